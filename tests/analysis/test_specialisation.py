"""What experts specialise in, against loops, scipy and routings whose specialisation is known."""

import math

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from sparse_experts.analysis import profiles, token_text
from sparse_experts.analysis import specialisation as spec
from sparse_experts.data import make_tokenizer

E, C = 4, 6


def planted(strength: float, number: int = 8000):
  """(category, expert, example) of assignments; with that probability category c goes to expert c mod E."""
  rng = np.random.default_rng(0)
  category_N = rng.choice(C, number, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
  free = rng.random(number) >= strength
  expert_N = np.where(free, rng.integers(E, size=number), category_N % E)
  return category_N, expert_N, np.arange(number) // 100


def test_counts_and_lifts_by_two_loops():
  category_N, expert_N, example_N = planted(0.3, 500)
  count_HCE = spec.halves(category_N, C, expert_N, E, example_N)
  lift_CE = spec.lifts(count_HCE.sum(0))
  for c in range(C):
    for e in range(E):
      for half in range(2):
        assert count_HCE[half, c, e] == sum(
            (a, b, r % 2) == (c, e, half) for a, b, r in zip(category_N, expert_N, example_N))
      mine, all_of = sum(expert_N == e), sum(category_N == c) / 500
      assert lift_CE[c, e] == pytest.approx(sum((category_N == c) & (expert_N == e)) / mine / all_of)


def test_typicality_is_the_log_likelihood_ratio_with_a_sign():
  category_N, expert_N, _ = planted(0.3, 500)
  count_CE = spec.counts(category_N, expert_N, C, E)
  for (c, e), found in np.ndenumerate(spec.typicality(count_CE)):
    k, n, m = count_CE[c, e], count_CE[c].sum(), count_CE[:, e].sum()
    table = [[k, n - k], [m - k, 500 - n - m + k]]
    expected = chi2_contingency(table, correction=False, lambda_="log-likelihood")[0]
    assert found == pytest.approx(math.copysign(expected, k - n * m / 500), abs=1e-6)


def test_a_rare_token_that_always_goes_one_way_is_less_typical_than_a_frequent_one():
  count_CE = np.array([[2, 0], [300, 100], [200, 400]])
  assert spec.typicality(count_CE)[:, 0].argmax() == 1
  assert spec.lifts(count_CE)[:, 0].argmax() == 0


def correlation(x, y, weight):
  """Pearson's, weighted, in plain Python."""
  mean = lambda z: sum(w * a for w, a in zip(weight, z)) / sum(weight)
  dx, dy = [a - mean(x) for a in x], [b - mean(y) for b in y]
  over = lambda p, q: sum(w * a * b for w, a, b in zip(weight, p, q))
  return over(dx, dy) / math.sqrt(over(dx, dx) * over(dy, dy))


def test_split_half_by_hand():
  """Category 5 is in one half only, so it does not count."""
  category_N, expert_N, example_N = planted(0.3, 500)
  keep = (category_N < 5) | (example_N % 2 == 0)
  count_HCE = spec.halves(*(x[keep] if isinstance(x, np.ndarray) else x for x in (
      category_N, C, expert_N, E, example_N)))
  found = spec.split_half(count_HCE)
  count_HCE = count_HCE[:, :5]
  share = [count_HCE[h].sum(1) / count_HCE[h].sum() for h in range(2)]
  for e in range(E):
    lift = [count_HCE[h, :, e] / count_HCE[h, :, e].sum() / share[h] for h in range(2)]
    assert found[e] == pytest.approx(correlation(*lift, (share[0] + share[1]) / 2))


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_planted_specialisation_is_reliable_and_a_random_one_is_not(strength):
  category_N, expert_N, example_N = planted(strength)
  found = spec.reliability({"class": (category_N, C)}, expert_N, example_N, E)["class"]
  information = spec.information(spec.counts(category_N, expert_N, C, E))
  assert found["information"] == pytest.approx(information)
  if strength:
    assert found["split_half"].min() > 0.97 > found["permuted"].max()
    assert information > 30 * found["permuted_information"] > 0
  else:
    assert abs(found["split_half"].mean()) < 0.5 and (found["split_half"] < found["permuted"]).mean() > 0.5
    assert information < 3 * found["permuted_information"]


def test_information_of_known_tables():
  assert spec.information(np.diag([5, 5, 5, 5])) == pytest.approx(math.log(4))
  assert spec.information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)


def test_normalised_information_of_known_tables():
  """1 where each tells the other, 0 where neither does; else over the geometric mean of the entropies."""
  assert spec.normalised_information(np.diag([3, 5, 9])) == pytest.approx(1)
  assert spec.normalised_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-6)
  # Two categories of 4 share expert 0: I = H(E) = log 2 = H(C) / 2.
  assert spec.normalised_information(np.array([[6, 0], [6, 0], [0, 6], [0, 6]])) == pytest.approx(
      math.log(2) / math.sqrt(math.log(4) * math.log(2)))
  assert math.isnan(spec.normalised_information(np.array([[4, 2, 1]])))
  assert math.isnan(spec.normalised_information(np.array([[4, 0], [3, 0]])))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_specialisation_is_what_permutations_do_not_explain(strength):
  """500 counts of 6 categories and 4 experts overstate the information of independent ones."""
  category_N, expert_N, _ = planted(strength, 500)
  found = spec.specialisation(category_N, C, expert_N, E, np.arange(500))
  rng = np.random.default_rng(1)
  by_loops = [spec.normalised_information(spec.counts(category_N, rng.permutation(expert_N), C, E))
              for _ in range(100)]
  # Means of 100 draws each, whose deviation is about a third of their mean.
  assert found["permuted"] == pytest.approx(np.mean(by_loops), rel=0.2)
  assert found["normalised"] - found["permuted"] == pytest.approx(found["above"])
  assert abs(found["above"]) < 0.01 if strength == 0 else found["above"] > 0.03
  assert found["normalised"] > (0.8 if strength == 1 else 0)


