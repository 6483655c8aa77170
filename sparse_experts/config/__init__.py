"""What a run is: its keys and their defaults, the published recipes, and config.json."""

from sparse_experts.config.derived import image_tokens, seeds
from sparse_experts.config.dotted import paths
from sparse_experts.config.files import check_workdir, from_json, read_config, to_json
from sparse_experts.config.keys_run import SEEDS
from sparse_experts.config.recipes import check_variant, dense_twin, t5_config, v_moe_config, v_moe_variant
from sparse_experts.config.routers import LAYERS, ROUTERS
from sparse_experts.config.schema import default_config
