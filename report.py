"""Compares finished runs, for instance hybrid with vanilla ones: tables in Markdown and a figure.

    python report.py out/demo                         # one run: its curves and their phases
    python report.py out/hybrid out/vanilla           # two groups of one run each; the second is the baseline
    python report.py out/hybrid out/vanilla --brief   # the figure in one row, for a README or a slide
    python report.py out/hybrid-1,out/hybrid-2 out/vanilla-1,out/vanilla-2 --out=out/seeds  # two runs a group
    python report.py "out/lr=1,2;out/lr=1,3" "--separator=;"   # two runs whose paths hold a comma

Writes OUT.md and OUT.png. Reads each run's log.jsonl and, if present, config.json, probes.jsonl, ner.jsonl.
Groups with runs of the same seeds are compared pair by pair: such runs start from the same weights and read
the same text. A metric of probes.jsonl named <what>/<layer> or <what>/<layer>/<head> is a curve: it gets a
panel in the figure and rows in the table of phases. For another evaluation, add a function to SECTIONS.
"""
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import config
from config import UserError, require

AXES = {"step": "updates", "tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds of training"}
# Where a word is read in the few-shot episodes on held-out text, and how its line is drawn. A causal language
# model predicts the word at the position before it; only runs with episodes have trained the mask.
READ_OUTS = {"context": ("before the word", "-"), "mask": ("at the mask", "--")}
WORDS = {"": "held-out text", "new_": "held-out words"}
# Runs that agree in these were measured by the same episodes.
INSTRUMENT = ("eval_episodes", "eval_ways", "eval_shots", "eval_queries", "eval_window", "inner_steps",
              "inner_lr")
LABELS = {  # of the curves that train.py writes, in the order in which they are shown
    "rank/resid": "effective rank, residual stream",
    "entropy": "attention entropy",
    "rank/v_proj": "effective rank, v_proj",
    "rank/o_proj": "effective rank, o_proj",
    "rank/down_proj": "effective rank, down_proj",
    "rank/grad_v_proj": "effective rank, gradient of v_proj",
    "rank/grad_o_proj": "effective rank, gradient of o_proj",
    "rank/grad_down_proj": "effective rank, gradient of down_proj",
}
NOT_SHOWN = ("entropy_nats",)  # `entropy` in another unit
# Two NER results that agree in these can be compared.
NER_KEY = ("mode", "train", "test", "tags", "shots", "label", "bidirectional", "lr", "epochs", "patience",
           "batch_size", "sentences")
RISE_AND_FALL = "diversify-then-compress"
MIN_POINTS = 8  # that a curve needs for its phases


@dataclass(frozen=True)
class Config:
    out: str = "report"  # path of the report without its ending; OUT.md and OUT.png are written
    brief: bool = False  # True: the figure is one row of at most three panels
    mixed: bool = False  # True: show what averaging query losses into the training loss makes of it
    separator: str = ","  # between the runs of a group: another one where a path holds a comma

    def __post_init__(self):
        require(self.separator, "separator must not be empty")


# ---- reading runs ----


def read_jsonl(path, *keys):
    """The lines of a .jsonl file as dicts, without non-finite numbers; [] if there is no such file.

    A torn last line, of a run that is still going, is skipped. UserError names any other line that is not
    JSON or lacks one of `keys`.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not all(key in line for key in keys):
                raise ValueError
            lines.append({k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)})
        except (ValueError, TypeError, AttributeError):
            if number < len(texts):
                expected = f"expected JSON with {', '.join(keys)}"
                raise UserError(f"{path}, line {number}: {expected}, got {text[:80]!r}") from None
    return lines


def read_run(folder):
    """{"path", "seed" (None if unknown), "config", "log", "probes", "ner"} of a run's folder."""
    folder = Path(folder)
    log = read_jsonl(folder / "log.jsonl", "step")
    require(any("val/loss" in line for line in log),
            f"{folder} holds no run with a validation loss in log.jsonl: "
            "name a folder that train.py wrote to; --separator is for paths that hold a comma")
    try:
        settings = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        settings = {}
    return {"path": folder, "seed": settings.get("seed"), "config": settings, "log": log,
            "probes": read_jsonl(folder / "probes.jsonl", "step"),
            "ner": read_jsonl(folder / "ner.jsonl", "mode", "train", "test", "seed", "step", "f1")}


def curve(run, key):
    """A metric of a run's log as arrays: {key: its values, and each of AXES that its lines have}."""
    lines = [line for line in run["log"] if key in line]
    present = [name for name in (*AXES, key) if all(name in line for line in lines)]
    return {name: np.array([line[name] for line in lines], float) for name in present}


def last_values(groups, key):
    """[[the last value of a metric in each run that has it] for each group]"""
    curves = [[curve(run, key)[key] for run in runs] for runs in groups]
    return [[float(values[-1]) for values in of_group if len(values)] for of_group in curves]


def shared_axes(groups):
    """The axes that the validation losses of all runs have. A run of episodes alone has no LM tokens."""
    curves = [curve(run, "val/loss") for runs in groups for run in runs]
    return [axis for axis in AXES if all(axis in c and c[axis].any() for c in curves)]


def domain_keys(groups):
    """The metrics val/<domain> that all runs have."""
    keys = [{key for line in run["log"] for key in line} for runs in groups for run in runs]
    return sorted(key for key in set.intersection(*keys) if re.fullmatch("val/(?!loss$|.*query_).*", key))


def layer_curves(runs):
    """The curves of probes.jsonl: {kind: {layer: [(steps, values) of each run that has it]}}.

    A metric is named <kind>/<layer> or <kind>/<layer>/<head>; the heads of a layer are averaged.
    """
    curves = defaultdict(lambda: defaultdict(list))
    for run in runs:
        metrics = defaultdict(list)  # (kind, layer): its metrics, one a head where there are heads
        for key in dict.fromkeys(key for line in run["probes"] for key in line):
            name = re.fullmatch(r"(.+?)/(\d\d+)(/\d+)?", key)
            if name and name[1] not in NOT_SHOWN:
                metrics[name[1], name[2]].append(key)
        for (kind, layer), keys in metrics.items():
            lines = [line for line in run["probes"] if all(key in line for key in keys)]
            if lines:
                steps = np.array([line["step"] for line in lines], float)
                values = np.array([np.mean([line[key] for key in keys]) for line in lines])
                curves[kind][layer].append((steps, values))
    known = list(LABELS)
    kinds = sorted(curves, key=lambda kind: (known.index(kind) if kind in known else len(known), kind))
    return {kind: dict(sorted(curves[kind].items())) for kind in kinds}


