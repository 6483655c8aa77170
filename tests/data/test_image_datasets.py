"""Records of images: what training does to them follows from seed and number alone."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from sparse_experts.config import default_config
from sparse_experts.data.images import datasets as image_datasets
from sparse_experts.data.images.augment import OPERATIONS, crop, fit, shift
from sparse_experts.data.images.sources import as_source
from sparse_experts.tasks import task_of
from tests.data.test_images import make_config, picture

IMAGES = [dict(image=np.asarray(picture(i, (12, 10))), label=i % 3) for i in range(12)]


def datasets(seed=0, **image):
  config = make_config(size=8, **image)
  config.train.seed = seed
  source = as_source(IMAGES, config.data, ["a", "b", "c"])
  task = task_of(config)
  classes = task.make_vocabulary(source)
  return [task.make_dataset(split, classes, source) for split in ("train", "valid")]


EVERYTHING = dict(crop_area=0.3, shift=1, flip=True, randaugment_layers=2, mixup=0.4)


def test_a_record_follows_from_its_seed_and_number():
  """Whichever is read first; two epochs differ, and so do two seeds."""
  (train, _), (again, _) = datasets(**EVERYTHING), datasets(**EVERYTHING)
  other, _ = datasets(1, **EVERYTHING)
  first = [train[i] for i in range(6)]
  for i in (5, 0, 3):
    for name, a in again[i].items():
      np.testing.assert_array_equal(a, first[i][name])
  assert any((other[i]["images"] != first[i]["images"]).any() for i in range(3))
  epochs = [sorted(train[i]["images"].sum() for i in range(start, start + 9)) for start in (0, 9)]
  assert epochs[0] != epochs[1]


def test_a_training_epoch_without_changes_is_every_image_once():
  train, valid = datasets()
  assert train.num_windows == 9 and len(valid) == valid.num_windows == 3
  assert task_of(make_config()).evaluated_records(valid) == 3
  seen = lambda dataset, n: sorted(float(dataset[i]["images"].sum()) for i in range(n))
  assert seen(train, 9) == sorted(float(train[i]["images"].sum()) for i in range(9, 18))
  whole = sorted(float((np.asarray(fit(Image.fromarray(i["image"]), 8), np.float32) / 127.5 - 1).sum())
                 for i in IMAGES)
  np.testing.assert_allclose(sorted(seen(train, 9) + seen(valid, 3)), whole, rtol=1e-5)
  record = valid[0]
  assert record["images"].shape == (8, 8, 3) and record["images"].dtype == np.float32
  assert (record["targets"].shape, record["shares"].tolist(), record["weights"]) == ((1,), [1], 1)


def test_mixup_blends_pixels_as_it_blends_targets():
  """Images of one colour each: the pixels tell the shares."""
  config = make_config(size=4, mixup=0.8)
  colours = [dict(image=np.full((4, 4), 20 * i, np.uint8), label=i % 4) for i in range(12)]
  source = as_source(colours, config.data)
  task = task_of(config)
  train = task.make_dataset("train", task.make_vocabulary(source), source)
  label_of = {20 * i: i % 4 for i in range(12)}
  shares = []
  for i in range(40):
    r = train[i]
    assert r["targets"].shape == r["shares"].shape == (2,)
    assert r["shares"].sum() == pytest.approx(1) and (r["shares"] >= 0).all()
    pixel = (r["images"][0, 0, 0] + 1) * 127.5
    pairs = [a * r["shares"][0] + b * r["shares"][1] for a in label_of for b in label_of
             if [label_of[a], label_of[b]] == r["targets"].tolist()]
    assert min(abs(pixel - p) for p in pairs) < 1e-2
    shares.append(r["shares"][0])
  assert 0.2 < np.mean(shares) < 0.8 and np.std(shares) > 0.2  # Beta(0.8, 0.8): mean 0.5, deviation 0.31


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_an_example_looks_like_all_records(mixup):
  looks = lambda record: {name: (np.shape(a), np.asarray(a).dtype) for name, a in record.items()}
  config = make_config(size=8, mixup=mixup)
  train, _ = datasets(mixup=mixup)
  assert looks(task_of(config).example(None)) == looks(train[0])


def test_fit_keeps_the_middle():
  wide = np.zeros((4, 12, 3), np.uint8)
  wide[:, 4:8] = 255
  np.testing.assert_array_equal(np.asarray(fit(Image.fromarray(wide), 4)), 255)
  assert fit(picture(size=(3, 50)), 8).size == (8, 8)


def test_crops_and_shifts_stay_inside():
  image, rng = picture(size=(20, 16)), np.random.default_rng(0)
  values = set(np.asarray(image).reshape(-1, 3)[:, 0].tolist())
  for _ in range(20):
    assert crop(image, 8, 0.1, rng).size == (8, 8)
    moved = np.asarray(shift(image, 3, rng))
    assert moved.shape == (16, 20, 3) and set(moved[..., 0].ravel().tolist()) <= values
  assert crop(picture(size=(2, 90)), 8, 0.9, rng).size == (8, 8)  # no such rectangle fits: the middle


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_operations_keep_the_size_and_grow_with_their_strength(operation):
  image = picture(size=(16, 16))
  for sign in (-1, 1):
    none, some, much = (OPERATIONS[operation](image, m, sign) for m in (0.0, 0.3, 1.0))
    assert some.size == image.size and some.mode == "RGB"
    of = lambda a: np.abs(np.asarray(a, int) - np.asarray(image, int)).mean()
    if operation > 2:  # the first three have no strength
      assert of(none) < 1.1 and of(none) <= of(some) <= of(much) * 1.2 and of(much) > 1


@pytest.mark.parametrize("values", [(0, 256), (40, 90), (7, 8), (0, 2)])
def test_tables_say_what_pillow_says(values):
  """The first five operations, also where a channel has one value only."""
  rng = np.random.default_rng(0)
  for size in ((1, 1, 3), (5, 9, 3), (32, 32, 3)):
    pixels = rng.integers(*values, size).astype(np.uint8)
    pixels[..., 1] = np.minimum(pixels[..., 1], pixels[..., 2])
    image = Image.fromarray(pixels)
    for m in (0.0, 0.4, 1.0):
      pillow = (ImageOps.autocontrast(image), ImageOps.equalize(image), ImageOps.invert(image),
                ImageOps.posterize(image, 8 - round(4 * m)), ImageOps.solarize(image, round(256 * (1 - m))))
      for operation, expected in zip(OPERATIONS, pillow):
        np.testing.assert_array_equal(np.asarray(operation(image, m, 1)), np.asarray(expected))


@pytest.mark.parametrize("room, times", [(10**6, 9), (3 * 120 * 4, 9 + 5), (0, 2 * 9)])
def test_images_stay_decoded_while_there_is_room(room, times, monkeypatch):
  """Nine images, twice; records do not depend on it. 120 pixels of three bytes each."""
  expected, decoded = [datasets()[0][i]["images"] for i in range(18)], []
  monkeypatch.setattr(image_datasets, "KEPT", room)
  monkeypatch.setattr(image_datasets, "decode", lambda image, real=image_datasets.decode: (
      decoded.append(1), real(image))[1])
  train, _ = datasets()
  for i in range(18):
    np.testing.assert_array_equal(train[i]["images"], expected[i])
  assert len(decoded) == times


def test_classes_are_read_as_they_were_kept():
  source = as_source(IMAGES, make_config().data, ["ä", "b", "c"])
  classes = task_of(make_config(classes=12)).make_vocabulary(source)
  again = task_of(make_config()).read_vocabulary(classes.serialize())
  assert (again.names, again.vocab_size, again.fingerprint) == (("ä", "b", "c"), 12, classes.fingerprint)
  assert task_of(default_config()).read_vocabulary(b"bytes").name == "bytes"
