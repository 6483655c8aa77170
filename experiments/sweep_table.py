"""Draws a sweep from its table where only that was kept: means, deviations, and paired differences.

A newer sweep also leaves results.json, figures by seed and curves, from which `report.pictures` draws more.
"""

import re

from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

Rows = dict[str, dict[str, str]]


def read(markdown: str, title: str = "") -> Rows:
  """{arm: {column: cell}} of the first table of a sweep after `title`."""
  lines = [line.strip("|") for line in markdown[markdown.index(title):].splitlines()]
  start = next(i for i, line in enumerate(lines) if re.match(r" arm +\| seeds", line))
  head, rows = [cell.strip() for cell in lines[start].split("|")], {}
  for line in lines[start + 2:]:
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) != len(head):
      break
    rows[cells[0]] = dict(zip(head, cells))
  return rows


def draw(rows: Rows) -> Picture:
  """Each arm's mean and standard deviation, and its paired difference to the baseline with its interval."""
  head = list(next(iter(rows.values())))
  minus = next(name for name in head if name.startswith("minus "))
  unit = head[head.index("sd") - 1]
  picture, (final, paired) = plots.panels("AB", 9, 1.1 + 0.32 * len(rows))
  means = {arm: (float(row[unit]), float(row["sd"])) for arm, row in rows.items()}
  plots.seeds(final, {}, f"final figure, {unit}",
              intervals={arm: (mean, mean - sd, mean + sd) for arm, (mean, sd) in means.items()})
  plots.title(final, f"mean and standard deviation over {next(iter(rows.values()))['seeds']} seeds")
  plots.seeds(paired, dict.fromkeys(rows, ()), f"{minus}, {unit}", line=0, intervals={
      arm: (float(row[minus]), *map(float, row["95% interval"].split(" to "))) for arm, row in rows.items()
      if row[minus]})
  paired.tick_params(labelleft=False)
  plots.title(paired, "paired by seed: mean difference and its 95% t-interval")
  return picture
