"""`describe` says what a config builds, for people and for programs."""

import json
import math
import re

import pytest

from sparse_experts import cli
from sparse_experts.cli import tables
from sparse_experts.config import LAYERS, ROUTERS, default_config, paths


def described(capsys, *argv):
  assert cli.main(["describe", *argv]) == 0
  return capsys.readouterr().out


def test_json_is_the_last_line(capsys):
  found = json.loads(described(capsys, "--config=configs/smoke.py", "--json").splitlines()[-1])
  assert {"params_total", "params_active", "flops_per_token", "layers"} <= set(found)
  dense, sparse = found["layers"][:2]
  assert "experts" not in dense
  assert (sparse["experts"], sparse["k"], sparse["causality"]) == (8, 1, "past")
  assert (sparse["capacity"], sparse["eval_capacity"], sparse["group_size"]) == (80, 128, 512)
  # Eight experts of three 128 x 256 matrices, one of them at work.
  assert sparse["params"] - sparse["params_active"] == 7 * 3 * 128 * 256


@pytest.mark.parametrize("spec", ["configs/smoke.py", "configs/switch/tiny.py", "configs/st_moe/tiny.py"])
def test_a_dense_twin_does_the_same_work(spec, capsys):
  sparse, dense = (json.loads(described(capsys, f"--config={spec}{arg}", "--json").splitlines()[-1])
                   for arg in ("", ":dense"))
  assert dense["flops_per_token"] == pytest.approx(sparse["flops_per_token"], rel=0.01)
  assert dense["params_active"] == dense["params_total"] < sparse["params_total"]
  assert dense["params_active"] == pytest.approx(sparse["params_active"], rel=0.01)


def test_the_twin_is_what_the_printed_overrides_make(capsys):
  out = described(capsys, "--config=configs/smoke.py")
  (line,) = [line for line in out.splitlines() if line.startswith("dense twin")]
  (override,) = [word.rstrip(":") for word in line.split() if word.startswith("--config.")]
  assert (described(capsys, "--config=configs/smoke.py", override, "--json")
          == described(capsys, "--config=configs/smoke.py:dense", "--json"))


def test_parameters_are_listed_by_name(capsys):
  out = described(capsys, "--config=configs/smoke.py", "--parameters", "--json").splitlines()
  found = json.loads(out[-1])
  assert sum(math.prod(shape) for shape in found["parameters"].values()) == found["params_total"]
  assert found["parameters"]["decoder/03/ffn/router/w"] == [128, 8]
  assert "decoder/03/ffn/router/w" in [line.split("  ")[0] for line in out]


def test_keys_are_searched_by_name_and_meaning(capsys):
  out = described(capsys, "--keys=Capacity", "--json").splitlines()
  found = {key["name"]: key for key in json.loads(out[-1])}
  assert {"model.capacity_rule", "model.eval_capacity_factor", "model.decoder.capacity_factor"} < set(found)
  assert "model.router.k" not in found
  assert found["model.capacity_factor"] == {
      "name": "model.capacity_factor", "default": None, "type": "float", "within": "0 or more", "choices": [],
      "most": 2**20, "open_to": "", "affects": "training", "also": ["evaluate"], "may_change": ["evaluate"],
      "meaning": "slots of an expert in training, relative to an even load; 0: dropless; unset: the router's "
                 "own, see `describe --routers`"}
  assert "model.capacity_factor=unset  [0 or more, at most 1,048,576]  affects: training" in out
  assert "model.capacity_rule=unset  [flaxformer | lingvo | maxtext" in "\n".join(out)


def test_all_keys_are_listed(capsys):
  out = described(capsys, "--keys")
  for key in paths(default_config()):
    assert re.search(rf"^{re.escape(key)}=", out, re.MULTILINE)
  assert max(map(len, out.splitlines())) <= 110


MATCH = ("--config=configs/smoke.py:dense", "--match=params", "--to=configs/smoke.py", "--json")


