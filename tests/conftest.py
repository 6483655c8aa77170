"""Eight simulated devices, and strict dtypes where they hold."""

import gc
import os
import uuid

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax starts
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from sparse_experts import partitioning

# Most of the tests' time is compiling. Loops without optimization, written XLA's other way, halve it.
# Jax 0.12 has no other, and an unknown flag ends the process. `XLA_FLAGS= pytest`: as in a run.
_QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 12):
  _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))  # read when a device is first used
gc.set_threshold(50_000, 20, 50)  # jax collects its own garbage each time: a tenth of the tests' time

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
  """Where compiled programs are kept: not with the user's, who might have some of broken code."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(autouse=True)
def strict_promotion(request):
  """Strict dtype promotion around moe/ and models/ tests; optax does not survive it."""
  folder = request.path.parent.name
  with jax.numpy_dtype_promotion("strict" if folder in ("moe", "models") else "standard"):
    yield


@pytest.fixture(scope="session")
def store():
  """A store of objects, with bucket gs://bucket; see `tests/store.py`."""
  from tests.store import Store

  store = Store()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in store.env.items():  # read when a client first asks
      patch.setenv(name, value)
    yield store
  store.close()


@pytest.fixture
def bucket(store):
  """An address of this test's own."""
  yield f"gs://bucket/{uuid.uuid4().hex[:8]}"
  store.harm()


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path):
  """A folder, or an address, of this test's own: what is promised of one is promised of the other."""
  return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture(params=[(1, 8, 1), (2, 4, 1)], ids=["1x8", "2x4"])
def mesh(request):
  """The two meshes most facts are checked on."""
  return partitioning.make_mesh(*request.param)
