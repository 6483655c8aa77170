"""Runs summed up, held against the published table, and printed as one."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.understanding_moe.published import ACCURACY, ENTROPY, SLACK

FIGURES = ("accuracy", "accuracy_no_noise", "entropy", "steps", "seconds")
COLUMNS = ("setting", "model", "runs", "accuracy %", "published", "without noise", "entropy", "published",
           "steps")


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
  """{setting: {model: {figure: (mean, sample deviation), runs: their number}}}; accuracies in %."""
  found: dict[int, dict[str, list]] = {}
  for run in runs:
    found.setdefault(run["setting"], {}).setdefault(run["model"], []).append(run)
  return {setting: {model: {"runs": len(some)} | {name: _spread(some, name) for name in FIGURES}
                    for model, some in models.items()} for setting, models in found.items()}


def _spread(runs, name) -> tuple[float, float] | None:
  scale = 100 if name.startswith("accuracy") else 1
  values = [scale * run[name] for run in runs if run[name] is not None]
  if not values:
    return None
  return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def limit(setting: int, model: str) -> float:
  """How far a mixture's mean accuracy may be from the published one, in points."""
  return 2 * ACCURACY[setting][model][1] + SLACK


def checks(found: Mapping[int, Mapping[str, Mapping[str, Any]]], quick: bool) -> list[dict[str, Any]]:
  """[{what, found, wanted, holds}]: full runs against the published figures, quick ones by order only."""
  made = []

  def check(what, got, wanted, holds):
    made.append({"what": what, "found": got, "wanted": wanted, "holds": bool(holds)})

  for setting, models in found.items():
    mean = {model: figures["accuracy"][0] for model, figures in models.items()}
    entropy = {model: models[model]["entropy"][0] for model in ENTROPY[setting]}
    if quick:
      single = max(mean["single linear"], mean["single cubic"])
      got = f"{mean['mixture cubic']:.2f}, {mean['mixture linear']:.2f}, {single:.2f}"
      check(f"setting {setting}: accuracy of mixture cubic > mixture linear > best single", got, "falling",
            mean["mixture cubic"] > mean["mixture linear"] > single)
    else:
      for model in ENTROPY[setting]:
        published, allowed = ACCURACY[setting][model][0], limit(setting, model)
        check(f"setting {setting}: accuracy of {model}", f"{mean[model]:.2f}",
              f"{published:.2f} ± {allowed:.2f}", abs(mean[model] - published) <= allowed)
      order = sorted(mean, key=mean.get, reverse=True)
      wanted = sorted(mean, key=lambda model: ACCURACY[setting][model][0], reverse=True)
      check(f"setting {setting}: models by accuracy", " > ".join(order), " > ".join(wanted), order == wanted)
    check(f"setting {setting}: entropy of mixture cubic < 0.6 < mixture linear",
          f"{entropy['mixture cubic']:.3f}, {entropy['mixture linear']:.3f}", "0.6 between",
          entropy["mixture cubic"] < 0.6 < entropy["mixture linear"])
  return made


def table(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
  rows = [list(COLUMNS)]
  for setting, models in found.items():
    for model, figures in models.items():
      rows.append([
          str(setting), model, str(figures["runs"]),
          _pair(figures["accuracy"], 2), _pair(ACCURACY[setting][model], 2),
          _pair(figures["accuracy_no_noise"], 2) if figures["entropy"] else "",
          _pair(figures["entropy"], 3), _pair(ENTROPY[setting].get(model), 3), f"{figures['steps'][0]:.0f}"])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _pair(pair: tuple[float, float | None] | None, digits: int) -> str:
  if pair is None:
    return ""
  mean, deviation = pair
  return f"{mean:.{digits}f}" + ("" if deviation is None else f" ({deviation:.{digits}f})")


def in_words(made: Iterable[Mapping[str, Any]]) -> str:
  verdict = {True: "holds", False: "FAILS"}
  return "\n".join(f"{verdict[c['holds']]}  {c['what']}: {c['found']} (wanted: {c['wanted']})" for c in made)