def mean_curve(curves):
    """(steps, mean) of [(steps, values), ...]: at the steps of the first, up to where the shortest ends."""
    end = min(steps[-1] for steps, _ in curves)
    steps = curves[0][0][curves[0][0] <= end]
    return steps, np.mean([np.interp(steps, *c) for c in curves], axis=0)


# ---- comparing two groups ----


def in_pairs(groups):
    """Whether there are two groups, of runs of the same seeds. (`read_groups` has sorted them.)"""
    seeds = [[run["seed"] for run in runs] for runs in groups]
    if len(groups) != 2 or seeds[0] != seeds[1] or None in seeds[0]:
        return False
    return len(set(seeds[0])) == len(seeds[0])


def student_p(t, df):
    """P(|T| > t) of Student's t-distribution with df degrees of freedom.

    The integral of cos(x)^(df - 1) from atan(t / sqrt(df)) to pi / 2, divided by that from 0 to pi / 2.
    """
    starts = math.atan2(abs(t), math.sqrt(df)), 0
    angles = [np.linspace(start, math.pi / 2, 20001) for start in starts]
    tail, whole = (np.trapezoid(np.cos(x) ** (df - 1), x) for x in angles)
    return float(tail / whole)


def difference(a, b, paired):
    """(mean(a) - mean(b), its standard error, p-value of a t-test that it is 0): paired, or Welch's (1947).

    The last two are nan if `a` or `b` has fewer than two values.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    delta = a.mean() - b.mean()
    if min(len(a), len(b)) < 2:
        return delta, math.nan, math.nan
    if paired:
        error, df = (a - b).std(ddof=1) / math.sqrt(len(a)), len(a) - 1
    else:
        var_a, var_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        error = math.sqrt(var_a + var_b)
        df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1)) if error else 1
    return delta, error, student_p(delta / error, df) if error else float(delta == 0)


def reach(losses, x, level):
    """Where a loss curve first falls to `level`, interpolated in log-loss between two evaluations.

    nan if it never does, or if it is there at the first evaluation.
    """
    i = int(np.argmax(losses <= level))
    if losses[i] > level or i == 0:
        return math.nan
    high, low = math.log(losses[i - 1]), math.log(losses[i])
    return x[i - 1] + (x[i] - x[i - 1]) * (high - math.log(level)) / (high - low)


def shared_levels(curves, n):
    """n losses that all validation curves reach, evenly spaced in log-loss; [] if there are none.

    The first segment of a curve, from the untrained model to the next evaluation, is left out: the loss falls
    too far within it to interpolate.
    """
    if min(len(losses) for losses in curves) < 3:
        return np.array([])
    high, low = min(losses[:2].min() for losses in curves), max(losses.min() for losses in curves)
    if low >= high:
        return np.array([])
    levels = np.exp(np.linspace(math.log(high), math.log(low), n))
    levels[0], levels[-1] = high, low  # exactly, since rounding could put them out of a curve's reach
    return levels


def speedup(groups, n=41):
    """How much sooner the first group reaches a loss: (levels, {axis: (ratios, errors, p)}).

    A ratio is what the second group needs, divided by what the first needs, of geometric means over runs.
    Errors are standard errors of the ratios' logs. p tests that the ratio at the last level is 1.
    ([], {}) if there is no loss that all runs reach.
    """
    curves = [[curve(run, "val/loss") for run in runs] for runs in groups]
    levels = shared_levels([c["val/loss"] for of_group in curves for c in of_group], n)
    speedups, finite = {}, np.ones(len(levels), bool)
    for axis in shared_axes(groups) if len(levels) else ():
        with np.errstate(divide="ignore"):
            first, second = (
                np.log([[reach(c["val/loss"], c[axis], level) for level in levels] for c in of_group])
                for of_group in curves
            )  # (runs, levels)
        tests = [difference(second[:, i], first[:, i], in_pairs(groups)) for i in range(len(levels))]
        ratios = np.exp([delta for delta, _, _ in tests])
        speedups[axis] = ratios, np.array([error for _, error, _ in tests]), tests[-1][2]
        finite &= np.isfinite(ratios)
    if not finite.any():
        return np.array([]), {}
    return levels[finite], {axis: (ratios[finite], errors[finite], p)
                            for axis, (ratios, errors, p) in speedups.items()}


def ner_scores(groups):
    """[(values of NER_KEY, [[F1 in percent of each run] for each group])] of what all groups were scored on.

    A run's F1 is the mean over fine-tuning seeds: these are not independent trials of the pretraining. Only a
    run's newest checkpoint counts, and of a result that was written twice the later one.
    """
    scores = [defaultdict(lambda: defaultdict(dict)) for _ in groups]  # of a group: {key: {run: {seed: F1}}}
    for of_group, runs in zip(scores, groups):
        for i, run in enumerate(runs):
            newest = max((line["step"] for line in run["ner"]), default=None)
            for line in run["ner"]:
                if line["step"] == newest:
                    of_group[tuple(line.get(key) for key in NER_KEY)][i][line["seed"]] = 100 * line["f1"]
    return [
        (key, [[statistics.mean(seeds.values()) for seeds in of_group[key].values()] for of_group in scores])
        for key in scores[0] if all(key in of_group for of_group in scores)
    ]


# ---- phases of a curve ----


def despiked_and_smoothed(t, y):
    """(y without single outliers and smoothed, the range that noise alone would have in it).

    The noise is taken to be white. Its size is estimated from how far each point lies from the line between
    its neighbours. The range is at least 1% of the curve's median.
    """
    weight = (t[1:-1] - t[:-2]) / (t[2:] - t[:-2])  # of the right neighbour: steps may be unevenly spaced
    deviations = y[1:-1] - (1 - weight) * y[:-2] - weight * y[2:]
    deviations = deviations / np.sqrt(1 + weight**2 + (1 - weight) ** 2)  # in units of one point's noise
    sigma = 1.4826 * np.median(np.abs(deviations))  # the median, since curvature at some points is no noise
    y = np.median([y, np.r_[y[:1], y[:-1]], np.r_[y[1:], y[-1:]]], axis=0)  # of each point and its neighbours
    width = 1 + 2 * (len(y) // 40)  # of a moving average, shorter at the ends
    window = np.ones(width)
    y = np.convolve(y, window, mode="same") / np.convolve(np.ones_like(y), window, mode="same")
    # The expected range of so many normal values; with few points sigma itself is uncertain.
    noise = 2 * sigma / math.sqrt(width) * math.sqrt(2 * math.log(len(y))) * (1 + 6 / len(y))
    return y, max(noise, 0.01 * np.median(np.abs(y)))


def turning_points(y, noise):
    """Indices where y turns, its two ends included; [] if it stays within the noise.

    From one to the next y changes by more than the noise, and never goes back by as much in between.
    """
    turns, direction = [], 0  # direction: 1 while rising, -1 while falling, 0 before the first change
    lowest = highest = extreme = 0  # extreme: the furthest point in the present direction
    for i in range(len(y)):
        if direction == 0:
            lowest, highest = i if y[i] < y[lowest] else lowest, i if y[i] > y[highest] else highest
            if y[highest] - y[lowest] > noise:
                direction = 1 if highest > lowest else -1
                turns, extreme = ([lowest], highest) if direction > 0 else ([highest], lowest)
        elif direction * (y[i] - y[extreme]) > 0:
            extreme = i
        elif direction * (y[extreme] - y[i]) > noise:
            turns, extreme, direction = [*turns, extreme], i, -direction
    return [*turns, extreme] if direction else []


def phase(steps, values):
    """How a curve rises and falls: a dict of verdict, before, start, rise, peak, fall, settled and noise.

    verdict: "diversify-then-compress", "only rise", "only fall", "fall, then rise", "flat", or "too short"
    (fewer than 8 points). The rise goes from step `start` to step `peak`. The fall comes after it; 90% of it
    has happened at step `settled`. `before` is a fall before the start, as from a random initialisation.
    `rise`, `fall` and `before` are fractions of the level that they start from. Of several rises the largest
    that is followed by a fall counts, or else the largest. Single outliers and changes within the noise do
    not count.
    """
    t, y = np.asarray(steps, float), np.asarray(values, float)
    t, y = t[np.isfinite(y)], y[np.isfinite(y)]
    result = {"verdict": "too short", "before": 0.0, "start": None, "rise": 0.0, "peak": None, "fall": 0.0,
              "settled": None, "noise": 0.0}
    if len(y) < MIN_POINTS:
        return result
    y, noise = despiked_and_smoothed(t, y)
    turns = turning_points(y, noise)
    result |= {"verdict": "flat", "noise": float(noise / np.median(np.abs(y))) if y.any() else 0.0}

    def change(i, j):
        return float(abs(y[j] - y[i]) / abs(y[i])) if y[i] else math.inf

    def size(k):  # of the rise from turning point k; one that is followed by a fall comes first
        return k + 2 < len(turns), y[turns[k + 1]] - y[turns[k]]

    rises = [k for k in range(len(turns) - 1) if y[turns[k + 1]] > y[turns[k]]]
    rise = max(rises, key=size, default=None)
    if rise is not None:
        start, peak = turns[rise], turns[rise + 1]
        result |= {"verdict": "only rise", "start": int(t[start]), "peak": int(t[peak])}
        result |= {"rise": change(start, peak)}
        if rise > 0:
            result |= {"verdict": "fall, then rise", "before": change(turns[rise - 1], start)}
    if turns and (rise is None or rise + 2 < len(turns)):
        peak, lowest = turns[:2] if rise is None else turns[rise + 1:rise + 3]
        settled = peak + int(np.argmax(y[peak:] <= y[peak] - 0.9 * (y[peak] - y[lowest])))
        result |= {"verdict": "only fall" if rise is None else RISE_AND_FALL, "peak": int(t[peak]),
                   "fall": change(peak, lowest), "settled": int(t[settled])}
    return result


def majority(curves):
    """(the most frequent verdict, the phases of the runs that have it) of a layer's curves, one a run."""
    results = [phase(*c) for c in curves]
    verdict = Counter(result["verdict"] for result in results).most_common(1)[0][0]
    return verdict, [result for result in results if result["verdict"] == verdict]


