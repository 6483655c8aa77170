"""Text files of every kind, cut into documents, with folders as domains."""

import gzip
import pathlib
import zipfile

import pytest

from sparse_experts.config import default_config
from sparse_experts.data.text import files
from sparse_experts.data.text.sources import open_source
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of

BOOK = "\n\n".join(f"Paragraph {i} é says {'a word ' * (i % 7)}." for i in range(400)).encode()


def open_files(path, **changes):
  c = default_config().data
  c.source = f"files:{path}"
  c.update(changes)
  return open_source(c)


def texts(source):
  return sorted(d["text"] for d in (*source.train, *source.valid))


def test_one_file_is_split_and_nothing_is_lost(tmp_path):
  (tmp_path / "book.txt").write_bytes(BOOK)
  documents, _ = files.read(str(tmp_path / "book.txt"))
  assert b"".join(d["text"] for d in documents) == BOOK
  assert all(d["text"].endswith(b"\n\n") for d in documents[:-1]) and len(documents) >= 10
  source = open_files(tmp_path / "book.txt", valid_share=.2)
  assert .2 <= sum(len(d["text"]) for d in source.valid) / len(BOOK) < .35


def test_compressed_and_plain_are_the_same(tmp_path):
  (tmp_path / "a.txt").write_bytes(BOOK)
  (tmp_path / "a.gz").write_bytes(gzip.compress(BOOK))
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
    z.writestr("a.txt", BOOK)
  plain, gz, zipped = (open_files(tmp_path / f"a.{kind}") for kind in ("txt", "gz", "zip"))
  assert texts(plain) == texts(gz) == texts(zipped)
  assert plain.fingerprint == gz.fingerprint


def test_sub_folders_are_domains(tmp_path):
  for folder, word in (("ships", b"sail "), ("trees/old", b"oak "), ("trees/new", b"elm ")):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "text.txt").write_bytes(word * 400)
  (tmp_path / ".hidden").write_bytes(b"\x00\xff")
  (tmp_path / "top.txt").write_bytes(b"top " * 400)
  with zipfile.ZipFile(tmp_path / "more.zip", "w") as z:
    z.writestr("inner/x.txt", "zip " * 400)
  source = open_files(tmp_path)
  assert source.domains == (".", "more.zip", "ships", "trees")
  shown = task_of(default_config()).domains(None, source)
  assert list(shown) == ["(no folder)", "more.zip", "ships", "trees"]  # what reports and traces call them
  first = {d["text"].split()[0].decode(): source.domains[d["domain"]] for d in (*source.train, *source.valid)}
  assert first == dict(sail="ships", oak="trees", elm="trees", top=".", zip="more.zip")


def test_domains_of_a_zip_are_its_folders(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
    z.mkdir("one") if hasattr(z, "mkdir") else None
    z.writestr("one/x.txt", BOOK)
    z.writestr("two/y.txt", BOOK[:3000])
  assert open_files(tmp_path / "a.zip").domains == ("one", "two")


def test_pieces_end_at_blank_lines_then_lines_then_characters():
  assert files.pieces(b"aaaa\nbb\n\ncccccc", 10) == [b"aaaa\nbb\n\n", b"cccccc"]
  assert files.pieces(b"aaaa\nbbbbbbbbb", 10) == [b"aaaa\n", b"bbbbbbbbb"]
  cut = files.pieces("é".encode() * 20, 7)
  assert b"".join(cut).decode() == "é" * 20
  assert [p.decode() for p in cut]  # every piece is whole characters


def test_stray_bytes_are_replaced_and_told(tmp_path, caplog):
  (tmp_path / "a.txt").write_bytes(BOOK + b"\xbd")
  documents, _ = files.read(str(tmp_path / "a.txt"))
  assert b"".join(d["text"] for d in documents) == BOOK + "�".encode()
  assert "1 bytes that are not UTF-8" in caplog.text


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(("make", "words"), [
    (lambda d: d / "nothing.txt", "nothing.txt' does not exist"),
    (lambda d: write(d / "empty.txt", b""), "empty.txt' holds no text"),
    (lambda d: d, "holds no text"),
    (lambda d: write(d / "a.png", b"\x89PNG\r\n\x00"), r"a.png' is not UTF-8 text \(byte 0x89 at 0\)"),
    (lambda d: write(d / "latin.txt", "Käse".encode("latin-1")), "latin.txt' is not UTF-8 text"),
    (lambda d: write(d / "nul.txt", b"a\0b"), r"byte 0x00 at 1"),
    (lambda d: write(d / "a.gz", b"not gzip"), "a.gz' cannot be read: Not a gzipped file"),
    (lambda d: write(d / "b.gz", gzip.compress(BOOK)[:-20]), "b.gz' cannot be read"),
    (lambda d: write(d / "a.zip", b"not zip"), "a.zip' cannot be read: File is not a zip file"),
    (lambda d: write(d / "short.txt", b"a"), "no validation documents; give it at least two"),
])
def test_mistakes(tmp_path, make, words):
  with pytest.raises(UserError, match=words) as e:
    open_files(make(tmp_path))
  assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_unreadable(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", BOOK)

  def refuse(self):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  with pytest.raises(UserError, match=r"a.txt' cannot be read: Permission denied"):
    open_files(path)
