"""Golden curves: 20 losses and the final norm of every parameter, for one short run of each family.

A refactoring that changes numbers fails here in two minutes: `pytest -m "" tests/test_golden.py`, with the
families that are slow tests. Every convention is written below, so a changed default or recipe moves no
curve. A change that is meant to move one re-makes the file, in a commit of its own that gives the reason:

    python -m tests.test_golden --remake

The file keeps one set of curves per jax version; re-make each version in an environment that has it.
"""

import tests.conftest  # noqa: F401, I001  first: it sets devices and compiler flags before jax starts

import json
import os
import pathlib
import random
import sys
import tempfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import sparse_experts
from sparse_experts.config import default_config
from sparse_experts.models import names
from sparse_experts.training import state

FILE = pathlib.Path(__file__).with_name("golden.json")
STEPS = 20
SAME_VERSION = 1e-6
# Losses of jax 0.10.2 and 0.12.0.1 differ by up to 3.2e-7; the next version may round more differently.
OTHER_VERSION = 1e-5
# Norms may also differ by ten times that, absolutely: where gradients begin near zero, as behind the vit's
# head, Adam scales up their rounding. They differ by 6.7e-6 between the two versions, and by 6.3e-6 between
# programs with and without fused multiply-add (--xla_cpu_max_isa=AVX), so other processors pass too.
ATOL_OF_NORMS = 10
# Softmax cancels a bias of all keys, so its gradient is rounding alone. Stored, not compared.
NOISE = "attention/key_bias"

# What every run sets. A run below adds what its family sets otherwise.
COMMON = {
    "model": dict(
        name="decoder", num_layers=2, embed_dim=32, mlp_dim=64, num_heads=2, head_dim=16, norm_eps=1e-6,
        layer_bias=False, activation="swiglu", tied_head=True, dropout=0.0, dtype="float32", remat=False,
        patch_size=2, pool="token", representation_dim=0, head_bias=0.0, num_experts=8, moe_every=2,
        moe_layers=(), depth_layers=(), moe_place="ffn", expert_dim=32, expert_activation=None,
        expert_dropout=0.0, expert_init_scale=0.1, multiplicative_bias=False, extra_ffn=False,
        shared_experts=0, shared_gate=False, capacity_factor=1.25, eval_capacity_factor=2.0,
        capacity_rule="flaxformer", min_capacity=4, group_size=32, dispatch="ragged", backend="slots",
        exchange_rows_factor=None,
        gating_dropout=dict(rate=0.0, machines=1, replicas=1, skip_experts=False)),
    "data": dict(
        source="embedded", tokenizer="bytes", objective="causal", length=32, target_length=None,
        noise_density=0.15, mean_span=5.0, valid_share=0.2,
        image=dict(size=8, classes=None, crop_area=1.0, shift=0, flip=False, randaugment_layers=0,
                   randaugment_magnitude=10.0, mixup=0.0)),
    "optimizer": dict(name="adamw", learning_rate=3e-3, schedule="cosine", warmup_steps=5, weight_decay=0.01,
                      b1=0.9, b2=0.98, clip_norm=1.0),
    "train": dict(
        steps=STEPS, batch_size=8, accumulate=1, seed=0, only="*", skip_nonfinite=False, layer_losses="mean",
        log_every=1, eval_every=2 * STEPS, checkpoint_every=2 * STEPS),
    "eval": dict(batch_size=8, train_windows=8, min_bytes=100),
    "seed": dict(init=1, data=2, noise=3),
    "mesh": dict(data=1, expert=1, model=1, fsdp=False, dcn=dict(data=1, expert=1, model=1)),
}
TOP_K = dict(
    name="top_k", k=1, jitter=0.01, input_dropout=0.0, choose="largest", gate="raw", order="choice",
    skip_threshold=0.0, balance_count="first", load_balance_weight=0.01, z_weight=0.0)
ST_MOE = TOP_K | dict(k=2, jitter=0.0, gate="renormalized", skip_threshold=0.2, z_weight=1e-3)
V_MOE = dict(name="v_moe", k=2, noise=1.0, order="choice", importance_weight=5e-3, load_weight=5e-3)
LIMOE = V_MOE | dict(
    name="limoe", k=1, order="batch_priority", scope="group", z_weight=1e-3, local_weights=(0.0, 1e-2),
    global_weights=(1e-2, 1e-2), min_experts=4.0)
# What a decoder alone has.
CAUSAL = dict(
    attention=dict(name="multi_head", num_kv_heads=2, qk_norm="none", bias=False),
    rope=dict(theta=10_000.0, factor=1.0, mscale=1.0, mscale_all_dim=0.0))
# Of an encoder-decoder's decoder. None: the encoder's, which is set.
DECODER = dict(
    num_experts=None, moe_every=None, moe_layers=None, capacity_factor=None, eval_capacity_factor=None,
    capacity_rule=None, min_capacity=None, dispatch=None, group_size=32)
VISION = dict(
    activation="gelu", moe_layers=(1,), expert_dim=64, expert_init_scale=1.0, capacity_rule="vmoe",
    capacity_factor=1.05, eval_capacity_factor=1.05, min_capacity=1)