def phase_summary(folder, width=108):
    """For the console, a line on each kind of curve of a run: how many layers show each verdict.

    Of layers that diversify then compress also which and when, in as much detail as fits in `width` columns.
    """
    curves = layer_curves([{"probes": read_jsonl(Path(folder) / "probes.jsonl", "step")}])
    lengths = [len(steps) for by_layer in curves.values() for [(steps, _)] in by_layer.values()]
    if lengths and max(lengths) < MIN_POINTS:
        return [f"too few probes for phases: {max(lengths)} of at least {MIN_POINTS}; lower probe_every"]
    lines = []
    for kind, by_layer in curves.items():
        results = {layer: phase(*of_run) for layer, [of_run] in by_layer.items()}
        counts = Counter(p["verdict"] for p in results.values()).most_common()
        for details in phase_details(results):
            parts = [f"{verdict} in {n}" + (f" of {len(results)} layers" if i == 0 else "")
                     + (details if verdict == RISE_AND_FALL else "") for i, (verdict, n) in enumerate(counts)]
            line = f"{LABELS.get(kind, kind)}: {', '.join(parts)}"
            if len(line) <= width:
                break
        lines.append(line)
    return lines


def phase_details(results):
    """Which layers diversify then compress, and when, in brackets; from the longest wording to none."""
    layers = [layer for layer, p in results.items() if p["verdict"] == RISE_AND_FALL]
    if not layers:
        return [""]
    which = [] if len(layers) == len(results) else [layer_ranges(layers)]
    peaks = sorted({results[layer]["peak"] for layer in layers})
    peak = f"peak {peaks[0]}" + (f"-{peaks[-1]}" if len(peaks) > 1 else "")
    settled = f"settled by {max(results[layer]['settled'] for layer in layers)}"
    details = [*which, peak, settled], [*which, peak], which or [peak]
    return [*(f" ({', '.join(parts)})" for parts in details), ""]


