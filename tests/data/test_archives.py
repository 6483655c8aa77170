"""Archives and images that were made to do harm: bounded before they are unpacked, refused in one line."""

import gzip
import io
import stat
import struct
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from sparse_experts import host_memory
from sparse_experts.data import files
from sparse_experts.data.images.files import MOST_RATIO, Unreadable, decode
from sparse_experts.errors import UserError

ZEROS = bytes(2_000_000)


def read(path):
  return [(inner, data) for _, inner, data, _ in files.members(str(path), "text")]


def zip_of(path, members, compression=zipfile.ZIP_DEFLATED):
  with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
    warnings.simplefilter("ignore")  # a name twice
    for member, data in members:
      archive.writestr(member, data)
  return path


def link(name, target="/etc/passwd"):
  info = zipfile.ZipInfo(name)
  info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
  return info, target


@pytest.mark.parametrize("members, expected", [
    ([("../a.txt", "x")], r"its member '\.\./a\.txt' leaves the archive; unpack it where that is safe"),
    ([("a/../../b.txt", "x")], "leaves the archive"), ([("/etc/cron.d/x", "x")], "leaves the archive"),
    ([("..\\a.txt", "x")], "leaves the archive"), ([("C:\\a.txt", "x")], "leaves the archive"),
    ([("good.txt", "x"), ("..", "x")], "leaves the archive"),
    ([link("a.txt")], "its member 'a.txt' is a link"), ([link(".hidden/a.txt")], "is a link"),
    ([("a.txt", "x"), ("b.txt", "x"), ("a.txt", "y")], "holds 'a.txt' twice; pack it anew"),
])
def test_members_that_leave_a_zip_are_refused(members, expected, tmp_path):
  with pytest.raises(UserError, match=expected):
    read(zip_of(tmp_path / "a.zip", members))


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "ALWAYS_ALLOWED", 100_000)
  (tmp_path / "a.gz").write_bytes(gzip.compress(ZEROS))
  (tmp_path / "many.gz").write_bytes(gzip.compress(ZEROS[:90_000]) * 30)  # a .gz may hold several
  zip_of(tmp_path / "a.zip", [("a.txt", ZEROS)])
  zip_of(tmp_path / "b.zip", [(f"{i}.txt", ZEROS[:90_000]) for i in range(30)])
  zip_of(tmp_path / "c.zip", [("a.txt", ZEROS)], zipfile.ZIP_BZIP2)
  zip_of(tmp_path / "d.zip", [("a.txt", ZEROS)], zipfile.ZIP_LZMA)
  for name in ("a.gz", "many.gz", "a.zip", "b.zip", "c.zip", "d.zip"):
    with pytest.raises(UserError, match=r"unpacks to .*iB.*, over 100 times its size; if it is meant so"):
      read(tmp_path / name)
  monkeypatch.undo()
  assert read(tmp_path / "a.zip") == [(("a.txt",), ZEROS)] and read(tmp_path / "a.gz")[0][1] == ZEROS


def test_a_zip_that_lies_about_its_size_is_damaged(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "ALWAYS_ALLOWED", 100_000)
  raw = zip_of(tmp_path / "a.zip", [("a.txt", ZEROS)]).read_bytes()
  (tmp_path / "a.zip").write_bytes(raw.replace(struct.pack("<I", len(ZEROS)), struct.pack("<I", 1000)))
  with pytest.raises(UserError, match="cannot be read: .*; mend, remove or replace it"):
    read(tmp_path / "a.zip")


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:len(raw) // 2], lambda raw: b"PK\5\6" + b"\xff" * 18,
    lambda raw: raw.replace(b"\0\0a.txt", b"\0\0\xff\xfe.txt").replace(struct.pack("<H", 20), b"\x14\0"),
    lambda raw: raw[:-10] + b"\xff" * 8 + raw[-2:], lambda raw: raw.replace(b"a.txt", b"b.txt", 1)])
def test_damaged_zips_are_one_line(damage, tmp_path):
  path = zip_of(tmp_path / "a.zip", [("a.txt", "some text")])
  path.write_bytes(damage(path.read_bytes()))
  try:
    assert read(path)  # bytes that nobody reads were damaged
  except UserError as e:
    assert "\n" not in str(e) and str(path) in str(e)


def test_what_memory_cannot_hold_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(host_memory, "limit", lambda: 3_000_000)
  for name in "abc":
    (tmp_path / name).write_bytes(ZEROS[:1_400_000])
  expected = "c' and what was read before it need 4.0 MiB of memory, but this process may have 2.9 MiB; "
  with pytest.raises(UserError, match=expected):
    read(tmp_path)
  with open(tmp_path / "a", "wb") as f:
    f.truncate(2**40)  # takes no room on the disk
  with pytest.raises(UserError, match=r"need 1.0 TiB of memory"):
    read(tmp_path)


def png(width, height):
  """A PNG that says it has these edges; its data are of none."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif(width, height):
  return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def bmp(width, height):
  header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
  return b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + header + bytes(900)


def as_png(image):
  out = io.BytesIO()
  image.save(out, "PNG")
  return out.getvalue()


@pytest.mark.parametrize("image, why", [
    (png(60_000, 60_000), "of more than 89,478,485 pixels"),
    (png(2**31 - 1, 2**31 - 1), "of more than .* pixels"),
    (png(10_000, 10_000), "of more than .* pixels"), (bmp(60_000, 60_000), "of more than .* pixels"),
    (b"P6 60000 60000 255\n" + bytes(100), "of more than .* pixels"), (gif(60_000, 60_000), ".+"),
    (png(1, 60_000), "1 x 60000 pixels, one edge over 1,000 times the other"),
    (as_png(Image.new("L", (5000, 1))), "5000 x 1 pixels, one edge .*"),
    (np.zeros((1, 1001), np.uint8), "1001 x 1 pixels, one edge .*"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n",
     "no image that Pillow knows"),
    (png(0, 0), ".+"), (png(100, 100), ".+")])
def test_images_that_were_made_to_do_harm(image, why):
  begin = time.perf_counter()
  with pytest.raises(Unreadable, match=f"^{why}$"):
    decode(image)
  assert time.perf_counter() - begin < 1


def test_long_images_within_bounds_are_read():
  assert decode(as_png(Image.new("L", (MOST_RATIO, 1)))).size == (MOST_RATIO, 1)
  assert decode(np.zeros((1, MOST_RATIO), np.uint8)).size == (MOST_RATIO, 1)
