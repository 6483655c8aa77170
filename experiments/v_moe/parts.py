"""What each part trains and measures; every figure goes through `kept.get`."""

import copy
import dataclasses
import functools
import os

import jax
import numpy as np

from experiments.v_moe import pictures
from sparse_experts import load, partitioning
from sparse_experts.analysis import few_shot as few
from sparse_experts.analysis import specialisation
from sparse_experts.analysis.compare import spread
from sparse_experts.config import load_config, read_config
from sparse_experts.data.feed import eval_batches
from sparse_experts.data.images.augment import fit
from sparse_experts.data.images.files import decode
from sparse_experts.models.build import build
from sparse_experts.moe.capacity import expert_capacity
from sparse_experts.report import plots
from sparse_experts.tasks import task_of
from sparse_experts.training import evaluate
from sparse_experts.training.loop import train


def subject(args, size):
  """The model that is looked at: --run, or a V-MoE of --config."""
  return load_run(args) if args.run else trained(args, size, "sparse")


def load_run(args):
  config = read_config(args.run).unlock()
  config.model.dtype = "float32"  # what CPUs multiply fastest
  return load(args.run, config=config.lock())


def trained(args, size, name, spec="", **overrides):
  """The run of that name, trained now unless it is there. overrides: {dotted key: value} of the config."""
  config = load_config(args.config + spec).unlock()
  config.train.steps = config.train.eval_every = config.train.checkpoint_every = size["steps"]
  for key, value in overrides.items():
    *sections, last = key.split(".")
    functools.reduce(getattr, sections, config)[last] = value
  return train(config.lock(), os.path.join(args.out, name))


def capacity(args, size, kept):
  """Accuracy and nats per image against slots; `effective` is what whole slots make of it."""
  run = subject(args, size)
  dataset = run.dataset("valid")
  for order in ("choice", "batch_priority"):
    for factor in size["capacities"]:

      def measure(order=order, factor=factor):
        config = copy.deepcopy(run.config).unlock()
        config.model.eval_capacity_factor, config.model.router.order = factor, order
        config.model.capacity_rule = "vmoe_paper"  # the code's rounds up to multiples of 4
        model = evaluate.eval_model(config, run.tokenizer.vocab_size, "eval_capacity")
        evaluator = evaluate.Evaluator(model, config, run.mesh, dataset)
        found = evaluator(run.params, run.buffers, len(dataset))
        m = config.model
        slots = expert_capacity(m.capacity_rule, m.group_size, m.num_experts, m.router.k, factor)
        dropped = [v for k, v in found.items() if k.endswith("/dropped")]
        return {"effective": slots * m.num_experts / (m.router.k * m.group_size),
                "dropped": float(np.mean(dropped)), "accuracy": found["accuracy"],
                "nats_per_image": found["nats_per_image"]}

      kept.get(f"capacity/{order}/{factor}", measure)
  plots.save(pictures.capacity(kept.found), os.path.join(args.out, "capacity.png"))


def classes(args, size, kept):
  """Nats of mutual information between a token's first expert and its image's class, on validation images.

  In every layer: without --run of a model whose layers are all sparse.
  """
  if args.run:
    run = load_run(args)
  else:
    every = tuple(range(load_config(args.config).model.num_layers))
    run = trained(args, size, "every", **{"model.moe_layers": every})
  dataset = run.dataset("valid")
  sharding = partitioning.batch_sharding(run.mesh)
  joint, label = {}, []
  with partitioning.use(run.mesh):
    for batch in eval_batches(dataset, run.config.eval.batch_size, sharding):
      real = np.asarray(batch["weights"]) > 0
      _, routings = run.model(batch, trace=True)
      label.append(np.asarray(batch["targets"])[real, 0])
      for name, routing in jax.device_get(routings).items():
        E, tokens = routing.prob.shape[-1], run.abstract_model().tokens
        first = routing.prob.reshape(-1, E)[:len(real) * tokens].argmax(-1).reshape(len(real), tokens)[real]
        joint.setdefault(name, []).append(np.stack([(first == e).sum(1) for e in range(E)], axis=1))
  label, rng = np.concatenate(label), np.random.default_rng(0)
  for name, parts in joint.items():

    def measure(parts=parts):
      counts = np.concatenate(parts)
      null = [information(counts, rng.permutation(label)) for _ in range(size["permutations"])]
      return {"information": information(counts, label), "null_mean": float(np.mean(null)),
              "null_largest": float(np.max(null))}

    kept.get(f"classes/{name}", measure)


