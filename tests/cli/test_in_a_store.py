"""The commands on runs at gs:// addresses."""

import io
import json

import numpy as np
import pytest

from sparse_experts import cli, storage
from sparse_experts.storage import objects, requests
from tests.sweeps.sweeps import write_config, write_sweep


@pytest.fixture(scope="session")
def far(runs, store):
  """The address of the tiny run, in a bucket with its text."""
  objects.put_folder(str(runs / "decoder"), "gs://bucket/commands/decoder")
  objects.put_folder(str(runs / "text"), "gs://bucket/commands/text")
  return "gs://bucket/commands"


def run(capsys, *argv):
  code = cli.main(list(argv))
  return (code, *capsys.readouterr())


def test_report(far, runs, capsys):
  code, out, _ = run(capsys, "report", f"--workdir={far}/decoder/", "--no-model")
  assert code == 0 and out.startswith(f"{far}/decoder/report.html: ")
  assert b"<html" in storage.read(f"{far}/decoder/report.html")[:200]
  code, _, _ = run(capsys, "report", f"--workdir={far}/decoder", f"--out={far}/page.html", "--no-model")
  assert code == 0 and storage.exists(f"{far}/page.html")


@pytest.mark.parametrize("argv, message", [
    (["report", "--workdir={far}/decoder", "--out=gs://nobucket/x.html"], "there is no bucket 'nobucket'"),
    (["report", "--workdir={far}/none"], "workdir {far}/none does not exist; name the folder of a run"),
    (["report", "--workdir=gs://closed/run"], "no rights there"),
    (["trace", "--workdir={far}/decoder", "--out=gs://closed/x.npz"], "cannot be written (no rights there"),
    (["trace", "--workdir={far}/decoder", "--out=gs:/bucket/x.npz"], "a slash too few; write gs://bucket/x.npz"),
    (["compare", "{far}/decoder", "{far}/none"], "workdir {far}/none does not exist"),
    (["evaluate", "--workdir={far}/decoder", "--step=7"], "has no step 7; choose from 1, 2"),
    (["sweep", "--sweep=experiments/sparse_vs_dense/sweep.py", "--runs=s3://bucket/runs"],
     "runs are kept in folders and at gs:// addresses"),
    (["convert", "--from=gs://bucket/none", "--workdir={far}/hf"], "gs://bucket/none holds nothing; mend"),
    (["train", "--config=configs/smoke.py", "--workdir={far}/x", "--config.init_from={far}/none"],
     "init_from={far}/none: there is no folder"),
])
def test_what_cannot_be_done_is_one_line(far, capsys, argv, message):
  code, _, err = run(capsys, *(part.replace("{far}", far) for part in argv))
  assert code == 2 and err.count("\n") == 1, err
  assert message.replace("{far}", far) in err


def test_the_extra_that_is_not_installed(far, capsys, monkeypatch):
  requests.store_of.cache_clear()

  def missing(_):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr("fsspec.filesystem", missing)
  code, _, err = run(capsys, "report", f"--workdir={far}/decoder")
  requests.store_of.cache_clear()
  assert code == 2 and err.count("\n") == 1 and err.endswith("pip install 'sparse_experts[gcs]'\n"), err


@pytest.mark.slow
def test_a_run_is_evaluated_sampled_traced_and_reported(far, runs, capsys):
  data = f"--config.data.source=files:{far}/text"
  code, there, err = run(capsys, "evaluate", f"--workdir={far}/decoder", "--json", data)
  assert code == 0, err
  _, here, _ = run(capsys, "evaluate", f"--workdir={runs}/decoder", "--json")
  last = lambda out: json.loads(out.splitlines()[-1])
  assert last(there) == last(here)
  sampled = [run(capsys, "sample", f"--workdir={where}/decoder", "--prompt=def f1(", "--length=5")[1]
             for where in (far, runs)]
  assert sampled[0] == sampled[1]
  for where in (far, runs):
    code, _, err = run(capsys, "trace", f"--workdir={where}/decoder", f"--out={where}/t.npz", "--records=4")
    assert code == 0, err
  traced = [np.load(io.BytesIO(storage.read(f"{where}/t.npz"))) for where in (far, str(runs))]
  assert set(traced[0]) == set(traced[1])
  for name in traced[0]:
    np.testing.assert_array_equal(traced[0][name], traced[1][name])
  assert storage.exists(f"{far}/t.json") and storage.exists(f"{far}/t.png")
  code, _, err = run(capsys, "report", f"--workdir={far}/decoder")
  assert code == 0 and storage.names(f"{far}/decoder/report_cache"), err
  code, out, _ = run(capsys, "report", f"--workdir={far}/decoder", str(runs / "decoder"),
                     f"--out={far}/two.html")
  assert code == 0 and "2 runs" in out
  code, _, err = run(
      capsys, "train", f"--config={runs}/tiny.py:configs/smoke.py", f"--workdir={far}/more", data,
      f"--config.init_from={far}/decoder@2", f"--config.data.tokenizer={far}/decoder/tokenizer.model")
  assert code == 0 and storage.is_complete(f"{far}/more/checkpoints/2"), err


@pytest.mark.slow
def test_a_sweep_and_a_comparison(bucket, store, tmp_path, capsys):
  write_config(tmp_path)
  argv = ["sweep", f"--sweep={write_sweep(tmp_path, seeds='range(2)')}", f"--runs={bucket}/runs"]
  code, out, err = run(capsys, *argv)
  assert code == 0, err
  assert f"{bucket}/runs/sweeps/a holds table.md, results.json, picture.png" in out
  assert storage.names(f"{bucket}/runs/sweeps/a") == [
      "dense", "picture.png", "results.json", "switch", "table.md"]
  code, again, _ = run(capsys, *argv)
  assert code == 0 and again.count("in the cache") == 4
  code, out, _ = run(capsys, "compare", f"{bucket}/runs/sweeps/a/switch", f"{bucket}/runs/sweeps/a/dense",
                     f"--out={bucket}/c.png")
  assert code == 0 and "switch" in out, out
  assert storage.read(f"{bucket}/c.png").startswith(b"\x89PNG")
  code, out, _ = run(capsys, "report", f"--sweep={bucket}/runs/sweeps/a")
  assert code == 0 and storage.exists(f"{bucket}/runs/sweeps/a/report.html")
