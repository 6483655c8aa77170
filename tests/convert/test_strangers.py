"""Files that somebody made up: refused in one line before a tensor is read; none outside their folder is."""

import json
import os
import re
import time

import ml_dtypes
import numpy as np
import pytest

from sparse_experts.convert import eight_bits
from sparse_experts.convert.files import CONFIG, FILE, INDEX, MAX_HEADER, Folder, read_header, read_json
from sparse_experts.convert.read import read
from sparse_experts.errors import UserError
from tests.convert.checkpoints import DATA, changed, config_of, copy, save, tensors

TWO = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
       "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}


def header_file(path, header, data=bytes(16), length=None):
  """A file with this header, a dict or bytes, and these data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
  return str(path)


def with_b(**changes):
  return TWO | {"b": TWO["b"] | changes}


BAD_HEADERS = {
    "negative offsets": (with_b(data_offsets=[-8, 0]), "integer `-8`"),
    "offsets in words": (with_b(data_offsets=["8", "16"]), 'string "8"'),
    "offsets of floats": (with_b(data_offsets=[8.0, 16.0]), "floating point `8.0`"),
    "one offset": (with_b(data_offsets=[8]), "length 1"),
    "offsets that overlap": (with_b(data_offsets=[4, 12]), "invalid offset"),
    "the same place twice": (with_b(data_offsets=[0, 8]), "invalid offset"),
    "a gap": (with_b(data_offsets=[12, 20]), "invalid offset"),
    "offsets backwards": (with_b(data_offsets=[16, 8]), "invalid offset|b"),
    "behind the end": (with_b(shape=[4], data_offsets=[8, 24]), "not fully covered"),
    "bytes of no tensor": ({"a": TWO["a"]}, "not fully covered"),
    "no tensor at all": ({}, "not fully covered"),
    "a shape of floats": (with_b(shape=[2.0]), "floating point `2.0`"),
    "a negative shape": (with_b(shape=[-2]), "integer `-2`"),
    "a shape in words": (with_b(shape="2"), 'string "2"'),
    "another size than its shape": (with_b(shape=[3]), "invalid"),
    "a shape beyond 64 bits": (with_b(shape=[2**40, 2**40]), "overflow|invalid"),
    "a number of 5,000 digits": (json.dumps(TWO).replace("16", "1" * 5000).encode(), "number out of range"),
    "a list": ([1], "sequence"),
    "a name that is a number": (b"{1: 2}", "key must be a string"),
    "no type": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "missing field `dtype`"),
    "an unknown type": (with_b(dtype="F31"), "F31"),
    "NaN": (b'{"a": NaN}', "invalid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "invalid"),
    "many brackets": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion limit"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_made_up_header_is_refused_in_one_line(case, tmp_path):
  header, expected = BAD_HEADERS[case]
  path = header_file(tmp_path / FILE, header)
  with pytest.raises(UserError, match=rf"is no whole safetensors file \(.*({expected}).*\); fetch it") as e:
    read_header(path)
  assert len(str(e.value)) < 400 + len(path) and "\n" not in str(e.value)


def test_a_name_twice_is_refused_where_the_library_takes_one_of_them(tmp_path):
  entry = {"dtype": "F32", "data_offsets": [0, 16]}
  one, other = (json.dumps({"a": entry | {"shape": shape}})[1:-1] for shape in ([4], [2, 2]))
  header = f"{{{one}, {other}}}"
  with pytest.raises(UserError, match="'a' stands in it twice"):
    read_header(header_file(tmp_path / FILE, header.encode()))
  same_field = json.dumps(TWO).replace('"shape": [2]', '"shape": [1], "shape": [2]', 1)
  with pytest.raises(UserError, match="shape"):
    read_header(header_file(tmp_path / FILE, same_field.encode()))


@pytest.mark.parametrize("length, expected", [
    (MAX_HEADER + 20_000_000, "its header has 120,000,000 bytes, of which 100,000,000 are allowed"),
    (2**63, "9,223,372,036,854,775,808 bytes does not fit"), (0, "invalid|JSON")])
def test_the_length_of_a_header_is_bounded_before_it_is_read(length, expected, tmp_path):
  path = tmp_path / FILE
  with open(path, "wb") as f:
    f.write(length.to_bytes(8, "little") + b"{}")
    f.truncate(MAX_HEADER + 30_000_000)  # a hole: it takes no room
  with pytest.raises(UserError, match=expected):
    read_header(str(path))


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
  (tmp_path / "folder.safetensors").mkdir()
  os.mkfifo(tmp_path / "pipe.safetensors")
  os.mkfifo(tmp_path / "pipe.json")
  for name in ("folder", "pipe"):
    with pytest.raises(UserError, match="it is no file"):
      read_header(str(tmp_path / f"{name}.safetensors"))
  with pytest.raises(UserError, match=r"pipe\.json is no file"):
    read_json(str(tmp_path / "pipe.json"))


def test_data_at_an_odd_place_have_the_same_values(tmp_path):
  values = np.arange(4, dtype=np.float32)
  header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
  for spaces in range(4):
    path = header_file(tmp_path / f"{spaces}.safetensors", header + b" " * spaces, values.tobytes())
    found = read_header(path)
    assert np.array_equal(found["a"].map(), values)
    assert np.isfinite(np.array(found["a"].map()).sum())


def index_of(folder, **weight_map):
  copy("mixtral", folder)
  (folder / FILE).rename(folder / "inside.safetensors")
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return folder


@pytest.mark.parametrize("name", [
    "../outside/model.safetensors", "{outside}", "sub/model.safetensors", "..", ".", "", "inside.bin", 3,
    None, ["inside.safetensors"], "./inside.safetensors", "a\0b"])
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
  copy("mixtral", tmp_path / "outside")
  name = name.format(outside=tmp_path / "outside" / FILE) if isinstance(name, str) else name
  folder = index_of(tmp_path / "hf", first="inside.safetensors", second=name)
  with pytest.raises(UserError, match=r"has 'second' in .*no safetensors file of its folder; files else"):
    Folder(str(folder))


@pytest.mark.parametrize("text, expected", [
    ("[" * 200_000, "is not JSON"), ('{"weight_map": []}', "no weight_map"), ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"), ("3", "no JSON object"), ('"text"', "no JSON object"),
    ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands in it twice"),
    ("1" * 5000, "is not JSON"), ("\0\0", "is not JSON")])
def test_a_made_up_index_is_refused(text, expected, tmp_path):
  copy("mixtral", tmp_path / "hf")
  (tmp_path / "hf" / INDEX).write_text(text)
  with pytest.raises(UserError, match=expected):
    Folder(str(tmp_path / "hf"))


def test_shards_may_be_links_as_hubs_make_them(tmp_path):
  copy("mixtral", tmp_path / "blobs")
  folder = tmp_path / "snapshot"
  folder.mkdir()
  (folder / FILE).symlink_to(tmp_path / "blobs" / FILE)
  assert Folder(str(folder)).tensors.keys() == Folder(str(tmp_path / "blobs")).tensors.keys()


@pytest.mark.parametrize("case, fields", [
    ("mixtral", dict(num_hidden_layers=10**6)), ("mixtral", dict(vocab_size=10**15)),
    ("mixtral", dict(num_local_experts=10**9)), ("olmoe", dict(hidden_size=10**12)),
    ("qwen3_moe", dict(num_hidden_layers=10**15)), ("qwen2_moe", dict(moe_intermediate_size=10**15)),
    ("switch", dict(num_layers=10**9, num_decoder_layers=10**9)), ("switch", dict(d_kv=10**15)),
    ("deepseek_v3", dict(n_routed_experts=2**70)), ("deepseek_v3", dict(kv_lora_rank=10**10)),
    ("mixtral", dict(num_hidden_layers=42, num_local_experts=96))])
def test_sizes_that_the_files_cannot_have_are_refused_at_once(case, fields, tmp_path):
  copy(case, tmp_path / "hf")
  (tmp_path / "hf" / CONFIG).write_text(json.dumps(config_of(case) | fields))
  begin = time.perf_counter()
  fits_not, is_none = r"(=\d+|parameters), but.*fetch both", r"=\d+ is not a whole number from 1 to"
  with pytest.raises(UserError, match=rf"config\.json.*({fits_not}|{is_none})"):
    read(str(tmp_path / "hf"), str(tmp_path / "run"))
  assert time.perf_counter() - begin < 3  # it took minutes and gigabytes; the last case traces a model
  assert not (tmp_path / "run" / "config.json").exists()


def test_eight_bits_need_scales_of_their_shape(tmp_path):
  name = next(n for n in tensors(DATA / "mixtral") if n.endswith("q_proj.weight"))
  weight = tensors(DATA / "mixtral")[name].astype(ml_dtypes.float8_e4m3fn)
  rule = eight_bits.Rule(stated=True)
  for scale, said in ((None, "8 bits, but .* is not there"), (np.ones(3, np.float32), r"is float32 \[3\]"),
                      (np.ones((2, 2), np.float32), r"is float32 \[2, 2\]"),
                      (np.ones((1, 1), np.int32), "is int32")):
    folder = tmp_path / re.sub(r"\W", "", said)
    changed("mixtral", folder, tensor={name: weight, name + "_scale_inv": scale})
    with pytest.raises(UserError, match=said):
      Folder(str(folder)).scale_by(rule)
  scale = np.ones((1, 1), np.float32)
  good = Folder(str(changed("mixtral", tmp_path / "good", tensor={name: weight, name + "_scale_inv": scale})))
  good.scale_by(rule)
  assert good.read(name).dtype == np.float32


def test_what_is_written_passes_the_library(tmp_path):
  arrays = {"a": np.zeros((0, 3), np.float32), "b": np.ones((2, 2), np.float16), "c": np.ones((), np.int64)}
  save(tmp_path, arrays, {})
  assert {name: a.shape for name, a in tensors(tmp_path).items()} == {"a": (0, 3), "b": (2, 2), "c": ()}