def information(count_NE: np.ndarray, label_N: np.ndarray) -> float:
  """Σ p(e, c) log p(e, c) / p(e) p(c), in nats: `count_NE` tokens of image n went to expert e."""
  return specialisation.information(np.stack([count_NE[label_N == c].sum(0) for c in np.unique(label_N)]))


def few_shot(args, size, kept):
  """Of the trained model, of the images' pixels, of the untrained model: mean and deviation over draws."""
  if not args.images:
    print("few_shot: left out; name a source, --images=files:PATH", flush=True)
    return
  run = subject(args, size)
  config = copy.deepcopy(run.config).unlock()
  config.data.source = args.images
  source = task_of(config).open_source()
  shots = [n for n in (1, 5, 10) if n <= min(np.bincount([i["label"] for i in source.train]))]
  params, buffers = build(run.config, run.tokenizer.vocab_size).init(jax.random.key(1))
  untrained = dataclasses.replace(run, params=params, buffers=buffers)
  pixels_of = lambda i: np.asarray(fit(decode(i["image"]), config.data.image.size), np.float64).ravel()
  pixels = lambda images: np.stack([pixels_of(i) for i in images])
  for name, look in (("trained", functools.partial(few.features, run)), ("pixels", pixels),
                     ("untrained", functools.partial(few.features, untrained))):

    def measure(look=look):
      seen = functools.cache(lambda part: look(getattr(source, part)))
      draws = [few.few_shot(functools.partial(pick, source, seen), source, shots, seed)
               for seed in range(size["seeds"])]
      of = {n: spread(found[f"few_shot/{n}/accuracy"] for found in draws) for n in shots}
      return {f"{n}/{key}": value for n, s in of.items()
              for key, value in (("accuracy", s.mean), ("deviation", s.deviation))}

    kept.get(f"few_shot/{name}", measure)


def pick(source, seen, images):
  """Features of some of a part's images, where `seen(part)` has those of all."""
  part = "valid" if images[0] is source.valid[0] else "train"
  place = {id(image): i for i, image in enumerate(getattr(source, part))}
  return seen(part)[[place[id(image)] for image in images]]


def upcycling(args, size, kept):
  """A dense parent goes on for half as many steps: dense, grown sparse, and a sparse model from scratch.

  Gates are renormalised, so what was grown is its parent before the first step. Each has the whole schedule.
  """
  plain = {"model.router.name": "top_k", "model.router.k": 1}  # dense FFNs as wide as one expert
  sparse = {"model.router.name": "top_k", "model.router.k": 2, "model.router.gate": "renormalized",
            "model.router.load_balance_weight": 0.01}
  for seed in range(size["seeds"]):
    parent = os.path.join(args.out, f"parent_{seed}")
    trained(args, size, f"parent_{seed}", ":dense", **plain, **{"train.seed": seed})
    arms = {"dense": (":dense", plain | {"init_from": parent}),
            "grown": ("", sparse | {"init_from": parent, "init_upcycle": True}), "scratch": ("", sparse)}
    for arm, (spec, overrides) in arms.items():

      def measure(arm=arm, spec=spec, overrides=overrides, seed=seed):
        run = trained(args, size, f"{arm}_{seed}", spec, **overrides, **{
            "train.seed": seed, "train.steps": size["more"]})
        found = evaluate.evaluate(run)
        return {name: found[name] for name in ("accuracy", "nats_per_image")}

      kept.get(f"upcycling/{arm}/{seed}", measure)
  of = lambda arm, name: [kept.found[f"upcycling/{arm}/{s}"][name] for s in range(size["seeds"])]
  for other in ("dense", "scratch"):
    for name in ("accuracy", "nats_per_image"):
      found = spread(np.subtract(of("grown", name), of(other, name)))
      print(f"grown minus {other}, {name}: {found.mean:+.4f}, 95% interval {found.interval}", flush=True)
