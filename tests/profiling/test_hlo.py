"""What a program sends is read from its text: every notation, loops, branches and asynchronous halves."""

import numpy as np
import pytest

from sparse_experts.profiling import hlo

# Eight devices. In words: a loop of 6 turns, in it one of 2 and one of as many as data say; a branch; an
# asynchronous computation; of a start and its done only the start counts; a kernel with line breaks inside.
TEXT = """HloModule jit_train_step, is_scheduled=true

%inner_cond (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %n = s32[]{:T(128)} constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner_body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %a2a = bf16[4,8]{1,0:T(8,128)S(1)} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, FORWARD
  ROOT %t = (s32[]) tuple(%p)
}

%data_cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%data_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %x = f32[10]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum, FORWARD
  ROOT %t = (s32[], s32[]) tuple(%x, %x)
}

%outer_body (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%p), condition=%inner_cond, body=%inner_body
  %d = (s32[], s32[]) while(%p), condition=%data_cond, body=%data_body
  ROOT %t = (s32[]) tuple(%w)
}

%fused (p: f32[4]) -> f32[8] {
  ROOT %rs = f32[1,2]{1,0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, BACKWARD
}

%branch_a (p: f32[4]) -> f32[4] {
  ROOT %y = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

%branch_b (p: f32[4]) -> f32[4] {
  ROOT %y = f32[4]{0} parameter(0)
}

%wrapped (p: f32[2]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=mesh['a'=8] {'a':(2)4}, dimensions={0}, AGAIN
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop = (s32[]) while(%x), condition=%unread, body=%outer_body, SIX
  %rows = f32[10,3]{1,0} parameter(1)
  %r = f32[80,3]{1,0} ragged-all-to-all(%rows, %x, %x, %x, %x, /*index=5*/%x), replica_groups={}
  %f = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused
  %c = f32[4]{0} conditional(%x, %x, %x), branch_computations={%branch_a, %branch_b}
  %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"tile_m\\": 512}"
}}, backend_config={}
  %s = ((f32[2]{0}), f32[16]{0}, s32[]) async-start(%x), calls=%wrapped
  %u = ((f32[2]{0}), f32[16]{0}, s32[]) async-update(%s), calls=%wrapped
  %e = f32[16]{0} async-done(%u), calls=%wrapped
  %g = ((f32[2]{0}, f32[1]{0}), (f32[16]{0}, /*index=1*/f32[8]{0})) all-gather-start(%x), replica_groups={}
  %h = (f32[16]{0}, f32[8]{0}) all-gather-done(%g)
  %send = (f32[100]{0}, u32[], token[]) send(%x), channel_id=1
  %recv = (f32[100]{0}, u32[], token[]) recv(%x), channel_id=1
  %self = f32[4]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  ROOT %all = (f32[3]{0}, s8[4]{0}) all-reduce(%x, %x), replica_groups={}, to_apply=%sum, UPDATE
}
"""
SHORT = {
    "FORWARD": 'metadata={op_name="jit(f)/jvp()/while/body/shard_map/all_to_all/all_to_all"}',
    "BACKWARD": 'metadata={op_name="jit(f)/transpose(jvp())/dot"}',
    "UPDATE": 'metadata={op_name="jit(f)/add"}',
    "AGAIN": 'metadata={op_name="jit(f)/transpose(jvp())/checkpoint/rematted_computation/dot"}',
    "SIX": 'backend_config={"known_trip_count":{"n":"6"}}'}
for word, attribute in SHORT.items():
  TEXT = TEXT.replace(word, attribute)


def test_counts_and_bytes_by_hand():
  found = [(c.kind, c.count, c.sent, c.phase, c.bounded) for c in hlo.collectives(TEXT, 8)]
  assert found == [
      ("all-to-all", 12, 12 * 64 * 3 / 4, "forward", True),
      ("all-reduce", 6, 6 * 40 * 2 * 3 / 4, "forward", False),  # at least once a turn of the outer loop
      ("ragged-all-to-all", 1, 120 * 7 / 8, "update", True),  # rows that are there, not room for all
      ("reduce-scatter", 1, 8 * 3, "backward", True),
      ("collective-permute", 1, 16, "update", True),
      ("all-gather", 1, 64 * 3 / 4, "recomputed", True),
      ("all-gather", 1, 96 * 7 / 8, "update", True),
      ("send", 1, 400, "update", True),
      ("all-reduce", 1, 16 * 2 * 7 / 8, "update", True)]


@pytest.mark.parametrize("index, groups", [
    (0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (1, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    (3, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (4, [[0, 1], [1, 0]]),
    (5, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (8, [[0, 1, 2, 3, 4, 5, 6, 7]])])
def test_groups(index, groups):
  np.testing.assert_array_equal(hlo.collectives(TEXT, 8)[index].groups, groups)


def test_groups_along_the_first_axis_of_a_mesh():
  found = hlo._groups("replica_groups=mesh['a'=2,'b'=4] {'a'}", 8)
  np.testing.assert_array_equal(found, [[0, 4], [1, 5], [2, 6], [3, 7]])
