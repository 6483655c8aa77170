"""Output that cannot be written, strangers' control characters, and Ctrl-C at any moment."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sparse_experts import cli, interrupts, terminal
from sparse_experts.errors import UserError, exit_code

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = [sys.executable, "-m", "sparse_experts"]


def run(command, **keys):
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, **keys)


# Control characters


@pytest.mark.parametrize("text, expected", [
    ("a\tb\nc é 漢 ␣", "a\tb\nc é 漢 ␣"),
    ("\033[2J\033]0;title\007", "\\u001b[2J\\u001b]0;title\\u0007"),
    ("a\rb\x08\x7f", "a\\u000db\\u0008\\u007f"),
    ("\x9b31m\x85", "\\u009b31m\\u0085"),  # the same as ESC [ in one byte
    ("ab\u202ecd\u2066", "ab\\u202ecd\\u2066"),  # read from right to left
    ("\udcff", "\\udcff"),  # a byte of a name that is no text
])
def test_control_characters_are_escaped(text, expected):
  assert terminal.escaped(text) == expected
  for ascii_only in (True, False):  # JSON that is printed stays the same JSON
    assert json.loads(terminal.escaped(json.dumps({"a": text}, ensure_ascii=ascii_only))) == {"a": text}


def test_messages_results_and_errors_of_a_command_are_escaped(capsys):
  def go():
    print("a\033[31mb")
    print("c\033[31md", file=sys.stderr)
    raise UserError("no file \033[31m\n here")

  assert exit_code(go) == 2
  out, err = capsys.readouterr()
  assert out == "a\\u001b[31mb\n" and err == "c\\u001b[31md\nerror: no file \\u001b[31m here\n"


@pytest.mark.parametrize("argv", [
    ["tra\033[31min"], ["train", "--con\033[31mfig=x"], ["train", "--config=no\033[31m.py", "--workdir=x"],
    ["evaluate", "--workdir=no\033[31m"], ["train", "--config=smoke.py", "--config.mod\033[31mel=1"],
    ["describe", "--keys=\033[31m"], ["report", "--workdir=no\033[31m"], ["compare", "a\033[31m", "b\r"],
])
def test_what_a_user_wrote_is_escaped_where_it_is_repeated(argv, capsys):
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  assert not {"\033", "\r"} & {*(out + err)} and "\\u001b[31m" in err


# Output that cannot be written


class Full(io.StringIO):
  def __init__(self, number=errno.ENOSPC):
    super().__init__()
    self.number = number

  def write(self, text):
    raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EIO, 2), (errno.EPIPE, 141)])
def test_results_that_cannot_be_written_are_not_a_success(number, code, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdout", Full(number))
  assert exit_code(lambda: print("result")) == code
  told = capsys.readouterr().err
  assert told == "" if code == 141 else told == (
      f"error: the output cannot be written ({os.strerror(number)}); make room, or send it elsewhere\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_a_training_does_not_need_its_output(number, monkeypatch):
  monkeypatch.setattr(sys, "stdout", Full(number))
  monkeypatch.setattr(sys, "stderr", Full(number))

  def go():
    print("plan", flush=True)
    print("step 1", file=sys.stderr, flush=True)
    terminal.tell("step 2")
    return 7

  assert exit_code(go, forgiving=True) == 7


@pytest.mark.parametrize("what", ["full", "broken pipe", "terminal gone", "closed", "none"])
def test_a_message_that_cannot_be_written_is_lost(what, monkeypatch):
  numbers = {"full": errno.ENOSPC, "broken pipe": errno.EPIPE, "terminal gone": errno.EIO}
  stream = Full(numbers[what]) if what in numbers else io.StringIO() if what == "closed" else None
  if what == "closed":
    stream.close()
  monkeypatch.setattr(sys, "stderr", stream)
  terminal.tell("step 1")
  assert exit_code(lambda: terminal.tell("step 2")) == 0


def test_an_error_that_nobody_hears_keeps_its_code(monkeypatch):
  monkeypatch.setattr(sys, "stderr", Full())
  assert cli.main(["nothing"]) == 2


@pytest.mark.parametrize("shell, code, err", [
    ("describe --keys | true; exit ${PIPESTATUS[0]}", 141, ""),
    ("describe --keys > /dev/full", 2,
     "error: the output cannot be written (No space left on device); make room, or send it elsewhere\n"),
    ("describe --keys >&-", 0, ""),
    ("nothing 2> /dev/full", 2, ""),
    ("nothing 2>&- >&- <&-", 2, ""),
])
def test_real_streams(shell, code, err):
  done = run(["bash", "-c", f"'{sys.executable}' -m sparse_experts {shell}"])
  assert (done.returncode, done.stderr) == (code, err)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
  """What libraries write to number 2 would otherwise land in the first file that is opened."""
  script = ("import os; from sparse_experts import terminal; terminal.open_closed_streams(); "
            f"f = open({str(tmp_path / 'file')!r}, 'w'); os.write(2, b'message'); print(f.fileno(), file=f)")
  assert run(["bash", "-c", f"'{sys.executable}' -c \"{script}\" 2>&- >&- <&-"]).returncode == 0
  assert int((tmp_path / "file").read_text()) > 2


# Ctrl-C


_SWALLOW = """
import gc, os, signal, sys, time
from sparse_experts import interrupts
from sparse_experts.errors import exit_code
interrupts.listen()
press = lambda: os.kill(os.getpid(), signal.SIGINT)

