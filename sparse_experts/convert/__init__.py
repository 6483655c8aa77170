"""Converts checkpoints from and to Hugging Face's layouts, stored as safetensors.

`layouts.py` names the families; each maps its config.json and its tensors to ours (`pieces.py`).
`read.py` and `write.py` move one tensor at a time.
"""
