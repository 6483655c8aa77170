"""`describe` says what a config builds, for people and for programs."""

import json

import pytest

from sparse_experts import cli
from sparse_experts.cli import describe


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


def test_the_table_names_every_layer(capsys):
  lines = described(capsys, "--config=configs/switch/tiny.py").splitlines()
  assert [line.split()[0] for line in lines[2:6]] == ["encoder/00", "encoder/01", "decoder/00", "decoder/01"]
  assert len({line.rfind(line.split()[-1]) + len(line.split()[-1]) for line in lines[1:6]}) == 1  # aligned


def test_dropless_is_said(capsys):
  assert "dropless" in described(capsys, "--config=configs/smoke.py", "--config.model.capacity_factor=0")


def test_a_tokenizer_that_is_not_there(capsys):
  assert cli.main(["describe", "--config=configs/smoke.py", "--config.data.tokenizer=byte"]) == 2
  assert capsys.readouterr().err == "error: tokenizer 'byte' is unknown; did you mean 'bytes'?\n"


@pytest.mark.parametrize("number, text", [
    (7, "7"), (999, "999"), (1234567, "1.235M"), (7.4e9, "7.4G"), (2e15, "2000T")])
def test_short(number, text):
  assert describe.short(number) == text
