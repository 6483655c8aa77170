"""The split is fixed by the text alone; the embedded text is there; mistakes are told in one line."""

import types

import pytest

from sparse_experts.config import default_config
from sparse_experts.data.text.sources import as_source, open_source, split
from sparse_experts.errors import UserError

DOCUMENTS = [dict(text=b"document %d " % i * 5, domain=i % 3) for i in range(200)]


def config_data(source="embedded", **changes):
  c = default_config().data
  c.source = source
  c.update(changes)
  return c


# What `package.module:function` may return.


def as_list(config_data):
  return [d["text"].decode() for d in DOCUMENTS]


def as_splits(config_data):
  return types.SimpleNamespace(train=DOCUMENTS[:150], valid=DOCUMENTS[150:], domains=("a", "b", "c"))


def without_valid(config_data):
  return types.SimpleNamespace(train=DOCUMENTS, valid=[])


def of_numbers(config_data):
  return [1, 2, 3]


def raising(config_data):
  return {}["no_such_key"]


class Documents:
  """Well-formed ones, but for number 7."""

  def __init__(self, seventh):
    self.seventh = seventh

  def __len__(self):
    return 20

  def __getitem__(self, i):
    return self.seventh(i) if i == 7 else f"document {i}"


@pytest.mark.parametrize(("documents", "words"), [
    (Documents(lambda i: 3), r"data \(Documents\): document 7 is of type int; give bytes, str"),
    (Documents(lambda i: {"words": b""}), r"document 7 has a 'text' of type NoneType; give bytes"),
    (Documents(lambda i: {"text": ["a"]}), r"document 7 has a 'text' of type list"),
    (Documents(lambda i: {"text": "a", "domain": "x"}), r"document 7 has domain 'x'; give a whole n"),
    (Documents(lambda i: {"text": "a", "domain": -1}), r"document 7 has domain -1"),
    (Documents(lambda i: "\ud800"), r"document 7 is no Unicode text \(surrogates not"),
    (Documents(lambda i: i / 0), r"document 7 raised ZeroDivisionError: .*_sources.py:\d+\)"),
    ((d for d in ["a", "b"]), r"data \(generator\) gives generator, without __len__ and __getitem__; gi"),
    ([], r"data \(list\) has no training documents; give it at least two"),
    (["", b""], r"data \(list\) has no training documents"),
    (types.SimpleNamespace(train=["a"], valid=[1]), r"data \(SimpleNamespace\).valid: document 0 is of"),
], ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_documents_that_are_none(documents, words):
  with pytest.raises(UserError, match=words) as e:
    as_source(documents, config_data(), name=f"data ({type(documents).__name__})")
  assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def embedded():
  return open_source(config_data())


def test_embedded_text(embedded):
  valid, train = (sum(len(d["text"]) for d in part) for part in (embedded.valid, embedded.train))
  assert valid >= 1_000_000 and train >= 8_000_000
  assert b"class JSONDecoder" in b"".join(d["text"] for d in (*embedded.train, *embedded.valid))
  assert "json" in embedded.domains and "test" not in embedded.domains
  assert open_source(config_data()).fingerprint == embedded.fingerprint
  assert open_source(config_data(valid_share=.2)).fingerprint != embedded.fingerprint


def test_nothing_is_in_both_splits(embedded):
  assert not {d["text"] for d in embedded.train} & {d["text"] for d in embedded.valid}


def test_split_depends_on_the_text_alone():
  _, valid = split(DOCUMENTS, .1, "x")
  moved = [dict(d, domain=7) for d in DOCUMENTS[::-1]]
  _, valid_again = split(moved, .1, "x")
  assert {d["text"] for d in valid} == {d["text"] for d in valid_again}
  _, valid_of_more = split(DOCUMENTS + [dict(text=b"one more", domain=0)], .1, "x")
  assert len({d["text"] for d in valid} ^ {d["text"] for d in valid_of_more}) <= 2


def test_copies_stay_on_one_side():
  train, valid = split(DOCUMENTS * 3, .1, "x")
  assert not {d["text"] for d in train} & {d["text"] for d in valid}
  assert len(train) + len(valid) == 600


@pytest.mark.parametrize("share", [.01, .08, .5, .99])
@pytest.mark.parametrize("n", [2, 3, 200])
def test_both_sides_get_something(n, share):
  train, valid = split(DOCUMENTS[:n], share, "x")
  assert train and valid and len(train) + len(valid) == n


def test_functions_as_sources():
  source = open_source(config_data(f"{__name__}:as_list"))
  assert len(source.train) + len(source.valid) == 200 and source.train[0]["domain"] == 0
  source = open_source(config_data(f"{__name__}:as_splits"))
  assert (len(source.train), len(source.valid), source.domains) == (150, 50, ("a", "b", "c"))


def test_an_object_as_source():
  source = as_source(DOCUMENTS, config_data())
  assert source.domains == ("0", "1", "2") and len(source.valid) >= 16


@pytest.mark.parametrize(("name", "words"), [
    ("embeded", "'embeded' is unknown; did you mean 'embedded'"),
    ("file:book.txt", "no module 'file'; did you mean 'files'"),
    ("files:", "names nothing; write files:PATH"),
    ("tfds:", "names nothing; write files:PATH or tfds:NAME"),
    ("/some/path", "is unknown; known: embedded, files:PATH"),
    ("no.such.module:f", "there is no module 'no.such.module'"),
    (f"{__name__}:as_lists", "has no function 'as_lists'; did you mean 'as_list'"),
    (f"{__name__}:DOCUMENTS", "has no function 'DOCUMENTS'"),
    (f"{__name__}:without_valid", "has no validation documents; give it"),
    (f"{__name__}:of_numbers", "document 0 is of type int; give bytes, str, or a dict"),
    (f"{__name__}:raising", r"test_sources.py:\d+: data.source='.*:raising' raised KeyError: 'no_such_"),
])
def test_mistakes(name, words):
  with pytest.raises(UserError, match=words) as e:
    open_source(config_data(name))
  assert "\n" not in str(e.value)


def test_no_share_for_validation():
  with pytest.raises(UserError, match=r"data.valid_share=0 must be between 0 and 1, say 0.08"):
    as_source(DOCUMENTS, config_data(valid_share=0.))
  with pytest.raises(UserError, match="has no training documents"):
    as_source([], config_data())


def test_an_error_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / "broken_source.py").write_text("import there_is_no_such_module\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
    open_source(config_data("broken_source:f"))
