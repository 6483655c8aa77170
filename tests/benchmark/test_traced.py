"""The routing of a trained run is what is timed, from the file of `trace`; a mistake takes a line."""

import dataclasses
import json

import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.benchmark import layer, traced
from sparse_experts.errors import UserError
from tests.benchmark.test_layer import PER_DISPATCH, TINY

ANSWER = 2  # exit code of a mistake


def write(folder, expert_NK, num_experts=4, name="x", **columns):
  """A trace of one layer at two steps, of which the first sends all to expert 0."""
  N, K = expert_NK.shape
  rows = {"example": np.repeat(np.arange(N) // 8, K), "position": np.repeat(np.arange(N) % 8, K),
          "head": np.zeros(N * K, int), "rank": np.tile(np.arange(K), N), "valid": np.ones(N * K, bool)}
  twice = {column: np.concatenate([a, a]) for column, a in rows.items()}
  table = twice | {"step": np.repeat([1, 2], N * K), "layer": np.full(2 * N * K, "decoder/01"),
                   "expert": np.concatenate([np.zeros(N * K, int), expert_NK.ravel()])} | columns
  np.savez_compressed(folder / f"{name}.npz", **table)
  about = {"layers": {"decoder/01": {"num_experts": num_experts, "k": K}}}
  (folder / f"{name}.json").write_text(json.dumps(about))
  return str(folder / f"{name}.npz")


def uneven(N=64):
  """Two of four experts for each token, the first one for five of eight."""
  rng = np.random.default_rng(0)
  first = np.where(np.arange(N) % 8 < 5, 1, rng.integers(0, 4, N))
  return np.stack([first, (first + rng.integers(1, 4, N)) % 4], 1)


@pytest.mark.parametrize("dispatch", [pytest.param("ragged", marks=pytest.mark.slow), "scatter"])
def test_tokens_go_where_those_of_the_run_went(dispatch):
  """The list of the layer is the trace's, in order, with gates of a softmax of 2, 1 and zeros."""
  experts, x_GTD = layer.make_experts(TINY), layer.inputs(TINY)
  made, x_GTD = layer.choose(layer.make_layer(TINY, experts, dispatch), x_GTD, uneven())
  _, routing = made(x_GTD)
  list_TK = lambda a: np.asarray(a).reshape(2, 2, 32).swapaxes(1, 2).reshape(64, 2)  # all first choices first
  np.testing.assert_array_equal(list_TK(routing.expert), uneven())
  gate_K = np.exp([2, 1]) / np.exp([2, 1, 0, 0]).sum()
  np.testing.assert_allclose(list_TK(routing.gate), np.tile(gate_K, (64, 1)), rtol=1e-6)
  load_E = np.bincount(uneven().ravel())
  assert layer.routing_facts(made, x_GTD)["load_max_mean"] == pytest.approx(load_E.max() / load_E.mean())


@pytest.mark.slow
def test_benchmark_layer_times_a_traced_routing(tmp_path, capsys, monkeypatch):
  """Next to made-up tokens, by the same compiled program; of the newest step."""
  w = dataclasses.replace(TINY, dispatches=("ragged",))
  monkeypatch.setitem(layer.WORKLOADS, "switch", w)
  monkeypatch.setitem(layer.WORKLOADS, "st_moe", dataclasses.replace(w, num_experts=8))
  path = write(tmp_path, uneven())
  assert cli.main(["benchmark", "layer", f"--routing={path}", "--runs=2", "--json"]) == 0
  out = capsys.readouterr().out
  assert "switch, tokens routed as in decoder/01" in out and "st_moe" not in out
  found = json.loads(out.splitlines()[-1])["workloads"]["switch"]
  figures = found["routings"]["decoder/01"]["ragged"]
  load_E = np.bincount(uneven().ravel())
  assert set(figures) == PER_DISPATCH
  assert figures["load_max_mean"] == pytest.approx(load_E.max() / load_E.mean())
  assert figures["load_max_mean"] > found["dispatches"]["ragged"]["load_max_mean"]


@pytest.mark.parametrize("argv, line", [
    (("--routing=none.npz",), "none.npz is not there; python -m sparse_experts trace --workdir=DIR"),
    (("--routing={x}:decoder/03",), "has no layer 'decoder/03'; did you mean 'decoder/01'?"),
    (("--routing={x}", "--workload=st_moe"),
     "decoder/01 has 4 experts and k=2, --workload=st_moe has 16 and k=2; choose a workload or a run with"),
    (("--routing={x}",), "has 4 experts and k=2, --workload=switch has 8 and k=1"),
    (("--routing={x}", "--workload=scaling"), "is for shapes of a layer, which --workload=scaling is not"),
    (("--routing={other}",), "other.npz is no trace, or not a whole one (BadZipFile); python -m"),
    (("--routing={columns}",), "columns.npz is no trace, or not a whole one (KeyError)"),
])
def test_mistakes(argv, line, tmp_path, capsys):
  x = write(tmp_path, uneven())
  (tmp_path / "other.npz").write_bytes(b"PK\3\4 no archive")
  np.savez(tmp_path / "columns.npz", loss=np.zeros(3))
  for name in ("other", "columns"):
    (tmp_path / f"{name}.json").write_text("{}")
  paths = dict(x=x, other=tmp_path / "other.npz", columns=tmp_path / "columns.npz")
  assert cli.main(["benchmark", "layer", *(arg.format(**paths) for arg in argv)]) == ANSWER
  err = capsys.readouterr().err
  assert line in err and err.count("\n") == 1, err


@pytest.mark.parametrize("columns, tokens, line", [
    (dict(valid=np.arange(256) % 5 > 0), 64, "decoder/01 has tokens with different numbers of experts"),
    (dict(), 65, "decoder/01 has 64 tokens, --workload=tiny takes 65; trace more records")])
def test_routings_that_do_not_suit(columns, tokens, line, tmp_path):
  (name, found), = traced.read(write(tmp_path, uneven(), **columns)).items()
  with pytest.raises(UserError, match=line):
    traced.choices("x.npz", name, found, "tiny", 4, 2, tokens)
