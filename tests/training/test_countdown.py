"""Lines on how far an evaluation is."""

from sparse_experts.training import countdown


def test_lines_every_few_seconds_and_time_left(monkeypatch):
  """Two passes of 100 records, 10 a batch: the first batch of a pass compiles for 30 s, others take 2 s."""
  now, lines = [0.0], []
  monkeypatch.setattr(countdown.time, "perf_counter", lambda: now[0])
  tell = countdown.Countdown(100, lines.append, passes=2)
  for name in ("dropless", "with random experts"):
    tell.start(name)
    for done in range(10, 101, 10):
      now[0] += 30 if done == 10 else 2
      tell(done)
  assert lines[:2] == ["dropless 20/100 records  5 records/s  0:36 left",
                       "dropless 50/100 records  5 records/s  0:30 left"]
  assert lines[3] == "with random experts 10/100 records  5 records/s  0:18 left"
  assert len(lines) == 6  # 2 s a batch and 5 s a line: every third batch, and none of the last


def test_a_short_evaluation_says_nothing(monkeypatch):
  lines = []
  monkeypatch.setattr(countdown.time, "perf_counter", lambda: 0.0)
  tell = countdown.Countdown(2, lines.append).start("dropless")
  tell(1)
  tell(2)
  assert lines == []