VISION_TRAINING = {
    "optimizer": dict(warmup_steps=5, b2=0.999, weight_decay=0.1),
    "train": dict(layer_losses="sum"),
}
ADAFACTOR = dict(name="adafactor", schedule="rsqrt", learning_rate=3e-2, weight_decay=0.0)

RUNS = {
    "decoder": {"model": CAUSAL | dict(router=TOP_K)},
    "decoder_2x4": {
        "model": CAUSAL | dict(moe_every=1, router=TOP_K | dict(
            k=2, gate="renormalized_after_drops", order="token", balance_count="multi_hot")),
        "mesh": dict(data=2, expert=4)},
    "switch": {
        "model": dict(name="seq2seq", num_layers=1, moe_every=1, activation="geglu", group_size=64,
                      router=TOP_K, decoder=DECODER),
        "data": dict(objective="span_corruption", length=64, target_length=16),
        "optimizer": ADAFACTOR},
    "st_moe": {
        "model": CAUSAL | dict(moe_every=1, activation="geglu", dispatch="einsum", router=ST_MOE),
        "optimizer": ADAFACTOR},
    "v_moe": {
        "model": VISION | dict(dispatch="scatter", name="vit", router=V_MOE, group_size=4 * 17),
        "data": dict(objective="softmax", image=dict(mixup=0.3)),
        **VISION_TRAINING},
    "limoe": {
        "model": VISION | dict(name="limoe", pool="mean", router=LIMOE, group_size=4 * (16 + 12)),
        "data": dict(objective="contrastive", tokenizer="words", length=12, image=dict(shift=2)),
        **VISION_TRAINING},
}


def _config(run: str) -> ConfigDict:
  config = default_config().unlock()
  for keys in (COMMON, RUNS[run]):
    config.update(keys)
  return config.lock()


def _text() -> list[bytes]:
  """Sixty documents of made-up words. `random` fixes its floats for a seed across versions of Python."""
  rng = random.Random(0)
  below = lambda n: int(n * rng.random())
  words = ["".join("abcdefghijklmnopqrstuvwxyz"[below(26)] for _ in range(2 + below(6))) for _ in range(50)]
  return [" ".join(words[below(50)] for _ in range(60)).encode() for _ in range(60)]


def train(run: str, workdir: str) -> dict:
  """{losses: of each step, norms: of each parameter after the last}."""
  config = _config(run)
  is_text = config.data.objective in ("causal", "span_corruption")
  with pytest.MonkeyPatch.context() as patch:
    # As a run draws them: at the tests' level 0 initial values differ by 5e-7, and norms of the vit by 1e-5.
    patch.setattr(state, "INIT_COMPILER_OPTIONS", {"xla_backend_optimization_level": 1})
    trained = sparse_experts.train(config, workdir, data=_text() if is_text else None)
  rows = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
  arrays = {path: np.asarray(x, np.float64) for path, x in names.by_path(trained.params).items()}
  norms = {name: np.linalg.norm(arrays[at.path] if at.repeat is None else arrays[at.path][at.repeat])
           for name, at in names.places(trained.params).items()}
  return {"losses": [row["loss"] for row in rows if "loss" in row], "norms": norms}


@pytest.mark.parametrize("run", [
    pytest.param(run, marks=[pytest.mark.slow] * (run != "decoder")) for run in RUNS])
def test_golden(run, tmp_path):
  golden = json.loads(FILE.read_text())
  distance = lambda version: [abs(int(a) - b) for a, b in zip(version.split("."), jax.__version_info__)]
  kept = golden[min(golden, key=distance)][run]
  rtol = SAME_VERSION if jax.__version__ in golden else OTHER_VERSION
  found = train(run, str(tmp_path))
  assert len(found["losses"]) == STEPS
  np.testing.assert_allclose(found["losses"], kept["losses"], rtol=rtol)
  assert found["norms"].keys() == kept["norms"].keys()
  for name, norm in found["norms"].items():
    if not name.endswith(NOISE):
      np.testing.assert_allclose(norm, kept["norms"][name], rtol, ATOL_OF_NORMS * rtol, err_msg=name)


def remake() -> None:
  """Writes the curves of this jax version; those of others stay."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ["XDG_CACHE_HOME"] = folder  # compiled here, whatever the user's cache holds
    found = {run: train(run, os.path.join(folder, run)) for run in RUNS}
  golden = (json.loads(FILE.read_text()) if FILE.exists() else {}) | {jax.__version__: found}
  short = lambda x: float(f"{x:.9g}")  # all of a float32
  lines = []
  for version in sorted(golden, key=lambda v: [int(part) for part in v.split(".")]):
    runs = ",\n".join(
        f'  "{run}": ' + json.dumps({"losses": [short(x) for x in kept["losses"]],
                                     "norms": {name: short(x) for name, x in kept["norms"].items()}})
        for run, kept in golden[version].items())
    lines.append(f' "{version}": {{\n{runs}}}')
  FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  if sys.argv[1:] != ["--remake"]:
    sys.exit("python -m tests.test_golden --remake writes tests/golden.json anew; pytest compares with it")
  remake()