def layer_ranges(layers):
    """["00", "01", "02", "05"] as "00-02, 05"."""
    ranges = []
    for layer in layers:
        if ranges and int(layer) == int(ranges[-1][-1]) + 1:
            ranges[-1] = [ranges[-1][0], layer]
        else:
            ranges.append([layer])
    return ", ".join(map("-".join, ranges))


# ---- tables ----


def markdown(rows, right=True):
    """A table whose first row is the head; right: columns after the first are aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rule = ["-" * (width - 1) + (":" if i and right else "-") for i, width in enumerate(widths)]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |")
    return "\n".join(lines)


def mean_std(values, form):
    """The mean, with ± standard deviation if there are several values, both in the number format `form`."""
    mean = format(np.mean(values), form)
    return mean + (f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else "")


def compared(label, values, form, paired=False, test=True):
    """[a row]: the mean of each group and, of two groups, the difference and its p-value.

    values: [[a number of each run] for each group]. [] if a group has none. test=False omits the p-value.
    """
    if not all(values):
        return []
    row = [label, *(mean_std(of_group, form) for of_group in values)]
    if len(values) == 2:
        delta, _, p = difference(*values, paired)
        row += [format(delta, "+" + form), f"{p:.2g}" if test and not math.isnan(p) else ""]
    return [row]


def comparison(names, rows):
    """The Markdown table of rows of `compared`."""
    return markdown([["", *names, *(["difference", "p"] if len(names) == 2 else [])], *rows])


# ---- sections: section(groups, names) -> paragraphs of Markdown, [] if the runs have nothing for it ----


def judged(groups, values, form, lower_is_better=False):
    """The difference of two groups' values in words: better, worse, or nothing that a t-test tells from 0."""
    delta, _, p = difference(*values, in_pairs(groups))
    if math.isnan(p):
        return f"{format(delta, '+' + form)} (one run in a group: no test)"
    if p >= 0.05:
        return f"nothing that a test shows ({format(delta, '+' + form)}, p = {p:.2g})"
    word = "better" if (delta < 0) == lower_is_better else "worse"
    return f"{word} by {format(abs(delta), form)} (p = {p:.2g})"


def losses_at_equal(groups, axis):
    """At the largest value of an axis that all runs reach: (losses, shares).

    losses: [[validation loss of each run] for each group]. shares: of its training that each group has done
    by then, nan where unknown.
    """
    curves = [[curve(run, "val/loss") for run in runs] for runs in groups]
    most = min(c[axis][-1] for of_group in curves for c in of_group)
    losses = [[float(np.interp(most, c[axis], c["val/loss"])) for c in of_group] for of_group in curves]
    shares = [np.mean([np.interp(most, c[axis], c["step"]) / run["config"].get("max_steps", math.nan)
                       for run, c in zip(runs, of_group)]) for runs, of_group in zip(groups, curves)]
    return losses, shares


def answer(groups, names):
    """What did meta-learning buy, if the first group has it and the second has not?"""
    if len(groups) != 2:
        return []
    losses = []
    for axis in shared_axes(groups):
        values, shares = losses_at_equal(groups, axis)
        text = f"{judged(groups, values, '.3f', lower_is_better=True)} at equal {AXES[axis]}"
        if abs(shares[0] - shares[1]) > 0.02:  # a loss falls as the learning rate decays
            text += f" ({names[0]} at {shares[0]:.0%} of its schedule, {names[1]} at {shares[1]:.0%})"
        losses.append(text)
    items = [f"Validation loss, nats: {'; '.join(losses)}."]
    accuracies = [f"{judged(groups, values, '.3f')} on {words}, {where}"
                  for kind, words in WORDS.items() for read_out, (where, _) in READ_OUTS.items()
                  if (values := final_adaptation(groups, read_out, kind))]
    items += [f"Adaptation, query accuracy at the end: {'; '.join(accuracies)}."] if accuracies else []
    items += ner_items(groups)
    shares = [f"{count} of {total} in {name}" for name, runs in zip(names, groups)
              for count, total in [count_rise_and_fall(runs)] if total]
    items += [f"Curves that diversify, then compress: {', '.join(shares)}."] if shares else []
    return ["\n".join(f"- {item}" for item in items)]


def ner_items(groups):
    """A line for each way of fine-tuning: the runs' mean F1 over the treebanks that all were scored on."""
    scores = defaultdict(list)
    for (mode, train, _, tags, shots, *rest), of_groups in ner_scores(groups):
        is_complete = [len(of_group) for of_group in of_groups] == [len(runs) for runs in groups]
        if mode != "majority" and is_complete:
            scores[mode, train, shots, tags, *rest].append(of_groups)
    items = []
    for (mode, train, shots, *_), tests in scores.items():
        means = [np.mean([of_groups[i] for of_groups in tests], axis=0) for i in range(2)]  # (runs,) each
        few = f", {shots} sentences" if shots else ""
        items.append(f"Universal NER, points of F1 over {len(tests)} treebanks ({mode}, {train}{few}): "
                     f"{judged(groups, means, '.1f')}.")
    return items


def count_rise_and_fall(runs):
    """(how many of the default curves diversify, then compress; how many there are)"""
    verdicts = [majority(of_layer)[0] for kind, by_layer in layer_curves(runs).items() if kind in LABELS
                for of_layer in by_layer.values()]
    return verdicts.count(RISE_AND_FALL), len(verdicts)


