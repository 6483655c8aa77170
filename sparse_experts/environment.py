"""Environment variables of jax and XLA: refused where they cannot work, named where they made an error.

jax reads them when it is imported. XLA does when a device is first used, and an unknown flag aborts
the process.
"""

import glob
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Mapping, MutableMapping
from importlib import metadata

from sparse_experts import storage
from sparse_experts.errors import UserError

_TRUE = ("1", "true", "t", "yes", "y", "on")
_STRICT = ("disallow", "disallow_explicit")
# Variable -> (values that cannot work, why)
REFUSED = {
    "JAX_ENABLE_X64": (_TRUE, "runs compute and save in 32 bits or fewer"),
    "JAX_DISABLE_JIT": (_TRUE, "train steps are compiled ahead; a step would take minutes without"),
    "JAX_NUMPY_DTYPE_PROMOTION": (("strict",), "optax needs the standard promotion"),
    **dict.fromkeys(("JAX_TRANSFER_GUARD", "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
                     "JAX_TRANSFER_GUARD_DEVICE_TO_HOST", "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE"),
                    (_STRICT, "batches and log rows are copied between host and devices")),
}
_GOOGLE = "0x1ae0"  # the vendor of TPU chips on the PCI bus


def prepare(environ: MutableMapping[str, str], tpu: bool | None = None) -> None:
  """Refuses what cannot work, before jax is imported; keeps jax from a libtpu that has no TPU to drive.

  tpu: whether this machine may have one; looked up by default.
  """
  for name, (values, why) in REFUSED.items():
    if environ.get(name, "").lower() in values:
      raise UserError(f"{name}={environ[name]}: {why}; unset {name}")
  count = environ.get("JAX_NUM_CPU_DEVICES") or "1"
  if not count.isdecimal() or int(count) < 1:
    raise UserError(f"JAX_NUM_CPU_DEVICES={count} is no number of devices; give 1 or more, or unset it")
  tpu = may_have_tpu(environ) if tpu is None else tpu
  platforms = environ.get("JAX_PLATFORMS", "").split(",")
  if "tpu" in platforms and not tpu:
    raise UserError(f"JAX_PLATFORMS={environ['JAX_PLATFORMS']}: this machine has no TPU; unset JAX_PLATFORMS")
  if not {"", "cpu", "tpu"}.issuperset(platforms) and not _has_plugins():
    raise UserError(f"JAX_PLATFORMS={environ['JAX_PLATFORMS']}: jax has no plugin for such devices here; "
                    "choose cpu, install the plugin, or unset JAX_PLATFORMS")
  if platforms == [""] and not tpu and importlib.util.find_spec("libtpu") and not _has_plugins():
    environ["JAX_PLATFORMS"] = "cpu"  # it would look for a TPU for half a minute, and print errors
  if environ.get("XLA_FLAGS") and "jax" not in sys.modules:
    _try_flags(environ)


def blame(e: BaseException, environ: Mapping[str, str]) -> str | None:
  """The line that names the variable which made jax raise `e`; None if none did."""
  said = textwrap.shorten(str(e) or type(e).__name__, 240, placeholder=" ...")
  frames = traceback.extract_tb(e.__traceback__)
  reading = any(frame.filename.endswith("jax/_src/config.py") for frame in frames)
  for name, value in sorted(environ.items()):
    if not name.startswith("JAX_") or not value:
      continue
    named = re.search(rf"\b({name}|{name.lower()})\b", str(e))
    if named or (reading and repr(value) in str(e)):
      return f"{name}={value}: {said}; choose another value or unset {name}"
  if environ.get("JAX_PLATFORMS") and any(frame.name == "backends" for frame in frames):
    return (f"JAX_PLATFORMS={environ['JAX_PLATFORMS']}: jax finds no such devices here ({said}); choose "
            "another value or unset JAX_PLATFORMS")
  return None


def may_have_tpu(environ: Mapping[str, str]) -> bool:
  """Whether anything hints at a TPU: its device files, Google's chips on the bus, variables of a TPU host."""
  if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or any(
      name.startswith(("TPU_", "COLAB_TPU")) for name in environ):
    return True
  for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
    try:
      with open(path, encoding="ascii") as f:
        if f.read().strip() == _GOOGLE:
          return True
    except OSError:
      continue
  return False


def _has_plugins() -> bool:
  """Whether jax will find devices of other kinds than CPU and TPU, if there are any."""
  found = importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins")
  return bool(found)


def _try_flags(environ: Mapping[str, str]) -> None:
  """Lets another process read XLA_FLAGS, once for each value: XLA aborts one that finds a mistake in them."""
  flags = environ["XLA_FLAGS"]
  key = hashlib.sha256(f"{metadata.version('jaxlib')} {flags}".encode()).hexdigest()[:16]
  known = os.path.join(storage.user_cache("xla_flags", environ), key)
  if os.path.exists(known):
    return
  code = "from jaxlib import xla_client; xla_client.make_cpu_client()"
  tried = subprocess.run([sys.executable, "-c", code], env=dict(environ), capture_output=True, text=True,
                         errors="replace")
  if tried.returncode:
    said = re.search(r"(Unknown flags? in XLA_FLAGS: .*|Couldn't interpret value .*|Could not open file .*)",
                     tried.stderr)
    why = said[0].rstrip(". ") if said else f"XLA ends with code {tried.returncode} when it reads them"
    raise UserError(f"XLA_FLAGS={flags}: {why}; mend or unset XLA_FLAGS")
  try:
    os.makedirs(os.path.dirname(known), exist_ok=True)
    storage.write(known, "")
  except OSError:
    pass  # tried again next time
