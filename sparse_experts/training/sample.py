"""Text from a trained run: continues a prompt, or fills the spans masked in it. Dropless, with a cache."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts import partitioning
from sparse_experts.config import ConfigDict
from sparse_experts.data import Tokenizer
from sparse_experts.data.text.tokenizer import NO_ID
from sparse_experts.errors import UserError
from sparse_experts.models.decoder import Decoder
from sparse_experts.models.seq2seq import Seq2Seq
from sparse_experts.tasks import task_of
from sparse_experts.training.log import say
from sparse_experts.training.run import Run

MASK = "<mask>"  # short for the next unused <extra_id_i>
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def sample(run: Run, prompt: str, *, length: int = 200, temperature: float = 0.7, seed: int = 0) -> str:
  """The prompt and what follows it, or the prompt with its masked spans filled.

  length: most tokens to draw, in each span where there are several. temperature: 0 takes the likeliest.
  """
  task = task_of(run.config)
  if task.sampling not in SAMPLING:
    raise UserError(f"a run on {task.items} (data.objective='{run.config.data.objective}') writes no text; "
                    "measure it with evaluate")
  return SAMPLING[task.sampling](run, prompt, length, temperature, jax.random.key(seed))


def _continue(run: Run, prompt: str, length: int, temperature: float, key: jax.Array) -> str:
  """Sees as many tokens of the prompt as the model can, the last ones; a longer prompt is reported."""
  tokenizer = _model(run)[1]
  if mark := MASK if MASK in prompt else (found := _SENTINEL.search(prompt)) and found[0]:
    raise UserError(f"the prompt '{prompt}' holds {mark}, but this model continues text and fills no spans; "
                    "end the prompt where the text is to go on, or sample a run of model.name='seq2seq'")
  ids, most = tokenizer.encode(prompt), context_length(run.config) - (tokenizer.bos_id is not None)
  if len(ids) > most:
    say(f"the prompt has {len(ids):,} tokens and this model reads {most:,}; the first "
        f"{len(ids) - most:,} are left out")
    ids = ids[-most:]
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  if not len(begin) + len(ids):
    raise UserError("the prompt is empty, and texts of this model begin with no mark; give it a word")
  start_L = np.concatenate([begin, ids]).astype(np.int32)
  return prompt + tokenizer.decode(_draw(run, start_L, length, temperature, key))


def context_length(config: ConfigDict) -> int:
  """Most tokens that the model reads: its own limit, as a converted one has it, or what it was trained on."""
  return config.model.context_length or config.data.length


def _model(run: Run) -> tuple[Decoder | Seq2Seq, Tokenizer]:
  """Model and tokenizer of a task that writes text."""
  model, tokenizer = run.abstract_model("dropless"), run.tokenizer
  assert isinstance(model, Decoder | Seq2Seq) and isinstance(tokenizer, Tokenizer)
  return model, tokenizer


def _fill(run: Run, prompt: str, length: int, temperature: float, key: jax.Array) -> str:
  """Puts what the decoder writes after each sentinel in the sentinel's place."""
  (model, tokenizer), marked = _model(run), number_masks(prompt)
  if not _SENTINEL.search(marked):
    raise UserError(f"the prompt '{prompt}' marks no span to fill; write {MASK} where text is missing")
  ids = np.concatenate([tokenizer.encode_prompt(marked), [tokenizer.eos_id]]).astype(np.int32)
  if len(ids) > (most := context_length(run.config)):
    limit = "data.length" if run.config.model.context_length is None else "model.context_length"
    raise UserError(f"the prompt has {len(ids)} tokens, more than the {limit}={most} that this model reads; "
                    "shorten it")
  batch = {"encoder_inputs": ids[None], "encoder_segments": np.ones((1, len(ids)), np.int32),
           "encoder_positions": np.arange(len(ids), dtype=np.int32)[None]}
  assert isinstance(model, Seq2Seq)
  with partitioning.use(run.mesh):
    encoded = jax.jit(model.encode)(run.params, run.buffers, batch)
  sentinels = [tokenizer.sentinel(int(i)) for i in dict.fromkeys(_SENTINEL.findall(marked))]
  start_L = np.array([tokenizer.pad_id, sentinels[0]], np.int32)
  drawn = _draw(run, start_L, length, temperature, key, sentinels, encoded=encoded)
  return put_in(marked, tokenizer.decode(np.concatenate([sentinels[:1], drawn]).astype(np.int32)))


