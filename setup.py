"""Package metadata. Lower bounds are the oldest versions the tests have passed with."""

import runpy
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

# The repository's public address: badges and install cells are made from it, and left out while it is empty.
URL = ""

REQUIRED = [
  "jax>=0.10.2",
  "flax>=0.12.8",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "chex>=0.1.92",
  "numpy>=2.4.6",
  "ml_collections>=1.1.0",
  "grain>=0.2.18",
  "array_record>=0.8.6",
  "tensorstore>=0.1.84",  # parts of arrays of a checkpoint; orbax brings it anyway
  "tensorflow-datasets>=4.9.10",  # its array_record readers; they need no TensorFlow
  "sentencepiece>=0.2.3",
  "safetensors>=0.8.0",  # judges foreign checkpoints
  "tensorboardX>=2.6.5",
  "rich>=15.0.0",  # train --watch; flax brings it anyway
  "scipy>=1.17.1",  # quantiles of Student's t; jax brings it anyway
  "matplotlib>=3.11.2",  # pictures of sweeps
  "Pillow>=13.0.0",  # reads and augments images; tensorboardX.add_image needs it and does not declare it
  "Jinja2>=3.1.6",  # the template of the report's page
  "scikit-learn>=1.9.1",  # the embedded images, its digits
]

EXTRAS = {
  "test": ["axe-core-python>=0.1.0", "hypothesis>=6.170.17", "ipykernel>=7.4.0", "jupyter_client>=8.10.0",
           "jupytext>=1.19.6", "mypy>=2.4.1", "nbclient>=0.11.0", "nbformat>=5.11.1", "pandas>=3.1.1",
           "gcp-storage-emulator>=2026.7.19", "gcsfs>=2026.10.1",  # a store of objects, over HTTP
           "playwright>=1.65.2", "pytest>=9.2.0", "pytest-timeout>=2.4.0", "pytest-xdist>=3.8.0",
           "ruff>=0.17.6", "tokamax>=0.0.12", "tokenizers>=0.23.3",
           "setuptools>=84.2.1"],  # builds a test's wheel
  "gcs": ["fsspec>=2026.9.0", "gcsfs>=2026.10.1", "aiohttp>=3.14.5"],  # gs:// addresses
  "hf": ["tokenizers>=0.23.3"],  # reads tokenizer.json of converted models
  "kernels": ["absl-py>=2.3.0", "tokamax>=0.0.12"],  # model.backend=tokamax
  "tpu": ["jax[tpu]>=0.10.2"],
  "aot": ["jax[tpu]>=0.10.2"],  # libtpu alone may be newer than jax's own, whose profiler then crashes
  "colab": ["ipykernel>=7.4.0", "jupyter_client>=8.10.0", "jupytext>=1.19.6", "nbclient>=0.11.0",
            "nbformat>=5.11.1"],
  "docs": ["furo>=2025.12.19", "myst-nb>=1.4.0", "sphinx>=9.0.4", "sphinx-copybutton>=0.5.2"],
}


def packages() -> list[str]:
  """configs/ stands at the top of the repository and travels in the wheel as a part of the package."""
  folders = find_namespace_packages("configs", exclude=["__pycache__", "*.__pycache__"])
  return [*find_packages(include=["sparse_experts", "sparse_experts.*"]), "sparse_experts.configs",
          *(f"sparse_experts.configs.{folder}" for folder in folders)]


setup(
  name="sparse_experts",
  version=runpy.run_path("sparse_experts/version.py")["VERSION"],
  description="Sparse mixtures of experts in JAX: routers to compare, papers to reproduce",
  long_description=Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  **({"url": URL} if URL else {}),
  python_requires=">=3.11",
  packages=packages(),
  package_dir={"sparse_experts.configs": "configs"},
  package_data={"sparse_experts.report": ["*.html", "*.css", "*.js"]},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
)
