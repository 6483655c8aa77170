"""The blob of made-up runs: numbers worked out by hand, what bad input is said to be, and no jax."""

import json
import os
import subprocess
import sys

import pytest

from sparse_experts import cli
from sparse_experts.analysis import compare
from sparse_experts.analysis.balance import balance
from sparse_experts.analysis.outcome import train_seconds
from sparse_experts.report import blob, colours, groups, log
from tests.report.made_up import make_cards, write_run

LAYER = "router/decoder/01/"


def write(folder, rows, end="\n", **config):
  """A run of these rows."""
  write_run(folder, rows=0, finished=False, steps=1000, **config)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows)[:-1] + end)
  return folder


def one(*paths, cards=None, **kwargs):
  return blob.make([str(path) for path in paths], cards, **kwargs)["runs"][0]


def rows(number, **last):
  return [{"step": 10 * i, "loss": 5.0 - i / number, "learning_rate": 1e-3, "grad_norm": 1.0,
           "seconds_per_step": 0.5, "tokens_per_second": 200.0} | last for i in range(1, number + 1)]


def test_numbers_by_hand(tmp_path):
  """Two rows of one layer of four experts: its loads, MaxVio = max/mean - 1, dead of four, and the axes."""
  layer = {LAYER + "load": [0.5, 0.25, 0.25, 0.0], LAYER + "load_max_mean": 2.0, LAYER + "dead": 1,
           LAYER + "effective_share": 0.7071, LAYER + "dropped": 0.1}
  made = [row | layer for row in rows(2)]
  made[0]["run"] = {"tokens_per_step": 100, "model_flops_per_step": 3e6,
                    "layers": {"decoder/01": {"experts": 4, "k": 2}}}
  made[1]["eval/loss"] = 4.5
  run = one(write(tmp_path / "run", made))
  assert run["x"] == {"step": [10, 20], "tokens": [1000, 2000], "flops": [3e7, 6e7], "seconds": [5.0, 10.0]}
  assert run["curves"]["loss"]["mean"] == [4.5, 4.0] and run["validation"]["value"] == [4.5]
  assert run["columns"] == [0, 1]
  found, = run["layers"]
  assert (found["name"], found["experts"], found["k"]) == ("decoder/01", 4, 2)
  assert found["load"]["even"] == [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
  assert found["load"]["largest"] == 2.0 and found["load"]["experts"] == ["0", "1", "2", "3"]
  assert found["series"]["max_vio"] == [1.0, 1.0] and found["series"]["dead"] == [0.25, 0.25]
  assert found["series"]["entropy"] is None
  assert any("effective" not in text and "load of each" not in text for text in run["not_measured"])


def test_blocks_of_experts_and_percentiles(tmp_path):
  """128 experts in 64 blocks of two; nine layers with MaxVio 0 to 8, of which the median is 4."""
  made = rows(1)
  for i in range(9):
    layer = f"router/decoder/{i:02d}/"
    made[0] |= {layer + "load": [1 / 64] * 64, layer + "load_max_mean": 1.0 + i}
  run = one(write(tmp_path / "run", made, experts=128))
  assert run["layers"][0]["load"]["experts"][:2] == ["0-1", "2-3"]
  assert run["layers"][0]["load"]["even"][5] == [1.0]
  found = run["percentiles"]["max_vio"]
  assert (found["0"], found["10"], found["50"], found["100"]) == ([0.0], [0.8], [4.0], [8.0])
  assert len(run["notes"]) == 1 and "Only one row" in run["notes"][0]


def test_long_logs_keep_their_spikes(tmp_path):
  """5,000 rows are at most 600 points; one row's spike is the largest value of its point, also unparsed."""
  made = rows(5000)
  layer = {LAYER + "load_max_mean": 3.0, LAYER + "load": [0.75, 0.25]}
  made = [row | layer for row in made]
  made[1234]["grad_norm"] = 500.0
  run = one(write(tmp_path / "run", made, experts=2))
  x, grad = run["x"]["step"], run["curves"]["grad_norm"]
  assert 500 < len(x) <= log.POINTS and x[-1] == 50_000 and run["bucket"] == 9
  assert max(grad["high"]) == 500.0 and max(grad["mean"]) == pytest.approx((500 + 8) / 9, rel=1e-4)
  assert run["curves"]["loss"]["mean"][0] == pytest.approx(5 - 5 / 5000)
  assert len(run["columns"]) == 200 == len(run["layers"][0]["load"]["even"][0])
  assert set(run["layers"][0]["load"]["even"][0]) == {1.5}
  skipping = log.Log(bucket=100)
  path = str(tmp_path / "run/metrics.jsonl")
  whole, sampled = list(log._rows([path], log.Log())), list(log._rows([path], skipping))
  assert len(whole) == len(sampled) and LAYER + "load" not in sampled[1][0]
  assert all(a[0]["grad_norm"] == b[0]["grad_norm"] and a[0]["step"] == b[0]["step"]
             for a, b in zip(whole, sampled))


SPOILT = {
    "no metrics": (lambda run: os.remove(run / "metrics.jsonl"), "no row yet"),
    "half a line": (lambda run: append(run, '{"step": 30, "lo'), "half written"),
    "no row": (lambda run: append(run, "noise\n[1, 2]\n"), "2 lines of metrics.jsonl are no rows"),
    "not finite": (lambda run: append(run, '{"step": 30, "loss": NaN, "grad_norm": Infinity}\n'),
                   "loss is not finite in 1 rows, first at step 30"),
    "newer": (lambda run: edit(run, lambda config: config["model"].update(wormholes=3)),
              "does not know: model.wormholes"),
    "older": (lambda run: edit(run, lambda config: config["train"].pop("skip_nonfinite")),
              "lacks train.skip_nonfinite"),
    "diverged": (lambda run: (run / "diverged.json").write_text('{"why": "step 20: <b>inf</b>"}'),
                 "diverged: step 20: <b>inf</b>"),
}


def append(run, text):
  with open(run / "metrics.jsonl", "a") as f:
    f.write(text)


def edit(run, change):
  config = json.loads((run / "config.json").read_text())
  change(config)
  (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_with_a_run_is_said(tmp_path, name, capsys):
  spoil, said = SPOILT[name]
  folder = write(tmp_path / "a b&<i>'\"é", rows(2))
  spoil(folder)
  assert cli.main(["report", f"--workdir={folder}", "--no-model"]) == 0
  page = (folder / "report.html").read_text()
  assert said.replace("<", "&lt;").replace(">", "&gt;") in page
  assert capsys.readouterr().out.startswith(f"{folder}/report.html: ")
  assert "report.html" not in os.listdir(folder.parent) and not os.path.exists(folder / "checkpoints")


REFUSED = [
    (["--workdir={root}/none"], "does not exist"),
    (["--workdir={root}/one/config.json"], "is a file"),
    (["--workdir={root}/empty"], "holds no run"),
    (["--workdir={root}/one", "--out={root}/none/x.html"], "there is no folder {root}/none"),
    (["--workdir={root}/one", "--out={root}"], "is a folder; name a file in it"),
    (["--workdir={root}/one", "--sweep={root}"], "leave one of them out"),
    (["--sweep={root}/empty"], "has no folder of an arm"),
    (["--workdir={root}/one", "--config.train.steps=3"], "leave the override out"),
    (["--workdir=s3://bucket/run"], "runs are kept in folders and at gs:// addresses"),
    ([], "report needs --workdir"),
    (["--sweep={root}/none"], "--sweep={root}/none does not exist; name a sweep's result, for example "
                              "--sweep={root}/routers"),
    (["--sweep={root}/none/none"], "name the folder that `sweep` printed at its end"),
    (["{root}/one", "{root}/two"], "write report --workdir={root}/one {root}/two"),
    (["--workdir={root}/one,{root}/two"], "write several with spaces, --workdir={root}/one {root}/two"),
    (["--workdir={root}/one", "{root}/two", "{root}/one/."],
     "is named by {root}/one and again by {root}/one/.; name each run once"),
    (["--workdir={root}", "{root}/two"], "is named by {root} and again by {root}/two"),
    (["--workdir={root}/broken", "--no-model"], "is not a config"),
]


@pytest.mark.parametrize("arguments, said", REFUSED)
def test_a_mistake_is_one_line(tmp_path, arguments, said, capsys):
  write_run(tmp_path / "one", rows=1)
  (tmp_path / "empty").mkdir()
  write_run(tmp_path / "two", rows=1)
  (tmp_path / "routers/switch").mkdir(parents=True)
  (tmp_path / "routers/switch/runs.json").write_text('{"runs": ["../../one"]}')
  (write_run(tmp_path / "broken", rows=1) / "config.json").write_text("{")
  assert cli.main(["report", *(argument.format(root=tmp_path) for argument in arguments)]) == 2
  message = capsys.readouterr().err
  assert said.format(root=tmp_path) in message and message.count("\n") == 1


def test_several_runs_are_compared_as_compare_does(tmp_path):
  jitter = "model.router.jitter"
  for name, shift in (("switch", 0.0), ("dense", 0.03)):
    for seed in range(3):
      write_run(tmp_path / name / f"s{seed}", rows=3, seed=seed, keys={jitter: shift or None},
                final=1.9 + shift + seed * (0.01 + shift / 10))
  paths = [str(tmp_path / name) for name in ("switch", "dense")]
  found = blob.make(paths, None)
  assert [group["name"] for group in found["groups"]] == ["switch", "dense"]
  assert [run["name"] for run in found["runs"]][:2] == ["switch, seed 0", "switch, seed 1"]
  assert [run["details"] for run in found["runs"]] == [True, False, False] * 2
  a, b = map(compare.read_group, paths)
  paired = compare.difference(a, b)  # of `A B` A minus B, on the page too, and with the same digits
  comparison = found["comparison"]
  assert comparison["baseline"] == "dense" and comparison["groups"][0]["difference"] == {
      "mean": paired.mean, "half": paired.half, "pairs": 3}
  cells = [dict(zip(comparison["table"]["head"], row, strict=True)) for row in comparison["table"]["rows"]]
  printed = compare.report(a, b)
  for cell, group in zip(cells, (a, b)):
    assert f'{cell["nats per byte"]} nats per byte, standard deviation {cell["sd"]}' in printed
    assert {"dropped", "dead", "MaxVio", "seconds"} < cell.keys() and cell["dropped"].endswith("%")
    assert cell["seconds"] == f"{sum(map(train_seconds, group.runs.values())) / 3:,.1f}"
    assert cell["MaxVio"] == f"{sum(balance(run).max_vio for run in group.runs.values()) / 3:.2f}"
  assert f'difference {cells[0]["minus dense"]}, 95% interval {cells[0]["95% interval"]}, over 3' in printed
  assert comparison["drops"] == ""
  assert found["comparison"]["config"]["rows"] == [[jitter, "unset", "0.03"]]
  assert "paired differences to dense" in found["summary"]
  write_run(tmp_path / "dense/s3", rows=3, seed=3, finished=False, steps=99, keys={jitter: 0.03})
  assert "is not finished" in blob.make(paths, None)["comparison"]["why_not"]


def test_figures_are_rounded_once_and_drops_that_differ_are_said(tmp_path, capsys):
  """1.9241499999 is 1.9241; rounded to seven digits first it was 1.9242. One arm drops nothing."""
  rows_of = lambda share, final: [*(row | {LAYER + "load_max_mean": 1.0, LAYER + "dropped": share}
                                    for row in rows(2)), {
      "step": 20, "eval/final/nats_per_byte": final, "measure": "m", "data_fingerprint": "d"}]
  paths = [tmp_path / "mine", tmp_path / "switch"]
  for path, share, final in zip(paths, (0.0, 0.25), (1.9241499999, 2.0)):
    write(path, rows_of(share, final))
    edit(path, lambda config: config["train"].update(steps=20))
  made = blob.make(list(map(str, paths)), None)["comparison"]
  assert made["table"]["rows"][0][1] == "1.9241" and made["t"] == {}
  said = "25.0% of assignments: drops have a part in the difference"
  assert f"mine 0.0%, switch {said}" in made["drops"]
  assert cli.main(["compare", *map(str, paths)]) == 0
  assert f"{paths[0]} 0.0%, {paths[1]} {said}" in capsys.readouterr().out


def test_a_sweeps_result(tmp_path):
  """Arms in the order of its table, which is shown; runs lie elsewhere."""
  folder = tmp_path / "runs/sweeps/routers"
  for arm, final in (("zeta", 1.9), ("alpha", 1.8)):
    names = [f"{arm}{seed}" for seed in range(2)]
    for seed, name in enumerate(names):
      write_run(tmp_path / "runs" / name, rows=2, seed=seed, final=final + seed / 50,
                keys={"train.batch_size": len(arm)})
    (folder / arm).mkdir(parents=True)
    (folder / arm / "runs.json").write_text(json.dumps({"runs": [f"../../../{name}" for name in names]}))
  rows = "| arm | minus zeta |\n|-----|----|\n| zeta | |\n| alpha | -0.1 |\n\n"
  (folder / "table.md").write_text(f"{rows}Seeds 0, 1; rate 0.5. sd: over `seeds`.\n")  # of an older version
  assert groups.read_table(str(folder))["notes"] == ["Seeds 0, 1; rate 0.5.", "sd: over `seeds`."]
  (folder / "table.md").write_text(f"{rows}- Seeds 0, 1.\n- sd: over `seeds`.\n")
  for arguments in (["--sweep=" + str(folder)], ["--workdir=" + str(folder)]):
    (folder / "report.html").unlink(missing_ok=True)
    assert cli.main(["report", *arguments]) == 0
    text = (folder / "report.html").read_text()
    assert "<li>Seeds 0, 1.</li>" in text and "<li>sd: over <code>seeds</code>.</li>" in text
    call = f"<code>python -m sparse_experts report --workdir={tmp_path}/runs"
    assert f"expert cards of a sweep; of one run they are made by, of zeta: {call}/zeta0</code>, al" in text
    assert f"all seeds but the first; {call}/zeta1</code> shows one more" in text
  found = blob.make([], None, sweep=str(folder))
  assert [group["name"] for group in found["groups"]] == ["zeta", "alpha"]
  assert found["sweep"]["rows"] == [["zeta", ""], ["alpha", "-0.1"]]
  assert found["comparison"]["baseline"] == "zeta"
  assert found["comparison"]["groups"][1]["difference"]["pairs"] == 2


def test_runs_are_named_by_as_much_of_their_path_as_differs(tmp_path):
  for name in ("mine/0", "switch/0", "switch/1"):
    write_run(tmp_path / name, rows=1)
  found = blob.make([str(tmp_path / name) for name in ("mine/0", "switch/0", "switch/1")], None)
  assert [run["name"] for run in found["runs"]] == ["mine/0", "switch/0", "switch/1"]
  assert found["title"] == "mine/0, switch/0, switch/1"
  assert groups.short_names(["runs/smoke"]) == ["smoke"]
  for sweep in "ab":  # which may share runs
    (tmp_path / sweep / "dense").mkdir(parents=True)
    (tmp_path / sweep / "dense/runs.json").write_text('{"runs": ["../../switch/0"]}')
  both = groups.arms([str(tmp_path / sweep) for sweep in "ab"])
  assert [arm.name for arm in both] == ["a/dense", "b/dense"]


def test_cards_are_put_with_their_layers(tmp_path):
  run = one(write_run(tmp_path / "run"), cards=lambda workdir: make_cards(("decoder/01", "decoder/09")))
  by_name = {layer["name"]: layer for layer in run["layers"]}
  assert list(by_name) == ["decoder/01", "decoder/03", "decoder/09"]
  assert "measured" not in by_name["decoder/03"] and by_name["decoder/09"]["series"]["max_vio"] is None
  assert {"label": "rerouting cost, nats per byte", "value": "0.0450",
          "detail": "rise of the loss with random experts, on the sample of the cards"} in run["tiles"]


def test_the_log_is_shown_without_jax(tmp_path):
  write_run(tmp_path / "run", rows=3)
  code = (f"import sys; from sparse_experts import cli; "
          f"code = cli.main(['report', '--workdir={tmp_path}/run', '--no-model']); "
          "sys.exit(code or bool({'jax', 'flax', 'orbax', 'matplotlib'} & set(sys.modules)))")
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


def test_colours_do_not_depend_on_order_and_differ():
  names = [f"arm {i}" for i in range(18)]
  found = colours.colours(names)
  assert list(found) == names and len(set(found.values())) == 18
  assert colours.colours(names[::-1]) == found
  assert colours.colours(["arm 3"])["arm 3"] in colours.FIRST
  assert len(colours.colours([f"arm {i}" for i in range(30)])) == 30


# Not getrusage's memory: that is of the process before exec too, which is as large as the tests'.
LONG = """
import sys, time
from sparse_experts import cli
code = cli.main(["report", "--workdir=" + sys.argv[1], "--no-model"])
with open("/proc/self/status") as f:
  most, = (line.split()[1] for line in f if line.startswith("VmHWM"))
print(time.process_time(), most)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_hundred_thousand_rows_of_twelve_layers(tmp_path):
  """Under 20 s of work and 300 MB; 200 made-up rows, each repeated 500 times."""
  layers = [f"decoder/{i:02d}" for i in range(1, 24, 2)]
  folder = write_run(tmp_path / "run", rows=200, layers=layers, finished=False, steps=1_000_000)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  with open(folder / "metrics.jsonl", "w") as f:
    f.writelines(f'{{"step": {10 * i}{lines[(i - 1) // 500][lines[(i - 1) // 500].index(","):]}\n'
                 for i in range(1, 100_001))
  run = subprocess.run([sys.executable, "-c", LONG, str(folder)], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  seconds, kilobytes = map(float, run.stdout.split()[-2:])
  print(f"{seconds:.1f} s, {kilobytes / 1024:.0f} MB")
  assert seconds < 20 and kilobytes < 300 * 1024
  assert os.path.getsize(folder / "report.html") < 3_000_000
