"""Finished runs: their folders read into dicts, the curves and scores in them. No torch: logs are enough."""
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from nanomaml.config import one_line, require
from nanomaml.files import parse, read_jsonl
from nanomaml.treebanks import TRAINABLE

AXES = {"step": "updates", "tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds of training"}
WEIGHTS = ("v_proj", "o_proj", "down_proj")
LABELS = {  # of the curves that train.py writes, in the order in which they are shown
    "rank/resid": "effective rank, residual stream",
    "entropy": "attention entropy",
    **{f"rank/{name}": f"effective rank, {name}" for name in WEIGHTS},
}
LAYER = re.compile(r"(?!entropy_nats/)(.+?)/(\d\d+)(/\d+)?")  # <what>/<layer>[/<head>]; not `entropy` twice
# Where a word is read in the episodes on held-out text, and how its line is drawn. Language modelling trains
# the position before it; only episodes train the mask.
READ_OUTS = {"context": ("before the word", "-"), "mask": ("at the mask", "--")}
WORDS = {"": "held-out text", "new_": "held-out words"}
# Runs that agree in all of this were measured on the same episodes.
INSTRUMENT = ("eval_episodes", "eval_ways", "eval_shots", "eval_queries", "eval_window", "inner_steps",
              "inner_lr", "word_targets", "max_word_share")
# Two NER results that agree in all of this can be compared.
NER_KEY = ("mode", "train", "tags", "shots", "label", "bidirectional", "lr", "epochs", "patience",
           "batch_size", "sentences")


def read_run(folder):
    """{"path", "seed" (None if unknown), "config", "record", "log", "probes", "ner"} of a run's folder."""
    folder = Path(folder)
    log = read_jsonl(folder / "log.jsonl", "step")
    probes = read_jsonl(folder / "probes.jsonl", "step")
    for name, lines in (("log.jsonl", log), ("probes.jsonl", probes)):
        wrong = [f"step {line['step']}: {key} = {value!r}" for line in lines for key, value in line.items()
                 if type(value) not in (int, float)]
        require(not wrong, f"{folder / name}: expected numbers, got {one_line(wrong[:1], 100)}")
    settings, record = (parse(path.read_bytes()) or {} if path.exists() else {}
                        for path in (folder / "config.json", folder / "run.json"))
    for key in ("seed", "max_steps"):  # another program may have written it
        if type(settings.get(key)) is not int:
            settings.pop(key, None)
    return {"path": folder, "seed": settings.get("seed"), "config": settings, "record": record, "log": log,
            "probes": probes,
            "ner": read_jsonl(folder / "ner.jsonl", "mode", "train", "test", "seed", "step", "f1")}


def read_groups(groups):
    """The runs of [[folder, ...], ...], in each group in the order of their seeds."""
    paths = [Path(folder).resolve() for folders in groups for folder in folders]
    require(len(set(paths)) == len(paths), f"a run is named twice: {', '.join(map(str, paths))}")
    found = [sorted(map(read_run, folders), key=by_seed) for folders in groups]
    for run in sum(found, []):
        require(is_measured(run), f"{run['path']} holds no run with a validation loss in log.jsonl")
    return found


def is_measured(run):
    return any("val/loss" in line for line in run["log"])


def by_seed(run):
    return run["seed"] is None, run["seed"]


def group_names(groups):
    """Names for the groups: "hybrid" for out/hybrid-1,out/hybrid-2 and for out/hybrid/1,out/hybrid/2."""
    names = []
    for first, *others in groups:
        first = Path(first).resolve()
        without_number = re.sub(r"[-_.,]?\d+$", "", first.name) or first.parent.name
        names.append(without_number if others else first.name)
    return names if len(set(names)) == len(names) else [",".join(map(str, folders)) for folders in groups]


def in_pairs(groups):
    """Whether there are two groups, whose runs have the same seeds. (`read_groups` has sorted them.)"""
    seeds = [[run["seed"] for run in runs] for runs in groups]
    return len(groups) == 2 and seeds[0] == seeds[1] and len({*seeds[0]} - {None}) == len(seeds[0])


