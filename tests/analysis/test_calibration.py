"""Calibration by hand, of forecasters whose calibration is known, and of runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.analysis import calibration
from sparse_experts.analysis.calibration import Tally, calibrate, calibration_errors
from sparse_experts.config import default_config
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of
from tests.analysis.tiny_run import SEQ2SEQ, tiny_dataset, tiny_run
from tests.tasks.test_images import BATCH, LOGITS
from tests.training.test_measures import undefined


def tally(confidence_N, right_N, document_N=None):
  """Scores are not looked at."""
  found, none_N = Tally(), np.zeros(len(confidence_N))
  found.add(confidence_N, right_N, none_N, none_N,
            np.arange(len(confidence_N)) if document_N is None else document_N)
  return found


def forecasts(rng, documents=300, tokens=10, over=0.0, alike=0.0):
  """(confidence, right, document): right with probability confidence - over, or in a share of documents all
  tokens have the first one's confidence and outcome."""
  confidence_DT = rng.uniform(0.2, 0.95, (documents, tokens))
  right_DT = rng.random((documents, tokens)) < confidence_DT - over
  same = np.flatnonzero(rng.random(documents) < alike)
  confidence_DT[same], right_DT[same] = confidence_DT[same][:, :1], right_DT[same][:, :1]
  document_DT = np.broadcast_to(np.arange(documents)[:, None], (documents, tokens))
  return confidence_DT.ravel(), right_DT.ravel(), document_DT.ravel()


def test_errors_by_hand():
  """Three forecasts of 0.30, two right; two of 0.90, one right; in bins of equal width, 4 and 13."""
  found = tally([0.3, 0.3, 0.3, 0.9, 0.9], [1, 1, 0, 1, 0]).report()
  low, high = 2 / 3 - 0.3, 0.9 - 0.5
  assert found["equal_width/ece"] == pytest.approx((3 * low + 2 * high) / 5)
  assert found["equal_width/ece2"] == pytest.approx(math.sqrt((3 * low**2 + 2 * high**2) / 5))
  # Independent forecasts: Kumar et al.'s accuracy (1 - accuracy) / (n - 1).
  debiased = (3 * (low**2 - 2 / 3 * 1 / 3 / 2) + 2 * (high**2 - 1 / 2 * 1 / 2)) / 5
  assert debiased < 0 and found["equal_width/ece2_debiased"] == 0
  assert found["accuracy"] == 3 / 5 and found["overconfidence"] == pytest.approx(0.54 - 0.6)
  assert (found["targets"], found["groups"]) == (5, 5)


def test_the_debiased_square_by_hand():
  """Tokens of a document are one draw: two documents of 2 and 1 tokens, a ratio's variance."""
  n_GS, gap_GS = np.array([[2.0], [1.0]]), np.array([[1.0], [-0.25]])
  found = calibration_errors(np.stack([n_GS, 0 * n_GS, gap_GS]), np.ones((1, 2)))
  gap = 0.75 / 3
  variance = 2 / 1 * ((1 - 2 * gap)**2 + (-0.25 - gap)**2) / 9
  assert found.square[0] == found.usable[0] == pytest.approx(gap**2)
  assert found.debiased[0] == pytest.approx(gap**2 - variance)
  alone = calibration_errors(np.stack([n_GS, 0 * n_GS, gap_GS])[:, :1], np.ones((1, 1)))
  assert alone.ece[0] == 0.5 and alone.debiased[0] == alone.usable[0] == 0


def test_bins_of_equal_mass_and_of_equal_width():
  number_C = np.zeros(calibration.CELLS)
  cell = np.arange(100, 160)
  number_C[cell] = 10
  assert np.bincount(calibration.equal_mass(number_C)[cell]).tolist() == [4] * 15
  width_C = calibration.equal_width()
  for x in (0.0, 0.0666, 0.0667, 0.5, 0.9332, 0.9334, 1.0):
    cell = np.searchsorted(calibration._EDGES, x, side="right")
    assert width_C[cell] == min(int(x * 15), 14), x


