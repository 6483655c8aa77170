"""The defaults of transformers' configuration classes, in `tests/convert/defaults.json`.

Not a test; it needs what the package does not: `pip install transformers==5.24.0`. The committed file
was made by

    python tests/convert/make_defaults.py tests/convert/defaults.json

{model_type: {field: default}}, of fields whose default is a number, a string, true, false, null or a list.
`rope_theta` is what a config without any field of rotary positions has. `encoder_sparse_step` and the like,
which are computed from other fields, are left out.
"""

import dataclasses
import json
import pathlib
import sys

import transformers

FAMILIES = {
    "mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
    "deepseek_v3": "DeepseekV3", "switch_transformers": "SwitchTransformers"}


def defaults(family):
  made = getattr(transformers, f"{FAMILIES[family]}Config")
  found = {}
  for field in dataclasses.fields(made):
    value = field.default
    if isinstance(value, int | float | str | list | None):
      found[field.name] = value
  rope = getattr(made(), "rope_parameters", None)
  return found | ({"rope_theta": rope["rope_theta"]} if rope else {})


if __name__ == "__main__":
  pathlib.Path(sys.argv[1]).write_text(json.dumps(
      {family: defaults(family) for family in FAMILIES}, indent=1, sort_keys=True) + "\n")
