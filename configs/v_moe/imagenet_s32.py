"""The small public V-MoE: S/32 with 8 experts in its last two sparse layers, from scratch on ImageNet-1k.

Paper:    the released code of Riquelme et al. 2021, V-MoE (https://github.com/google-research/vmoe): 300
          epochs, batch 8192, rate 3e-3, weight decay 0.1, clip 1, expert dropout 0.2, evaluated at capacity 4
Command:  python -m sparse_experts train --config=configs/v_moe/imagenet_s32.py --workdir=runs/imagenet_s32
          --config.data.dir=DIR
Hardware: v5e:4x4, 16 chips; not tried
Minutes:  not run here, 5h50 on 32 TPUv3 cores there
Expect:   there 76.8% on images held out of the training set, 73.1% on ILSVRC2012's validation images (means
          of three seeds); not run here

What we do not know of it and chose: a softmax, mean pooling, RandAugment and mixup as for ImageNet-21k, a
warm-up of 10,000 steps. TFDS asks for the archives by hand.
"""

from sparse_experts.config import v_moe_config, v_moe_variant


def get_config():
  config = v_moe_config(layers=8, dim=512, mlp_dim=2048, heads=8, patch_size=32, pool="mean", classes=1000)
  model = config.model
  model.num_experts = 8
  model.expert_dropout = 0.2
  model.eval_capacity_factor = 4.0
  model.representation_dim, model.head_bias = 0, 0.0
  config.data.source, config.data.objective = "tfds:imagenet2012", "softmax"
  config.data.image.update(dict(randaugment_layers=2, randaugment_magnitude=20.0, mixup=0.5))
  config.optimizer.learning_rate, config.optimizer.clip_norm = 3e-3, 1.0
  config.train.batch_size = 8192
  config.train.steps = 300 * 1_281_167 // 8192
  return v_moe_variant(config, "last_2")