def test_documents_of_one_group_and_parts_add_up():
  """Documents 0 and GROUPS are one; forecasts may come in any parts."""
  rng = np.random.default_rng(0)
  confidence_N, right_N, document_N = forecasts(rng, 30)
  whole, parts = tally(confidence_N, right_N, document_N + 1), Tally()
  for part in np.array_split(rng.permutation(300), 7):
    parts.add(confidence_N[part], right_N[part], np.zeros(len(part)), np.zeros(len(part)),
              document_N[part] + 1 + calibration.GROUPS)
  a, b = whole.report(50), parts.report(50)
  assert a["groups"] == 30 and a["intervals"]["accuracy"] == pytest.approx(b["intervals"]["accuracy"])
  assert a["equal_mass/ece2_debiased"] == pytest.approx(b["equal_mass/ece2_debiased"])


def test_one_document_has_no_interval_and_none_no_figure():
  found = tally([0.5, 0.7], [1, 0], [3, 3]).report()
  assert set(found["intervals"].values()) == {None} and found["accuracy"] == 0.5
  with pytest.raises(ValueError, match="no forecast was added"):
    Tally().report()


def test_plain_errors_of_a_calibrated_forecaster_are_biased_and_debiased_ones_are_not():
  """40 forecasters that are calibrated: the mean of the debiased square is 0 within three of its deviations,
  the plain one is the noise that was taken off."""
  rng, debiased, plain, covered = np.random.default_rng(0), [], [], np.zeros(2)
  for _ in range(40):
    cells = tally(*forecasts(rng))
    sums = calibration._merge(cells._cells_3GC, calibration.equal_width())
    errors = calibration_errors(sums, np.ones((1, calibration.GROUPS)))
    debiased.append(errors.debiased[0])
    plain.append(errors.square[0])
    found = cells.report(100)
    for i, bins in enumerate(("equal_mass", "equal_width")):
      covered[i] += found["intervals"][f"{bins}/ece2_debiased"][0] == 0
      assert found[f"{bins}/ece"] > 0.01 and found[f"{bins}/ece2"] > found[f"{bins}/ece2_debiased"]
  error = np.std(debiased, ddof=1) / math.sqrt(40)
  assert abs(np.mean(debiased)) < 3 * error and np.mean(plain) > 10 * error
  assert covered.min() >= 38  # intervals of a calibrated forecaster are wide: more than 95% hold 0


def test_every_figure_has_its_entry():
  found = tally(*forecasts(np.random.default_rng(0), 20)).report(20)
  assert not undefined(f"calibration/{name}" for name in found)
  assert set(found["intervals"]) < set(found) and all(found["intervals"].values())


def test_an_overconfident_forecaster_is_found():
  """By 0.15 everywhere, so that is its error in any bins. Resamples are noisier by as much as was taken off,
  so the interval lies around the debiased square only if it is measured from the plain one."""
  found = tally(*forecasts(np.random.default_rng(1), over=0.15)).report()
  debiased, (low, high) = found["equal_mass/ece2_debiased"], found["intervals"]["equal_mass/ece2_debiased"]
  assert 0.1 < low < 0.15 < high < 0.2 and debiased == pytest.approx(0.15, abs=0.03)
  noise = found["equal_mass/ece2"]**2 - debiased**2
  assert abs((low**2 + high**2) / 2 - debiased**2) < 0.5 * noise


