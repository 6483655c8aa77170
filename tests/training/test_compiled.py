"""What is compiled once stays compiled: within a run, and from run to run."""

import contextlib
import os
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparse_experts import storage
from sparse_experts.training import compiled
from sparse_experts.training.session import Session
from tests.training.tiny import tiny_train


@contextlib.contextmanager
def no_cache_set():
  """As in a process that has just started."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def events():
  """Names of what jax tells while it traces and compiles."""
  seen = []
  on_event = lambda name, **_: seen.append(name)
  on_duration = lambda name, _, **__: seen.append(name)
  jax.monitoring.register_event_listener(on_event)
  jax.monitoring.register_event_duration_secs_listener(on_duration)
  yield seen
  jax.monitoring.unregister_event_listener(on_event)
  jax.monitoring.unregister_event_duration_listener(on_duration)


@pytest.mark.slow
def test_nothing_is_traced_again_while_training(events, monkeypatch, tmp_path):
  """Steps, rows of the log, evaluations and checkpoints: each kind compiles the first time alone."""
  traced, after = [], Session.after
  count = lambda: sum(name.endswith(("jaxpr_trace_duration", "backend_compile_duration")) for name in events)

  def watched(self, state, pairs):
    after(self, state, pairs)
    traced.append(count())

  monkeypatch.setattr(Session, "after", watched)
  tiny_train(tmp_path, train__steps=9, train__log_every=1, train__eval_every=2, train__checkpoint_every=2)
  assert len(traced) == 9 and traced[0] > 0
  # Step 3 is the first to add to a row after an evaluation; the last one evaluates and saves besides.
  assert len(set(traced[3:])) == 1, traced


@pytest.mark.slow
def test_a_second_run_compiles_nothing(events, monkeypatch, tmp_path):
  """Every program it asks for is found, however small, in the folder that the first run has filled."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  compilation_cache.reset_cache()
  count = lambda name: events.count(f"/jax/compilation_cache/{name}")
  try:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with no_cache_set():
      jax.clear_caches()
      tiny_train(tmp_path / "first", train__steps=2)
      assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache/sparse_experts/jax")
      assert count("cache_misses") > 0
      events.clear()
      jax.clear_caches()
      tiny_train(tmp_path / "second", train__steps=2)
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()
  asked = count("compile_requests_use_cache")
  assert asked > 5 and count("cache_hits") == asked and count("cache_misses") == 0


def test_another_folder_is_respected(monkeypatch, tmp_path):
  """JAX_COMPILATION_CACHE_DIR is what jax.config says before anything is set."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  with no_cache_set():
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compiled.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  with no_cache_set():
    for home in (tmp_path / "file", tmp_path / "closed"):
      monkeypatch.setenv("XDG_CACHE_HOME", str(home))
      if home.name == "closed":
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
      compiled.keep_compiled_programs()
      assert jax.config.jax_compilation_cache_dir is None


def test_what_was_used_longest_ago_is_removed(tmp_path):
  for name, used in (("old-cache", 1), ("new-cache", 3), ("middle-cache", 2), ("other", 0)):
    (tmp_path / name).write_bytes(b"x" * 10)
    os.utime(tmp_path / name, (used, used))
  storage.prune(str(tmp_path), 25, end="-cache")
  assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "middle-cache", "other"}
  storage.prune(str(tmp_path), 25, end="-cache")
  assert len(list(tmp_path.iterdir())) == 3


def test_nothing_is_kept_on_a_disk_that_is_nearly_full(monkeypatch, tmp_path):
  """jax would leave a part of a program there, and read it at every start."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(compiled.shutil, "disk_usage", lambda folder: SimpleNamespace(free=compiled.ROOM - 1))
  with no_cache_set():
    compiled.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
