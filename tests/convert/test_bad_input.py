"""Checkpoints that cannot be read, and models that cannot be written: one line with the thing and the way out."""

import json
import re

import numpy as np
import pytest

from sparse_experts import cli
from sparse_experts.convert.files import FILE, INDEX
from tests.convert.checkpoints import DATA, changed, config_of, copy, save, tensors

NORM, GATE = "model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"
HOLES = {NORM: np.full(16, np.nan, np.float32), "lm_head.weight": np.full((96, 16), np.inf, np.float32)}


def cut_off(folder):
  whole = (copy("mixtral", folder) / FILE).read_bytes()
  (folder / FILE).write_bytes(whole[:-10])


def no_header(folder):
  (copy("mixtral", folder) / FILE).write_bytes(b"\xff" * 100)


def no_json(folder):
  (copy("mixtral", folder) / FILE).write_bytes((4).to_bytes(8, "little") + b"oops")


def pickle(folder):
  copy("mixtral", folder)
  (folder / FILE).rename(folder / "pytorch_model.bin")


def missing_shard(folder):
  save(folder, tensors(DATA / "mixtral"), config_of("mixtral"), max_bytes=20_000)
  assert (folder / INDEX).exists() and not (folder / FILE).exists()
  next(folder.glob("model-00002*")).unlink()


def two_checkpoints(folder):
  save(folder, tensors(DATA / "mixtral"), config_of("mixtral"), max_bytes=20_000)
  (folder / FILE).write_bytes((DATA / "mixtral" / FILE).read_bytes())


def tensor_twice(folder):
  save(folder, tensors(DATA / "mixtral"), config_of("mixtral"), max_bytes=20_000)
  (folder / "model-00002-copy.safetensors").write_bytes(next(folder.glob("model-00002*")).read_bytes())
  index = json.loads((folder / INDEX).read_text())
  index["weight_map"]["another"] = "model-00002-copy.safetensors"
  (folder / INDEX).write_text(json.dumps(index))


def without_config(folder):
  (copy("mixtral", folder) / "config.json").unlink()


def mend(name, **changes):
  return lambda folder: changed(name, folder, **changes)


BAD = {
    "two checkpoints": (two_checkpoints, "holds both model.safetensors and model.safetensors.index.json, which names "
                        "model-00001-of-.*: two checkpoints; remove the one that is not meant"),
    "a tensor twice": (tensor_twice, " is in .*model-00002-copy.safetensors and in .*; remove the file"),
    "missing": (mend("mixtral", tensor={NORM: None, GATE: None}),
                f"no mixtral checkpoint.*2 missing .*{GATE}.*; fetch its files again"),
    "not known": (mend("mixtral", tensor={"model.extra": np.zeros(3, np.float32)}), r"1 not known \(model.extra\)"),
    "all at once": (mend("olmoe", config=dict(num_experts=5, num_hidden_layers=1)),
                    r"3 missing \(.*experts.4.*; 21 not known \(.* and 18 more\); 1 of another shape \(.*gate.weight "
                    r"\[4, 16\], not \[5, 16\]\)"),
    "of another shape": (mend("mixtral", tensor={NORM: np.zeros(3, np.float32)}),
                         r"1 of another shape \(model.norm.weight \[3\], not \[16\]\)"),
    "whole numbers": (mend("mixtral", tensor={NORM: np.ones(16, np.int32)}), "1 of whole numbers .*norm"),
    "not finite": (mend("mixtral", tensor=HOLES), "2 tensors hold values that are not finite .*lm_head.*norm"),
    "another embedding": (mend("switch", tensor={"encoder.embed_tokens.weight": np.ones((96, 16), np.float32)}),
                          "encoder.embed_tokens.weight differs from shared.weight"),
    "pickle": (pickle, r"pytorch_model.bin is a pickle, which can run code.*safe_serialization"),
    "nothing": (lambda folder: folder.mkdir(), "holds neither model.safetensors nor"),
    "no folder": (lambda folder: None, "--from=.* is no folder"),
    "no config": (without_config, "config.json cannot be read"),
    "cut off": (cut_off, "no whole safetensors file .*file not fully covered.*fetch it again"),
    "no header": (no_header, "no whole safetensors file .*header.*does not fit"),
    "no JSON": (no_json, "no whole safetensors file .invalid JSON in header"),
    "missing shard": (missing_shard, "index.json names model-00002.*not there"),
    "another family": (mend("mixtral", config=dict(model_type="mixtrall")),
                       "model_type='mixtrall' is no layout that is known; did you mean 'mixtral'"),
    "an unknown one": (mend("mixtral", config=dict(model_type="llama")),
                       "model_type='llama' is no layout.*known: deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3_moe, sw"),
    "no model_type": (mend("mixtral", config=dict(model_type="absent")), "lacks 'model_type'"),
    "the class's width": (mend("mixtral", config=dict(hidden_size="absent")),
                          "asks for .* parameters, but the tensors next to it hold"),
    "a width in words": (mend("mixtral", config=dict(hidden_size="16")),
                         "hidden_size='16' is not a whole number from 1 to 2,147,483,647; restore the file"),
    "a model_type of two": (mend("mixtral", config=dict(model_type=["mixtral"])),
                            "model_type=.'mixtral'. is not a string"),
    "window": (mend("mixtral", config=dict(sliding_window=8)), "sliding_window=8 is not supported, only None"),
    "clipped": (mend("olmoe", config=dict(clip_qkv=8.0)), "clip_qkv=8.0 is not supported"),
    "rope type": (mend("mixtral", config=dict(rope_parameters=dict(rope_type="linear", factor=2.0))),
                  "rope type 'linear' is not supported"),
    "all dense": (mend("qwen3_moe", config=dict(mlp_only_layers=[1])), "leave no sparse layer"),
}


def complaint(capsys, *argv):
  """The one line that the command line answers."""
  assert cli.main(["convert", *argv]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ")
  return lines[0]


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_in_one_line(case, tmp_path, capsys):
  make, expected = BAD[case]
  make(tmp_path / "hf")
  line = complaint(capsys, f"--from={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}")
  assert re.search(expected, line), line
  run = tmp_path / "run"
  assert not run.exists() or not list(run.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("argv, expected", [
    ((), "one of --from=HF_DIR, which it reads, and --to"),
    (("--from=a", "--to=b"), "one of --from=HF_DIR, which it reads, and --to"),
    (("--from=a", "--layout=mixtral"), "--layout and --step belong to --to"),
    (("--to=b",), "convert needs --layout"),
    (("--to=b", "--layout=mixtrall"), "--layout='mixtrall'.*did you mean 'mixtral'"),
    (("--to=b", "--layout=mixtral", "--dtype=bf16"), "--dtype='bf16' is unknown"),
    (("--from=a", "--config.model.num_layers=3"), "--config.model.num_layers: what --from holds tells the model"),
    (("--to=b", "--layout=mixtral", "--config.train.seed=3"), "writes what was trained"),
])
def test_flags_that_do_not_go_together(argv, expected, tmp_path, capsys):
  assert re.search(expected, complaint(capsys, f"--workdir={tmp_path / 'run'}", *argv))
