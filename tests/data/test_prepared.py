"""TFDS data is prepared and read without TensorFlow, with or without the class that wrote it."""

import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_corpus
import tiny_pictures

from sparse_experts.config import default_config
from sparse_experts.data import prepared
from sparse_experts.data.images.files import decode
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of


def make_config(name, directory, **keys):
  c = default_config()
  c.data.source, c.data.dir = f"tfds:{name}", str(directory)
  c.data.update(keys)
  return c


def open_source(*where, **keys):
  return task_of(make_config(*where, **keys)).open_source()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  open_source(tiny_corpus.TinyCorpus.name, folder)  # prepares it
  open_source(tiny_pictures.TinyPictures.name, folder, objective="softmax")
  return folder


def test_images_of_every_size_with_their_classes(folder):
  task = task_of(make_config("tiny_pictures", folder, objective="softmax"))
  source = task.open_source()
  assert source.domains == tuple(tiny_pictures.NAMES)
  pixels = lambda image: np.asarray(decode(image["image"])).tobytes()
  for part, numbers in ((source.train, range(12)), (source.valid, range(12, 15))):  # its own `test` split
    expected = {tiny_pictures.picture(i).tobytes(): i % 3 for i in numbers}
    assert {pixels(image): image["label"] for image in part} == expected and len(part) == len(expected)
    assert all(isinstance(image["image"], bytes) for image in part)  # as they are stored, not unpacked
  record = task.make_dataset("train", task.make_vocabulary(source), source)[0]
  assert record["images"].shape == (8, 8, 3) and record["targets"] in range(3)


def test_images_with_alpha_and_one_that_is_cut_off(tmp_path):
  """They go the way of image files: over white, and what cannot be read is named, or left out if asked."""
  config = make_config(tiny_pictures.ClearPictures.name, tmp_path, objective="softmax")
  with pytest.raises(UserError, match=r"tfds:clear_pictures'.train: 1 of 12 images .*: number \d+ \(image "
                                      r"file is truncated\); .*skip_unreadable"):
    task_of(config).open_source()
  config.data.image.skip_unreadable = True
  source = task_of(config).open_source()
  assert (len(source.train), len(source.valid)) == (11, 3)
  whites = np.asarray(decode(source.valid[0]["image"]))[:, ::2]
  assert (whites == 255).all()


def test_data_without_pictures(folder, monkeypatch):
  task = task_of(make_config("tiny_corpus", folder, objective="sigmoid"))
  with pytest.raises(UserError, match=r"has features \['text', 'topic'\], 0 images and 1 class labels, not"):
    task.open_source()
  depth = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
  deep = tfds.features.FeaturesDict(dict(depth=depth, label=tfds.features.ClassLabel(num_classes=2)))
  builder = types.SimpleNamespace(info=types.SimpleNamespace(features=deep))
  monkeypatch.setattr(prepared, "_open", lambda name, directory: (builder, tfds))
  with pytest.raises(UserError, match=r"tfds:tiny_corpus' has images of float32, not of whole numbers; wri"):
    task.open_source()



def test_prepared_by_the_source_itself(folder):
  source = open_source("tiny_corpus", folder)
  assert {d["text"].decode() for d in source.train} == {f"Sentence {i} é." for i in range(30)}
  assert len(source.valid) == 10  # its own validation split, not a share of train
  assert source.domains == ("trees", "ships")
  assert all(int(d["text"].split()[1]) % 2 == d["domain"] for d in source.train)
  assert list((folder / "tiny_corpus/1.0.0").glob("*.array_record*"))


def test_read_elsewhere_without_the_class_and_without_tensorflow(folder):
  code = f"""
import sys
from sparse_experts.config import default_config
from sparse_experts.tasks import task_of
c = default_config()
c.data.source, c.data.dir = "tfds:tiny_corpus", {str(folder)!r}
print(task_of(c).open_source().fingerprint)
c.data.source, c.data.objective = "tfds:tiny_pictures", "softmax"
print(task_of(c).open_source().fingerprint)
print(*(name in sys.modules for name in ("tensorflow", "tiny_corpus", "tiny_pictures")))
"""
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  texts = open_source("tiny_corpus", folder)
  images = open_source("tiny_pictures", folder, objective="softmax")
  assert out.split() == [texts.fingerprint, images.fingerprint, *["False"] * 3]


def test_misspelt(folder):
  with pytest.raises(UserError, match=r"tfds:tiny_corpse' is neither in .* did you mean 'tiny_corpus'"):
    open_source("tiny_corpse", folder)
  with pytest.raises(UserError, match=r"nor known to TFDS; set data.dir") as e:
    open_source("qqqqqq", folder / "none")
  assert len(str(e.value)) < 200  # and not the list of everything TFDS knows


def test_data_without_text(tmp_path):
  with pytest.raises(UserError, match=r"has features \['number'\] and no one text; write package.module"):
    open_source(tiny_corpus.TinyNumbers.name, tmp_path)


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
    open_source("tiny_corpus", tmp_path)
  assert "\n" not in str(e.value) and "tfds:tiny_corpus" in str(e.value)


def test_package_that_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match="pip install tensorflow-datasets"):
    prepared.read("anything", "")


def test_a_name_is_not_taken_for_any_other():
  known = ["kitti", "mnist", "wiki40b", "wikipedia"]
  assert prepared._alike("mnits", known) == "; did you mean 'mnist'?"
  assert prepared._alike("wikitext", known).startswith("; those that begin alike: wiki40b, wikipedia; or")
  assert prepared._alike("imagenet", known) == ""
