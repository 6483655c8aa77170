"""Made-up work directories and cards: everything a page shows, without training."""

import json
import math
import random
import zlib

from sparse_experts.config import default_config, to_json

CODE = "def main(argv):\n  return run(argv[1:]) or <script>alert('&')</script>\n"
PATCH = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAFElEQVR4nGNgYGD4z8DA"
         "wMAAAAYEAQEAZvsAAAAASUVORK5CYII=")


ABOUT = {"sparse_experts": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "device": "cpu", "devices": 1,
         "processes": 1, "tokens_per_step": 4096, "model_flops_per_step": 2.0e10, "params_total": 2_066_560,
         "params_active": 690_304, "data_fingerprint": "5f2c9d1e"}


def write_run(folder, rows=50, layers=("decoder/01", "decoder/03"), experts=8, seed=0, finished=True,
              steps=None, keys=(), loads=True, final=1.9, **last):
  """A run of `rows` rows, ten steps apart; `keys` changes its config, `last` its final row.

  loads=False: as a version wrote it that logged neither loads nor what ran.
  """
  draw = random.Random(seed)
  config = default_config().unlock()
  config.train.seed, config.train.steps = seed, steps or max(rows, 1) * 10
  config.model.num_experts = experts
  for key, value in dict(keys).items():
    section, _, name = key.rpartition(".")
    target = config
    for part in section.split("."):
      target = target[part]
    target[name] = value
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(to_json(config))
  with open(folder / "metrics.jsonl", "w") as f:
    for i in range(1, rows + 1):
      made = row(i, rows, layers, experts, draw, loads, final - 1.9)
      if i == 1 and loads:
        made["run"] = ABOUT | {"layers": {layer: {"experts": experts, "k": 1} for layer in layers}}
      f.write(json.dumps(made) + "\n")
    if finished:
      f.write(json.dumps({
          "step": 10 * rows, "eval/final/nats_per_byte": final, "eval/final/unigram_entropy": 3.1738,
          "eval/final/bigram_entropy": 2.4116, "eval/final/target_bytes": 1_000_192,
          "data_fingerprint": "5f2c9d1e", "measure": "nats_per_byte causal length=256", **last}) + "\n")
  return folder


def row(i, rows, layers, experts, draw, loads=True, gap=0.0):
  """Row number i: a loss that falls, loads that drift towards an even one, an evaluation every tenth row."""
  share = i / rows
  noise = lambda size: draw.gauss(0, size)
  made = {"step": 10 * i, "loss": 1.5 + 4 * math.exp(-6 * share) + gap * share + noise(0.03),
          "grad_norm": 0.4 + 3 * math.exp(-20 * share) + abs(noise(0.1)), "aux_loss": 0.01,
          "learning_rate": 3e-3 * min(1, 10 * share) * (0.5 + 0.5 * math.cos(math.pi * share)),
          "seconds_per_step": 0.35 + abs(noise(0.02)), "tokens_per_second": 11_700.0}
  made["tokens_per_second"] = 4096 / made["seconds_per_step"]
  for layer in layers:
    weights = [max(0.02, 1 + (1.6 - share) * math.sin(e * 2.3 + zlib.crc32(layer.encode()) % 7) + noise(0.1))
               for e in range(experts)]
    load = [w / sum(weights) for w in weights]
    entropy = -sum(p * math.log(p) for p in load)
    it = {"load_max_mean": max(load) * experts, "dead": sum(p < 0.1 / experts for p in load),
          "dropped": max(0.0, 0.12 * (1 - share) + noise(0.005)), "entropy": 2 - share + noise(0.02),
          "experts_per_token": 1.0}
    if loads:
      it |= {"load": [round(p, 4) for p in load], "effective_share": math.exp(entropy) / experts}
    made |= {f"router/{layer}/{name}": value for name, value in it.items()}
  if i % 10 == 0:
    made |= {"eval/loss": made["loss"] + 0.06, "eval/nats_per_byte": made["loss"] + 0.06}
  return made


def make_cards(layers=("decoder/01", "decoder/03"), experts=8, steps=(100, 200, 300, 400, 500),
               patches=False):
  """What `cards.cards` gives, by its contract, with texts that look like HTML."""
  draw = random.Random(1)
  domains = ["json", "asyncio", "test/<b>bold</b>", "encodings", "tkinter"]

  def profile(names):
    weights = [draw.random() ** 2 for _ in names]
    return [{"name": n, "share": w / sum(weights), "overall": 1 / len(names)} for n, w in zip(names, weights)]

  def card(e):
    tokens = [{"text": t, "count": 40 - i, "share": 0.9 - i / 20, "lift": 3.2 - i / 5} for i, t in enumerate(
        ["def", "self", "</script>", "·import", "&amp;", "\\n", "return", "0"])]
    examples = [{"before": "class A:\n  ", "token": "def", "after": " f(<img src=x onerror=alert(1)>):"},
                {"before": CODE[:20], "token": "<script>", "after": "alert('&')</script>"}] * 2
    return {"expert": e, "share": (e + 1) / (experts * (experts + 1) / 2), "assignments": 1000 + e,
            "tokens": [] if patches else tokens, "examples": [] if patches else examples,
            "patches": [PATCH] * 12 if patches else [],
            "profiles": {"domain": profile(domains), "position": profile(["0-63", "64-127", "128-255"]),
                         "token class": profile(["letters", "digits", "space", "punctuation"])},
            "reliability": {"domain": {"split_half": 0.93, "permuted": 0.02, "untrained": 0.41},
                            "position": {"split_half": 0.01, "permuted": 0.03, "untrained": 0.02},
                            "token class": {"split_half": 0.88, "permuted": None, "untrained": 0.3}}}

  head = "layer kind hidden experts k slots-train slots-eval sees params active FLOPs/token".split()
  sparse = ["sparse", "256", str(experts), "1", "80 of 512", "dropless", "past", "852k", "164.9k", "395.3k"]
  return {
      "step": steps[-1], "tokens": 16384, "records": 64, "seconds": 41.5, "checkpoint": "a1b2c3",
      "unit": "nats per byte", "grouping": "domain", "other_data": False,
      "rerouting": {"loss": 1.912, "random": 1.957, "cost": 0.045},
      "model": {"head": head, "rows": [
          ["decoder/00", "dense", "256", "", "", "", "", "", "163.8k", "163.8k", "393.2k"],
          *([name, *sparse] for name in layers)],
                "params_total": 2_066_560, "params_active": 690_304, "flops_per_token": 1_642_496.0},
      "layers": [{"name": name, "num_experts": experts, "k": 1, "why_missing": None,
                  "saturation": {"step": list(steps), "share": [0.4 + 0.6 * s / steps[-1] for s in steps]},
                  "regret": {"chosen_best": 0.31, "saved": 0.0123, "tokens": 256},
                  "information": {"domain": {"trained": 0.05, "permuted": 0.002, "untrained": 0.07}},
                  "expert_cards": [card(e) for e in range(experts)]} for name in layers]}
