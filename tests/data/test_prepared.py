"""TFDS data is prepared and read without TensorFlow, with or without the class that wrote it."""

import subprocess
import sys

import pytest
import tiny_corpus

from sparse_experts.config import default_config
from sparse_experts.data import open_source, prepared
from sparse_experts.errors import UserError


def config_data(name, directory):
  c = default_config().data
  c.source, c.dir = f"tfds:{name}", str(directory)
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  open_source(config_data(tiny_corpus.TinyCorpus.name, folder))  # prepares it
  return folder


def test_prepared_by_the_source_itself(folder):
  source = open_source(config_data("tiny_corpus", folder))
  assert {d["text"].decode() for d in source.train} == {f"Sentence {i} é." for i in range(30)}
  assert len(source.valid) == 10  # its own validation split, not a share of train
  assert source.domains == ("trees", "ships")
  assert all(int(d["text"].split()[1]) % 2 == d["domain"] for d in source.train)
  assert list((folder / "tiny_corpus/1.0.0").glob("*.array_record*"))


def test_read_elsewhere_without_the_class_and_without_tensorflow(folder):
  code = f"""
import sys
from sparse_experts.config import default_config
from sparse_experts.data import open_source
c = default_config().data
c.source, c.dir = "tfds:tiny_corpus", {str(folder)!r}
print(open_source(c).fingerprint, "tensorflow" in sys.modules, "tiny_corpus" in sys.modules)
"""
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  fingerprint = open_source(config_data("tiny_corpus", folder)).fingerprint
  assert out.split() == [fingerprint, "False", "False"]


def test_misspelt(folder):
  with pytest.raises(UserError, match=r"tfds:tiny_corpse' is neither in .* did you mean 'tiny_corpus'"):
    open_source(config_data("tiny_corpse", folder))
  with pytest.raises(UserError, match=r"nor known to TFDS; set data.dir") as e:
    open_source(config_data("qqqqqq", folder / "none"))
  assert len(str(e.value)) < 200  # and not the list of everything TFDS knows


def test_data_without_text(tmp_path):
  with pytest.raises(UserError, match=r"has features \['number'\] and no one text; write package.module"):
    open_source(config_data(tiny_corpus.TinyNumbers.name, tmp_path))


@pytest.mark.parametrize(("error", "words"), [
    (ModuleNotFoundError("...", name="tensorflow"), "it needs 'tensorflow'; pip install tensorflow, prepare"),
    (ModuleNotFoundError("...", name="a.b"), "it needs 'a'; pip install a$"),
    (ConnectionError("no network\nat all"), "no network; prepare it where it can be"),
])
def test_what_cannot_be_prepared_names_the_way_out(tmp_path, monkeypatch, error, words):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(tiny_corpus.TinyCorpus, "download_and_prepare", fail)
  with pytest.raises(UserError, match=words) as e:
    open_source(config_data("tiny_corpus", tmp_path))
  assert "\n" not in str(e.value) and "tfds:tiny_corpus" in str(e.value)


def test_package_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match="pip install tensorflow-datasets"):
    prepared.read("anything", "")