def training_curve(run, mixed, width=5):
    """(steps, training loss in nats), a running mean over log lines; mixed: averaged with the query losses.

    The published trainer averages the losses of all micro-steps, whatever their kind, into one curve.
    """
    steps, losses = [], []
    for line in run["log"]:
        share = line.get("share/episodes", 0.0) if mixed else 0.0
        parts = [(1 - share, line.get("train/loss")), (share, line.get("meta/query_loss"))]
        if "lr" in line and all(loss is not None for weight, loss in parts if weight > 0):
            steps.append(line["step"])
            losses.append(sum(weight * loss for weight, loss in parts if weight > 0))
    width = min(width, len(losses))
    means = np.convolve(losses, np.ones(width) / width, "valid") if width else np.array([])
    return np.array(steps[max(width - 1, 0):], float), means


def mixed_runs(groups):
    """Whether all runs have a training loss, and those of the first group episodes to mix into it."""
    has_loss = all(len(training_curve(run, False)[0]) for runs in groups for run in runs)
    return has_loss and all(any("share/episodes" in line for line in run["log"]) for run in groups[0])


def mixed_curve(groups, names):
    """What a curve looks like that averages LM and query losses, and the speedup that it seems to show."""
    heading = "## The mixed curve"
    if not mixed_runs(groups):
        return [heading, f"There is nothing to mix: {names[0]} has no micro-steps of episodes, or a run has "
                "no training loss."]
    rows = [["training loss at the end, nats", *names]]
    times = {}
    for label, mixed in (("next-token prediction alone", False), ("averaged with query losses", True)):
        curves = [[training_curve(run, mixed) for run in runs] for runs in groups]
        last = [[losses[-1] for _, losses in of_group] for of_group in curves]
        rows.append([label, *(mean_std(of_group, ".3f") for of_group in last)])
        if len(groups) == 2:
            needed = np.array([reach(losses, steps, np.mean(last[0])) for steps, losses in curves[1]])
            ratio = needed.mean() / np.mean([steps[-1] for steps, _ in curves[0]])
            times[label] = "never" if math.isnan(ratio) else f"{ratio:.2f} times"
    note = ("The training loss as it is, and as the published trainer logs it: one mean over next-token and "
            "query losses. A query loss is of N words, not of a vocabulary, so it is lower without any "
            "language being learned.")
    paragraphs = [heading, note, markdown(rows)]
    if times:
        alone, mixed = times.values()
        paragraphs.append(f"The updates that {names[1]} needs for the last loss of {names[0]}, as a multiple "
                          f"of its own: {alone} by next-token prediction alone, {mixed} by the mixed curve. "
                          "The difference of the two is an artefact of the averaging.")
    return paragraphs


def compared_with_paper(groups, names):
    """What the paper reports, next to the same of these runs."""
    if len(groups) != 2:
        return []
    _, speedups = speedup(groups)
    domains = domain_keys(groups)
    worse = [key for key in domains if np.greater(*map(np.mean, last_values(groups, key)))]
    gains = [difference(*scores, False)[0] for (mode, *_), scores in ner_scores(groups) if mode != "majority"]
    rows = [["in arXiv 2508.02189", "here"]]
    if "flops" in speedups:
        ratios = speedups["flops"][0]
        rows.append(["the same loss up to 1.6 times sooner",
                     f"{ratios[-1]:.2f} times in FLOPs at the last loss that both reach, "
                     f"at most {ratios.max():.2f}"])
    if gains:
        rows.append(["2 to 3 points more F1 on Universal NER, medium and large models",
                     f"{np.mean(gains):+.1f} on average"])
    if domains:
        rows.append(["perplexity worse on text of other domains at most sizes",
                     f"worse on {len(worse)} of {len(domains)} validation domains"])
    shares = [f"{name}: {count} of {total} curves do" for name, runs in zip(names, groups)
              for count, total in [count_rise_and_fall(runs)] if total]
    if shares:
        rows.append(["effective rank and head entropy rise, then fall", "; ".join(shares)])
    return ["## Compared with the paper", markdown(rows, right=False)] if len(rows) > 1 else []


def final_adaptation(groups, read_out, kind, what="acc"):
    """[[query accuracy, or loss, at the end of each run] for each group]; None unless it can be compared.

    It cannot where a run lacks it, or where runs were measured by other episodes.
    """
    settings = [[run["config"].get(key) for key in INSTRUMENT] for runs in groups for run in runs]
    values = last_values(groups, f"final/{read_out}_{kind}query_{what}")
    is_complete = [len(of_group) for of_group in values] == [len(runs) for runs in groups]
    return values if is_complete and all(of_run == settings[0] for of_run in settings) else None


def adaptation_rows(groups, paired):
    rows = []
    for what, label in (("acc", "query accuracy"), ("loss", "query loss, nats")):
        for kind, words in WORDS.items():
            for read_out, (where, _) in READ_OUTS.items():
                values = final_adaptation(groups, read_out, kind, what)
                rows += compared(f"{label} on {words}, {where}", values, ".3f", paired) if values else []
    return rows


def end_of_training(groups, names):
    """The last value of each loss and accuracy, not the best, and what the runs took."""
    paired = in_pairs(groups)
    rows = compared("validation loss, nats", last_values(groups, "val/loss"), ".3f", paired)
    for key in domain_keys(groups):
        label = f"validation loss, {key.removeprefix('val/')}"
        rows += compared(label, last_values(groups, key), ".3f", paired)
    rows += adaptation_rows(groups, paired)
    for key, label in AXES.items():
        form = ".0f" if key in ("step", "seconds") else ".3g"
        rows += compared(label, last_values(groups, key), form, test=False)
    return ["## At the end of training", comparison(names, rows)]


