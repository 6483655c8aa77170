"""A converted model goes on: convert, train on one's own text or ids on a mesh, evaluate, write it back."""

import io
import json
import re

import numpy as np
import pytest
import sentencepiece

from sparse_experts import cli
from sparse_experts.config import read_config
from sparse_experts.training.run import load
from tests.convert.checkpoints import DATA, copy, reference, tensors

SMALL = [f"--config.{key}" for key in (
    "train.steps=2", "train.batch_size=4", "train.log_every=1", "train.eval_every=1",
    "train.checkpoint_every=2", "eval.batch_size=4", "eval.train_windows=4", "eval.min_bytes=300",
    "data.valid_share=0.3", "data.length=32", "model.group_size=32", "optimizer.warmup_steps=1",
    "optimizer.learning_rate=1e-3", "mesh.data=2", "mesh.expert=2")]
WORDS = "the expert that a token goes to writes what comes next and the router learns from it".split()


def text(seed=0, paragraphs=60):
  rng = np.random.default_rng(seed)
  return "\n\n".join(" ".join(rng.choice(WORDS, 20)) for _ in range(paragraphs))


def run(capsys, *argv):
  """What the command prints; it does its work."""
  code = cli.main(list(argv))
  out = capsys.readouterr()
  assert code == 0, out.err
  return out.out + out.err


@pytest.fixture
def mixtral(tmp_path):
  """A checkpoint of 96 rows, with a sentencepiece model numbered as LLaMA's, of fewer pieces."""
  folder, model = copy("mixtral", tmp_path / "hf"), io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(text().split("\n")), model_writer=model, vocab_size=60, hard_vocab_limit=False,
      minloglevel=2)
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  return folder


@pytest.mark.slow  # compiles training, evaluation and three models: ten seconds of computing
def test_on_text(mixtral, tmp_path, capsys):
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts/a.txt").write_text(text(1))
  one, more, out = (str(tmp_path / name) for name in ("one", "more", "out"))
  assert f"tokenizer {mixtral / 'tokenizer.model'}" in run(
      capsys, "convert", f"--from={mixtral}", f"--workdir={one}")
  printed = run(capsys, "train", f"--config={one}/config.json", f"--workdir={more}",
                f"--config.init_from={one}", f"--config.data.source=files:{tmp_path / 'texts'}", *SMALL)
  assert f"14,032 parameters from {one}, 0 fresh" in printed and "nats per byte" in printed
  assert "nats per byte" in run(capsys, "evaluate", f"--workdir={more}")
  sampled = run(capsys, "sample", f"--workdir={more}", "--prompt=the expert", "--length=4")
  assert sampled.startswith("the expert")
  run(capsys, "convert", f"--workdir={more}", f"--to={out}", "--layout=mixtral")
  assert (tmp_path / "out/tokenizer.model").read_bytes() == (mixtral / "tokenizer.model").read_bytes()
  written = json.loads((tmp_path / "out/config.json").read_text())
  assert (written["bos_token_id"], written["eos_token_id"], written["vocab_size"]) == (1, 2, 96)
  run(capsys, "convert", f"--from={out}", f"--workdir={tmp_path / 'again'}")
  batch, _ = reference("mixtral")
  logits = [load(workdir).model(batch)[0] for workdir in (one, more, str(tmp_path / "again"))]
  # One is loaded on a mesh of four devices, the other on one: sums of float32 in another order.
  np.testing.assert_allclose(logits[1], logits[2], rtol=0, atol=1e-5)
  assert np.abs(np.asarray(logits[0]) - np.asarray(logits[1])).max() > 1e-3
  before, after = tensors(mixtral), tensors(tmp_path / "out")
  assert {name: a.shape for name, a in before.items()} == {name: a.shape for name, a in after.items()}


@pytest.mark.slow  # as above
def test_on_ids(tmp_path, capsys):
  """Texts are ids with spaces between; the figures are those of ids, as nobody knows their bytes."""
  (tmp_path / "ids").mkdir()
  rng = np.random.default_rng(0)
  for i in range(20):
    (tmp_path / f"ids/{i}.txt").write_text(" ".join(map(str, [1, *rng.integers(3, 96, 60), 2])))
  one, more, out = (str(tmp_path / name) for name in ("one", "more", "out"))
  run(capsys, "convert", f"--from={DATA / 'mixtral'}", f"--workdir={one}")
  assert read_config(one).data.tokenizer == "vocabulary:96"
  data = f"--config.data.source=files:{tmp_path / 'ids'}"
  before = run(capsys, "evaluate", f"--workdir={one}", data, *(flag for flag in SMALL if "eval." in flag))
  # Random weights on random ids: the loss of 96 equal ones, or above.
  loss = float(re.search(r"validation loss ([\d.]+) nats per target", before)[1])
  assert np.log(93) < loss < 8
  printed = run(capsys, "train", f"--config={one}/config.json", f"--workdir={more}",
                f"--config.init_from={one}", data, *SMALL)
  assert "nats per target" in printed and "nats per byte" not in printed
  rows = [json.loads(line) for line in (tmp_path / "more/metrics.jsonl").read_text().splitlines()]
  figures = set().union(*rows)
  assert "eval/nats_per_target" in figures and "eval/nats_per_byte" not in figures
  run(capsys, "convert", f"--workdir={more}", f"--to={out}", "--layout=mixtral")


def test_the_config_of_a_run_is_one_to_start_from(mixtral, tmp_path, capsys):
  """Its tokenizer is the run's own file, so no flag is needed for it."""
  run(capsys, "convert", f"--from={mixtral}", f"--workdir={tmp_path / 'one'}")
  described = run(capsys, "describe", f"--config={tmp_path / 'one/config.json'}")
  assert "96 ids" in described and "tokenizer.model" in described
  assert read_config(str(tmp_path / "one")).data.tokenizer == str(tmp_path / "one/tokenizer.model")
  assert cli.main(["describe", f"--config={tmp_path / 'two/config.json'}"]) == 2
  assert "two does not exist" in capsys.readouterr().err
