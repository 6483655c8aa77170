"""The reproduction of Chen et al. 2022: its data, rules and measures, and its quick form as a whole."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.understanding_moe import __main__ as command
from experiments.understanding_moe import data, models, report, train
from experiments.understanding_moe.entropy import dispatch_entropy
from experiments.understanding_moe.kept import Job, Kept
from sparse_experts.errors import UserError
from sparse_experts.moe import MoELayer, check_router
from sparse_experts.moe.grouped.layout import sorted_by_expert

L, W, S, D = data.L, data.W, data.S, data.D


@pytest.fixture(scope="module")
def drawn():
  """Setting 2 before the patches are shuffled."""
  signal_SW, centre_SW = data.directions(jax.random.key(0))
  patch_NLW, sign_N, cluster_N = data.draw(jax.random.key(1), data.SETTINGS[2], signal_SW, centre_SW, 4000)
  return tuple(map(np.asarray, (signal_SW, centre_SW, patch_NLW, sign_N, cluster_N)))


def test_directions_are_orthonormal(drawn):
  vector = np.concatenate(drawn[:2])
  np.testing.assert_allclose(vector @ vector.T, np.eye(2 * S), atol=1e-6)  # float32


def test_patches_are_what_the_paper_says(drawn):
  signal_SW, centre_SW, patch_NLW, sign_N, cluster_N = drawn
  setting, n = data.SETTINGS[2], np.arange(len(sign_N))
  vectors = (signal_SW, centre_SW, signal_SW)
  feature_NS, centre_NS, noise_NS = (patch_NLW[:, i] @ v.T for i, v in enumerate(vectors))
  alpha_N = feature_NS[n, cluster_N] * sign_N
  assert setting.alpha[0] <= alpha_N.min() < alpha_N.max() <= setting.alpha[1] + 1e-5
  assert alpha_N.min() < 0.51 and alpha_N.max() > 1.99  # the whole range, in 4,000 draws
  beta_N = centre_NS[n, cluster_N]
  assert setting.beta[0] - 1e-5 <= beta_N.min() < 1.01 and 1.99 < beta_N.max() <= setting.beta[1] + 1e-5
  # One direction each: the rest of the scores is rounding.
  other_N = np.abs(noise_NS).argmax(1)
  for score_NS, at_N in ((feature_NS, cluster_N), (centre_NS, cluster_N), (noise_NS, other_N)):
    assert np.abs(np.where(np.arange(S) == at_N[:, None], 0, score_NS)).max() < 1e-5
  gamma_N = noise_NS[n, other_N]
  size_N = np.abs(gamma_N)
  assert size_N.min() >= setting.gamma[0] - 1e-5 and 2.9 < size_N.max() <= setting.gamma[1] + 1e-5
  assert (other_N != cluster_N).all()
  # Shares of 4,000 draws, within 5 of their deviations.
  near = lambda share, p: abs(share - p) < 5 * math.sqrt(p * (1 - p) / 4000)
  assert near((sign_N > 0).mean(), 0.5) and near((gamma_N > 0).mean(), 0.5)
  assert near((gamma_N * sign_N > 0).mean(), 0.5)  # the noise's sign tells nothing
  for k in range(S):
    assert near((cluster_N == k).mean(), 1 / S) and near((other_N == k).mean(), 1 / S)
  # The random patch: sigma² / W in each number, sigma² in all.
  assert (patch_NLW[:, 3] ** 2).sum(-1).mean() == pytest.approx(4, rel=0.02)  # 0.02: 6 deviations of the mean


def test_examples_are_shuffled_scaled_and_split():
  training, test = data.examples(data.SETTINGS[1], 2000)
  signal_SW, centre_SW = data.directions(jax.random.split(jax.random.key(data.SETTINGS[1].seed), 3)[0])
  for part in (training, test):
    assert part.x_ND.shape == (2000, D)
    assert set(np.unique(part.label_N)) == {0, 1}
    centre_NL = np.einsum("nlw,nw->nl", part.x_ND.reshape(-1, L, W), centre_SW[part.cluster_N])
    beta_N, place_N = centre_NL.max(1), centre_NL.argmax(1)
    assert beta_N.min() >= 10 - 1e-3 and beta_N.max() <= 20 + 1e-3  # times 10
    assert np.abs(np.bincount(place_N, minlength=L) / 2000 - 0.25).max() < 0.05  # 5 deviations
  assert np.abs(training.x_ND - test.x_ND).max() > 1  # other examples
  again, _ = data.examples(data.SETTINGS[1], 2000)
  np.testing.assert_array_equal(again.x_ND, training.x_ND)


@pytest.mark.parametrize("cluster, expert, entropy", [
    ([0, 0, 1, 2, 3], [5, 5, 1, 0, 2], 0.0),  # experts 3 and 4 are empty
    ([0, 0, 1, 1, 2, 3], [0, 1, 2, 3, 4, 4], 2 / 6 * math.log(2)),
    (list(range(4)) * 8, sorted(list(range(8)) * 4), math.log(4)),
])
def test_dispatch_entropy(cluster, expert, entropy):
  assert dispatch_entropy(np.array(cluster), np.array(expert)) == pytest.approx(entropy, abs=1e-12)


def test_normalized_steps():
  w_EWF = jnp.zeros((3, 2, 2)).at[0].set(jnp.array([[3.0, 0.0], [0.0, 4.0]])).at[2, 0, 0].set(1e-30)
  grads = {"w": w_EWF, "b": jnp.zeros((3, 2)).at[0, 1].set(12.0)}
  step = train.normalized(grads)
  # Norms 5 and 12 are added, not taken of all numbers at once (13).
  np.testing.assert_allclose(step["w"][0], np.array([[3, 0], [0, 4]]) / 17, rtol=1e-6)
  np.testing.assert_allclose(step["b"][0], [0, 12 / 17], rtol=1e-6)
  assert not step["w"][1].any() and not step["b"][1].any()
  params = {"experts": {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}, "router": {"w": jnp.ones((2, 3))}}
  after = train.descend_mixture(params, {"experts": grads, "router": {"w": jnp.full((2, 3), 2.0)}})
  np.testing.assert_array_equal(after["experts"]["w"][1], 1.0)
  assert after["experts"]["b"][0, 1] == pytest.approx(1 - 1e-3 * 12 / 17)
  np.testing.assert_allclose(after["router"]["w"], 1 - 0.1 * 2.0, rtol=1e-6)


@pytest.mark.parametrize("loss, best, ends", [
    (0.3135, 0.35, False),  # a new minimum goes on, however low
    (0.3138, 0.3136, True),
    (0.3141, 0.3139, False),
    (0.3720, 0.35, True),
    (0.3690, 0.35, False),
])
def test_mixtures_stop(loss, best, ends):
  assert bool(train.mixture_stops(*map(jnp.float32, (7, loss, best)))) == ends


@pytest.mark.parametrize("step, loss, ends", [(500, 0.9, False), (501, 0.9, True), (501, 0.51, False)])
def test_single_models_stop(step, loss, ends):
  assert bool(train.single_stops(*map(jnp.float32, (step, loss, 0.5)))) == ends


def test_descent_ends_with_the_step_that_stops():
  losses = jnp.array([5.0, 1.0, 4.0, 3.0, 9.0])  # the fourth is above the best, not above the one before
  stops = lambda step, loss, best: (step > 2) & (loss > best)
  state, steps, loss, aux = train.descend(
      lambda state, step: (losses[step], jnp.float32(1), step), lambda state, grads: state + grads,
      jnp.float32(0), jnp.int32(0), stops, 5)
  assert (float(state), int(steps), float(loss), int(aux)) == (4, 4, 3.0, 3)


def test_loss_takes_probabilities_for_logits():
  sure = jnp.array([[50.0, -50.0], [-50.0, 50.0]])
  least = train.double_softmax_loss(sure, jnp.array([0, 1]))
  assert float(least) == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("gate", models.GATES)
def test_router_keeps_its_promises(gate):
  router = models.NoisyTopOne(8, gate)
  router.w[...] = jax.random.normal(jax.random.key(0), (W, 8))
  check_router(router, D)


def test_unknown_gate():
  with pytest.raises(UserError, match="gate='sotfmax' is unknown; did you mean 'softmax'"):
    models.NoisyTopOne(8, "sotfmax")


class Rows(nnx.Module):
  """The banks as `MoELayer` calls experts; the classes stand first in a row as wide as the input."""

  def __init__(self, banks):
    self.banks, self.num_experts, self.dropout = banks, banks.num_experts, 0.0

  def plan_layout(self, size_E, R, expected=None):
    return sorted_by_expert(size_E, R, expected)

  def grouped(self, x_RD, layout, dropout=None):
    expert_R = jnp.repeat(jnp.arange(self.num_experts), layout.size_E, total_repeat_length=x_RD.shape[0])
    y_RC = self.banks(x_RD, expert_R)
    return jnp.pad(y_RC, ((0, 0), (0, x_RD.shape[1] - models.CLASSES)))


@pytest.mark.parametrize("activation, gate", [("cubic", "raw"), ("linear", "softmax")])
def test_mixture_is_the_layer_and_its_formula(activation, gate):
  mixture = models.mixture(activation, gate, rngs=nnx.Rngs(0))
  mixture.router.w[...] = 0.1 * jax.random.normal(jax.random.key(2), (W, 8))
  mixture.experts.w[...] *= 1000
  mixture.experts.b[...] *= 1000
  x_ND, key = jax.random.normal(jax.random.key(3), (40, D)), jax.random.key(4)
  noise_key = jax.random.split(key)[0]  # the layer gives its router the first
  class_NC, routing = jax.jit(lambda x, key: mixture(x, key))(x_ND, noise_key)
  layer = MoELayer(mixture.router, Rows(mixture.experts))
  y_GTD, _ = jax.jit(lambda x, key: layer(x, key=key))(x_ND[None], key)
  # float32, sums in another order
  np.testing.assert_allclose(class_NC, y_GTD[0, :, :2], rtol=1e-5, atol=1e-5)

  # Word by word, in float64.
  w_EWF, b_EF, theta = (np.asarray(p[...], np.float64) for p in (mixture.experts.w, mixture.experts.b,
                                                                 mixture.router.w))
  noise_NE = np.asarray(jax.random.uniform(noise_key, (1, 40, 8)))[0]
  assert len(set(np.asarray(routing.expert[0]))) > 4
  for n in range(40):
    patches = np.asarray(x_ND[n], np.float64).reshape(L, W)
    score_E = patches.sum(0) @ theta + noise_NE[n]
    e = score_E.argmax()
    z_LF = patches @ w_EWF[e] + b_EF[e]
    act_F = (z_LF**3 if activation == "cubic" else z_LF).sum(0)
    gate_value = score_E[e] if gate == "raw" else np.exp(score_E[e]) / np.exp(score_E).sum()
    classes = np.array([act_F[:8].sum(), act_F[8:].sum()])
    np.testing.assert_allclose(class_NC[n], gate_value * classes, rtol=1e-4, atol=1e-5)


def test_without_a_key_there_is_no_noise():
  router = models.NoisyTopOne(8, "raw")
  tokens = models.Tokens(mask=jnp.ones((1, 5), bool))
  gate = jax.jit(lambda key: router(jnp.ones((1, 5, D)), tokens, None, key).gate)
  assert not gate(None).any()  # scores start at zero
  noisy = gate(jax.random.key(0))
  assert 0.3 < noisy.min() < noisy.max() < 1  # the largest of eight U(0, 1)


def test_parts_have_the_gradient_of_the_whole(monkeypatch):
  rng = np.random.default_rng(0)
  draw = lambda low, high: jnp.asarray(rng.integers(low, high, 24, dtype=np.int32))
  examples = data.Examples(jnp.asarray(rng.normal(size=(24, D)), jnp.float32), draw(0, 2), draw(0, S))
  params = jnp.asarray(rng.normal(size=(D, 2)), jnp.float32)
  objective = lambda p, part, key: (train.double_softmax_loss(part.x_ND @ p, part.label_N), part.cluster_N)
  found = []
  for size in (24, 8):
    monkeypatch.setattr(train, "PART", size)
    found.append(jax.jit(train.in_parts(objective))(params, examples, jax.random.key(0)))
  (loss, grads, _), (loss_in_parts, grads_in_parts, cluster) = found
  assert float(loss) == pytest.approx(float(loss_in_parts), rel=1e-6)  # float32
  np.testing.assert_allclose(grads, grads_in_parts, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(cluster.reshape(-1), examples.cluster_N)


@pytest.fixture
def runs():
  """Made up: as published, with a deviation of one point."""
  made = []
  for setting, models_ in report.ACCURACY.items():
    for model, (mean, _) in models_.items():
      entropy = report.ENTROPY[setting].get(model, (None,))[0]
      same = dict(setting=setting, model=model, steps=501, accuracy_no_noise=mean / 100, seconds=1,
                  entropy=entropy)
      made += [same | dict(seed=s, accuracy=(mean + 2 * s - 1) / 100) for s in range(2)]
  return made


def test_checks_hold_for_the_published_figures(runs):
  found = report.summary(runs)
  assert found[1]["mixture cubic"]["accuracy"] == pytest.approx((99.46, math.sqrt(2)))
  assert len(report.checks(found, quick=False)) == 16
  assert all(c["holds"] for c in report.checks(found, quick=False) + report.checks(found, quick=True))
  assert "| 1       | mixture cubic  | 2    | 99.46 (1.41) | 99.46 (0.55) |" in report.table(found)


@pytest.mark.parametrize("model, accuracy, fails", [
    ("mixture linear", 93 + 2 * 2.11 + 2 - 0.01, []),
    ("mixture linear", 93 - 2 * 2.11 - 2 - 0.01, ["accuracy of mixture linear"]),
    ("single linear", 79, ["models by accuracy"]),
])
def test_checks_fail(runs, model, accuracy, fails):
  for run in runs:
    if run["setting"] == 1 and run["model"] == model:
      run["accuracy"] = accuracy / 100
  made = report.checks(report.summary(runs), quick=False)
  assert [c["what"].removeprefix("setting 1: ") for c in made if not c["holds"]] == fails


def test_done_runs_are_kept(tmp_path):
  kept = Kept(str(tmp_path), {"examples": 4})
  kept.add(Job(1, "mixture cubic", 0), {"accuracy": 1.0})
  assert list(Kept(str(tmp_path), {"examples": 4}).runs) == [Job(1, "mixture cubic", 0)]
  with pytest.raises(UserError, match="holds runs of .*'examples': 4.*, not of .*'examples': 5"):
    Kept(str(tmp_path), {"examples": 5})
  (tmp_path / "results.json").write_text("{")
  with pytest.raises(UserError, match="is no JSON; remove it"):
    Kept(str(tmp_path), {"examples": 4})


@pytest.mark.parametrize("arguments, words", [
    (["--qiuck"], "--qiuck"),
    (["--gate=hard"], "invalid choice: 'hard'"),
    (["--out=a_file"], "--out=a_file cannot be made (File exists)"),
    (["--out=a_file/results"], "--out=a_file/results cannot be made (Not a directory)"),
])
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a_file").touch()
  assert command.main(arguments) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1


@pytest.mark.slow
def test_quick_form(tmp_path, capsys):
  """4,000 examples, two runs of each: cubic > linear > best single, and only cubic experts specialise."""
  code = command.main(["--quick", f"--out={tmp_path}"])
  printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
  assert code == 0, printed
  for setting in "1234":
    mean = {model: figures["accuracy"][0] for model, figures in results["summary"][setting].items()}
    assert mean["mixture cubic"] > mean["mixture linear"] > max(mean["single linear"], mean["single cubic"])
    entropy = {model: figures["entropy"] for model, figures in results["summary"][setting].items()}
    assert entropy["mixture cubic"][0] < 0.6 < entropy["mixture linear"][0]
  assert (tmp_path / "table.md").read_text() in printed
  assert (tmp_path / "picture.png").stat().st_size > 10_000
  assert command.main(["--quick", f"--out={tmp_path}"]) == 0
  assert "32 runs, 32 of them done" in capsys.readouterr().out
