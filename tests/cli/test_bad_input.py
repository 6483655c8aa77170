"""Every mistake a user can mend: one line on stderr that names it and the way out, exit code 2."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from sparse_experts import cli
from sparse_experts.config import default_config, to_json

SMOKE = "--config=configs/smoke.py"
TINY = "--config=configs/switch/tiny.py"
DIGITS = "--config=configs/v_moe/digits.py"
WORKDIR = "--workdir={run}"
DATA = "--config={runs}/tiny.py:configs/smoke.py"  # the smoke config on 4 rows of 32 tokens
OWN_ROUTER, OWN_DATA = (f"--config.{key}=tests.cli.bad_input:" for key in ("model.router.name", "data.source"))



def _png(grey: int) -> bytes:
  out = io.BytesIO()
  Image.new("L", (4, 4), grey).save(out, "PNG")
  return out.getvalue()


# In argv, {dir} is an empty folder, {run} a folder with the config of a run, {files} holds the files below,
# and {runs} and {closed} what conftest.py has trained and spoilt.
FILES = {
    "broken.py": "def get_config(:\n  pass\n",
    "raises.py": "x = 1\ndef get_config():\n  return {}['a']\n",
    "import.py": "import a_module_that_is_not_there\n",
    "without.py": "config = 1\n",
    "dict.py": "def get_config():\n  return {'a': 1}\n",
    "plain.py": "from sparse_experts.config import default_config\nget_config = lambda: default_config()\n",
    "misspelt.py": "from sparse_experts.config import default_config\n"
                   "def get_config():\n  c = default_config()\n  c.model.num_expert = 4\n  return c\n",
    "short.py": "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'model': {}})\n",
    "file.txt": "text",
    "folder.npz/file.txt": "text",
    "cut/config.json": '{"model": {',
    "newer/config.json": '{"model": {"num_expertz": 4}}',
    "typed/config.json": '{"model": {"num_experts": "four"}}',
    "none.py": "def get_sweep():\n  return 3\n",
    "sweep.py": "from sparse_experts.sweeps.sweep import Arm, Sweep\ndef get_sweep():\n"
                "  return Sweep(arms={'switch': Arm('configs/smoke.py'), 'dense': Arm('configs/smoke.py:dense')})\n",
    "joint.py": "from sparse_experts.sweeps.sweep import Arm, Sweep\ndef get_sweep():\n"
                "  return Sweep(arms={'a': Arm('configs/smoke.py')}, seeds_together=4)\n",
    "badly/config.json": '{"train": {"steps": 1}}',
    "badly/metrics.jsonl": "not JSON\n",
    "two/0/config.json": '{"train": {"steps": 1}}',
    "two/1/config.json": '{"train": {"steps": 1}, "model": {"num_experts": 4}}',
    "twice/0/config.json": '{"train": {"steps": 1}}',
    "twice/1/config.json": '{"train": {"steps": 1}}',
    "index/runs.json": '{"runs": 3}',
}
for _i in range(4):
  FILES |= {f"pictures/{_name}/{_i}.png": _png(10 * _i + len(_name)) for _name in ("cat", "horse")}
  FILES |= {f"one_class/cat/{_i}.png": _png(_i), f"no_class/{_i}.png": _png(_i)}
FILES |= {"torn/cat/9.png": _png(9)[:50], "torn/dog/1.png": _png(1), "torn/dog/2.png": b"text",
          "vit/config.json": '{"model": {"name": "vit", "group_size": 80, "activation": "gelu"}, "data": {"objective": "softmax"}}'}
FILES |= {"labels.csv": "a,x\nb,y\nc,x\nd,y\n",
          "limoe/config.json": '{"model": {"name": "limoe", "pool": "mean", "activation": "gelu", "group_size": 160}, "data": {"objective": "contrastive"}}'}
_ROW = '{"step": 1, "eval/final/nats_per_byte": 2.0, "data_fingerprint": "%s", "measure": "%s"}\n'
_RUNS = {"a": (0, "d1", "m1"), "b": (0, "d2", "m1"), "c": (0, "d1", "m2"), "d": (1, "d1", "m1")}
for _name, (_seed, _data, _measure) in _RUNS.items():
  FILES[f"{_name}/config.json"] = f'{{"train": {{"steps": 1, "seed": {_seed}}}}}'
  FILES[f"{_name}/metrics.jsonl"] = _ROW % (_data, _measure)
FILES |= {"half/config.json": '{"train": {"steps": 2}}', "half/metrics.jsonl": _ROW % ("d1", "m1"),
          "older/config.json": FILES["a/config.json"],
          "older/metrics.jsonl": '{"step": 1, "eval/final/nats_per_byte": 2.0}\n'}
# An arm of a sweep file -> what is wrong with it.
_ARMS = {"key": "Arm('configs/smoke.py', {'model.num_expert': 4})",
         "value": "Arm('configs/smoke.py', {'train.steps': 2.5})",
         "range": "Arm('configs/smoke.py', {'model.router.k': 9})",
         "file": "Arm('configs/smoek.py')", "seed": "Arm('configs/smoke.py', {'train.seed': 1})",
         "rate": "Arm('configs/smoke.py', {'optimizer.learning_rate': 0.1})", "type": "'configs/smoke.py'"}
FILES |= {f"arm_{name}.py": "from sparse_experts.sweeps.sweep import Arm, Sweep\ndef get_sweep():\n"
          f"  return Sweep(arms={{'a': {arm}}}, learning_rates=(0.1, 0.2))\n" for name, arm in _ARMS.items()}

TABLE = [
    # verbs and flags
    (["trian"], "unknown verb 'trian'; did you mean 'train'\\?"),
    (["zzz"], "unknown verb 'zzz'; known: benchmark, claim, compare, compile, convert, describe, evaluate, report, sample, sweep, trace, train"),
    (["train"], "train needs --config; write for example --config=configs/smoke.py"),
    (["train", SMOKE], "train needs --workdir; write for example --workdir=runs/smoke"),
    (["train", SMOKE, "--workdir="], "train needs --workdir; .*"),
    (["train", SMOKE, "--workdri=x"], "unknown flag '--workdri' of train; did you mean '--workdir'\\?"),
    (["train", SMOKE, "-config.train.steps=3"], "unknown flag '-config.train.steps' of train.*"),
    (["train", SMOKE, "--steps=10"], "unknown flag '--steps' of train; did you mean --config.train.steps=10\\?"),
    (["train", SMOKE, "--train.steps", "10"],
     "unknown flag '--train.steps' of train; did you mean --config.train.steps=10\\?"),
    (["describe", SMOKE, "--lr=0.1"], "unknown flag '--lr' .*did you mean --config.optimizer.learning_rate=0.1\\?"),
    (["describe", SMOKE, "--config.lr=1"], "unknown config key 'lr'; did you mean 'optimizer.learning_rate'\\?"),
    (["evaluate", WORKDIR, "--steps=10"], "unknown flag '--steps' of evaluate; did you mean '--step'\\?"),
    (["describe", SMOKE, "--config.train.steps=1", "--config.train.steps=2"],
     "--config.train.steps is given twice, as '1' and as '2'; leave one of them out"),
    (["train", SMOKE, "--workdir=a", "--workdir", "b"],
     "--workdir is given twice, as 'a' and as 'b'; leave one of them out"),
    (["train", SMOKE, "--profile=0"], "--profile: wants a whole number of at least 1, got '0'"),
    (["train", SMOKE, "fast"], "unexpected 'fast' after train; flags are written --name=value"),
    (["describe", SMOKE, "--json=yes"], "--json: ignored explicit argument 'yes'"),
    (["describe", "--config"], "--config: expected one argument"),
    (["describe", SMOKE, "--match=flops"], "--match=flops needs --to; write for example --to=configs/smoke.py:dense"),
    (["describe", SMOKE, "--to=configs/smoke.py"],
     "--to=configs/smoke.py needs --match; write --match=flops, --match=params or --match=both"),
    (["describe", SMOKE, "--match=flop", SMOKE.replace("config=", "to=")], "--match='flop' is unknown; did you mean 'flops'\\?"),
    (["describe", SMOKE + ":dense", "--match=both", "--to=configs/smoke.py"],
     "--match=both changes model.expert_dim and model.num_experts, but model.num_experts=0 makes the config dense; .*"),
    (["describe", SMOKE, "--match=flops", "--to=configs/smoek.py"], ".*no file configs/smoek.py; did you mean .*"),
    (["describe", "--keys=capacitty"], "--keys=capacitty is in no config key's name or meaning; write --keys to list all"),
    (["sample", WORKDIR, "--length=0"], "--length: wants a whole number of at least 1, got '0'"),
    (["sample", WORKDIR, "--prompt=a\udcff"], r"--prompt='a\\udcff' is not UTF-8; give text"),
    (["sample", WORKDIR, "--temperature=hot"], "--temperature: wants a number of at least 0.0, got 'hot'"),
    (["sample", WORKDIR, "--temperature=nan"], "--temperature: wants a number of at least 0.0, got 'nan'"),
    (["sample", WORKDIR], "sample needs --prompt; write for example --prompt='def main\\('"),
    # config files
    (["describe", "--config=configs/smoek.py"], ".*no file configs/smoek.py; did you mean 'configs/smoke.py'\\?"),
    (["describe", "--config=smoek.py"], ".*no file smoek.py; did you mean 'smoke.py'\\?"),
    (["describe", "--config=nowhere/tiny.py"], ".*no file nowhere/tiny.py; did you mean 'st_moe/tiny.py'\\?"),
    (["describe", "--config=nowhere/a.py"], ".*no file nowhere/a.py; `python -m sparse_experts describe --configs` lists .*"),
    (["describe", "--config=configs"], ".*configs is a folder; name a Python file in it"),
    (["describe", "--config=configs/smoke.py:sparse"], "config variant ':sparse' is unknown; known: dense"),
    (["describe", "--config={files}/plain.py:dense"], ".*takes no argument; leave out ':dense'"),
    (["describe", "--config={files}/broken.py"], ".*broken.py:1: importing it raised SyntaxError: .*"),
    (["describe", "--config={files}/raises.py"], ".*raises.py:3: get_config\\(\\) raised KeyError: 'a'; mend.*"),
    (["describe", "--config={files}/import.py"], ".*import.py:1: importing it raised ModuleNotFoundError: .*"),
    (["describe", "--config={files}/without.py"], ".*without.py defines no get_config\\(\\); see .*"),
    (["describe", "--config={files}/dict.py"], ".*returned dict, not a ConfigDict; start from .*"),
    (["describe", "--config={files}/short.py"], ".*key 'data.dir' is missing; start from default_config\\(\\)"),
    (["describe", "--config={files}/misspelt.py"], ".*misspelt.py:4: .*num_expert.*Did you mean.*num_experts.*"),
    # images
    (["describe", DIGITS, "--config.model.patch_size=3"],
     "model.patch_size=3 does not divide data.image.size=8; choose a patch of 1 or 2 or 4 pixels, .*"),
    (["describe", DIGITS, "--config.data.objective=causal"],
     "data.objective='causal' does not fit model.name='vit'; choose data.objective=softmax or sigmoid or .*"),
    (["describe", SMOKE, "--config.data.objective=softmax"], "data.objective='softmax' does not fit .*"),
    (["describe", DIGITS, "--config.data.image.crop_area=0"],
     "data.image.crop_area=0.0 is out of range; choose above 0 to 1 \\(no crop\\)"),
    (["train", DIGITS, "--workdir={dir}/x", "--config.data.image.classes=7"], "data.image.classes=7, .*is outside the head.*"),
    (["describe", DIGITS, "--config.model.group_size=100"],
     "model.group_size=100 does not divide the 1088 tokens of a batch \\(64 rows x image tokens=17\\); choose .*"),
    (["describe", DIGITS, "--config.model.activation=swiglu"], "model.activation='swiglu', .*; choose gelu .*"),
    (["train", DIGITS, "--workdir={dir}/x", "--config.data.source=files:{dir}"],
     "data.source='files:.*' holds no images .*; give a folder or .zip with a sub-folder for each class"),
    (["train", SMOKE, "--workdir={dir}/x", "--config.init_upcycle=true"],
     "init_upcycle=True is set, but init_from names no dense run to copy FFNs from; set it"),
    (["train", SMOKE, "--workdir={dir}/x", "--config.init_optimizer=step"],
     "init_optimizer='step' is set, but init_from names no run to go on from; set it"),
    (["describe", SMOKE, "--config.init_optimizer=moment"],
     "init_optimizer='moment' is unknown; did you mean 'moments'\\?"),
    (["train", DIGITS, "--workdir={dir}/x", "--config.data.source=files:{files}/no_class"],
     "data.source='files:.*no_class': image '0.png' is in no class; give a folder or .zip with a sub-folder for .*"),
    (["train", DIGITS, "--workdir={dir}/x", "--config.data.source=files:{files}/one_class"],
     "data.source='files:.*one_class' has images of one class only, 'cat'; give it two or more"),
    (["train", DIGITS, "--workdir={dir}/x", "--config.data.source=files:{files}/torn"],
     "data.source='files:.*torn': 2 of 3 images cannot be read: cat/9.png \\(.*\\), dog/2.png \\(no image that "
     "Pillow knows\\); mend or remove them, or leave them out with data.image.skip_unreadable=true"),
    (["evaluate", "--workdir={files}/vit", "--few_shot=files:{files}/pictures"],
     "10 shots: class 'cat' has 3 training images; ask for 3 or fewer"),
    (["evaluate", "--workdir={files}/vit", "--few_shot=files:{files}/pictures", "--shots=1"],
     "1 shot alone cannot choose the ridge; ask for more shots too, such as 1,5"),
    (["evaluate", "--workdir={files}/vit", "--few_shot=files:{files}/no_class"], ".*'0.png' is in no class; .*"),
    (["evaluate", WORKDIR, "--few_shot=embedded"],
     "data.source='embedded' has no labels; give files:PATH of a table of texts and labels, .*"),
    (["evaluate", WORKDIR, "--few_shot=files:{files}/labels.csv", "--shots=0,9"],
     "9 shots: the source has 2 training texts; ask for so many or fewer"),
    (["evaluate", WORKDIR, "--few_shot=files:{files}/labels.csv", "--config.data.prompt=which one"],
     "data.prompt='which.*' has 0 places for the text; write \\{text\\} once, .*"),
    (["evaluate", "--workdir={files}/limoe", "--few_shot=files:{files}/labels.csv"],
     "--few_shot=files:.* is of labelled images or texts, and this run is on pairs of images and texts; choose .*"),
    (["evaluate", WORKDIR, "--shots=five"], "--shots=five is not a list of numbers; write for example .*"),
    # keys and types
    (["describe", SMOKE, "--config.model.num_expert=4"],
     "unknown config key 'model.num_expert'; did you mean 'model.num_experts'\\?"),
    (["describe", SMOKE, "--config.modle.num_experts=4"],
     "unknown config key 'modle.num_experts'; did you mean 'model.num_experts'\\?"),
    (["describe", SMOKE, "--config.learning_rate=1"],
     "unknown config key 'learning_rate'; did you mean 'optimizer.learning_rate'\\?"),
    (["describe", SMOKE, "--config.train.qqqqqq=1"], "unknown config key 'train.qqqqqq'; train has accumulate, .*"),
    (["describe", SMOKE, "--config.model=3"], "--config.model is a section, not a value; set one of its keys: .*"),
    (["describe", SMOKE, "--config.train.steps.x=3"],
     "--config.train.steps.x: 'train.steps' is a value, not a section; write --config.train.steps=VALUE"),
    (["describe", SMOKE, "--config.train.steps=1e3"],
     "--config.train.steps wants a whole number, got '1e3'; write for example --config.train.steps=200"),
    (["describe", SMOKE, "--config.train.steps"], "--config.train.steps wants a whole number, got nothing; .*"),
    (["describe", SMOKE, "--config.optimizer.learning_rate=fast"], ".*learning_rate wants a number, got 'fast'; .*"),
    (["describe", SMOKE, "--config.mesh.fsdp=maybe"], ".*mesh.fsdp wants true or false, got 'maybe'; .*"),
    (["describe", SMOKE, "--config.model.moe_layers=first"],
     ".*moe_layers wants whole numbers with commas between them, got 'first'; write for example .*=1,3"),
    (["describe", SMOKE, "--config.data.mean_span=long"], ".*mean_span wants a number, got 'long'; .*"),
    (["describe", SMOKE, "--config.train.steps=none"], ".*train.steps wants a whole number, got 'none'; .*"),
    # names
    (["describe", SMOKE, "--config.model.name=deocder"], "model.name='deocder' is unknown; did you mean 'decoder'\\?"),
    (["describe", SMOKE, "--config.model.activation=relux"], "model.activation='relux'.*did you mean 'relu'\\?"),
    (["describe", SMOKE, "--config.model.dispatch=rugged"], "model.dispatch='rugged'.*did you mean 'ragged'\\?"),
    (["describe", SMOKE, "--config.model.router.name=topk"], "model.router.name='topk'.*did you mean 'top_k'\\?.*"),
    (["describe", SMOKE, "--config.model.router.jiter=0.1"],
     "router.jiter is set, but router.name='top_k' takes no such argument; did you mean "
     "'jitter'\\?; unset it with --config.model.router.jiter=none"),
    (["describe", SMOKE, "--config.model.router.name=hash"],
     "router.jitter is set, but router.name='hash' takes no such argument; known: assign, "
     "counts, k, table; unset it with --config.model.router.jitter=none"),
    (["describe", TINY, "--config.model.decoder.router.name=hash", "--config.model.decoder.router.jitter=0.1"],
     "router.jitter is set, but router.name='hash' .*; unset it with --config.model.decoder.router.jitter=none"),
    (["describe", SMOKE, "--config.model.router.name=permuted", "--config.model.router.of=hash"],
     "router.jitter is set, but router.name='hash' .*; unset it with --config.model.router.jitter=none"),
    (["describe", SMOKE, "--config.model.router.name=deepseek_v3", "--config.model.router.nodes=3",
      "--config.model.router.jitter=None"],
     "router.nodes=3 does not divide num_experts=8 into nodes of 2 or more; choose a divisor, or 1 for no limit"),
    (["describe", SMOKE, "--config.model.router.gate=rawr"], "model.router.gate='rawr'.*did you mean 'raw'\\?"),
    (["describe", SMOKE, "--config.optimizer.schedule=cos"], "optimizer.schedule='cos' is unknown; .*"),
    (["describe", TINY, "--config.model.decoder.dispatch=rugged"], "model.decoder.dispatch='rugged' is unknown.*"),
    (["describe", SMOKE, "--config.data.objective=span_corruption"],
     "data.objective='span_corruption' does not fit model.name='decoder'; choose data.objective=causal or .*"),
    (["describe", SMOKE, "--config.model.decoder.router.k=2"],
     "model.decoder.router.k is set, but model.name='decoder' has one stack only; set model.router.k instead"),
    # numbers
    (["describe", SMOKE, "--config.model.router.k=0"], "model.router.k=0 is out of range; choose 1 or more"),
    (["describe", SMOKE, "--config.model.router.k=9"],
     "model.router.k=9 is more than model.num_experts=8; choose k from 1 to 8"),
    (["describe", TINY, "--config.model.decoder.router.k=9"],
     "model.decoder.router.k=9 is more than model.num_experts=8; choose k from 1 to 8"),
    (["describe", SMOKE, "--config.model.embed_dim=-1"], "model.embed_dim=-1 is out of range; choose 1 or more"),
    (["describe", SMOKE, "--config.model.capacity_factor=inf"], "model.capacity_factor=inf is out of range; .*"),
    (["describe", SMOKE, "--config.optimizer.learning_rate=nan"], "optimizer.learning_rate=nan is out of range; .*"),
    (["describe", SMOKE, "--config.model.dropout=1"], "model.dropout=1.0 is out of range; choose from 0 to below 1"),
    (["describe", SMOKE, "--config.data.valid_share=0"], "data.valid_share=0.0 .* choose from above 0 to below 1"),
    (["describe", SMOKE, "--config.model.head_dim=31"], "model.head_dim=31 is odd.*; choose 32"),
    (["describe", SMOKE, "--config.model.moe_layers=1,4"], "model.moe_layers=1,4 names layer 4; layers are 0 to 3"),
    (["describe", SMOKE, "--config.model.moe_every=5"], "model.moe_every=5 leaves no sparse layer .* choose 1 to 4.*"),
    # what must divide
    (["describe", SMOKE, "--config.model.num_experts=12", "--config.mesh.expert=8"],
     "model.num_experts=12 does not divide over mesh axis 'expert'=8; choose 8, 16 or 24, or shrink the axis"),
    (["describe", SMOKE, "--config.model.group_size=1000"],
     "model.group_size=1000 does not divide the 4096 tokens of a batch \\(16 rows x data.length=256\\); "
     "choose 512, 1024 or 2048"),
    (["describe", SMOKE, "--config.model.group_size=1024", "--config.mesh.data=2", "--config.mesh.expert=4"],
     "model.group_size=1024 makes 4 groups of the 4096 tokens .* do not divide over mesh.data=2 x mesh.expert=4; "
     "choose 128, 256 or 512"),
    (["describe", TINY, "--config.model.decoder.group_size=1000"],
     "model.decoder.group_size=1000 does not divide the 1024 tokens of a batch .*data.target_length=64.*"),
    (["describe", SMOKE, "--config.train.accumulate=3"],
     "train.batch_size=16 does not divide by train.accumulate=3; choose 15, 18 or 21"),
    (["describe", SMOKE, "--config.train.batch_size=12", "--config.mesh.data=8"],
     "train.batch_size=12 does not divide over .*mesh.data=8.*; choose 8, 16 or 24"),
    (["describe", SMOKE, "--config.mesh.model=3"], "model.num_heads=2 does not divide by mesh.model=3; choose 3, 6 or 9"),
    (["train", SMOKE, "--workdir=s3://bucket/run"],
     "workdir s3://bucket/run: runs are kept in folders and at gs:// addresses; give one of these, or mount the .*"),
    (["evaluate", "--workdir=gs:/bucket/run"], "workdir gs:/bucket/run looks like an address with a slash too few; .*"),
    (["evaluate", "--workdir=gs://My bucket/run"], "workdir gs://My bucket/run: no bucket is called 'My bucket'; .*"),
    (["sample", "--workdir=file:///tmp/run"], "workdir file:///tmp/run is of this machine; write the path alone, .*"),
    (["describe", SMOKE, "--config.mesh.fsdp=true", "--config.mesh.data=3", "--config.train.batch_size=12"],
     "model.embed_dim=128 does not divide over mesh.data=3 x mesh.expert=1, as mesh.fsdp=True asks; choose 126, .*"),
    (["describe", SMOKE, "--config.mesh.expert=0"], "mesh.expert=0 is out of range; choose 1 or more"),
    (["describe", SMOKE, "--config.mesh.data=4", "--config.mesh.dcn.data=3"],
     "mesh.dcn.data=3 slices do not divide mesh.data=4, which counts the devices of all; choose 1, 2 or 4"),
    (["describe", SMOKE, "--config.init_take=*/attention/*"],
     "init_take='\\*/attention/\\*' is set, but init_from names no run to take from; set it"),
    # a router that sees the future
    (["describe", SMOKE, "--config.model.router.order=batch_priority"],
     "model.router.order='batch_priority' lets later tokens .* causal decoder refuses; set model.router.order to .*"),
    (["describe", TINY, "--config.model.router.order=batch_priority"],
     "model.router.order='batch_priority' .* causal decoder refuses; set model.decoder.router.order to .*"),
    (["describe", SMOKE, "--config.model.router.name=expert_choice", "--config.model.router.jitter=none"],
     "model.router.name='expert_choice' sees other tokens, .* choose model.router.name='top_k' .*"),
    (["describe", SMOKE, "--config.model.router.name=hash", "--config.model.router.jitter=none",
      "--config.model.router.k=3"], "router.k=3 hash functions do not divide num_experts=8; choose a divisor: .*"),
    (["describe", SMOKE, "--config.model.router.name=task", "--config.model.router.jitter=none",
      "--config.model.router.k=none", "--config.model.router.draw=layer"],
     "router.draw is set, but router.name='task' takes no such argument.*"),
    (["describe", SMOKE, "--config.model.router.name=random", "--config.model.router.jitter=none",
      "--config.model.router.k=none", "--config.model.router.draw=tokens"],
     "router.draw='tokens' is unknown; did you mean 'token'\\?"),
    # work directories
    (["evaluate"], "evaluate needs --workdir; write for example --workdir=runs/smoke"),
    (["evaluate", "--workdir={dir}/none"], "workdir .*none does not exist; name the folder of a trained run"),
    (["evaluate", "--workdir={files}/file.txt"], "workdir .*file.txt is a file; name the folder of a trained run"),
    (["evaluate", "--workdir={dir}"], "workdir .* has no config.json; name the folder of a trained run"),
    (["evaluate", "--workdir={files}/cut"], ".*config.json is not a config \\(.*\\); restore it or start in .*"),
    (["evaluate", "--workdir={files}/newer"], ".*unknown key 'model.num_expertz'; did you mean 'model.num_experts'\\?"),
    (["evaluate", "--workdir={files}/typed"], ".*'model.num_experts'='four' should be int; restore it or .*"),
    (["evaluate", WORKDIR, "--config.model.embed_dim=64"],
     "--config.model.embed_dim: evaluate cannot change what was trained; it may change data.source, .*"),
    (["sample", WORKDIR, "--prompt=a", "--config.eval.batch_size=8"],
     "--config.eval.batch_size: sample cannot change what was trained; leave the override out"),
    # sweeps
    (["sweep"], "sweep needs --sweep; write for example --sweep=experiments/sparse_vs_dense/sweep.py"),
    (["sweep", "--sweep=experiments/sparse_vs_dense/sweeep.py"], ".*no file .*; did you mean 'experiments/sparse_vs_dense/sweep.py'\\?"),
    (["sweep", "--sweep={files}/plain.py"], ".*plain.py defines no get_sweep\\(\\); see experiments/.* for one"),
    (["sweep", "--sweep={files}/broken.py"], ".*broken.py:1: importing it raised SyntaxError: .*; mend the file"),
    (["sweep", "--sweep={files}/none.py"], ".*none.py: get_sweep\\(\\) returned int, not a Sweep; see .* for one"),
    (["sweep", "--sweep={files}/sweep.py", "--only=dense,swich"],
     "--only=dense,swich: there is no arm 'swich'; did you mean 'switch'\\?"),
    (["sweep", "--sweep={files}/sweep.py", "--config.model.num_expert=4"],
     "arm 'switch': unknown config key 'model.num_expert'; did you mean 'model.num_experts'\\?"),
    (["sweep", "--sweep={files}/sweep.py", "fast"], "unexpected 'fast' after sweep; flags are written --name=value"),
    (["sweep", "--sweep={files}/joint.py", "--config.mesh.data=2", "--config.mesh.expert=4"],
     "arm 'a': seeds_together=4 is for one device, and the mesh has 8; leave one of them out"),
    (["sweep", "--sweep={files}/arm_key.py"],
     "arm 'a': unknown config key 'model.num_expert'; did you mean 'model.num_experts'\\?"),
    (["sweep", "--sweep={files}/arm_value.py"], "arm 'a': --config.train.steps wants a whole number, got '2.5'; .*"),
    (["sweep", "--sweep={files}/arm_range.py"], "arm 'a': model.router.k=9 is more than model.num_experts=8; .*"),
    (["sweep", "--sweep={files}/arm_file.py"], "arm 'a': .*no file configs/smoek.py; did you mean 'configs/smoke.py'\\?"),
    (["sweep", "--sweep={files}/arm_type.py"], "arm 'a' is of type str; write Arm\\('configs/smoke.py'\\)"),
    (["sweep", "--sweep={files}/arm_seed.py"],
     "arm 'a': train.seed is set, but it comes from the sweep's seeds; leave one of them out"),
    (["sweep", "--sweep={files}/arm_rate.py"],
     "arm 'a': optimizer.learning_rate is set, but it comes from the sweep's learning_rates; leave one of them out"),
    # comparisons
    (["compare"], "compare needs two folders, got 0; write for example compare runs/sweeps/.*"),
    (["compare", "{files}/a"], "compare needs two folders, got 1; write for example compare runs/sweeps/.*"),
    (["compare", "{files}/a", "{files}/a", "--jsno"], "unknown flag '--jsno' of compare; did you mean '--json'\\?"),
    (["compare", "{files}/a", "{files}/a", "--out=x.pdf"], "--out=x.pdf is drawn as a PNG; name a .png file"),
    (["compare", "{files}/a", "{files}/a", "--config.train.steps=1"],
     "--config.train.steps: compare reads what was trained and scored; leave the override out"),
    (["compare", "{files}/a", "{dir}"], ".* holds no run; name a run, a folder of runs, or an arm of a sweep"),
    (["compare", "{files}/a", "{dir}/none"], "workdir .*none does not exist; name the folder of a trained run"),
    (["compare", "{files}/a", "{files}/half"], "run .*half is not finished: it is at step 1 of 2; train it to .*"),
    (["compare", "{files}/a", "{files}/older"],
     "run .*older has no data_fingerprint, as an older version trained it; train it again"),
    (["compare", "{files}/a", "{files}/b"],
     "runs .*a and .*b do not compare: their data differ, data.source='embedded' with data.valid_share=.* \\(d1\\) and "
     "data.source='embedded' .* \\(d2\\); compare runs on one data source"),
    (["compare", "{files}/a", "{files}/c"],
     "runs .*a and .*c do not compare: their metrics differ, m1 and m2; compare runs on one metric"),
    (["compare", "{files}/a", "{files}/d"], ".*a has seeds 0 and .*d has 1: no pair to compare; train both on .*"),
    (["compare", "{files}/a", "{files}/badly"], ".*badly/metrics.jsonl: line 1 is damaged; restore it, or .*"),
    (["compare", "{files}/a", "{files}/two"],
     ".*two holds runs of two configs: model.num_experts=8 in .*0 and 4 in .*1; name a folder of one config's runs"),
    (["compare", "{files}/a", "{files}/twice"], ".*twice holds two runs of seed 0, .*0 and .*1; name a folder of .*"),
    (["compare", "{files}/a", "{files}/index"], ".*runs.json does not name .*; run the sweep again, .*"),
    (["trace", WORKDIR], "trace needs --out; write for example --out=trace.npz"),
    (["trace", "--out={dir}/x.npz"], "trace needs --workdir; write for example --workdir=runs/smoke"),
    (["trace", WORKDIR, "--out={dir}/x.csv"], "--out=.*x.csv does not end in .npz; write --out=.*x.npz"),
    (["trace", WORKDIR, "--out={dir}/none/x.npz"], "--out=.*: there is no folder .*none; make it, or choose another"),
    (["trace", WORKDIR, "--out={files}/folder.npz"], "--out=.*folder.npz is a folder; name a file in it"),
    (["trace", WORKDIR, "--out=/proc/x.npz"], "--out=/proc/x.npz cannot be written \\(.*\\); choose another folder"),
    (["trace", WORKDIR, "--out={dir}/x.npz", "--steps=new"],
     "--steps=new wants steps with commas between them, or all; write for example --steps=100,200"),
    (["trace", WORKDIR, "--out={dir}/x.npz", "--kind=droples"], "--kind=droples is unknown; did you mean 'dropless'\\?"),
    (["trace", WORKDIR, "--out={dir}/x.npz", "--records=0"], "--records: wants a whole number of at least 1, got '0'"),
    (["trace", WORKDIR, "--out={dir}/x.npz", "--config.model.router.k=2"],
     "--config.model.router.k: trace cannot change what was trained; it may change data.source, .*"),
    (["evaluate", WORKDIR, "--step=last"], "--step: wants a whole number of at least 0, got 'last'"),
    # what is found only with devices, data or a trained run
    (["train", DATA, "--workdir={runs}/new", "--config.mesh.data=2", "--config.mesh.expert=4",
      "--config.mesh.model=2", "--config.train.batch_size=16"],
     "mesh data=2 x expert=4 x model=2 needs 16 devices, but there are 8; .*"),
    (["train", DATA, "--workdir={runs}/decoder", "--config.model.embed_dim=32"],
     "workdir .* holds another config: model.embed_dim=16 there and 32 here; choose another workdir, .*"),
    (["train", DATA, "--workdir={runs}/empty.txt"], "workdir .*empty.txt is a file; name a folder"),
    (["train", DATA, "--workdir=/proc/run"], "workdir /proc/run cannot be made .*; choose another .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.data.source=files:{runs}/none"],
     "data.source='files:.*none' does not exist; .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.data.source=files:{runs}/empty"],
     "data.source=.*empty.*; .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.data.source=files:{runs}/empty.txt"],
     "data.source=.*empty.txt.*; .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.data.source=files:{runs}/broken.gz"],
     "data.source=.*broken.gz.*; .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.data.source=embeded"],
     "data.source='embeded' is unknown; did you mean 'embedded'\\?"),
    (["train", DATA, "--workdir={runs}/new", "--config.model.router.name=nowhere:Router"],
     "router.name='nowhere:Router' cannot be imported: .*; give package.module:Class"),
    (["evaluate", "--workdir={runs}/decoder", "--step=7"], ".*checkpoints has no step 7; choose from .*"),
    (["trace", "--workdir={runs}/decoder", "--steps=2,7", "--out={runs}/x.npz"], ".*no step 7; choose .*"),
    (["evaluate", "--workdir={runs}/damaged"], ".*checkpoints/2 is damaged \\(.+\\); choose step 1"),
    (["evaluate", "--workdir={runs}/newer"], ".*checkpoints/2 has format 2, this version reads up to 1; install .*"),
    (["evaluate", "--workdir={runs}/wider"],
     ".*checkpoints/2 was trained with another config: model.mlp_dim=32 there and 48 here; set it back, in "
     ".*wider/config.json too, or name another workdir"),
    (["evaluate", "--workdir={runs}/gone"], ".*checkpoints holds no checkpoint; train the run first, or name .*"),
    (["evaluate", "--workdir={closed}"], ".*2/meta/metadata cannot be read .*; mend its permissions"),
    (["train", DATA, "--workdir={runs}/newer"], ".*checkpoints/2 has format 2, this version reads up to 1; .*"),
    (["train", DATA, "--workdir={runs}/wider", "--config.model.mlp_dim=48"],
     ".*checkpoints/2 was trained with another config: model.mlp_dim=32 there and 48 here; set it back, .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.init_from={runs}/decoder", "--config.model.mlp_dim=48"],
     "init_from=.*: decoder/00/ffn/w_gate is \\(16, 32\\) there and \\(16, 48\\) here, .*; exclude what .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.init_from={runs}/decoder", "--config.init_upcycle=true",
      "--config.model.moe_every=1", "--config.model.expert_dim=48"],
     "init_from=.*: decoder/00/ffn/w_gate is 16 x 32 there, and an expert's decoder/00/ffn/experts/w_gate 16 x 48 "
     "here; set model.expert_dim and widths to the dense run's"),
    (["train", DATA, "--workdir={runs}/new", "--config.init_from={runs}/decoder", "--config.init_optimizer=moments"],
     "init_optimizer=moments continues from step 2 of .*decoder, and train.steps=2 ends there; set train.steps above 2, "
     "or init_optimizer=fresh"),
    (["train", DATA, "--workdir={runs}/new", OWN_ROUTER + "Shapes"],
     "router Shapes: gate has shape \\(4, 15\\), but token has \\(4, 16\\); token, expert, gate and valid list .*"),
    (["train", DATA, "--workdir={runs}/new", OWN_ROUTER + "NoArguments"],
     "router.name='tests.cli.bad_input:NoArguments': its __init__\\(self\\) is not that of a router; write def "
     "__init__\\(self, d, num_experts, \\*, rngs\\), and after them .*"),
    (["train", DATA, "--workdir={runs}/new", "--config.model.router.name=hash", "--config.model.router.jitter=0.1",
      "--config.model.router.gate=raw"],
     "router.gate and router.jitter are set, but router.name='hash' takes no such arguments; known: .*; unset them with "
     "--config.model.router.gate=none --config.model.router.jitter=none"),
    (["sample", "--workdir={runs}/decoder", "--prompt=a <mask> b"],
     "the prompt 'a <mask> b' holds <mask>, but this model continues text and fills no spans; end the prompt .*"),
    (["describe", SMOKE, "--config.model.moe_heads=3"],
     "model.moe_heads=3 does not divide model.embed_dim=128; choose 2, 4 or 8, or another width"),
    (["describe", SMOKE, "--config.model.moe_projections=none"],
     "model.moe_projections='none' is set, but model.moe_heads=1 cuts no token; set that, or leave it"),
    (["describe", SMOKE, "--config.model.moe_heads=2", "--config.model.moe_place=attention"],
     "model.moe_heads=2 cuts the tokens of sparse FFNs, but model.moe_place='attention' has experts in .*"),
    (["describe", SMOKE, "--config.model.ternary.norm=layer"],
     "model.ternary.norm=layer is set, but model.expert_weights='float32'; set model.expert_weights=ternary, .*"),
    (["describe", SMOKE, "--config.model.expert_weights=ternary", "--config.model.ffn_bias=true"],
     "model.expert_weights='ternary' has no biases, but model.ffn_bias=True; leave one of them out"),
    (["describe", SMOKE, "--config.model.expert_weights=ternery"],
     "model.expert_weights='ternery' is unknown; did you mean 'ternary'\\?"),
    (["convert", "--workdir={runs}/decoder", "--to={runs}/packed", "--layout=ternary"],
     "--layout=ternary packs ternary experts, but the run in .* has model.expert_weights='float32'; train one with .*"),
    (["convert", "--workdir={runs}/decoder", "--to={runs}/packed", "--layout=ternary", "--dtype=float16"],
     "--dtype=float16 is of other layouts; leave it out with --layout=ternary"),
    (["convert", "--workdir={runs}/decoder", "--to={runs}/hf", "--layout=switch_transformers"],
     "--layout=switch_transformers cannot hold model.name='decoder', only 'seq2seq'; choose --layout=deepseek_v3 or mixtral or .*"),
    (["train", DATA, "--workdir={runs}/new", OWN_ROUTER + "NotANumber"], "router NotANumber: a gate is nan; .*"),
    (["train", DATA, "--workdir={runs}/new", OWN_ROUTER + "OutOfRange"],
     "router OutOfRange: expert 4 is listed, of 4; experts are 0 to 3"),
    (["train", DATA, "--workdir={runs}/new", OWN_ROUTER + "Duplicates"],
     "router Duplicates: token 0 is sent to expert \\d twice; list a pair once, with the sum of its gates"),
    (["train", DATA, "--workdir={runs}/new", OWN_DATA + "changing_shape"],
     "data.source='tests.cli.bad_input:changing_shape': document 3 is .*; give bytes, str, or a dict with .*"),
    (["train", DATA, "--workdir={runs}/new", OWN_DATA + "raises"], ".*bad_input.py:\\d+: .* raised AttributeError: .*"),
    (["train", DATA, "--workdir={runs}/new", OWN_DATA + "short"],
     "data.source='tests.cli.bad_input:short': document 2 raised IndexError: .*; mend it or leave it out"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  root = tmp_path_factory.mktemp("bad_input")
  for name, text in FILES.items():
    path = root / "files" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
  (root / "dir").mkdir()
  (root / "run").mkdir()
  (root / "run/config.json").write_text(to_json(default_config()))
  return {name: str(root / name) for name in ("files", "dir", "run")}


@contextlib.contextmanager
def another_user():
  """Root may read anything; this user only what others may."""
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(user)


@pytest.mark.parametrize("argv, line", TABLE, ids=[" ".join(argv) for argv, _ in TABLE])
def test_one_line(argv, line, places, request, capsys):
  if any("{runs}" in text or "{closed}" in text for text in argv):
    places = request.getfixturevalue("spoilt")
    capsys.readouterr()
  with another_user() if "closed" in argv[-1] else contextlib.nullcontext():
    assert cli.main([text.format(**places) for text in argv]) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.count("\n") == 1
  assert re.fullmatch(f"error: {line}\n", printed.err), printed.err


@pytest.mark.parametrize("argv, line", [TABLE[0], (["train", SMOKE, "--config.train.steps=x"], ".*whole number.*")])
def test_as_a_command(argv, line):
  run = subprocess.run([sys.executable, "-m", "sparse_experts", *argv], capture_output=True, text=True)
  assert run.returncode == 2
  assert re.fullmatch(f"error: {line}\n", run.stderr), run.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
  from sparse_experts.cli import describe

  def broken(args):
    raise RuntimeError("a bug")

  monkeypatch.setattr(describe, "run", broken)
  with pytest.raises(RuntimeError):
    cli.main(["describe", SMOKE])
