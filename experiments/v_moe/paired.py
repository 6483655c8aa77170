"""Arms of `cifar` compared image by image: python -m experiments.v_moe.paired --out=DIR.

Three answers to "is a better than b", each about another chance: over seeds (a t-interval of the paired
differences in accuracy), over images (of the mean over seeds, these runs given), and over both at once
(bootstrap: seeds and images drawn anew, 4,000 times; 5 seeds drawn with replacement vary a fifth too little).
McNemar's exact test is of one seed's two runs: images that only one of them has right.
Runs that were cut off stand at different steps: beside these, the last evaluation that all of them reached.
"""

import argparse
import itertools
import json
import os

import numpy as np
from scipy import special

from experiments.v_moe import pictures
from experiments.v_moe.cifar import ARMS
from sparse_experts import storage
from sparse_experts.analysis.compare import spread
from sparse_experts.report import plots

DRAWS = 4000


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m experiments.v_moe.paired", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", metavar="DIR", default="runs/v_moe_cifar")
  args = parser.parse_args()
  with open(os.path.join(args.out, "runs.json"), encoding="utf-8") as f:
    runs = json.load(f)["runs"]
  found = compare(read(os.path.join(args.out, "images.npz")))
  found["same step"] = at_the_same_step(runs)
  storage.write(os.path.join(args.out, "paired.json"), json.dumps(found, indent=1))
  print(in_words(found, runs))
  plots.save(pictures.cifar(found, runs), os.path.join(args.out, "paired.png"))


def read(path: str, kind: str = "dropless") -> dict[str, dict[str, np.ndarray]]:
  """{arm: {"right", "nats": [S, N]}} of the seeds that all arms have."""
  with np.load(path) as f:
    there = [[s for s in range(100) if f"{arm}/{s}/nats/{kind}" in f] for arm in ARMS]
    seeds = sorted(set.intersection(*map(set, there)))
    label = f[f"dense/{seeds[0]}/label/{kind}"]
    found = {}
    for arm in ARMS:
      of = lambda name, arm=arm: np.stack([f[f"{arm}/{s}/{name}/{kind}"] for s in seeds])
      if (of("label") != label).any():
        raise ValueError(f"{path}: {arm} saw other images, or in another order")
      found[arm] = {"right": (of("guess") == label).astype(float), "nats": of("nats").astype(float)}
  return found


def compare(arms: dict[str, dict[str, np.ndarray]]) -> dict:
  """Of each arm mean and standard deviation over seeds; of each two what `difference` says."""
  of = lambda s: {"mean": s.mean, "deviation": s.deviation, "n": s.n}
  found = {"arms": {arm: {name: of(spread(x.mean(1))) for name, x in a.items()} for arm, a in arms.items()}}
  for a, b in itertools.combinations(arms, 2):
    found[f"{b} - {a}"] = {name: difference(arms[b][name] - arms[a][name]) for name in arms[a]}
    found[f"{b} - {a}"]["mcnemar"] = [mcnemar(x - y) for x, y in zip(arms[b]["right"], arms[a]["right"])]
  return found


def at_the_same_step(runs: dict) -> dict:
  """At the last step that all runs were evaluated at: of each two arms accuracy and nats, over seeds."""
  by_step = {name: {step: of for step, *of in run["valid"]} for name, run in runs.items() if run["valid"]}
  step = max(set.intersection(*map(set, by_step.values())))
  value = {}
  for name, of in by_step.items():
    arm, seed = name.split("/")
    value.setdefault(arm, {})[seed] = np.array(of[step])
  found = {"step": step}
  for a, b in itertools.combinations(ARMS, 2):
    diff = [value[b][seed] - value[a][seed] for seed in sorted(value[a].keys() & value[b].keys())]
    of = {name: spread(x[i] for x in diff) for i, name in enumerate(("right", "nats"))}
    found[f"{b} - {a}"] = {name: {"mean": s.mean, "seeds": s.interval} for name, s in of.items()}
  return found


def difference(diff_SN: np.ndarray, seed: int = 0) -> dict:
  """Mean of the differences, and its 95% interval over seeds, over images, over both."""
  S, N = diff_SN.shape
  rng, over_seeds = np.random.default_rng(seed), spread(diff_SN.mean(1))
  half = 1.96 * diff_SN.mean(0).std(ddof=1) / np.sqrt(N)
  drawn = [diff_SN[rng.integers(S, size=S)].mean(0)[rng.integers(N, size=N)].mean() for _ in range(DRAWS)]
  mean = float(diff_SN.mean())
  return {"mean": mean, "seeds": over_seeds.interval, "images": (mean - half, mean + half),
          "both": tuple(np.quantile(drawn, (0.025, 0.975))) if S > 1 else None}


def mcnemar(diff_N: np.ndarray) -> dict:
  """How many images only one has right, and the chance of a split as uneven if a coin decided."""
  more, fewer = int((diff_N > 0).sum()), int((diff_N < 0).sum())
  p = min(2 * special.bdtr(min(more, fewer), more + fewer, 0.5), 1.0)
  return {"more": more, "fewer": fewer, "p": float(p)}


def in_words(found: dict, runs: dict) -> str:
  lines = []
  for arm, of in found["arms"].items():
    step = [run["step"] for name, run in runs.items() if name.startswith(arm + "/")]
    right, nats = of["right"], of["nats"]
    give_or_take = lambda x, form: "" if x["deviation"] is None else f" +- {x['deviation']:{form}}"
    lines.append(f"{pictures.NAMES[arm]}: accuracy {right['mean']:.2%}{give_or_take(right, '.2%')}, "
                 f"{nats['mean']:.4f}{give_or_take(nats, '.4f')} nats per image over {right['n']} seed(s), "
                 f"steps {min(step)} to {max(step)}")
  for pair, of in pairs(found).items():
    for name, x in of.items():
      if name == "mcnemar":
        lines.append(f"  McNemar, by seed: {', '.join('+{more} -{fewer} p={p:.2g}'.format(**m) for m in x)}")
        continue
      lines.append(f"{pair}: {interval_in_words(name, x)}")
  lines.append(f"all at step {found['same step']['step']}:")
  lines += [f"{pair}: {interval_in_words(name, x)}"
            for pair, of in pairs(found["same step"]).items() for name, x in of.items()]
  return "\n".join(lines)


def pairs(found: dict) -> dict:
  return {name: of for name, of in found.items() if " - " in name}


def interval_in_words(name: str, x: dict) -> str:
  scale, unit = (100, "points") if name == "right" else (1, "nats")
  over = [f"{over} {scale * x[over][0]:+.3f} to {scale * x[over][1]:+.3f}"
          for over in ("seeds", "images", "both") if x.get(over)]
  return f"{scale * x['mean']:+.3f} {unit}" + f"; 95%: {', '.join(over)}" * bool(over)


if __name__ == "__main__":
  main()
