"""A router that the command line names does not get what the config file set for another one."""

import copy
import re

import pytest

from sparse_experts import cli
from sparse_experts.cli import overrides, router_change
from sparse_experts.cli.sweep import resolve
from sparse_experts.config import LAYERS, ROUTERS, get, load_config
from sparse_experts.sweeps.sweep import Arm, Sweep

CAPACITY = ("model.capacity_factor", "model.eval_capacity_factor", "model.capacity_rule")


def changed(spec, *given):
  """(the config of `spec` with the overrides KEY=VALUE, what is to be said)."""
  config = load_config(spec)
  before = copy.deepcopy(config)
  pairs = [text.split("=", 1) for text in given]
  for key, text in pairs:
    overrides.override(config, key, text)
  lines = router_change.apply(config, before, [key for key, _ in pairs])
  return config, "".join(f"{line}\n" for line in lines)


def values(config, keys=CAPACITY):
  return [get(config, key) for key in keys]


def test_capacity_and_coefficients_of_the_file_do_not_apply():
  config, said = changed("configs/moe_base.py", "model.router.name=dynmoe")
  assert values(config) == [None] * 3 and config.train.layer_losses is None
  assert config.model.router.load_balance_weight is None
  assert said == (
      "capacity_factor=2.0, eval_capacity_factor=2.0, capacity_rule=mesh, router.load_balance_weight=0.01 "
      "and train.layer_losses=sum of the config file were for top_k; dynmoe's own act: dropless, its "
      "coefficients, losses summed over layers; to keep them set --config.model.capacity_factor=2.0 "
      "--config.model.eval_capacity_factor=2.0 --config.model.capacity_rule=mesh "
      "--config.model.router.load_balance_weight=0.01 --config.train.layer_losses=sum\n")


def test_what_the_command_line_sets_stays():
  config, said = changed("configs/smoke.py", "model.router.name=v_moe", "model.capacity_factor=1.25",
                         "train.layer_losses=mean")
  assert values(config) == [1.25, None, None] and config.train.layer_losses == "mean"
  assert said == ("eval_capacity_factor=2.0 of the config file was for top_k; v_moe's own acts: 1.05 (vmoe); "
                  "to keep it set --config.model.eval_capacity_factor=2.0\n")


@pytest.mark.parametrize("given", ["model.router.name=top_k", "model.router.k=2"])
def test_the_same_router_keeps_what_the_file_set(given):
  config, said = changed("configs/smoke.py", given)
  assert values(config) == [1.25, 2.0, None] and config.train.layer_losses == "mean" and not said


def test_dropless_is_of_no_router():
  spec = "experiments/routers_side_by_side/config_causal.py"
  config, said = changed(spec, "model.router.name=v_moe")
  assert values(config) == [0.0, 0.0, None] and not said


def test_each_stack_by_itself():
  """The stack whose router stays keeps the capacity that both had."""
  both = [key.replace("model.", f"model.{part}", 1) for part in ("", "decoder.") for key in CAPACITY[:2]]
  config, said = changed("configs/switch/tiny.py", "model.decoder.router.name=hash")
  assert values(config, both) == [1.25, 2.0, 0.0, 0.0] and config.train.layer_losses == "mean"
  assert said.startswith("decoder.capacity_factor=1.25 and decoder.eval_capacity_factor=2.0 of the config "
                         "file were for top_k; hash's own act: dropless; to keep")
  config, _ = changed("configs/switch/tiny.py", "model.decoder.router.name=hash",
                      "model.decoder.capacity_factor=1.5")
  assert values(config, both) == [1.25, 2.0, 1.5, None]
  config, _ = changed("configs/switch/tiny.py", "model.router.name=hash",
                      "model.decoder.router.name=top_k")
  assert values(config, both) == [None, None, 1.25, 2.0]
  config, said = changed("configs/switch/tiny.py", "model.router.name=hash")
  assert values(config, both) == [None] * 4 and said.count("\n") == 1


def test_arms_of_a_sweep_too(capsys):
  arm = Arm("configs/smoke.py", {"model.router.name": "v_moe", "model.router.jitter": "none"})
  config = resolve("v", arm, Sweep({"v": arm}), [])
  assert values(config) == [None] * 3
  assert capsys.readouterr().err.startswith("arm 'v': capacity_factor=1.25")


def test_describe_says_what_acts(capsys):
  argv = ["describe", "--config=configs/smoke.py", "--config.model.router.k=2"]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert ("warning: an even load does not fit: decoder/01, decoder/03: k=2 needs 128 slots per expert in a "
          "group of 512, there are 80, so 38% of assignments are dropped; ") in out
  words = "load_balance 0.005, after the mean over layers: decoder/01, decoder/03"
  assert f"loss coefficients      {words}\n" in out


def test_routers_are_a_table(capsys):
  assert cli.main(["describe", "--routers"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 110
  assert re.split(" {2,}", lines[0]) == ["router", "papers", "capacity", "losses", "layers",
                                         "values held to"]
  first = {line.split()[0]: re.split(" {2,}", line) for line in lines[-2:0:-1] if line[:1].strip()}
  assert first.keys() >= {*ROUTERS, *LAYERS}
  assert first["v_moe"] == ["v_moe", "Riquelme et al.", "1.05 (vmoe)", "importance 0.005,", "sum",
                            "two own scripts, by"]