def test_records_exchange_categories_that_are_theirs():
  """Each record prefers an expert of its own, whatever its domain: that says nothing of the domain, though
  permutations of single assignments would take it for specialisation. Means of 40 draws of the records."""
  rng, above = np.random.default_rng(0), []
  example_N = np.repeat(np.arange(30), 20)
  for _ in range(40):
    domain_X, favourite_X = rng.integers(3, size=30), rng.integers(E, size=30)
    expert_N = np.where(rng.random(600) < 0.7, favourite_X[example_N], rng.integers(E, size=600))
    above.append([spec.specialisation(domain_X[example_N], 3, expert_N, E, examples_N, 30)["above"]
                  for examples_N in (example_N, np.arange(600) // 7)])
  (of_records, alone), (error, _) = np.mean(above, 0), np.std(above, 0) / math.sqrt(40)
  assert abs(of_records) < 3 * error and alone > 5 * error
  learnt = spec.specialisation(domain_X[example_N], 3, domain_X[example_N], E, example_N)
  assert learnt["normalised"] == pytest.approx(1) and learnt["above"] > 0.8
  assert math.isnan(spec.specialisation(0 * example_N, 3, expert_N, E, example_N)["above"])


def test_hashing_tells_the_token_and_nothing_else():
  """Ids of three classes; second choices are other experts."""
  rng = np.random.default_rng(0)
  traced = dict(token_id=np.repeat(rng.integers(40, size=500), 2), rank=np.tile([0, 1], 500),
                expert=np.zeros(1000, np.int32))
  found = profiles.hashed(traced, 8)
  first, second = found["expert"][::2], found["expert"][1::2]
  assert (second == (first + 1) % 8).all() and len(set(first.tolist())) == 8
  assert len(set(zip(traced["token_id"].tolist(), traced["rank"].tolist()))) == len(set(zip(
      traced["token_id"].tolist(), traced["rank"].tolist(), found["expert"].tolist())))
  assert (traced["expert"] == 0).all()


def test_what_cannot_be_correlated_is_nan():
  two = spec.halves(np.arange(40) % 2, 2, np.arange(40) % 3, 3, np.arange(40) // 7)
  assert np.isnan(spec.split_half(two)).all()
  category_N, expert_N, example_N = planted(0.3, 500)
  idle = spec.split_half(spec.halves(category_N, C, expert_N, E + 1, example_N))
  assert np.isfinite(idle[:E]).all() and np.isnan(idle[E])


CLASSES = {
    "lowercase letter": ["a", "é"], "uppercase letter": ["A"], "other letter": ["中"], "digit": ["7", "12"],
    "space": [" ", "   "], "newline": ["\n", "\n  "], "tab": ["\t"], "bracket": ["(", "]", "(("],
    "quote": ["'"], "punctuation": ["."], "symbol": ["+", " +="], "underscore": ["_"],
    "control character": ["\x00"], "part of a character": ["<0xE2>"], "word": [" the"],
    "part of a word": ["ing"], "capitalised word": [" The"], "mixed": ["):", "x1"]}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_tokens(name):
  assert {token_text.text_class(text) for text in CLASSES[name]} == {name}


def test_tokens_are_shown():
  assert token_text.visible(" a\n\tb\x1b") == "␣a⏎⇥b<0x1B>"
  tokenizer = make_tokenizer("bytes")
  text = tokenizer.encode("a é.")
  ids = [0, *text, 1, tokenizer.sentinel(7), tokenizer.vocab_size - 1]
  assert [tokenizer.piece(int(i)) for i in ids] == [
      "<bos>", "a", " ", "<0xC3>", "<0xA9>", ".", "<eos>", "<extra_id_7>", "<unused>"]
  assert [token_text.token_class(tokenizer, int(i)) for i in ids[:2]] == ["mark", "lowercase letter"]
  words = make_tokenizer("words", ["big red box"])
  assert [words.piece(int(i)) for i in words.encode("red dog")] == ["red", "<unk>"]


def test_pieces_of_sentencepiece():
  tokenizer = make_tokenizer("sentencepiece:300", ["the theme of the thesis"] * 50)
  ids = tokenizer.encode("the\né")
  pieces = [tokenizer.piece(int(i)) for i in ids]
  assert "".join(pieces) == "the\n<0xC3><0xA9>"


def test_a_context_stays_in_its_sequence():
  tokenizer = make_tokenizer("bytes")
  one, two = tokenizer.encode("first é\n"), tokenizer.encode("second one")
  ids = np.concatenate([one, [1], two])
  segments = np.repeat([1, 2], [len(one) + 1, len(two)])
  found = token_text.context(tokenizer, ids, segments, len(one) + 1)
  assert found == {"before": "", "token": "s", "after": "econd one"}
  assert token_text.context(tokenizer, ids, segments, 7) == {
      "before": "first ", "token": "<0xA9>", "after": "⏎<eos>"}
  words = make_tokenizer("words", ["a big red box"])
  ids = words.encode("a red box")
  found = token_text.context(words, ids, np.ones(3, int), 1)
  assert found == {"before": "a ", "token": "red", "after": " box"}
