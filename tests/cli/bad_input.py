"""A user's own routers and data, each wrong in one way; on a command line tests.cli.bad_input:NAME."""

import jax.numpy as jnp

from sparse_experts.moe import TopKRouter


class _Spoils(TopKRouter):
  """A correct router whose list is changed by `spoil`."""

  def __call__(self, *arguments):
    routing = super().__call__(*arguments)
    return routing.replace(**self.spoil(routing))


class Shapes(_Spoils):
  def spoil(self, r):
    return dict(gate=r.gate[:, :-1])


class NotANumber(_Spoils):
  def spoil(self, r):
    return dict(gate=r.gate.at[0, 1].set(jnp.nan))


class OutOfRange(_Spoils):
  def spoil(self, r):
    return dict(expert=r.expert.at[0, 1].set(self.num_experts))


class Duplicates(_Spoils):
  def spoil(self, r):
    twice = lambda a: jnp.concatenate([a, a], axis=1)
    return dict(token=twice(r.token), expert=twice(r.expert), gate=twice(r.gate), valid=twice(r.valid),
                rows_per_token=None)


class NoArguments(TopKRouter):
  def __init__(self):
    pass


def changing_shape(config):
  return [b"some text"] * 3 + [[b"a", b"list"]]


def raises(config):
  return config.no_such_key


class Short:
  """Says it is longer than it is."""

  def __len__(self):
    return 4

  def __getitem__(self, i):
    return (b"some text", b"other text")[i]


def short(config):
  return Short()
