"""Speed of other libraries' layers: each in an environment of its own, with our weights, next to ours.

`serve.py` and `compile_layer.py` are started in those environments and read a `layer_*.py`, so these import
nothing of this package (but for `layer_ours.py`); the rest runs here and starts them.
"""
