"""Numbers are made of sums, last; files stay whole."""

import io
import json

import numpy as np
import pytest

from sparse_experts.training import metrics


def test_pairs_are_divided_once_and_last():
  a = {"loss": (6.0, 2.0), "router/d/01/load": (np.array([3.0, 1.0]), 4.0), "router/d/01/dropped": (1.0, 4.0)}
  b = {"loss": (1.0, 1.0), "router/d/01/load": (np.array([0.0, 4.0]), 4.0), "router/d/01/dropped": (0.0, 4.0)}
  numbers = metrics.reduce(metrics.add(metrics.add({}, a), b))
  assert numbers == {"loss": 7 / 3, "router/d/01/load_max_mean": 5 / 4, "router/d/01/load_cv": 1 / 4,
                     "router/d/01/effective_share": pytest.approx(4 / (3 ** (3 / 8) * 5 ** (5 / 8))),
                     "router/d/01/dropped": 1 / 8}


def test_nothing_counted_is_no_number():
  assert metrics.reduce({"marks": (0.0, 0.0), "router/d/01/load": (np.zeros(4), 0.0)}) == {}


def load(*load_E):
  return {"router/d/01/load": (np.array(load_E, np.float64), 1.0)}


def test_load_by_expert_and_by_blocks():
  """64 experts are shown; 96 as 48 pairs, 130 as 26 fives, 67 only as a whole."""
  shares = lambda *load_E: metrics.shares(load(*load_E)).get("router/d/01/load")
  assert shares(2, 0, 1) == [0.6667, 0.0, 0.3333] and shares(0, 0) is None
  assert [len(shares(*[1] * n)) for n in (64, 96, 128, 130, 67)] == [64, 48, 64, 26, 1]
  assert shares(*[1, 2] * 48)[0] == round(3 / 144, 5) and shares(*range(128))[:2] == [1.23e-4, 6.152e-4]


def test_effective_share_at_its_ends():
  share = lambda *load_E: metrics.reduce(load(*load_E))["router/d/01/effective_share"]
  assert share(3, 3, 3, 3) == pytest.approx(1) and share(0, 7, 0, 0) == pytest.approx(1 / 4)
  assert share(1, 1, 0, 0) == pytest.approx(1 / 2)


def test_tensorboard_takes_numbers_alone(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(metrics.EventsWriter, "write_event", lambda self, event: written.append(event))
  board = metrics.TensorBoard(str(tmp_path), 0)
  board.write({"step": 1, "loss": 2.0, "router/d/01/load": [0.5, 0.5], "run": {"devices": 1}, "measure": "m"})
  board.close()
  assert [value.tag for value in written[-1].summary.value] == ["loss"]


def test_dead_is_under_a_tenth_of_an_even_share():
  assert metrics.dead_experts(np.array([100, 100, 5.1, 1.0])) == 2  # the border: 206.1 / 40 = 5.15
  assert metrics.dead_experts(np.array([100, 100, 5.2, 1.0])) == 1
  assert metrics.dead_experts(np.full(8, 3.0)) == 0


def test_dead_experts_look_back_a_hundred_steps():
  dead = metrics.DeadExperts(window=100)
  pairs = lambda load: {"router/d/01/load": (np.array(load, np.float64), 1.0)}
  count = lambda load, steps: dead(pairs(load), steps)["router/d/01/dead"]
  assert count([50, 50], 50) == 0
  assert [count([100, 0], 50) for _ in range(2)] == [0, 1]  # the third interval has pushed the first one out
  assert count([60, 40], 10) == 0


def test_json_lines_forget_what_was_not_saved(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  first = metrics.JsonLines(path, 0)
  for step in (1, 2, 3):
    first.write({"step": step, "loss": 1.0 / step})
  first.close()
  with open(path, "a") as f:
    f.write('{"step": 4, "lo')  # killed here
  second = metrics.JsonLines(path, 2)
  second.write({"step": 3, "loss": float("nan")})
  second.close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3] and np.isnan(rows[-1]["loss"])


def test_progress_line():
  stream = io.StringIO()
  row = {"step": 20, "loss": 2.5, "tokens_per_second": 12345.6}
  for layer in ("decoder/03", "decoder/01"):
    row |= {f"router/{layer}/{k}": v for k, v in dict(load_max_mean=1.25, dropped=0.034, entropy=2.0).items()}
  row |= {"router/decoder/03/dead": 2, "router/encoder/00/processed": 0.5}  # the last has no experts
  row |= {"router/decoder/01/experts_per_token": 2.0, "router/decoder/03/experts_per_token": 1.625}  # k is 2
  metrics.Progress(100, {"decoder/01": 2, "decoder/03": 2}, stream).write(row, seconds_per_step=1.0)
  assert stream.getvalue() == (
      "step 20/100  loss 2.5000  12,346 tokens/s  1:20 left  decoder/01 load 1.25 dropped 3.4% entropy 2.00"
      "  decoder/03 load 1.25 dropped 3.4% entropy 2.00 experts/token 1.62 dead 2\n")


@pytest.mark.parametrize("seconds, text", [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_clock(seconds, text):
  assert metrics.clock(seconds) == text


def test_the_stopwatch_leaves_out_pauses(monkeypatch):
  now = iter([0.0, 1.0, 4.0, 5.0, 7.0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
  watch = metrics.Stopwatch()
  with watch:
    pass
  assert [watch.lap(), watch.lap()] == [2.0, 2.0]
