"""One tiny run for all tests of commands, and what spoils it."""

import json
import os
import pathlib
import shutil
import tempfile

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparse_experts import cli
from tests.texts import functions, write_texts

CONFIG = """
from sparse_experts.config import load_config
from tests.shrink import shrink

def get_config(arg):
  config = shrink(load_config(arg)).unlock()
  config.data.source = {source!r}
  config.data.valid_share = 0.3
  return config
"""


ROUTERS = pathlib.Path(__file__).with_name("bad_routers.py")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
  """Text, a config of it, and files that are no text."""
  root = tmp_path_factory.mktemp("commands")
  write_texts(root / "text", functions())
  (root / "tiny.py").write_text(CONFIG.format(source=f"files:{root / 'text'}"))
  (root / "empty").mkdir()
  (root / "empty.txt").write_text("")
  (root / "broken.gz").write_bytes(b"\x1f\x8b no gzip")
  return root


@pytest.fixture(scope="session")
def runs(root):
  """A folder where `decoder` is a run of two steps."""
  before = jax.config.jax_compilation_cache_dir
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))  # not the user's
    assert cli.main(["train", f"--config={root}/tiny.py:configs/smoke.py", f"--workdir={root}/decoder",
                     "--config.train.checkpoint_every=1"]) == 0
    yield root
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


def _truncate(run):
  for file in (run / "checkpoints/2/state").rglob("*"):
    if file.is_file():
      os.truncate(file, file.stat().st_size // 2)


def _edit_config(run, section, key, value):
  config = json.loads((run / "config.json").read_text())
  config[section][key] = value
  (run / "config.json").write_text(json.dumps(config))


def _newer(run):
  """What a version with another format would have written."""
  from sparse_experts.training.checkpoints.meta import FORMAT, meta_checksum

  path = run / "checkpoints/2/meta/metadata"
  meta = json.loads(path.read_text()) | {"format": FORMAT + 1}
  meta.pop("check")
  path.write_text(json.dumps(meta | {"check": meta_checksum(meta)}))


SPOILT = {
    "damaged": _truncate,
    "newer": _newer,
    "wider": lambda run: _edit_config(run, "model", "mlp_dim", 48),
    "gone": lambda run: shutil.rmtree(run / "checkpoints"),
}


@pytest.fixture(scope="session")
def spoilt(runs):
  """{runs}: the folder with copies of `decoder`, each with one thing wrong; {closed}: nobody may read it."""
  for name, spoil in SPOILT.items():
    shutil.copytree(runs / "decoder", runs / name)
    spoil(runs / name)
  with tempfile.TemporaryDirectory() as folder:  # pytest's own are for their owner only
    closed = pathlib.Path(folder) / "closed"
    shutil.copytree(runs / "decoder", closed)
    for path in (closed.parent, closed, *closed.rglob("*")):
      path.chmod(0o755)
    (closed / "checkpoints/2/meta/metadata").chmod(0)
    yield {"runs": str(runs), "closed": str(closed)}
