"""Training: state, step, optimizer, data loop, checkpoints, evaluation and sampling.

Called, it trains: `sparse_experts.train(config, workdir, router=..., data=...)` is `loop.train`.
"""

import sys
import types


class _Callable(types.ModuleType):

  def __call__(self, *args, **kwargs):
    from sparse_experts.train.loop import train

    return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