def test_match_prints_overrides_that_make_it_equal(capsys):
  out = described(capsys, *MATCH).splitlines()
  found = json.loads(out[-1])
  (flags,) = [line.split() for line in out if line.lstrip().startswith("--config.")]
  again = json.loads(described(capsys, MATCH[0], *flags, "--json").splitlines()[-1])
  target = json.loads(described(capsys, "--config=configs/smoke.py", "--json").splitlines()[-1])
  match = found["match"]
  assert again["params_total"] == match["reached"] and target["params_total"] == match["target"]
  assert match["start"] == found["params_total"] and match["equal"]
  assert match["excess"] == again["params_total"] / target["params_total"] - 1
  assert match["overrides"] == {"model.expert_dim": 2048}
  assert out[-2] == "then      2.082M, -0.10%: equal"


def test_what_cannot_be_matched_is_exit_code_1(capsys):
  argv = ["describe", "--config=configs/smoke.py", "--match=flops", "--to=configs/smoke.py:dense",
          "--config.model.num_heads=8", "--json"]
  assert cli.main(argv) == 1
  *_, line, last = capsys.readouterr().out.splitlines()
  assert "the FFNs cannot be narrower; change num_layers, embed_dim or num_experts by hand" in line
  match = json.loads(last)["match"]
  assert not match["equal"] and match["excess"] > 0.01


def test_equal_already_needs_no_override(capsys):
  out = described(capsys, "--config=configs/smoke.py", "--match=flops", "--to=configs/smoke.py:dense")
  assert out.splitlines()[-1] == "now       1.676M, +0.24%: equal"


def test_the_table_names_every_layer(capsys):
  lines = described(capsys, "--config=configs/switch/tiny.py").splitlines()
  assert [line.split()[0] for line in lines[2:6]] == ["encoder/00", "encoder/01", "decoder/00", "decoder/01"]
  assert len({line.rfind(line.split()[-1]) + len(line.split()[-1]) for line in lines[1:6]}) == 1  # aligned


@pytest.mark.parametrize("router, at_most", [
    (("top_k",), False), (("top_k", "k=2", "skip_threshold=0.2"), True),
    (("dynmoe", "k=none", "jitter=none"), True)])
def test_flops_are_at_most_where_tokens_differ_in_their_number_of_experts(router, at_most, capsys):
  keys = [f"--config.model.router.{key}" for key in (f"name={router[0]}", *router[1:])]
  *lines, last = described(capsys, "--config=configs/smoke.py", "--json", *keys).splitlines()
  assert any(line.startswith("model FLOPs per token  at most ") for line in lines) == at_most
  sparse = json.loads(last)["layers"][1]
  assert ("at_most" in sparse) == at_most
  if router[0] == "dynmoe":  # any number, so that every expert may be met
    assert sparse["params"] == sparse["params_active"]


def test_dropless_is_said(capsys):
  assert "dropless" in described(capsys, "--config=configs/smoke.py", "--config.model.capacity_factor=0")


def test_a_tokenizer_that_is_not_there(capsys):
  assert cli.main(["describe", "--config=configs/smoke.py", "--config.data.tokenizer=byte"]) == 2
  assert capsys.readouterr().err == "error: tokenizer 'byte' is unknown; did you mean 'bytes'?\n"


@pytest.mark.parametrize("number, text", [
    (7, "7"), (999, "999"), (1234567, "1.235M"), (7.4e9, "7.4G"), (2e15, "2000T")])
def test_short(number, text):
  assert tables.short(number) == text


def test_it_lists_the_ways_of_routing(capsys):
  """Each name, with what it sees, its paper's words and its arguments, and no config needed."""
  out = described(capsys, "--routers")
  names = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
  assert names == {"router", *ROUTERS, *LAYERS}
  assert re.search(
      r"^expert_choice +batch +Zhou et al. 2022: .*\n +.*group.\n"
      r" +k=1 token_cap=0 noise=0.0 bias=False z_weight=0.0$", out, re.M)