def speedup_to_equal_loss(groups, names):
    """How much sooner the first group reaches the losses that all runs reach."""
    if len(groups) != 2:
        return []
    heading = "## Speedup to equal loss"
    levels, speedups = speedup(groups)
    if not speedups:
        return [heading, "There is no loss that all runs reach between two evaluations of their own."]

    def ratio_with_error(ratio, error):
        interval = f" ({ratio * math.exp(-error):.2f} to {ratio * math.exp(error):.2f})"
        return f"{ratio:.2f}" + ("" if math.isnan(error) else interval)

    rows = [["", f"final, at loss {levels[-1]:.3f}", "p", "largest", "at loss"]]
    for axis, (ratios, errors, p) in speedups.items():
        i = int(np.argmax(ratios))
        final, largest = ratio_with_error(ratios[-1], errors[-1]), ratio_with_error(ratios[i], errors[i])
        rows.append([AXES[axis], final, "" if math.isnan(p) else f"{p:.2g}", largest, f"{levels[i]:.3f}"])
    brackets = "" if math.isnan(speedups["step"][1][-1]) else " In brackets: one standard error."
    note = (f"What {names[1]} needs to reach a validation loss, divided by what {names[0]} needs: above 1, "
            f"{names[0]} is sooner. Losses from {levels[0]:.3f} to {levels[-1]:.3f}, which all runs reach, "
            f"interpolated in log-loss.{brackets} The largest is picked from {len(levels)} losses, so it is "
            "biased upwards.")
    return [heading, note, markdown(rows)]


def universal_ner(groups, names):
    """Span F1 on each treebank that all groups were scored on, a table for each way of fine-tuning."""
    settings = defaultdict(list)
    for (mode, train, test, *rest), scores in ner_scores(groups):
        settings[mode, train, *rest].append((test, scores))
    paragraphs = []
    for (mode, train, *rest), tests in settings.items():
        options = ", ".join(f"{name} {value}" for name, value in zip(NER_KEY[3:8], rest) if value)
        rows = [row for test, scores in tests for row in compared(test, scores, ".1f")]
        paragraphs += [f"## Universal NER, {mode}, trained on {train} ({options})",
                       "Span F1 in percent; of each run the mean over fine-tuning seeds.",
                       comparison(names, rows)]
    return paragraphs


def phases(groups, names):
    """The phases of every curve and layer, a table for each group."""
    paragraphs = []
    for name, runs in zip(names, groups):
        curves = layer_curves(runs)
        if not curves:
            continue
        note = ("The rise goes from start to peak. The fall comes after it; 90% of it has happened where it "
                "has settled. Before: a fall before the start. Start, peak and settled are updates; before, "
                "rise and fall are percentages of the level that they start from. Changes within the noise "
                "do not count.")
        if len(runs) > 1:
            note += " Each run is judged by itself: the verdict of most runs, and the means over these."
        rows = [["curve", "layer", "verdict", "before", "start", "rise", "peak", "fall", "settled", "noise"]]
        orders = []
        for kind, by_layer in curves.items():
            label = LABELS.get(kind, kind)
            rows += [phase_row(label, layer, of_layer, len(runs)) for layer, of_layer in by_layer.items()]
            orders += layer_orders(label, by_layer)
        paragraphs += [f"## Phases of {name}", note, markdown(rows), *(["\n".join(orders)] if orders else [])]
    return paragraphs


def phase_row(label, layer, curves, n_runs):
    verdict, results = majority(curves)

    def step(key):
        return "" if results[0][key] is None else mean_std([result[key] for result in results], ".0f")

    def percent(key):
        return f"{np.mean([result[key] for result in results]):.1%}" if results[0][key] else ""

    share = f" ({len(results)} of {len(curves)})" if n_runs > 1 else ""
    return [label, layer, verdict + share, percent("before"), step("start"), percent("rise"), step("peak"),
            percent("fall"), step("settled"), percent("noise")]


def layer_orders(label, by_layer):
    """The order in which layers peak, and in which they settle: those that diversify then compress."""
    results = {layer: majority(curves) for layer, curves in by_layer.items()}
    lines = []
    for key, verb in (("peak", "peak"), ("settled", "settle again")):
        means = {layer: np.mean([result[key] for result in of_layer])
                 for layer, (verdict, of_layer) in results.items() if verdict == RISE_AND_FALL}
        order = ", ".join(f"{layer} ({means[layer]:.0f})" for layer in sorted(means, key=means.get))
        lines += [f"- {label}: layers {verb} in the order {order}"] if means else []
    return lines


# In the order of the report. Phases come last: the console shows what stands before them.
SECTIONS = [compared_with_paper, end_of_training, speedup_to_equal_loss, universal_ner, phases]


def tables(groups, names, mixed=False):
    """The report as Markdown; mixed: with the section of that name before the phases."""
    folders = [f"{name}: {', '.join(str(run['path']) for run in runs)}" for name, runs in zip(names, groups)]
    note = ""
    if max(map(len, groups)) > 1:
        note = " Mean ± standard deviation over runs."
        if len(groups) == 2 and min(map(len, groups)) > 1:
            note += " p: t-test, paired by seed." if in_pairs(groups) else " p: Welch's t-test."
            note += " Several tests are made here, and none is corrected for that."
    bought = f": what did {names[0]} buy?" if len(groups) == 2 else ""
    paragraphs = [f"# {' against '.join(names)}{bought}", *answer(groups, names)]
    paragraphs.append(f"Runs: {'; '.join(folders)}.{note}")
    for section in [*SECTIONS[:-1], *([mixed_curve] if mixed else []), SECTIONS[-1]]:
        paragraphs += section(groups, names)
    return "\n\n".join(paragraphs) + "\n"


# ---- panels of a figure: each draws on one matplotlib Axes ----

COLORS = ("#c0392b", "#2c6fbb")  # of the groups
MARKERS = {"start": ("v", "start of the rise"), "peak": ("^", "peak"), "settled": ("s", "90% of the fall")}
MARKER_STYLE = {"mec": "black", "mew": 0.4, "lw": 0}


def legend_handle(label, **style):
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def styled_runs(groups):
    """(run, how its line is drawn) of all runs."""
    for runs, color in zip(groups, COLORS):
        for run in runs:
            yield run, {"color": color, "alpha": 1 if len(runs) == 1 else 0.6}


