"""Scores a run on its frozen list of validation windows, images or pairs, dropless.

Example: python -m sparse_experts evaluate --workdir=runs/smoke

Beside it: the loss at the evaluation capacity, and rerouting cost, the rise of the loss when every token
goes to random experts instead of its own. Overrides may name other data, another mesh, other capacities
or who claims a slot first, say --config.model.eval_capacity_factor=0.5
--config.model.router.order=batch_priority. Progress and time left are on stderr.

--quick takes seconds: the dropless figure of a sample, 100,000 bytes or 1,000 images or pairs, with its 95%
interval. --calibration adds whether the model is right as often as it is confident, with 95% intervals over
documents or images.

--few_shot=SOURCE measures the run on other data that have labels, without training. Of a run on text:
--few_shot=files:reviews.csv --shots=0,4 asks for the label of each text, with 0 and 4 examples before it.
"""

import functools

from sparse_experts.cli import flags
from sparse_experts.cli.tables import table
from sparse_experts.config import may_change, replaced
from sparse_experts.config.key import EVALUATE
from sparse_experts.config.keys_run import MOST_SEED
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of
from sparse_experts.tasks.task import QUICK_RECORDS

FIGURES = {  # of --calibration, in words
    "nats": "nats per target", "brier": "Brier score", "accuracy": "accuracy",
    "overconfidence": "confidence - accuracy", "equal_mass/ece": "ECE, equal mass",
    "equal_mass/ece2": "ECE (squares), equal mass", "equal_mass/ece2_debiased": "  debiased",
    "equal_width/ece": "ECE, equal width", "equal_width/ece2": "ECE (squares), equal width",
    "equal_width/ece2_debiased": "  debiased"}


def add_flags(parser):
  flags.add_run(parser)
  parser.add_argument("--quick", action="store_true", help="the dropless figure of a small sample, with its "
                      "95%% interval: 100,000 bytes, or 1,000 images or pairs")
  parser.add_argument("--few_shot", metavar="SOURCE", help="such as files:PATH; of a run on images: also how "
                      "well a ridge regression on its features tells classes of others; of one on text: how "
                      "often the label is right that it finds likeliest")
  parser.add_argument("--shots", metavar="N,N,..", help="training images of a class, default 1,5,10; "
                      "labelled texts in the prompt, default 0")
  parser.add_argument("--seed", metavar="N", type=flags.at_least(0, MOST_SEED), default=0,
                      help="of the draw of images or texts to learn from; default 0")
  parser.add_argument("--calibration", action="store_true", help="of a run on text or on images of classes: "
                      "also Brier score and calibration errors of the dropless model, on the same records")
  flags.add_json(parser)


def run(args):
  config = flags.read_run_config(args, may_change(EVALUATE))
  least, default = (0, "0") if task_of(config).few_shot == "labels" else (1, "1,5,10")
  shots = flags.whole_numbers("shots", args.shots or default, "is not a list of numbers", "1,5,10", low=least)
  if args.calibration:
    task_of(config).check_forecasts()
  from sparse_experts.training.evaluate import evaluate, quick, summary
  from sparse_experts.training.log import say
  from sparse_experts.training.run import load

  others = _open_others(args.few_shot, config, shots) if args.few_shot else None
  loaded = load(args.workdir, args.step, config=flags.on_these_devices(args, config))
  print(f"{args.workdir} at step {loaded.step}")
  source = loaded.source()
  if source.fingerprint != loaded.data_fingerprint:
    print(f"data.source='{config.data.source}' is other data than the run was trained on")
  dataset = task_of(config).make_dataset("valid", loaded.tokenizer, source)
  numbers = (quick if args.quick else evaluate)(loaded, dataset, say=say)
  print(summary(task_of(config), numbers))
  if others is not None:
    found = _few_shot(loaded, others, shots, args)
    parts = [f"{n}-shot accuracy {found[f'few_shot/{n}/accuracy']:.2%}" for n in shots]
    if "few_shot/majority" in found:
      parts.append(f"the most frequent label has {found['few_shot/majority']:.2%}")
    print(f"few-shot on {args.few_shot}: " + ", ".join(parts))
    numbers |= found
  if args.calibration:
    from sparse_experts.analysis.calibration import calibrate

    found = calibrate(loaded, dataset, int(numbers["windows"]), say).report()
    print(_calibration(found))
    numbers |= {f"calibration/{name}": value for name, value in found.items()}
  flags.print_json(args, numbers)


def _calibration(found):
  """Two tables: figures with their intervals, and how confident and how right the model is by bin."""
  intervals = found["intervals"]
  rows = [("", "figure", "95% interval")]
  rows += [(words, f"{found[name]:.4f}", f"{ends[0]:.4f} to {ends[1]:.4f}" if (ends := intervals.get(name))
            else "") for name, words in FIGURES.items()]
  bins = [("confidence", "accuracy", "share")]
  bins += [(f"{of['confidence']:.4f}", f"{of['accuracy']:.4f}", f"{of['share']:.1%}") for of in found["bins"]]
  return (f"calibration, dropless, of {found['targets']:,} targets; intervals over {found['groups']:,} "
          f"groups of documents:\n{table(rows)}\nby bins of equal mass:\n{table(bins)}")


def _open_others(name, config, shots):
  """The source --few_shot names, if the run can be tried on it."""
  from sparse_experts.analysis import few_shot, prompted

  task = task_of(config)
  if not task.few_shot:
    raise UserError(f"--few_shot={name} is of labelled images or texts, and this run is on {task.items}; "
                    "choose a run of model.name='vit', 'decoder' or 'seq2seq'")
  if task.few_shot == "labels":
    source = prompted.open_source(config, name)
    prompted.check_shots(source, shots)
    return source
  source = task_of(replaced(config, {"data.source": name})).open_source()
  few_shot.check_shots(source, shots)
  return source


def _few_shot(run, source, shots, args):
  from sparse_experts.analysis.few_shot import features, few_shot
  from sparse_experts.analysis.prompted import prompted

  task = task_of(run.config)
  if task.few_shot == "labels":
    return prompted(run, source, shots, args.seed, most=QUICK_RECORDS if args.quick else None)
  return few_shot(functools.partial(features, run), source, shots, args.seed)
