"""Testbeds: their entropy, worked out from the model's input; their best routing; that they do not repeat."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.data.testbeds import STREAMS, Composites, Facts, Languages
from sparse_experts.data.testbeds.composites import EDGE, LABELS, SHIFTS, shifted, symmetries
from sparse_experts.data.testbeds.facts import agreeing, signs
from sparse_experts.data.testbeds.stream import noise_entropy
from sparse_experts.errors import UserError

GROUPS = 64
EACH = ["clusters", "composites", "facts_and_arithmetic", "languages"]
VECTORS = jax.jit(lambda world, batch: world.vectors(batch))


@pytest.fixture(scope="module")
def drawn():
  """{name: (stream, world, groups, their vectors)}."""
  found = {}
  for name in EACH:
    stream = STREAMS[name]
    world = stream.world(jax.random.key(0))
    batch = stream.batches(world, jax.random.key(1), (GROUPS,))
    found[name] = stream, world, batch, np.asarray(VECTORS(world, batch))
  return found


def check_floor(likely, stream):
  """-log p(target), where p is 1 - eps and eps over all targets, averages to the floor: 6 standard errors."""
  rest = stream.eps / stream.targets
  nats = np.where(likely, -math.log(1 - stream.eps + rest), -math.log(rest))
  assert abs(nats.mean() - stream.floor) < 6 * nats.std() / math.sqrt(nats.size)


@pytest.mark.parametrize("name", EACH)
def test_the_best_routing_is_even_and_within_a_sequence(drawn, name):
  stream, _, batch, _ = drawn[name]
  cluster_GT, sequence_GT = np.asarray(batch.tokens.task), np.asarray(batch.tokens.sequence)
  counts = np.apply_along_axis(np.bincount, 1, cluster_GT)
  np.testing.assert_array_equal(counts, np.full((GROUPS, stream.clusters), stream.length))
  assert len(np.unique(sequence_GT)) == GROUPS * stream.clusters
  assert len(np.unique(sequence_GT * 100 + cluster_GT)) == GROUPS * stream.clusters  # one cluster each
  assert {*cluster_GT[:, 0]} == {*range(stream.clusters)}  # each is first somewhere


@pytest.mark.parametrize("name", EACH)
def test_a_key_says_all_and_another_says_something_else(drawn, name):
  stream, world, batch, x_GTD = drawn[name]
  again = stream.batches(stream.world(jax.random.key(0)), jax.random.key(1), (GROUPS,))
  jax.tree.map(np.testing.assert_array_equal, batch, again)
  rows = lambda x_GTD: [row.tobytes() for row in np.asarray(x_GTD).reshape(-1, stream.embed_dim)]
  other = stream.batches(world, jax.random.key(2), (GROUPS,))
  seen, unseen = {*rows(x_GTD)}, {*rows(VECTORS(world, other))}
  # 1,024 keys of facts with 4,096 noises may meet again; nothing else has so few.
  assert len(seen | unseen) > 0.99 * 2 * GROUPS * stream.clusters * stream.length
  elsewhere = stream.world(jax.random.key(3))
  assert not np.isclose(VECTORS(elsewhere, batch), x_GTD).all(-1).any()


def test_clusters_have_the_entropy_that_is_drawn(drawn):
  stream, world, batch, _ = drawn["clusters"]
  likely = np.asarray(world.map_NV)[batch.tokens.task, batch.tokens.id] == np.asarray(batch.target_GT)
  check_floor(likely, stream)
  others = np.bincount(np.asarray(batch.target_GT)[~likely], minlength=stream.targets)
  assert others.min() > 0 and others.max() < 3 * others.mean()  # any of them: 400 are some 12 each


def test_a_linear_router_can_tell_clusters(drawn):
  """Least squares on one half tells the cluster on the other half."""
  stream, _, batch, x_GTD = drawn["clusters"]
  x_ND = x_GTD.reshape(-1, stream.embed_dim)
  x_ND = np.concatenate([x_ND, np.ones((len(x_ND), 1))], axis=1)
  y_N = np.asarray(batch.tokens.task).reshape(-1)
  half = len(y_N) // 2
  w, *_ = np.linalg.lstsq(x_ND[:half], np.eye(stream.clusters)[y_N[:half]], rcond=None)
  assert ((x_ND[half:] @ w).argmax(-1) == y_N[half:]).mean() > 0.99


def test_facts_are_remembered_and_arithmetic_is_computed(drawn):
  """Answers from the vectors alone: a table of values for facts, the digits' agreement for arithmetic."""
  stream, world, batch, x_GTD = drawn["facts_and_arithmetic"]
  is_fact_GT = np.asarray(batch.tokens.task) < stream.shares
  mean_GT = np.asarray(world.centre_ND)[np.where(is_fact_GT, 0, 1)]
  a_GTJ, b_GTJ = np.split((x_GTD - mean_GT) @ np.asarray(world.digit_JD).T, 2, axis=-1)
  computed_GT = (a_GTJ * b_GTJ > 0).sum(-1)
  recalled_GT = np.asarray(world.value_V)[batch.tokens.id]
  check_floor(np.where(is_fact_GT, recalled_GT, computed_GT) == np.asarray(batch.target_GT), stream)
  masks = stream.kinds(batch)
  assert list(masks) == ["facts", "arithmetic"] and (np.asarray(masks["facts"]) == is_fact_GT).all()
  # Each share of the keys has its own sequence.
  key_N = np.asarray(batch.tokens.id)[is_fact_GT]
  task_N = np.asarray(batch.tokens.task)[is_fact_GT]
  np.testing.assert_array_equal(task_N, key_N * stream.shares // stream.keys)
  assert len(np.unique(key_N)) > 0.8 * stream.keys  # of 2,048 draws


@pytest.mark.parametrize("kind", ["facts", "arithmetic"])
def test_a_stream_of_one_kind_has_no_other(kind):
  stream = STREAMS[kind]
  batch = jax.eval_shape(lambda key: stream.batches(stream.world(key), key, (1,)), jax.random.key(0))
  assert [*jax.eval_shape(stream.kinds, batch)] == [kind]


@pytest.mark.parametrize("a, b, expected", [
    (0, 0, 3), (0b101, 0b101, 3), (0b101, 0b010, 0), (0b110, 0b010, 2)])
def test_agreeing_digits(a, b, expected):
  """Bits of 3 digits; what stands above both operands is not read."""
  operands = jnp.uint32(a | b << 3 | 0b1011 << 6)
  assert int(agreeing(operands, 3)) == expected
  np.testing.assert_array_equal(signs(operands, 3), [2 * (a >> i & 1) - 1 for i in range(3)])


def test_the_grammar_has_the_entropy_that_is_drawn(drawn):
  """By enumeration of pairs of words, and on the text, whose language a model may be told."""
  stream, world, batch, _ = drawn["languages"]
  p_NVV = np.exp(np.asarray(stream.log_prob(world), np.float64))
  np.testing.assert_allclose(p_NVV.sum(-1), 1, atol=1e-5)  # float32
  for p_VV in p_NVV:
    stationary_V = np.linalg.matrix_power(p_VV, 50)[0]
    assert -(stationary_V[:, None] * p_VV * np.log(p_VV)).sum() == pytest.approx(stream.floor, abs=1e-5)
  nats = -np.log(p_NVV[batch.tokens.task, batch.tokens.id, batch.target_GT])
  assert abs(nats.mean() - stream.floor) < 6 * nats.std() / math.sqrt(nats.size)
  # One grammar: each language's table is the first's, with other spellings of the same words.
  spelling_NV = np.asarray(world.spelling_NV)
  grammar_VV = p_NVV[0][np.ix_(spelling_NV[0], spelling_NV[0])]
  for p_VV, spelling_V in zip(p_NVV, spelling_NV):
    np.testing.assert_array_equal(np.sort(spelling_V), np.arange(stream.targets))
    np.testing.assert_allclose(p_VV[np.ix_(spelling_V, spelling_V)], grammar_VV, atol=1e-6)


def test_context_tells_the_language_and_a_word_does_not(drawn):
  stream, world, batch, _ = drawn["languages"]
  log_prob_NVV = np.asarray(stream.log_prob(world))
  told_GT = -log_prob_NVV[batch.tokens.task, batch.tokens.id, batch.target_GT]
  assert np.asarray(stream.context_nats(world, batch)).mean() == pytest.approx(told_GT.mean(), abs=0.01)
  # The same targets, but only one word known before the sequence's own.
  short = dataclasses.replace(stream, warmup=1)
  known = batch.replace(text_GNS=batch.text_GNS[..., stream.warmup - 1:])
  lost_L = (np.asarray(short.context_nats(world, known)) - told_GT).reshape(-1, stream.length).mean(0)
  assert lost_L[0] > 0.3 and abs(lost_L[-1]) < 0.05


def test_a_text_is_read_from_the_left(drawn):
  """The vector of a token is its word's and the mean of those before it: later words change nothing."""
  stream, world, batch, x_GTD = drawn["languages"]
  text_GNS, x_GNLD = np.asarray(batch.text_GNS), x_GTD.reshape(GROUPS, stream.clusters, stream.length, -1)
  word_VD, past_VD = np.asarray(world.word_VD), np.asarray(world.past_VD)
  for place in (0, stream.length - 1):
    at = stream.warmup + place
    expected = word_VD[text_GNS[3, 2, at]] + past_VD[text_GNS[3, 2, :at]].mean(0)
    np.testing.assert_allclose(x_GNLD[3, 2, place], expected, atol=1e-5)  # float32 sums
  of_sequences = lambda a_GT: np.asarray(a_GT).reshape(GROUPS, stream.clusters, -1)
  np.testing.assert_array_equal(of_sequences(batch.tokens.id), text_GNS[..., stream.warmup:])
  np.testing.assert_array_equal(of_sequences(batch.target_GT)[..., :-1], text_GNS[..., stream.warmup + 1:])


def test_tiles_can_be_read_by_who_knows_the_style(drawn):
  """The nearest of all shifted digits, turned as the style says and on its paper, has the tile's label."""
  stream, world, batch, x_GTD = drawn["composites"]
  image_ID, label_I = np.asarray(world.image_ID), shifted()[1]
  name_GT = np.asarray(world.name_NL)[batch.tokens.task, label_I[batch.tokens.id]]
  check_floor(name_GT == np.asarray(batch.target_GT), stream)
  style_N, digit_N = np.asarray(batch.tokens.task)[0], np.asarray(batch.tokens.id)[0]
  for x_D, style, digit in zip(x_GTD[0], style_N, digit_N):
    seen_D = np.empty(EDGE * EDGE)
    seen_D[np.asarray(world.turn_ND)[style]] = x_D - np.asarray(world.paper_ND)[style]  # turned back
    assert label_I[((seen_D - image_ID) ** 2).sum(-1).argmin()] == label_I[digit]


def test_digits_are_moved_and_turned_and_named(drawn):
  pixels_ID, label_I = shifted()
  assert pixels_ID.mean() == pytest.approx(0, abs=1e-4) and pixels_ID.std() == pytest.approx(1, abs=1e-4)
  images_SIHW = pixels_ID.reshape(len(SHIFTS), -1, EDGE, EDGE)
  whole, down = images_SIHW[SHIFTS.index((0, 0))], images_SIHW[SHIFTS.index((1, 0))]
  np.testing.assert_array_equal(down[:, 1:], whole[:, :-1])
  assert len(label_I) == len(pixels_ID) == 9 * 1797
  turns = symmetries()
  assert len({row.tobytes() for row in turns}) == 8
  image_HW = np.arange(EDGE * EDGE).reshape(EDGE, EDGE)
  assert any((image_HW.reshape(-1)[turn] == np.rot90(image_HW).reshape(-1)).all() for turn in turns)
  assert any((image_HW.reshape(-1)[turn] == image_HW.T.reshape(-1)).all() for turn in turns)
  names_NL = np.asarray(drawn["composites"][1].name_NL)
  np.testing.assert_array_equal(np.sort(names_NL, axis=1), np.tile(np.arange(LABELS), (8, 1)))
  assert (names_NL[1:] == names_NL[0]).mean() < 0.4  # they contradict each other


@pytest.mark.parametrize("eps, targets, expected", [
    (0.0, 4, 0.0), (1.0, 4, math.log(4)), (0.5, 2, 0.5623351)])
def test_noise_entropy(eps, targets, expected):
  assert noise_entropy(eps, targets) == pytest.approx(expected)  # the last: 3/4 and 1/4


@pytest.mark.parametrize("make, message", [
    (lambda: Facts(arithmetic=9), "arithmetic=9 is out of range; choose 0 to clusters=8"),
    (lambda: Facts(digits=20), "digits=20 with embed_dim=32 and targets=17"),
    (lambda: Composites(clusters=9), "clusters=9, embed_dim=64, targets=10: digits have 64 pixels"),
    (lambda: Languages(classes=7), "targets=64 words do not divide into classes=7"),
])
def test_a_wrong_setting_is_one_line(make, message):
  with pytest.raises(UserError) as error:
    make()
  assert message in str(error.value) and "\n" not in str(error.value)