def legend_of_groups(ax, names):
    ax.legend(handles=[legend_handle(name, color=color) for name, color in zip(names, COLORS)])


def y_limits(curves):
    """Limits for curves (steps, values) without the first tenth of a run: the fall from the random start."""
    shown = [values[steps >= 0.1 * steps[-1]] for steps, values in curves]
    low, high = min(values.min() for values in shown), max(values.max() for values in shown)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def loss_panel(ax, groups, names, axis):
    losses = []
    for run, style in styled_runs(groups):
        c = curve(run, "val/loss")
        losses.append(c["val/loss"])
        ax.plot(c[axis], c["val/loss"], **style)
    # From the second evaluation: the fall from the untrained model would flatten the rest.
    low, high = min(y.min() for y in losses), max(y[min(1, len(y) - 1)] for y in losses)
    margin = 0.04 * (high - low) or 0.1
    ax.set(xlabel=AXES[axis], ylabel="nats", title="validation loss", ylim=(low - margin, high + margin))
    legend_of_groups(ax, names)


def speedup_panel(ax, groups, names):
    levels, speedups = speedup(groups)
    for axis, color in zip(speedups, ("black", "#8e44ad", "#27ae60", "#d68910")):
        ratios, errors, _ = speedups[axis]
        ax.plot(levels, ratios, color=color, label=AXES[axis])
        low, high = ratios * np.exp(-errors), ratios * np.exp(errors)
        ax.fill_between(levels, low, high, color=color, alpha=0.12, lw=0)
    ax.axhline(1, color="gray", lw=0.6)
    ax.invert_xaxis()
    ax.set(xlabel="validation loss, nats", ylabel="ratio", title=f"speedup of {names[0]} to equal loss")
    ax.legend()


def adaptation_panel(ax, groups, kind):
    for run, style in styled_runs(groups):
        for read_out, (_, dashes) in READ_OUTS.items():
            key = f"val/{read_out}_{kind}query_acc"
            c = curve(run, key)
            ax.plot(c["step"], c[key], dashes, **style)
    ax.set(xlabel=AXES["step"], title=f"query accuracy, {WORDS[kind]}", ylim=(0, None))
    ax.legend(handles=[legend_handle(where, color="gray", ls=dashes) for where, dashes in READ_OUTS.values()])


def measured_words(groups):
    """The kinds of word of which any run has the accuracy on held-out text."""
    return [kind for kind in WORDS if any(map(len, last_values(groups, f"val/context_{kind}query_acc")))]


def mixed_panel(ax, groups, names):
    """The training loss of the LM alone, and as it looks where query losses are averaged into it."""
    for run, style in styled_runs(groups):
        for mixed, dashes in ((False, "-"), (True, "--")):
            ax.plot(*training_curve(run, mixed), dashes, **style)
    ax.set(xlabel=AXES["step"], ylabel="nats", title="training loss")
    ax.legend(handles=[legend_handle("next-token alone", color="gray"),
                       legend_handle("averaged with query losses", color="gray", ls="--")])


def domains_panel(ax, groups, names):
    keys = domain_keys(groups)
    y = np.arange(len(keys))
    for i, (runs, color) in enumerate(zip(groups, COLORS)):
        final = np.array([last_values([runs], key)[0] for key in keys])  # (domains, runs)
        error = final.std(1, ddof=1) if len(runs) > 1 else None
        offset = 0.2 * (i - (len(groups) - 1) / 2)
        ax.errorbar(final.mean(1), y + offset, xerr=error, fmt="o", ms=4, color=color, capsize=2)
    ax.set_yticks(y, [key.removeprefix("val/") for key in keys])
    ax.set_ylim(len(keys) - 0.5, -0.5)
    ax.grid(axis="y", lw=0.3)
    ax.set(xlabel="nats", title="validation loss by domain")
    legend_of_groups(ax, names)


def rise_and_fall(curves):
    """{start, peak, settled: mean step} of a layer; {} unless most runs diversify then compress there."""
    verdict, results = majority(curves)
    if verdict != RISE_AND_FALL or 2 * len(results) <= len(curves):
        return {}
    return {name: np.mean([result[name] for result in results]) for name in MARKERS}


def layers_panel(ax, kind, by_layer, limits, colors):
    for layer, curves in by_layer.items():
        steps, values = mean_curve(curves)
        ax.plot(steps, values, color=colors[layer])
        for name, step in rise_and_fall(curves).items():
            y = np.interp(step, steps, values)
            ax.plot(step, y, marker=MARKERS[name][0], color=colors[layer], ms=4, **MARKER_STYLE)
    ax.set(xlabel=AXES["step"], title=LABELS.get(kind, kind), ylim=limits)


