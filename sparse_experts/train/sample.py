"""Text from a trained run: continues a prompt, or fills the spans masked in it. Dropless, with a cache."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.train.run import Run

MASK = "<mask>"  # short for the next unused <extra_id_i>
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def sample(run: Run, prompt: str, *, length: int = 200, temperature: float = 0.7, seed: int = 0) -> str:
  """The prompt and what follows it, or the prompt with its masked spans filled.

  length: most tokens to draw. temperature: 0 takes the likeliest token.
  """
  fill = run.config.model.name == "seq2seq"
  return (_fill if fill else _continue)(run, prompt, length, temperature, jax.random.key(seed))


def _continue(run: Run, prompt: str, length: int, temperature: float, key: jax.Array) -> str:
  """Sees the last `data.length` tokens of the prompt: the model has never seen more."""
  tokenizer = run.tokenizer
  ids = tokenizer.encode(prompt)[1 - run.config.data.length:]
  start_L = np.concatenate([[tokenizer.pad_id], ids]).astype(np.int32)  # padding's id is also BOS
  return prompt + tokenizer.decode(_draw(run, start_L, length, temperature, key))


def _fill(run: Run, prompt: str, length: int, temperature: float, key: jax.Array) -> str:
  """Puts what the decoder writes after each sentinel in the sentinel's place."""
  tokenizer, marked = run.tokenizer, number_masks(prompt)
  if not _SENTINEL.search(marked):
    raise UserError(f"the prompt '{prompt}' marks no span to fill; write {MASK} where text is missing")
  ids = np.concatenate([tokenizer.encode_prompt(marked), [tokenizer.eos_id]]).astype(np.int32)
  if len(ids) > run.config.data.length:
    raise UserError(f"the prompt has {len(ids)} tokens, more than the data.length={run.config.data.length} "
                    "this model was trained on; shorten it")
  model, batch = run.models("dropless"), {
      "encoder_inputs": ids[None], "encoder_segments": np.ones((1, len(ids)), np.int32),
      "encoder_positions": np.arange(len(ids), dtype=np.int32)[None]}
  with partitioning.use(run.mesh):
    encoded = jax.jit(model.encode)(run.params, run.buffers, batch)
  drawn = _draw(run, np.array([tokenizer.pad_id], np.int32), length, temperature, key, encoded=encoded)
  return put_in(marked, tokenizer.decode(drawn))


def number_masks(prompt: str) -> str:
  """Each <mask> becomes the next <extra_id_i> that the prompt does not use yet."""
  used = {int(i) for i in _SENTINEL.findall(prompt)}
  free = (i for i in range(len(used) + prompt.count(MASK)) if i not in used)
  return re.sub(re.escape(MASK), lambda _: f"<extra_id_{next(free)}>", prompt)


def put_in(marked: str, drawn: str) -> str:
  """`marked` with each sentinel replaced by what follows it in `drawn`; one that was not drawn stays."""
  pieces = _SENTINEL.split(drawn)
  spans = {}
  for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
    spans.setdefault(name, text)
  return _SENTINEL.sub(lambda m: spans.get(m[1], m[0]), marked)


def _draw(run: Run, start_L: np.ndarray, length: int, temperature: float, key: jax.Array, **encoded: Any):
  """Ids drawn after `start_L`, up to the end of text or `length` of them."""
  model, eos = run.models("dropless"), run.tokenizer.eos_id

  def choose(logits_BLV, i):
    logits_V = logits_BLV[0, -1]
    if temperature == 0:
      return jnp.argmax(logits_V).astype(jnp.int32)
    return jax.random.categorical(jax.random.fold_in(key, i), logits_V / temperature).astype(jnp.int32)

  @functools.partial(jax.jit, static_argnames="size")
  def draw(params, buffers, start_BL, encoded, size):
    cache = model.init_cache(1, start_BL.shape[1] + size)
    logits, cache = model.decode(params, buffers, cache, start_BL, **encoded)
    first = choose(logits, 0)
    drawn_L = jnp.full(size, eos, jnp.int32).at[0].set(first)

    def more(carry):
      i, last, *_ = carry
      return (i < size) & (last != eos)

    def one(carry):
      i, last, cache, drawn_L = carry
      logits, cache = model.decode(params, buffers, cache, last[None, None], **encoded)
      token = choose(logits, i)
      return i + 1, token, cache, drawn_L.at[i].set(token)

    return jax.lax.while_loop(more, one, (jnp.ones((), jnp.int32), first, cache, drawn_L))[-1]

  with partitioning.use(run.mesh):
    return np.asarray(draw(run.params, run.buffers, start_L[None], encoded, length))