def curve(run, key):
    """A metric of a run's log as arrays: {key: its values, and each of AXES that its lines have}."""
    lines = [line for line in run["log"] if key in line]
    present = [name for name in (*AXES, key) if all(name in line for line in lines)]
    return {name: np.array([line[name] for line in lines], float) for name in present}


def last_values(groups, key):
    """[[the last value of a metric in each run that has it] for each group]"""
    return [[float(y[-1]) for run in runs if len(y := curve(run, key)[key])] for runs in groups]


def shared_axes(groups):
    """The axes that the validation losses of all runs have. A run with only episodes has no LM tokens."""
    curves = [curve(run, "val/loss") for runs in groups for run in runs]
    return [axis for axis in AXES if all(axis in c and c[axis].any() for c in curves)]


def domain_keys(groups):
    """The metrics val/<domain> that all runs have."""
    keys = [{key for line in run["log"] for key in line} for runs in groups for run in runs]
    return sorted(key for key in set.intersection(*keys) if key.startswith("val/") and key != "val/loss")


def losses_at_equal(groups, axis):
    """At the largest value of an axis that all runs reach: ([[validation loss of each run] for each group],
    [how much of its training each group has done by then, nan where unknown])."""
    curves = [[(run, curve(run, "val/loss")) for run in group] for group in groups]
    shared = min(c[axis][-1] for group in curves for _, c in group)
    losses = [[float(np.interp(shared, c[axis], c["val/loss"])) for _, c in group] for group in curves]
    return losses, [np.mean([np.interp(shared, c[axis], c["step"]) / run["config"].get("max_steps", math.nan)
                             for run, c in group]) for group in curves]


def layer_curves(runs):
    """{kind: {layer: [(steps, mean over heads) of each run]}} of the metrics <kind>/<layer>[/<head>]."""
    curves = defaultdict(lambda: defaultdict(list))
    for run in runs:
        metrics = defaultdict(list)  # (kind, layer): its metrics, one a head where there are heads
        for key in dict.fromkeys(key for line in run["probes"] for key in line):
            if name := LAYER.fullmatch(key):
                metrics[name[1], name[2]].append(key)
        for (kind, layer), keys in metrics.items():
            points = [(line["step"], np.mean([line[key] for key in keys])) for line in run["probes"]
                      if all(key in line for key in keys)]
            if points:
                curves[kind][layer].append(np.array(points, float).T)
    kinds = sorted(curves, key=lambda kind: ([*LABELS, kind].index(kind), kind))
    return {kind: dict(sorted(curves[kind].items())) for kind in kinds}


def mean_curve(curves):
    """(steps, mean) of [(steps, values), ...]: at the steps of the first, up to where the shortest ends."""
    end = min(steps[-1] for steps, _ in curves)
    steps = curves[0][0][curves[0][0] <= end]
    return steps, np.mean([np.interp(steps, *c) for c in curves], axis=0)


def in_language(train, test):
    """Whether a treebank is in a language that was trained on: en_pud is after --train=en_ewt."""
    names = TRAINABLE if train == "all" else train.split(",")
    return re.split("[_:]", test)[0] in {re.split("[_:]", name)[0] for name in names}


def ner_scores(groups):
    """{values of NER_KEY: {treebank: [[F1 in percent of each run that was scored] for each group]}}

    A run's F1 is the mean over fine-tuning seeds: these are not independent trials of the pretraining. Only a
    run's newest checkpoint counts and, if a result was written twice, the later one.
    """
    scores = defaultdict(lambda: defaultdict(lambda: [[] for _ in groups]))
    for i, run in ((i, run) for i, group in enumerate(groups) for run in group):
        newest, found = max((line["step"] for line in run["ner"]), default=None), defaultdict(dict)
        for line in run["ner"]:
            if line["step"] == newest:
                setting = tuple(line.get(key) for key in NER_KEY)
                found[setting, line["test"]][line["seed"]] = 100 * line["f1"]
        for (setting, test), seeds in found.items():
            scores[setting][test][i].append(float(np.mean(list(seeds.values()))))
    return scores