def layers_legend(ax, curves, colors):
    """An empty panel with the legend of a group's layers."""
    ax.axis("off")
    some = list(colors)[::-(-len(colors) // 12)]  # every n-th, if there are more than 12
    handles = [legend_handle(f"layer {layer}", color=colors[layer]) for layer in some]
    if any(rise_and_fall(of_layer) for by_layer in curves.values() for of_layer in by_layer.values()):
        handles += [legend_handle(label, marker=marker, color="gray", **MARKER_STYLE)
                    for marker, label in MARKERS.values()]
    ax.legend(handles=handles, loc="center", ncols=1 + (len(handles) > 8))


def residual_rank_panel(ax, groups):
    curves = []
    for run, style in styled_runs(groups):
        by_layer = layer_curves([run]).get("rank/resid", {})
        if by_layer:
            curves.append(mean_curve([of_run for [of_run] in by_layer.values()]))
            ax.plot(*curves[-1], **style)
    ax.set(xlabel=AXES["step"], ylabel="mean over layers", title=LABELS["rank/resid"], ylim=y_limits(curves))


# ---- the figures ----


def draw(rows, size, font):
    """A figure of rows [(heading or "", [panel, ...])], with lettered panels of a size in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": font, "axes.titlesize": 1.07 * font, "legend.fontsize": 0.93 * font,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "lines.linewidth": font / 7, "axes.formatter.use_mathtext": True,
    }
    columns, letter = max(len(panels) for _, panels in rows), 0
    with rc_context(style):
        fig = Figure(figsize=(size[0] * columns, size[1] * len(rows)), layout="constrained", dpi=150)
        for part, (heading, panels) in zip(np.atleast_1d(fig.subfigures(len(rows), 1)), rows):
            if heading:
                part.suptitle(heading, fontsize=1.14 * font)
            grid = part.add_gridspec(1, columns)
            for column, panel in enumerate(panels):
                ax = part.add_subplot(grid[column])
                panel(ax)
                if ax.get_title():
                    ax.set_title(f"({name_of_panel(letter)}) {ax.get_title()}")
                    letter += 1
    return fig


def name_of_panel(i):
    """a, b, ..., z, aa, ab, ..."""
    return (name_of_panel(i // 26 - 1) if i >= 26 else "") + chr(ord("a") + i % 26)


def in_threes(heading, panels):
    """Rows of three panels, the first under the heading."""
    return [("" if i else heading, panels[i:i + 3]) for i in range(0, len(panels), 3)]


def figure(groups, names, mixed=False):
    """All panels for which there are data, at most three in a row, at the width of a page."""
    from matplotlib import colormaps

    axes = [axis for axis in shared_axes(groups) if axis != "step"] or ["step"]
    panels = [partial(loss_panel, groups=groups, names=names, axis=axis) for axis in axes]
    if len(groups) == 2 and speedup(groups)[1]:
        panels.append(partial(speedup_panel, groups=groups, names=names))
    panels += [partial(adaptation_panel, groups=groups, kind=kind) for kind in measured_words(groups)]
    if mixed and mixed_runs(groups):
        panels.append(partial(mixed_panel, groups=groups, names=names))
    if domain_keys(groups):
        panels.append(partial(domains_panel, groups=groups, names=names))
    rows = in_threes("", panels)

    curves = [layer_curves(runs) for runs in groups]
    layers = sorted({layer for of_group in curves for by_layer in of_group.values() for layer in by_layer})
    shades = 0.95 * np.arange(len(layers)) / max(len(layers) - 1, 1)
    colors = dict(zip(layers, colormaps["viridis"](shades)))
    for name, of_group in zip(names, curves):
        panels = []
        for kind, by_layer in of_group.items():
            # One scale for both groups, so that they can be compared.
            limits = y_limits([c for g in curves for of_layer in g.get(kind, {}).values() for c in of_layer])
            panels.append(partial(layers_panel, kind=kind, by_layer=by_layer, limits=limits, colors=colors))
        if panels:
            panels.append(partial(layers_legend, curves=of_group, colors=colors))
        rows += in_threes(f"{name}, by layer", panels)
    return draw(rows, size=(2.5, 1.9), font=7)


def brief_figure(groups, names):
    """One row: validation loss, adaptation on held-out text, mean effective rank of the residual stream."""
    axis = "flops" if "flops" in shared_axes(groups) else "step"
    panels = [partial(loss_panel, groups=groups, names=names, axis=axis)]
    panels += [partial(adaptation_panel, groups=groups, kind=kind) for kind in measured_words(groups)[:1]]
    if any("rank/resid" in layer_curves(runs) for runs in groups):
        panels.append(partial(residual_rank_panel, groups=groups))
    return draw([("", panels)], size=(3.4, 2.7), font=10)


# ---- writing a report ----


def read_groups(groups):
    """The runs of [[folder, ...], ...], those of a group in the order of their seeds."""
    given = " ".join(",".join(map(str, folders)) for folders in groups)
    require(1 <= len(groups) <= 2 and all(groups),
            "give one or two groups of runs, each a run's folder or several with commas between; "
            f"got {len(groups)}: {given or '-'}")
    counts = Counter(Path(folder).resolve() for folders in groups for folder in folders)
    for folder, n in counts.items():
        require(n == 1, f"{folder} is named twice")
    runs = [[read_run(folder) for folder in folders] for folders in groups]
    return [sorted(of_group, key=lambda run: (run["seed"] is None, run["seed"])) for of_group in runs]


def group_names(groups):
    """Names for the groups: "hybrid" for out/hybrid-1,out/hybrid-2 and for out/hybrid/1,out/hybrid/2."""
    names = []
    for folders in groups:
        first = Path(folders[0]).resolve()
        without_number = re.sub(r"[-_.,]?\d+$", "", first.name) or first.parent.name
        names.append(first.name if len(folders) == 1 else without_number)
    return names if len(set(names)) == len(names) else [",".join(map(str, folders)) for folders in groups]


def write(groups, out, brief=False, mixed=False):
    """Writes OUT.md and OUT.png and returns the tables as Markdown.

    groups: one or two lists of run folders; of two, the second is the baseline. out: a path without ending.
    brief: the figure is one row of at most three panels. Raises UserError if a run has no validation loss.
    """
    runs, names = read_groups(groups), group_names(groups)
    path = Path(out)
    require(path.name, f"out = {str(out)!r} must be a path of a file without its ending, such as out/report")
    text = tables(runs, names, mixed)
    fig = brief_figure(runs, names) if brief else figure(runs, names, mixed)
    image = f"![{' against '.join(names)}]({path.name}.png)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path.with_name(path.name + ".png"))
        path.with_name(path.name + ".md").write_text(f"{text}\n{image}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}.md and .png: {error.strerror}") from None
    return text


def main(argv):
    given, flags = config.operands(argv)
    cfg = config.load(Config, flags, __doc__)
    groups = [[folder for folder in arg.split(cfg.separator) if folder] for arg in given]
    out = re.sub(r"\.(md|png)$", "", cfg.out)
    text = write(groups, out, cfg.brief, cfg.mixed)
    print(text.split("## Phases of")[0].rstrip() + "\n")
    print(f"files     {out}.md (these tables, and the phases of every layer), {out}.png")


if __name__ == "__main__":
    config.run(main)