SAMPLING = {"continue": _continue, "fill": _fill}  # by the task's `sampling`


def number_masks(prompt: str) -> str:
  """Each <mask> becomes the next <extra_id_i> that the prompt does not use yet."""
  used = {int(i) for i in _SENTINEL.findall(prompt)}
  free = (i for i in range(len(used) + prompt.count(MASK)) if i not in used)
  return re.sub(re.escape(MASK), lambda _: f"<extra_id_{next(free)}>", prompt)


def put_in(marked: str, drawn: str) -> str:
  """`marked` with each sentinel replaced by what follows it in `drawn`; one that was not drawn stays."""
  pieces = _SENTINEL.split(drawn)
  spans: dict[str, str] = {}
  for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
    spans.setdefault(name, text)
  return _SENTINEL.sub(lambda m: spans.get(m[1], m[0]), marked)


def _draw(run: Run, start_L: np.ndarray, length: int, temperature: float, key: jax.Array,
          sentinels: Sequence[int] = (), **encoded: Any) -> np.ndarray:
  """Ids drawn after `start_L`, up to the end of text or `length` of them.

  With `sentinels`, the first of which ends `start_L`: up to `length` of them after each. Where the model
  would end a span with any sentinel or the end of text, the next of the list is put, so that every span
  is filled, with one token at least.
  """
  model, tokenizer = _model(run)
  marks = [tokenizer.sentinel(i) for i in range(tokenizer.num_sentinels)] * bool(sentinels)
  ends_V = np.zeros(tokenizer.vocab_size, bool)
  ends_V[[i for i in (tokenizer.eos_id, *marks) if i != NO_ID]] = True
  next_S = jnp.asarray([*sentinels[1:], tokenizer.eos_id], jnp.int32)  # what closes each span
  size = len(next_S) * (length + 1)

  def choose(logits_BLV, i, span, drawn):
    """(token, spans closed, tokens drawn in the present span)."""
    logits_V = jnp.where(ends_V & (drawn == 0) & bool(sentinels), -jnp.inf, logits_BLV[0, -1])
    if temperature == 0:
      token = jnp.argmax(logits_V)
    else:
      token = jax.random.categorical(jax.random.fold_in(key, i), logits_V / temperature)
    closes = jnp.asarray(ends_V)[token] | (drawn == length)
    token = jnp.where(closes, next_S[span], token).astype(jnp.int32)
    return token, span + closes, jnp.where(closes, 0, drawn + 1)

  @jax.jit
  def draw(params, buffers, start_BL, encoded):
    cache = model.init_cache(1, start_BL.shape[1] + size)
    logits, cache = model.decode(params, buffers, cache, start_BL, **encoded)
    state = choose(logits, 0, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    drawn_L = jnp.full(size, tokenizer.eos_id, jnp.int32).at[0].set(state[0])

    def more(carry):
      i, (_, span, _), *_ = carry
      return (i < size) & (span < len(next_S))

    def one(carry):
      i, (last, span, drawn), cache, drawn_L = carry
      logits, cache = model.decode(params, buffers, cache, last[None, None], **encoded)
      state = choose(logits, i, span, drawn)
      return i + 1, state, cache, drawn_L.at[i].set(state[0])

    return jax.lax.while_loop(more, one, (jnp.ones((), jnp.int32), state, cache, drawn_L))[-1]

  with partitioning.use(run.mesh):
    return np.asarray(draw(run.params, run.buffers, start_L[None], encoded))
