"""The view of `train --watch`: what it shows, that it fits, and lines where there is no terminal."""

import io
import sys
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from sparse_experts.config import to_json
from sparse_experts.training import metrics
from sparse_experts.training.log import Log
from sparse_experts.training.loop import train
from sparse_experts.training.watch import BLOCKS, Watch, bars, watching
from tests.training.tiny import documents, tiny_config

LAYERS = [f"decoder/{i:02d}" for i in range(12)]


def row(step, layers=LAYERS[:2], experts=8):
  """The third expert gets nothing; in each layer after the first, the last one takes more."""
  numbers = {"step": step, "loss": 4.0 - step / 100, "tokens_per_second": 12345.6}
  for i, layer in enumerate(layers):
    load_E = [1.0] * (experts - 1) + [1.0 + i]
    load_E[2] = 0.0
    pairs = {f"router/{layer}/load": (load_E, sum(load_E)), f"router/{layer}/dropped": (1.0, 8.0),
             f"router/{layer}/entropy": (2.0, 1.0), f"router/{layer}/experts_per_token": (1.0, 1.0)}
    numbers |= metrics.reduce(pairs) | metrics.shares(pairs) | {f"router/{layer}/dead": 1}
  return numbers


def drawn(watch, width=80, height=25):
  """The lines of the view."""
  console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
  console.print(watch)
  lines = console.file.getvalue().splitlines()
  assert max(map(len, lines)) <= width
  return [line.rstrip() for line in lines]


def watched(layers=LAYERS[:2], experts=8, messages=2):
  watch = Watch(200, dict.fromkeys(layers, 1), [row(10), row(20), {"step": 20, "eval/loss": 1.0}])
  for step in (30, 40):
    watch.step(step)
    watch.write(row(step, layers, experts), seconds_per_step=0.5)
  for i in range(messages):
    watch.say(f"message {i}, so long that it fits on no line of sixty letters, nor on any one of eighty")
  return watch


def test_what_it_shows():
  progress, loss, titles, even, other, *messages = drawn(watched())
  assert progress.startswith("step 40/200 ━") and progress.endswith("1:20 left")
  assert loss == "loss 3.6000 █▆▃▁ 12,346 tokens/s"  # the rows of the run before too
  assert titles.split() == "layer load by expert MaxVio dropped entropy dead".split()
  assert even == "decoder/00  ▅▅·▅▅▅▅▅          0.14    12.5%     2.00     1"
  assert other == "decoder/01  ▅▅·▅▅▅▅█          1.00    12.5%     2.00     1"
  assert [line[:9] for line in messages] == ["message 0", "message 1"]


def test_before_the_first_row():
  watch = Watch(200, {})
  watch.say("compiling the train step")
  assert drawn(watch) == ["step 0/200", "", "compiling the train step"]


@pytest.mark.parametrize("width, blocks", [(60, 16), (100, 56), (120, 64)])
def test_experts_that_do_not_fit_share_bars(width, blocks):
  line = drawn(watched(experts=64), width)[3]
  assert line.startswith("decoder/00") and line.endswith(" 0.02    12.5%     2.00     1")
  assert len(line.split()[1]) == blocks and set(line.split()[1]) <= {*BLOCKS, "·"}


def test_layers_that_do_not_fit_are_the_most_even():
  lines = drawn(watched(LAYERS, messages=9), height=14)
  assert len(lines) == 14
  shown = [line.split()[0] for line in lines if line.startswith("decoder")]
  assert shown == LAYERS[-7:]
  assert lines[10] == "5 more layers with MaxVio up to 2.64" and lines[-1].startswith("message 8")


def test_all_is_shown_in_the_end():
  watch = watched(LAYERS, messages=9)
  watch.ended = True
  lines = drawn(watch, height=14)
  assert all(any(line.startswith(layer) for line in lines) for layer in LAYERS)
  assert " ".join(lines).count("any one of eighty") == 9


def test_experts_per_token_where_they_are_not_k():
  watch = Watch(200, {"decoder/00": 2})
  watch.write(row(10, LAYERS[:1]), seconds_per_step=0.5)
  assert drawn(watch)[2].endswith("per token") and drawn(watch)[3].endswith("1.00")


def test_a_loss_that_is_no_number_leaves_a_gap():
  assert bars([1.0, float("nan"), 3.0]) == "▁·█" and bars([float("inf")]) == "·" and bars([2.0, 2.0]) == "▁▁"


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


def use(monkeypatch, stream, term="xterm"):
  """In the test, not in a fixture: pytest sets stderr anew in between."""
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setenv("TERM", term)
  return stream


def test_the_last_view_remains(tmp_path, monkeypatch):
  """Whole, though it is higher than the terminal."""
  terminal = use(monkeypatch, Terminal())
  (tmp_path / "config.json").write_text(to_json(tiny_config()))
  log = Log(str(tmp_path), tiny_config(), 0, {}, {"tokens_per_step": 8, "layers": {
      layer: {"k": 1} for layer in LAYERS}})
  log.say("a line before")
  lines = log.view
  with watching(log, str(tmp_path)):
    log.say("\n".join(f"message {i}" for i in range(20)))
    log.view.step(4)
    log.view.write(row(4, LAYERS), 0.5)
    log.say("validation loss 1.2345\ndead experts: none")
  assert log.view is lines
  log.say("a line after")
  log.close()
  before, *_ = terminal.getvalue().splitlines()
  assert before == "a line before" and terminal.getvalue().endswith("a line after\n")
  last = terminal.getvalue().split("step 4/4")[-1]
  for text in ("decoder/00  ▅▅", "decoder/11", "message 0", "validation loss 1.2345", "dead experts: none"):
    assert text in last


@pytest.mark.slow
def test_a_run_on_a_terminal_ends_with_its_summary(tmp_path, monkeypatch):
  terminal = use(monkeypatch, Terminal())
  train(tiny_config(), str(tmp_path), data=documents(), watch=True)
  last = terminal.getvalue().split("step 4/4")[-1]
  assert "decoder/01" in last and "MaxVio" in last and "step 4: validation" in last
  assert "validation loss" in last and "dead experts" in last


@pytest.mark.parametrize("stream, term, process", [
    (io.StringIO(), "xterm", 0), (Terminal(), "dumb", 0), (Terminal(), "xterm", 1)])
def test_elsewhere_lines_go_on(tmp_path, monkeypatch, stream, term, process):
  use(monkeypatch, stream, term)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  log = SimpleNamespace(view=metrics.Progress(4, {}), done=0)
  with watching(log, str(tmp_path)):
    log.view.say("a message")
  assert stream.getvalue() == "a message\n"
