"""Sources of images: folders, zips and one's own, in every mode, and what is wrong with them."""

import io
import re
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from sparse_experts.config import default_config
from sparse_experts.data.images.files import Unreadable, decode
from sparse_experts.data.images.sources import as_source, open_source
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of


def make_config(source="embedded", **image):
  config = default_config()
  config.model.name, config.data.objective, config.data.source = "vit", "softmax", source
  config.data.valid_share = 0.25
  config.data.image.update(image)
  return config


def picture(seed=0, size=(9, 7), mode="RGB"):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def as_file(image, suffix="png", **keys):
  out = io.BytesIO()
  image.save(out, {"jpg": "JPEG"}.get(suffix, suffix), **keys)
  return out.getvalue()


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def pictures(*classes, each=4, suffix="png"):
  return {f"{c}/{i}.{suffix}": as_file(picture(100 * n + i), suffix)
          for n, c in enumerate(classes) for i in range(each)}


def test_a_folder_and_its_zip_are_one_source(tmp_path):
  files = pictures("cat", "dog") | {
      "cat/notes.txt": b"no image", ".hidden/1.png": b"", "cat/deep/9.png": as_file(picture(9))}
  folder = write(tmp_path / "animals", files)
  with zipfile.ZipFile(tmp_path / "animals.zip", "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  found = [open_source(make_config(f"files:{path}").data) for path in (folder, tmp_path / "animals.zip")]
  assert found[0].fingerprint == found[1].fingerprint
  assert found[0].domains == ("cat", "dog")
  assert sorted(i["name"] for part in (found[0].train, found[0].valid) for i in part) == sorted(
      name for name in files if name.endswith("png") and name[0] != ".")
  assert [sum(i["label"] == c for i in found[0].valid) for c in (0, 1)] == [1, 1]  # a quarter of 5, of 4


def test_parts_of_their_own_are_held_out(tmp_path):
  """Two zips in a folder, as data sets are often given."""
  for part, each in (("train", 3), ("test", 2)):
    with zipfile.ZipFile(tmp_path / f"{part}_of_it.zip", "w") as archive:
      for name, content in pictures("a", "b", each=each).items():
        archive.writestr(f"{part}/{name}", content)
  source = open_source(make_config(f"files:{tmp_path}").data)
  assert (len(source.train), len(source.valid)) == (6, 4)
  assert source.domains == ("a", "b")


def test_the_split_knows_copies_and_minds_no_order():
  images = [dict(image=np.full((4, 4), i % 12, np.uint8), label=i % 2) for i in range(24)]  # each one twice
  data = make_config().data
  first, turned = as_source(images, data), as_source(images[::-1], data)
  of = lambda part: sorted(int(i["image"][0, 0]) for i in part)
  assert of(first.valid) == of(turned.valid)
  assert not set(of(first.valid)) & set(of(first.train))
  assert len(first.train) + len(first.valid) == 24


def test_embedded_digits():
  config = make_config()
  source = task_of(config).open_source()
  assert len(source.train) + len(source.valid) == 1797
  assert source.domains == tuple("0123456789")
  zero = next(i for part in (source.train, source.valid) for i in part if i["name"] == "digit 0")
  assert zero["label"] == 0
  first_row = [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 sixteenths
  np.testing.assert_array_equal(zero["image"][0, :, 0], first_row)


GREY = np.array([[0, 128], [255, 7]], np.uint8)
RED = Image.new("RGBA", (1, 1), (255, 0, 0, 0))


@pytest.mark.parametrize("image, expected", [
    (as_file(Image.fromarray(GREY)), GREY),
    (as_file(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),  # 16 bits: 65535 is white
    (as_file(Image.fromarray(GREY.astype(np.int32) * 257), "tiff"), GREY),  # 32 bits by their range
    (as_file(Image.fromarray(GREY.astype(np.int32)), "tiff"), GREY),
    (as_file(Image.fromarray(GREY.astype(np.int32) * 5000 - 9), "tiff"), GREY),
    (as_file(Image.fromarray(GREY.astype(np.float32) / 255), "tiff"), GREY),
    (as_file(Image.fromarray(GREY.astype(np.float32)), "tiff"), GREY),
    (as_file(Image.fromarray(np.zeros((2, 2), np.float32) - 3), "tiff"), np.zeros((2, 2))),
    (as_file(Image.fromarray(GREY).convert("LA")), GREY),
    (as_file(Image.fromarray(GREY).convert("RGB").quantize(4)), GREY),  # a palette
    (as_file(Image.fromarray(GREY > 100)), np.where(GREY > 100, 255, 0)),  # 1 bit
    (as_file(Image.fromarray(GREY).convert("CMYK"), "tiff"), GREY),
    (as_file(RED), np.full((1, 1), 255)),  # wholly transparent: white
    (GREY, GREY), (GREY[..., None], GREY), (np.stack([GREY] * 3, axis=-1), GREY),
], ids=["grey", "16 bit", "32 as 16", "32 as 8", "32 wide", "float 1", "float 255", "float one",
        "grey alpha", "palette", "1 bit", "cmyk", "transparent", "array", "H W 1", "H W 3"])
def test_every_mode_becomes_rgb(image, expected):
  found = decode(image)
  assert found.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(found), np.repeat(np.asarray(expected)[..., None], 3, axis=2))


def test_the_orientation_of_a_photograph_is_applied():
  """A camera held upright: rotated 90 degrees clockwise to be shown (EXIF orientation 6)."""
  exif = Image.Exif()
  exif[0x0112] = 6
  shown = picture()
  stored = shown.transpose(Image.Transpose.ROTATE_90)
  np.testing.assert_array_equal(np.asarray(decode(as_file(stored, exif=exif))), np.asarray(shown))


def test_links_to_folders_are_followed_and_loops_noticed(tmp_path):
  """A class that lies elsewhere, a data set that is a link, and a link back to the folder above."""
  folder = write(tmp_path / "animals", pictures("cat"))
  write(tmp_path / "elsewhere", pictures("dog"))
  (folder / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
  (tmp_path / "link").symlink_to(folder)
  source = open_source(make_config(f"files:{tmp_path}/link").data)
  assert source.domains == ("cat", "dog") and len(source.train) + len(source.valid) == 8
  (folder / "cat" / "again").symlink_to(folder)
  with pytest.raises(UserError, match="animals/cat/again' is a link back to .*animals, which never ends"):
    open_source(make_config(f"files:{folder}").data)


def test_what_was_found_is_said(tmp_path):
  folder = write(tmp_path, pictures("cat", "dog"))
  told = []
  for size in (4, 7, 14):
    task = task_of(make_config(f"files:{folder}", size=size))
    told.append(task.describe_source(task.open_source()))
  assert told == [f"8 images, 2 classes, 6 to train on{more}" for more in (
      "; the usual shorter edge is 7 px, data.image.size=4 shrinks it", "",
      "; the usual shorter edge is 7 px, data.image.size=14 enlarges it")]


@pytest.mark.parametrize("image, why", [
    (b"", "empty"), (b"text", "no image that Pillow knows"),
    (as_file(picture(size=(64, 64)))[:3000], ".*(truncated|broken).*"),
    (as_file(picture(size=(64, 64)), "jpg")[:700], ".*truncated.*"),
    (as_file(Image.fromarray(np.array([[0, np.nan]], np.float32)), "tiff"), "greys that are not finite"),
    (GREY.astype(np.float32), r"an array of float32 \(2, 2\), .*"),
    (np.zeros((2, 2, 4), np.uint8), "an array.*"),
    (np.zeros((0, 2), np.uint8), "an array .*"), (None, "of type NoneType, .*"),
])
def test_what_cannot_be_decoded(image, why):
  with pytest.raises(Unreadable, match=f"^{why}$"):
    decode(image)


CAT, DOG = pictures("cat", each=2), pictures("dog", each=2)
BROKEN = {"cat/z.png": b"text", "dog/y.jpg": as_file(picture(size=(64, 64)), "jpg")[:700]}


def below(folder, files):
  return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("files, image, message", [
    ({"a.png": as_file(picture()), "b.png": as_file(picture(1))}, {},
     "image 'a.png' is in no class; give a folder or .zip with a sub-folder for each class"),
    ({"notes.txt": b""}, {}, r"holds no images \(.png, .jpg, .jpeg, ...\); give a folder or .zip .*"),
    (CAT, {}, "has images of one class only, 'cat'; give it two or more"),
    (CAT | DOG | {"c.png": as_file(picture())}, {}, "image 'c.png' is in no class; .*"),
    (CAT | DOG | BROKEN, {}, r"2 of 6 images cannot be read: cat/z.png \(no image that Pillow knows\), "
     r"dog/y.jpg \(.*truncated.*\); mend or remove them, or leave them out with "
     "data.image.skip_unreadable=true"),
    (CAT | {"dog/1.png": b"text"}, dict(skip_unreadable=True), "has images of one class only, 'cat'; .*"),
    (below("train", CAT | DOG) | below("test", pictures("cow", "dog")), {},
     "class 'cow' has validation images but none to train on; add some, or leave it out"),
    (below("train", CAT) | below("test", CAT), {},
     "has images of one class only, 'cat'; .*"),
    ({"cat.zip": b"text"}, {}, "cannot be read: File is not a zip file; .*"),
    ({"cat/1.png": CAT["cat/0.png"], "dog/1.png": DOG["dog/0.png"]}, {},
     "has no validation images; give it at least two of each class, or another data.valid_share=0.25"),
])
def test_what_is_wrong_with_a_folder(tmp_path, files, image, message):
  config = make_config(f"files:{write(tmp_path, files)}", **image)
  with pytest.raises(UserError) as e:
    open_source(config.data)
  text = str(e.value)
  assert "\n" not in text
  assert re.fullmatch(rf"data.source='files:{tmp_path}[^']*'(\.valid)?:? {message}", text), text


def test_unreadable_images_are_counted_and_left_out_if_asked(tmp_path, caplog):
  config = make_config(f"files:{write(tmp_path, CAT | DOG | BROKEN)}", skip_unreadable=True)
  source = open_source(config.data)
  assert len(source.train) + len(source.valid) == 4
  assert "2 of 6 images cannot be read: cat/z.png" in caplog.text
  assert caplog.text.rstrip().endswith("left out")


@pytest.mark.parametrize("images, message", [
    (3, ".* gives int, without __len__ and __getitem__; .*"),
    ([GREY], ".*image 0 is of type ndarray, without 'image' and 'label'; give a dict with both"),
    ([dict(image=GREY, label="cat")], ".*image 0 has label 'cat'; give a whole number from 0 on"),
    ([dict(image=GREY, label=-1, name="x")], ".*image x has label -1; give a whole number from 0 on"),
    ([dict(image=GREY[:, :1] + i, label=i % 2) for i in range(9)], None),
    (types.SimpleNamespace(train=[dict(image=GREY, label=i) for i in (0, 1)], domains=["a", "b"],
                           valid=[dict(image=GREY, label=2)]),
     ".*image '0' has label 2, but there are 2 classes; .*"),
])
def test_images_of_ones_own(images, message):
  config = make_config()
  if message is None:
    assert as_source(images, config.data).domains == ("0", "1")
    return
  with pytest.raises(UserError, match=f"^{message}$"):
    as_source(images, config.data)


def test_a_label_outside_the_head():
  source = open_source(make_config().data)
  with pytest.raises(UserError, match="^data.image.classes=7, but the source has 10 classes: label 7, "
                                      "'7', is outside the head; choose 10 or more$"):
    task_of(make_config(classes=7)).make_vocabulary(source)
  classes = task_of(make_config(classes=12)).make_vocabulary(source)
  assert classes.vocab_size == 12
  other = as_source([dict(image=GREY + i, label=i % 2) for i in range(8)], make_config().data, ["3", "cat"])
  with pytest.raises(UserError, match="^data.source has a class 'cat' that the head has no row for; .*$"):
    task_of(make_config()).make_dataset("valid", classes, other)
