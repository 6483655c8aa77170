"""Checkpoints of other people's code, in both directions: Hugging Face's layouts as safetensors.

`layouts.py` names the families; each says how its config.json and its tensors lie in ours (`pieces.py`).
`read.py` and `write.py` move one tensor at a time.
"""
