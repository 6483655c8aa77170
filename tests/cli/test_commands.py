"""The verbs one after another on tiny runs, and the mistakes that are found only with data or devices."""

import json
import re

import jax
import numpy as np
import pandas
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparse_experts import cli

CONFIG = """
from sparse_experts.cli.config_file import load
from tests.shrink import shrink

def get_config(arg):
  config = shrink(load(arg)).unlock()
  config.data.source = {source!r}
  config.data.valid_share = 0.3
  return config
"""


def run(capsys, *argv):
  """(exit code, stdout, stderr) of a command."""
  code = cli.main(list(argv))
  return (code, *capsys.readouterr())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("commands")
  (root / "text").mkdir()
  for i in range(20):
    (root / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n  return x + {i}\n" * 12)
  (root / "tiny.py").write_text(CONFIG.format(source=f"files:{root / 'text'}"))
  (root / "empty").mkdir()
  (root / "empty.txt").write_text("")
  (root / "broken.gz").write_bytes(b"\x1f\x8b no gzip")
  return root


@pytest.fixture(scope="module")
def runs(root):
  """A folder where `decoder` is a run of two steps."""
  before = jax.config.jax_compilation_cache_dir
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))  # not the user's
    assert cli.main(["train", f"--config={root}/tiny.py:configs/smoke.py", f"--workdir={root}/decoder"]) == 0
    yield root
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


def test_a_folder_of_ones_own_trains_by_one_flag(runs, capsys, tmp_path):
  """As small as a note."""
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "note.txt").write_text("Remember the milk, and to mend the tap.\n")
  code, _, err = run(capsys, "train", f"--config={runs}/tiny.py:configs/smoke.py", f"--workdir={tmp_path}/r",
                     f"--config.data.source=files:{tmp_path}/text", "--config.data.valid_share=0.08")
  assert code == 0 and "validation loss" in err, err


def test_a_run_leaves_its_files(runs):
  names = {path.name for path in (runs / "decoder").iterdir()}
  assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= names
  rows = [json.loads(line) for line in (runs / "decoder" / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["step"] == 2
  assert {"step", "loss", "learning_rate", "tokens_per_second"} <= set().union(*rows)


def test_evaluate(runs, capsys):
  code, out, _ = run(capsys, "evaluate", f"--workdir={runs}/decoder", "--json",
                     "--config.model.dispatch=scatter", "--config.mesh.data=2")
  assert code == 0
  numbers = json.loads(out.splitlines()[-1])
  assert numbers["step"] == 2
  assert {"nats_per_byte", "rerouting_cost", "unigram_entropy", "bigram_entropy"} <= set(numbers)


def test_sample_continues_a_prompt(runs, capsys):
  argv = ("sample", f"--workdir={runs}/decoder", "--prompt=def f1(", "--length=5", "--seed=3")
  code, out, _ = run(capsys, *argv)
  assert code == 0
  assert out.startswith("def f1(")
  assert run(capsys, *argv)[1] == out


def test_trace(runs, capsys):
  """The arrays, what they are of, a picture, and the one line that reads them."""
  out = runs / "trace.npz"
  code, printed, _ = run(capsys, "trace", f"--workdir={runs}/decoder", f"--out={out}", "--steps=all",
                         "--records=3", "--kind=train", "--regret=1")
  assert code == 0
  (line,) = [text for text in printed.splitlines() if text.startswith("frame = ")]
  names = {"pandas": pandas, "numpy": np}
  exec(line, names)
  frame, about = names["frame"], json.loads((runs / "trace.json").read_text())
  assert set(frame.step) == {2} == set(about["steps"])
  assert set(frame.layer) == set(about["layers"]) and frame.example.nunique() == about["records"] == 3
  assert about["data"] == about["trained_on"] and len(about["domains"]) > frame.domain.max()
  experts = about["layers"]["decoder/01"]["num_experts"]
  row = re.search(r"^2 +decoder/01 +96 +([\d.]+) +[\d.]+ +([\d.]+)%", printed, re.MULTILINE)
  assert float(row[1]) == pytest.approx(frame.expert.value_counts().max() / (96 / experts), abs=0.005)
  assert float(row[2]) == pytest.approx(100 * (~frame.kept).mean(), abs=0.05)
  assert (runs / "trace.png").read_bytes()[:4] == b"\x89PNG"
  forced = np.load(runs / "trace.regret.npz")
  assert len(forced["change"]) == 3 * experts
  assert "decoder/01: the router chose the best expert for" in printed


def test_train_resumes(runs, capsys):
  code, out, err = run(
      capsys, "train", f"--config={runs}/tiny.py:configs/smoke.py", f"--workdir={runs}/decoder")
  assert code == 0
  assert "nothing left to train" in out + err


MISTAKES = [
    (["train", "{smoke}", "--workdir={root}/new", "--config.mesh.data=2", "--config.mesh.expert=4",
      "--config.mesh.model=2", "--config.train.batch_size=16"],
     "mesh data=2 x expert=4 x model=2 needs 16 devices, but there are 8; .*"),
    (["train", "{smoke}", "--workdir={root}/decoder", "--config.model.embed_dim=32"],
     "workdir .* holds another config: model.embed_dim=16 there and 32 here; choose another workdir, .*"),
    (["train", "{smoke}", "--workdir={root}/empty.txt"], "workdir .*empty.txt is a file; name a folder"),
    (["train", "{smoke}", "--workdir=/proc/run"], "workdir /proc/run cannot be made .*; choose another .*"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.data.source=files:{root}/none"],
     "data.source='files:.*none' does not exist; .*"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.data.source=files:{root}/empty"],
     "data.source=.*empty.*; .*"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.data.source=files:{root}/empty.txt"],
     "data.source=.*empty.txt.*; .*"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.data.source=files:{root}/broken.gz"],
     "data.source=.*broken.gz.*; .*"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.data.source=embeded"],
     "data.source='embeded' is unknown; did you mean 'embedded'\\?"),
    (["train", "{smoke}", "--workdir={root}/new", "--config.model.router.name=nowhere:Router"],
     "router.name='nowhere:Router' cannot be imported: .*; give package.module:Class"),
    (["evaluate", "--workdir={root}/decoder", "--step=7"], ".*checkpoints has no step 7; choose from .*"),
    (["trace", "--workdir={root}/decoder", "--steps=2,7", "--out={root}/x.npz"], ".*no step 7; choose .*"),
]


@pytest.mark.parametrize("argv, line", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_one_line(argv, line, runs, capsys):
  config = f"--config={runs}/tiny.py:configs/smoke.py"
  code, _, err = run(capsys, *(text.format(root=runs, smoke=config) for text in argv))
  assert code == 2
  assert re.fullmatch(f"error: {line}\n", err), err