def in_a_callback(phase, info):
  if not pressed:
    pressed.append(1)
    press()
    time.sleep(0.01)

def go():
  {go}

pressed = []
sys.exit(exit_code(go))
"""
SWALLOWED = {
    "a callback of the garbage collector": "gc.callbacks.append(in_a_callback); gc.collect(); time.sleep(50)",
    "a finalizer": "A = type('A', (), {'__del__': lambda self: in_a_callback(0, 0)}); A(); time.sleep(50)",
    "a library that catches everything": """
  try:
    press()
    time.sleep(50)
  except BaseException:
    pass""",
    "a library that makes another error of it": """
  try:
    press()
    time.sleep(50)
  except BaseException:
    raise ImportError('initialization failed')""",
}


@pytest.mark.parametrize("where", SWALLOWED)
def test_ctrl_c_is_not_swallowed(where):
  start = time.monotonic()
  done = run([sys.executable, "-c", _SWALLOW.format(go=SWALLOWED[where])])
  assert (done.returncode, done.stderr) == (130, "interrupted\n") and time.monotonic() - start < 40


def test_ctrl_c_twice_ends_at_once():
  done = run([sys.executable, "-c", _SWALLOW.format(go="""
  try:
    press()
    time.sleep(50)
  finally:  # a save that takes long
    press()
    time.sleep(50)
    print("saved")""")])
  assert (done.returncode, done.stdout) == (130, "") and done.stderr == "interrupted again: ended at once\n"


def test_a_background_command_ignores_ctrl_c_as_before(monkeypatch):
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    interrupts.listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0])
def test_ctrl_c_at_any_moment_of_a_start(seconds, tmp_path):
  """While it imports, reads data, compiles: within seconds, with one line."""
  process = subprocess.Popen([*PYTHON, "train", "--config=smoke.py", f"--workdir={tmp_path}/run"], cwd=ROOT,
                             stderr=subprocess.PIPE, text=True)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  err = process.communicate(timeout=60)[1]
  assert "Traceback" not in err and "Exception ignored" not in err and err.endswith("interrupted\n"), err
  assert process.returncode in (130, -signal.SIGINT)  # Python turns one into the other; a shell shows 130


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["> /dev/full 2>&1", ">&- 2>&-", "2>&1 | head -1"])
def test_a_real_training_does_not_need_its_output(streams, tmp_path):
  keys = "train.steps=2 train.log_every=1 eval.min_bytes=1 eval.train_windows=4".split()
  command = " ".join([f"'{sys.executable}' -m sparse_experts train --config=smoke.py",
                      f"--workdir={tmp_path}/run", *(f"--config.{key}" for key in keys), streams])
  done = run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"])
  assert done.returncode == 0, done
  assert "measure" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
