"""What a run is: its keys and their defaults, the published recipes, and config.json."""

from ml_collections import ConfigDict

from sparse_experts.config.code_names import trust
from sparse_experts.config.config_file import load_config
from sparse_experts.config.derived import image_tokens, layer_field, routing_field, seeds, sparse_indices
from sparse_experts.config.dotted import differences, flat, get, paths, replaced
from sparse_experts.config.files import check_config, check_workdir, from_json, read_config, to_json
from sparse_experts.config.keys_model import FACTOR_KEYS
from sparse_experts.config.keys_run import SEEDS
from sparse_experts.config.recipes import check_variant, dense_twin, t5_config, v_moe_config, v_moe_variant
from sparse_experts.config.routers import LAYERS, ROUTERS
from sparse_experts.config.schema import INCIDENTAL, KEYS, NOT_IN_OUTPUTS, default_config, may_change
