"""The published configs route as their papers say, on six tokens and three experts worked out by hand.

Slots, gates, losses and order are those of Mesh TensorFlow's `moe.py` (Switch, MoE-Base, ST-MoE), of
Flaxformer (`:released`) and of GShard (GLaM).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.config import load_config
from sparse_experts.models import build
from sparse_experts.moe.routing import slots

ROOT = pathlib.Path(__file__).parent.parent
LOGIT_TE = jnp.array([[2.1, 1.0, 0.0], [1.0, 0.0, 2.0], [3.0, 1.9, 1.2], [0.5, 0.0, -1.0], [1.0, 1.5, 0.0],
                      [2.5, 0.0, 1.0]], jnp.float32)
BALANCE, BOTH_COUNTED, Z = 1.310886, 2.328162, 6.135246
# (token, expert, gate) of those that get one of two slots per expert: first choices in order, then second.
TOP_1 = [(0, 0, .687131), (1, 2, .665241), (2, 0, .667481), (4, 1, .546549)]
TOP_2 = [(0, 0, .750260), (1, 2, .731059), (2, 0, .750260), (4, 1, .622459), (0, 1, .249740), (5, 2, .182426)]
TOP_2_RAW = [*TOP_1, (0, 1, .228726), (5, 2, .170953)]
SECOND = .182426  # the second gate of the last token, which is used with this probability over a threshold

# config: (kept, jitter, losses in the objective, probability of the last token's second expert,
#          slots of the encoder's and the decoder's experts in training and evaluation)
SWITCH = (TOP_1, 0.01, 0.01 * BALANCE, None)
RELEASED = (TOP_1, 0.0, 0.01 * BALANCE, None)
ST_MOE = (TOP_2, 0.0, 0.01 * BALANCE + 0.001 * Z, SECOND / 0.2)
PAPERS = {
    "switch/base.py": (*SWITCH, [80, 128, 17, 28]),  # 8192 * 1.25 / 128 and so on, rounded down
    "switch/base.py:released": (*RELEASED, [80, 128, 18, 28]),  # rounded
    "switch/large.py": (*SWITCH, [40, 64, 17, 28]),
    "switch/xxl.py:released": (*RELEASED, [40, 128, 18, 57]),
    "switch/c.py": (*SWITCH, [2, 2, 2, 2]),
    "switch/c.py:released": (*RELEASED, [2, 2, 2, 2]),
    "moe_base.py": (TOP_2, 0.0, 0.01 * BALANCE, SECOND / 0.2, [128, 128, 28, 28]),
    "st_moe/l.py": (*ST_MOE, [80, 128, 17, 28]),
    "st_moe/st_moe_32b.py": (*ST_MOE, [80, 128, 71, 114]),
    "st_moe/st_moe_32b.py:released": (
        TOP_2_RAW, 0.0, 0.01 * BOTH_COUNTED + 0.001 * Z, 1.0, [80, 128, 71, 114]),
    "glam/64b64e.py": (TOP_2, 0.0, 0.01 * BALANCE, SECOND / 0.5, [64, 64]),
    "glam/1b7.py:e256": (TOP_2, 0.0, 0.01 * BALANCE, SECOND / 0.5, [16, 16]),
}


@pytest.mark.parametrize("spec", PAPERS)
def test_routing(spec):
  kept, jitter, objective, second, slots_of = PAPERS[spec]
  config = load_config(str(ROOT / "configs" / spec)).unlock()
  stacks = ["encoder", "decoder"] if config.model.name == "seq2seq" else ["decoder"]
  models = [build(config, 128, phase).sparse_layers for phase in ("train", "eval_capacity")]
  one = lambda layers, stack: next(layer for name, layer in layers.items() if name.startswith(stack))
  assert [one(layers, stack).capacity for stack in stacks for layers in models] == slots_of

  config.model.num_experts = 3
  layers = build(config, 128).sparse_layers
  for stack in stacks:
    router = one(layers, stack).router
    assert router.jitter == jitter
    routing = router.route(LOGIT_TE[None], jnp.ones((1, 6), bool), capacity=2)
    taken = routing.valid & (slots(routing.expert, routing.valid, 3) < 2)
    found = [(int(t), int(e), float(g)) for t, e, g, ok in zip(
        routing.token[0], routing.expert[0], routing.gate[0], taken[0], strict=True) if ok]
    np.testing.assert_allclose(found, kept, atol=1e-6)  # gates are given to six decimals
    losses = sum(router.loss_weights[name] * total / count for name, (total, count) in routing.losses.items())
    np.testing.assert_allclose(losses, objective, rtol=1e-5)

  if second is not None:
    same_GTE = jnp.broadcast_to(LOGIT_TE[5], (1, 20_000, 3))
    routing = router.route(same_GTE, jnp.ones((1, 20_000), bool), key=jax.random.key(0))
    assert routing.valid[0, :20_000].all()
    # Four standard deviations of a mean of 20,000 draws.
    assert float(routing.valid[0, 20_000:].mean()) == pytest.approx(second, abs=0.014)


def test_layers_losses_are_summed_in_mesh_and_averaged_in_t5x():
  how = {spec: load_config(str(ROOT / "configs" / spec)).train.layer_losses for spec in PAPERS}
  for spec, found in how.items():
    assert found == ("mean" if spec.endswith("released") or spec.startswith("glam") else "sum"), spec
