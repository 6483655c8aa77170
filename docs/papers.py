"""The papers that docstrings and pages name, and where they are."""

import re

# As docstrings name them -> (title, number on arXiv).
PAPERS = {
    "Abnar et al. 2025": ("Parameters vs FLOPs: Scaling Laws for Optimal Sparsity", "2501.12370"),
    "Chen et al. 2022": ("Towards Understanding Mixture of Experts in Deep Learning", "2208.02813"),
    "Chi et al. 2022": ("On the Representation Collapse of Sparse Mixture of Experts (X-MoE)", "2204.09179"),
    "Clark et al. 2022": ("Unified Scaling Laws for Routed Language Models (S-BASE, RL-R)", "2202.01169"),
    "Csordás et al. 2023": ("Approximating Two-Layer Feedforward Networks (sigma-MoE)", "2310.10837"),
    "Csordás et al. 2024": ("MoEUT", "2405.16039"),
    "Dai et al. 2024": ("DeepSeekMoE", "2401.06066"),
    "DeepSeek-AI 2024": ("DeepSeek-V3 Technical Report", "2412.19437"),
    "Du et al. 2021": ("GLaM", "2112.06905"),
    "Fedus et al. 2021": ("Switch Transformers", "2101.03961"),
    "Guo et al. 2025": ("Dynamic Mixture of Experts (DynMoE)", "2405.14297"),
    "Dosovitskiy et al. 2020": ("An Image is Worth 16x16 Words (ViT)", "2010.11929"),
    "Guo, Mishra et al. 2025": ("SonicMoE (token rounding)", "2512.14080"),
    "Hazimeh et al. 2021": ("DSelect-k", "2106.03760"),
    "Huang et al. 2024": ("Harder Tasks Need More Experts (top-p)", "2403.07652"),
    "Ibrahim et al. 2023": ("COMET", "2306.02824"),
    "Jiang et al. 2024": ("Mixtral of Experts", "2401.04088"),
    "Kimi-Team 2026": ("Kimi K3 (quantile balancing)", "2607.24653"),
    "Komatsuzaki et al. 2022": ("Sparse Upcycling", "2212.05055"),
    "Krajewski et al. 2024": ("Scaling Laws for Fine-Grained Mixture of Experts", "2402.07871"),
    "Kumar et al. 2019": ("Verified Uncertainty Calibration", "1909.10155"),
    "Lepikhin et al. 2020": ("GShard", "2006.16668"),
    "Lewis et al. 2021": ("BASE Layers", "2103.16716"),
    "Liu et al. 2022": ("Gating Dropout", "2205.14336"),
    "Liu et al. 2024": ("GRIN: GRadient-INformed MoE (SparseMixer-v2)", "2409.12136"),
    "Muennighoff et al. 2024": ("OLMoE", "2409.02060"),
    "Muqeeth et al. 2023": ("Soft Merging of Experts with Adaptive Routing (SMEAR)", "2306.03745"),
    "Mustafa et al. 2022": ("LIMoE", "2206.02770"),
    "Omi et al. 2025": ("Similarity Preserving Routers (SimBal)", "2506.14038"),
    "Puigcerver et al. 2023": ("From Sparse to Soft Mixtures of Experts (Soft MoE)", "2308.00951"),
    "Radford et al. 2021": ("CLIP", "2103.00020"),
    "Raffel et al. 2019": ("T5", "1910.10683"),
    "Raffel et al. 2020": ("T5", "1910.10683"),
    "Raposo et al. 2024": ("Mixture-of-Depths", "2404.02258"),
    "Riquelme et al. 2021": ("Scaling Vision with Sparse Mixture of Experts (V-MoE)", "2106.05974"),
    "Roller et al. 2021": ("Hash Layers", "2106.04426"),
    "Shazeer et al. 2017": ("Outrageously Large Neural Networks", "1701.06538"),
    "Sun et al. 2026": ("Expert Threshold Routing", "2603.11535"),
    "Zhou et al. 2022": ("Mixture-of-Experts with Expert Choice Routing", "2202.09368"),
    "Zoph et al. 2022": ("ST-MoE", "2202.08906"),
}
_ANY = re.compile("|".join(map(re.escape, PAPERS)))


def url(name: str) -> str:
  return f"https://arxiv.org/abs/{PAPERS[name][1]}"


def named(text: str) -> list[str]:
  """The papers that a text names, in order, each once."""
  return list(dict.fromkeys(_ANY.findall(re.sub(r"\s+", " ", text))))


def link(text: str, form: str) -> str:
  """The text with each paper's name in a `form` of {text} and {url}."""
  return _ANY.sub(lambda found: form.format(text=found[0], url=url(found[0])), text)