@pytest.mark.slow
@pytest.mark.parametrize("over", [0.0, 0.1])
def test_intervals_cover_what_is_true(over):
  """150 simulated data sets of 300 documents; in half of the documents all tokens are alike, so tokens are no
  independent draws. 95% intervals hold the truth 142.5 times on average; fewer than 134 times by chance once
  in 700 (binomial). Drawn token by token they hold it 59 times of 100."""
  rng, documents_inside, tokens_inside = np.random.default_rng(0), {}, 0
  truth = {"accuracy": 0.575 - over, "overconfidence": over, "equal_mass/ece2_debiased": over,
           "equal_width/ece2_debiased": over}
  for i in range(150):
    confidence_N, right_N, document_N = forecasts(rng, over=over, alike=0.5)
    intervals = tally(confidence_N, right_N, document_N).report(400)["intervals"]
    for name, value in truth.items():
      low, high = intervals[name]
      documents_inside[name] = documents_inside.get(name, 0) + (low <= value <= high)
    if i < 50:
      low, high = tally(confidence_N, right_N).report(400)["intervals"]["overconfidence"]
      tokens_inside += low <= over <= high
  assert min(documents_inside.values()) >= 134 and tokens_inside < 42, (documents_inside, tokens_inside)


def test_a_decoders_forecasts_are_those_of_its_losses():
  """On two devices, whose last batch has rows to fill up; documents are those of the tokens."""
  run = tiny_run()
  data, n = tiny_dataset(run), 13
  found = calibrate(tiny_run(mesh=(2, 1, 1)), data, n).report(20)
  records = [data[i] for i in range(n)]
  batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
  logits_BLV, _ = run.model(batch)
  log_p_BLV = np.asarray(jax.nn.log_softmax(logits_BLV), np.float64)
  nats, brier, confidence, right, documents = [], [], [], [], set()
  for b in range(n):
    for l in range(32):
      if batch["weights"][b, l] and batch["target_bytes"][b, l]:
        target, p_V = batch["targets"][b, l], np.exp(log_p_BLV[b, l])
        nats.append(-log_p_BLV[b, l, target])
        brier.append(sum((p - (v == target))**2 for v, p in enumerate(p_V)))
        confidence.append(p_V.max())
        right.append(p_V.argmax() == target)
        documents.add(int(data.documents(b)[l]))
  assert (found["targets"], found["groups"]) == (len(nats), len(documents))
  expected = {"nats": np.mean(nats), "brier": np.mean(brier), "accuracy": np.mean(right),
              "overconfidence": np.mean(confidence) - np.mean(right)}
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
  assert sum(of["share"] for of in found["bins"]) == pytest.approx(1)


@pytest.mark.parametrize("objective, p", [("softmax", [0.5, 0.3, 0.2]), ("sigmoid", [0.9, 0.4, 0.2])])
def test_images_by_hand(objective, p):
  """Of class 1, so the likeliest one is wrong."""
  config = default_config()
  config.data.objective = objective
  logits = jnp.log(jnp.array([p])) - (jnp.log(1 - jnp.array([p])) if objective == "sigmoid" else 0)
  batch = {"targets": jnp.array([[1]]), "shares": jnp.ones((1, 1)), "weights": jnp.ones(1)}
  found = task_of(config).forecasts(logits, batch)
  assert float(found.confidence[0, 0]) == pytest.approx(max(p)) and not found.right[0, 0]
  assert float(found.brier[0, 0]) == pytest.approx(p[0]**2 + (1 - p[1])**2 + p[2]**2, rel=1e-5)
  scored = task_of(config).forecasts(jnp.array(LOGITS), BATCH).scored
  assert scored.shape == (3, 1) and scored[:, 0].tolist() == [True, True, False]


def test_spans_belong_to_the_document_in_the_middle():
  run = tiny_run(**SEQ2SEQ)
  data = tiny_dataset(run)
  assert data.documents(0).shape == (1,)
  numbers = [int(data.documents(i)[0]) for i in range(data.num_windows)]
  assert set(numbers) == set(range(4)) and np.bincount(numbers).max() < len(numbers) / 2


def test_pairs_have_no_forecasts():
  config = default_config()
  config.data.objective = "contrastive"
  with pytest.raises(UserError, match="calibration is of text or of images with classes, and the model reads "
                                      "pairs .*leave --calibration out"):
    task_of(config).check_forecasts()
