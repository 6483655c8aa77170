"""Data at an address: the same records as from a folder, through a cache that is bounded."""

import gzip
import pathlib

import numpy as np
import pytest
import tiny_corpus
import tiny_pictures
from PIL import Image

from sparse_experts import storage
from sparse_experts.config import default_config
from sparse_experts.data import prepared
from sparse_experts.data.feed import in_time
from sparse_experts.data.files import members
from sparse_experts.errors import UserError
from sparse_experts.storage import cache, objects
from sparse_experts.tasks import task_of


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """The cache's folder, empty."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "sparse_experts" / "objects"


def open_source(source, **keys):
  c = default_config()
  c.data.source = source
  c.data.update(keys)
  return task_of(c).open_source()


def files(kept):
  return sorted(path for path in kept.iterdir() if path.is_file())


def downloads(store):
  return sum("alt=media" in url for url in store.requests())


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / "texts"
  for path, text in (("a/one.txt", b"one two " * 900), ("b/two.txt", b"three four " * 900)):
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_bytes(text)
  (folder / "b" / "three.txt.gz").write_bytes(gzip.compress(b"five " * 2000))
  (folder / ".hidden").write_text("no")
  return folder


def test_texts(texts, bucket, kept, store):
  objects.put_folder(str(texts), f"{bucket}/texts")
  here, there = (open_source(f"files:{path}") for path in (texts, f"{bucket}/texts/"))
  assert there == here
  assert len(files(kept)) == 4 and [path.name for path in kept.iterdir() if path.is_dir()] == []
  asked = downloads(store)
  assert open_source(f"files:{bucket}/texts") == here and downloads(store) == asked
  storage.write(f"{bucket}/texts/a/one.txt", b"other " * 900)
  assert open_source(f"files:{bucket}/texts") != here and downloads(store) == asked + 1
  assert open_source(f"files:{bucket}/texts/b/two.txt") == open_source(f"files:{texts}/b/two.txt")


def test_images(tmp_path, bucket, kept):
  rng = np.random.default_rng(0)
  for i in range(6):
    folder = tmp_path / "images" / "xy"[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
  objects.put_folder(str(tmp_path / "images"), f"{bucket}/images")
  here, there = (open_source(f"files:{path}", objective="softmax")
                 for path in (tmp_path / "images", f"{bucket}/images"))
  assert there == here and there.domains == ("x", "y")


def test_array_record(tmp_path, bucket, kept):
  for name, keys in ((tiny_corpus.TinyCorpus.name, {}),
                     (tiny_pictures.TinyPictures.name, dict(objective="softmax"))):
    here = open_source(f"tfds:{name}", dir=str(tmp_path / "tfds"), **keys)  # prepares it
    objects.put_folder(str(tmp_path / "tfds" / name), f"{bucket}/tfds/{name}")
    assert open_source(f"tfds:{name}", dir=f"{bucket}/tfds", **keys) == here
  with pytest.raises(UserError, match=f"data.source='tfds:none' is not in data.dir='{bucket}/tfds', which"):
    prepared.read("none", f"{bucket}/tfds")


def test_the_cache_is_bounded(bucket, kept, monkeypatch, texts):
  monkeypatch.setenv(cache.VARIABLE, str(2500 / 2**30))
  for i in range(5):
    storage.write(f"{bucket}/{i}/a", bytes([i]) * 1000)
    with storage.cached(f"{bucket}/{i}") as folder:
      assert pathlib.Path(folder, "a").read_bytes() == bytes([i]) * 1000
      storage.prune(str(kept), 0)  # another process
      assert pathlib.Path(folder, "a").read_bytes() == bytes([i]) * 1000
  for i in range(5):
    with storage.cached(f"{bucket}/{i}/a") as file:
      assert pathlib.Path(file).name == "a" and pathlib.Path(file).read_bytes() == bytes([i]) * 1000
    assert sum(path.stat().st_size for path in files(kept)) <= 2500
  with pytest.raises(UserError, match="holds .* GiB, and the cache of objects may hold .*; set SPARSE_"):
    list(members(bucket, "text"))
  monkeypatch.setenv(cache.VARIABLE, "much")
  with pytest.raises(UserError, match="SPARSE_EXPERTS_CACHE_GIB=much is no number of GiB"):
    list(members(bucket, "text"))


@pytest.mark.parametrize("source, message", [
    ("files:gs://bucket/none", "data.source='files:gs://bucket/none' does not exist; give a text file, .gz"),
    ("files:gs://nobucket/x", "data.source='files:gs://nobucket/x' does not exist; give a text file"),
    ("files:gs://closed/x", "data.source='files:gs://closed/x' cannot be read: no rights there"),
    ("files:gs:/bucket/x", "looks like an address with a slash too few; write gs://bucket/x"),
    ("files:s3://bucket/x", "s3:// addresses need a package that is not installed: Install s3fs"),
])
def test_what_is_no_data(store, kept, source, message):
  with pytest.raises(UserError, match=message):
    open_source(source)


def test_a_file_that_is_no_text_is_named_by_its_address(bucket, kept):
  storage.write(f"{bucket}/texts/a.gz", b"no gzip")
  with pytest.raises(UserError, match=f"data.source='files:{bucket}/texts/a.gz' cannot be read: Not a gzip"):
    open_source(f"files:{bucket}/texts")


def test_a_store_slower_than_the_input_timeout(bucket, kept, store):
  storage.write(f"{bucket}/texts/a.txt", b"text " * 900)
  with store.harmed({"fault": "slow"}), pytest.raises(
      UserError, match="process 0 of 1 waited 0.2 seconds for data.source='files:x'; see what"):
    in_time(lambda: open_source(f"files:{bucket}/texts"), 0.2, "data.source='files:x'")
