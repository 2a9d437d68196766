"""What did meta-learning buy? Compares finished runs: tables in Markdown and a figure.

    python report.py out/hybrid out/vanilla                          # two arms of one run each; the second is the baseline
    python report.py out/hybrid-1,out/hybrid-2 out/vanilla-1,out/vanilla-2 --out=out/report     # several runs (seeds) an arm
    python report.py out/demo                                        # one arm: its curves and their phases

Writes OUT.md and OUT.png. Reads log.jsonl of each run, and where they are there config.json, probes.jsonl and ner.jsonl.
Two arms with runs of the same seeds are compared pair by pair: such runs have the same initial weights and the same text.
"""
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from probes import phase

AXES = {"step": "updates", "tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds of training"}
CURVES = {"rank/resid": "rank, residual stream", "entropy": "attention entropy", "rank/v_proj": "rank, v_proj",
          "rank/o_proj": "rank, o_proj", "rank/down_proj": "rank, down_proj", "rank/grad_v_proj": "rank, gradient of v_proj",
          "rank/grad_o_proj": "rank, gradient of o_proj", "rank/grad_down_proj": "rank, gradient of down_proj"}
COLORS = ("#c0392b", "#2c6fbb")  # of the arms
MARKS = {"start": "v", "peak": "^", "settled": "s"}  # of a rise and fall
# Two results that agree in these can be compared.
NER_KEY = ("mode", "train", "test", "shots", "label", "bidirectional", "lr", "epochs", "patience", "batch_size", "sentences")
BOTH = "diversify-then-compress"


@dataclass(frozen=True)
class Config:
    out: str = "report"  # path of the report without its ending; OUT.md and OUT.png are written


# ---- reading runs ----


def read_jsonl(path, *keys):
    """The lines of a .jsonl file without their non-finite numbers, [] where there is none. A torn last line (the run goes on) is
    passed over; UserError names another one that is no JSON or lacks one of `keys`."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if not all(key in line for key in keys):
                raise ValueError
            found.append({key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)})
        except (ValueError, TypeError, AttributeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: expected JSON with {', '.join(keys)}, got {text[:80]!r}") from None
    return found


def read_run(folder):
    """{"path", "seed" (None: unknown), "log", "probes", "ner"} of a run's folder."""
    folder = Path(folder)
    log = read_jsonl(folder / "log.jsonl", "step")
    if not any("val/loss" in line for line in log):
        raise UserError(f"{folder} holds no run with a validation loss in log.jsonl: name a folder that train.py wrote to")
    try:
        seed = json.loads((folder / "config.json").read_text())["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        seed = None
    return {"path": folder, "seed": seed, "log": log, "probes": read_jsonl(folder / "probes.jsonl", "step"),
            "ner": read_jsonl(folder / "ner.jsonl", "mode", "train", "test", "seed", "step", "f1")}


def curve(run, key):
    """The lines of a run's log that have `key`, as arrays: {"step", "tokens", "flops", "seconds" where all have them, and `key`}."""
    lines = [line for line in run["log"] if key in line]
    return {name: np.array([line[name] for line in lines], float) for name in (*AXES, key) if all(name in line for line in lines)}


def last(arms, key):
    """[[the last value of `key` of each run that has it] of each arm]"""
    return [[float(curve(run, key)[key][-1]) for run in runs if len(curve(run, key)[key])] for runs in arms]


def domain_keys(arms):
    """The metrics val/<domain> that all runs have."""
    return sorted(set.intersection(*({key for line in run["log"] for key in line if re.fullmatch("val/(?!loss$).*", key)}
                                     for runs in arms for run in runs)))


def layer_curves(run, what):
    """{layer: (steps, values)} of a curve of a run's probes.jsonl; of entropies the mean over the layer's heads."""
    keys = defaultdict(list)
    for key in dict.fromkeys(key for line in run["probes"] for key in line):
        if key.startswith(what + "/"):
            keys[key.removeprefix(what + "/").split("/")[0]].append(key)
    found = {}
    for layer in sorted(keys):
        lines = [line for line in run["probes"] if all(key in line for key in keys[layer])]
        if lines:
            values = [np.mean([line[key] for key in keys[layer]]) for line in lines]
            found[layer] = np.array([line["step"] for line in lines], float), np.array(values)
    return found


# ---- comparing ----


def in_pairs(arms):
    """Whether the two arms hold runs of the same seeds."""
    seeds = [[run["seed"] for run in runs] for runs in arms]
    return seeds[0] == seeds[1] and None not in seeds[0] and len(set(seeds[0])) == len(seeds[0])  # `main` has sorted them


def student(t, df):
    """P(|T| > t) of Student's distribution: the integral of cos(x)^(df - 1) from atan(t / sqrt(df)) to pi / 2 over that from 0."""
    angles = [np.linspace(start, math.pi / 2, 20001) for start in (math.atan2(abs(t), math.sqrt(df)), 0)]
    tail, whole = (np.trapezoid(np.cos(x) ** (df - 1), x) for x in angles)
    return float(tail / whole)


def difference(a, b, paired):
    """(mean(a) - mean(b), its standard error, the p-value of a t-test that it is 0): paired, or Welch's (1947).

    The last two are nan where an arm has fewer than two values.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    d = a.mean() - b.mean()
    if min(len(a), len(b)) < 2:
        return d, math.nan, math.nan
    if paired:
        error, df = (a - b).std(ddof=1) / math.sqrt(len(a)), len(a) - 1
    else:
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        error = math.sqrt(va + vb)
        df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if error else 1
    return d, error, student(d / error, df) if error else float(d == 0)


def reach(losses, x, level):
    """Where a loss curve first falls to `level`, interpolated in log-loss between two evaluations; nan where it never does, or where
    it was there at the first."""
    i = int(np.argmax(losses <= level))
    if losses[i] > level or i == 0:
        return math.nan
    high, low = math.log(losses[i - 1]), math.log(losses[i])
    return x[i - 1] + (x[i] - x[i - 1]) * (high - math.log(level)) / (high - low)


def sooner(arms, n=41):
    """(levels, {axis: (ratios, standard errors of their logs, p-value of the last)}): how much sooner the first arm reaches a loss.

    Ratios of geometric means over the runs of an arm, at losses that all runs reach, evenly spaced in log-loss. The first segment of a
    curve, from the untrained model to the first evaluation after it, is left out: too much falls within it to interpolate.
    """
    curves = [[curve(run, "val/loss") for run in runs] for runs in arms]
    every = [c for cs in curves for c in cs]
    if min(len(c["val/loss"]) for c in every) < 3:
        return np.array([]), {}
    high, low = min(c["val/loss"][:2].min() for c in every), max(c["val/loss"].min() for c in every)
    if low >= high:
        return np.array([]), {}
    levels = np.exp(np.linspace(math.log(high), math.log(low), n))
    levels[0], levels[-1] = high, low  # to the last bit, so that the curves that touch them reach them
    found, good = {}, np.ones(n, bool)
    for axis in AXES:
        if all(axis in c and c[axis].any() for c in every):  # a run of episodes alone has no LM tokens
            with np.errstate(divide="ignore"):
                a, b = (np.log([[reach(c["val/loss"], c[axis], level) for level in levels] for c in cs]) for cs in curves)  # (runs, n)
            compared = [difference(b[:, i], a[:, i], in_pairs(arms)) for i in range(n)]
            found[axis] = np.exp([d for d, _, _ in compared]), np.array([error for _, error, _ in compared]), compared[-1][2]
            good &= np.isfinite(found[axis][0])
    return levels[good], {axis: (ratio[good], error[good], p) for axis, (ratio, error, p) in found.items()} if good.any() else {}


def ner_scores(arms):
    """[(NER_KEY's values, [F1 in percent of each run] of each arm)] of what all arms were scored on.

    Of a run the mean over its fine-tuning seeds, which are no independent trials of the pretraining; only its newest checkpoint
    counts, and of a result that was written twice the later.
    """
    scores = [defaultdict(dict) for _ in arms]
    for found, runs in zip(scores, arms):
        for i, run in enumerate(runs):
            newest = max((line["step"] for line in run["ner"]), default=None)
            for line in run["ner"]:
                if line["step"] == newest:
                    found[tuple(line.get(key) for key in NER_KEY)].setdefault(i, {})[line["seed"]] = 100 * line["f1"]
    return [(key, [[statistics.mean(seeds.values()) for seeds in found[key].values()] for found in scores])
            for key in scores[0] if all(key in found for found in scores)]


# ---- tables ----


def markdown(rows, right=True):
    """The first row is the head; columns after the first are aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * (w - 1) + (":" if i and right else "-") for i, w in enumerate(widths)], *rows[1:]]
    lines = ([cell.rjust(w) if i and right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values, form):
    mean = format(np.mean(values), form)
    return mean + (f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else "")


def compared(label, values, form, paired=False, test=True):
    """A row: the mean of each arm, and of two arms the difference and its p-value. No row where an arm has no value."""
    if not all(values):
        return []
    row = [label, *(spread(v, form) for v in values)]
    if len(values) == 2:
        d, _, p = difference(*values, paired)
        row += [format(d, "+" + form), f"{p:.2g}" if test and not math.isnan(p) else ""]
    return [row]


def phases(runs):
    """The phases of every curve and layer: (paragraphs of Markdown, a count of the verdicts)."""
    rows, orders, counts = [["curve", "layer", "verdict", "before", "start", "rise", "peak", "fall", "settled", "noise"]], [], Counter()
    for what, label in CURVES.items():
        found = defaultdict(list)
        for run in runs:
            for layer, c in layer_curves(run, what).items():
                found[layer].append(phase(*c))
        both = []
        for layer, every in sorted(found.items()):
            verdict, n = Counter(p["verdict"] for p in every).most_common(1)[0]
            same = [p for p in every if p["verdict"] == verdict]
            counts[verdict] += 1
            step = {key: "" if same[0][key] is None else spread([p[key] for p in same], ".0f") for key in ("start", "peak", "settled")}
            share = {key: f"{np.mean([p[key] for p in same]):.1%}" if same[0][key] else "" for key in ("before", "rise", "fall", "noise")}
            rows.append([label, layer, verdict + (f" ({n} of {len(every)})" if len(runs) > 1 else ""), share["before"], step["start"],
                         share["rise"], step["peak"], share["fall"], step["settled"], share["noise"]])
            if verdict == BOTH:
                both.append((layer, *(np.mean([p[key] for p in same]) for key in ("peak", "settled"))))
        for i, word in ((1, "peak"), (2, "settle again")):
            order = ", ".join(f"{line[0]} ({line[i]:.0f})" for line in sorted(both, key=lambda line: line[i]))
            orders += [f"- {label}: layers {word} in the order {order}"] * bool(both)
    note = ("The rise from start to peak, the fall after it, of which 90% are made where it has settled, and the fall before the start, "
            "in updates and in percent of the level that each starts from. What stays within the noise counts as none.")
    if len(runs) > 1:
        note += " Each run by itself: the verdict of most, and the mean over these."
    return [note, markdown(rows), *(["\n".join(orders)] if orders else [])], counts


def tables(arms, names):
    """The report as Markdown."""
    two = len(arms) == 2
    paired = two and in_pairs(arms)
    head = ["", *names] + ["difference", "p"] * two
    listed = "; ".join(f"{name}: {', '.join(str(run['path']) for run in runs)}" for name, runs in zip(names, arms))
    note = ""
    if max(map(len, arms)) > 1:
        note = " Mean ± standard deviation over runs."
        if two and min(map(len, arms)) > 1:
            note += f" p: t-test, {'paired by seed' if paired else 'of Welch'}."
    text = [f"# {' against '.join(names)}", f"Runs: {listed}.{note}"]

    domains = domain_keys(arms)
    rows = compared("validation loss, nats", last(arms, "val/loss"), ".3f", paired)
    for key in domains:
        rows += compared(f"validation loss, {key.removeprefix('val/')}", last(arms, key), ".3f", paired)
    for key, label in (("meta/query_acc", "query accuracy, adapted"), ("meta/query_acc_unadapted", "query accuracy, unadapted")):
        values = last(arms, key)
        if any(values):
            rows.append([label, *(spread(v, ".3f") if v else "" for v in values)] + ["", ""] * two)
    for key, label in AXES.items():
        rows += compared(label, last(arms, key), ".0f" if key in ("step", "seconds") else ".3g", test=False)
    text += ["## At the end of training", markdown([head, *rows])]

    levels, found = sooner(arms) if two else (None, {})
    if found:
        def named(axis, i):
            ratio, error = found[axis][0][i], found[axis][1][i]
            return f"{ratio:.2f}" + ("" if math.isnan(error) else f" ({ratio * math.exp(-error):.2f} to {ratio * math.exp(error):.2f})")

        rows = [["", f"final, at loss {levels[-1]:.3f}", "p", "largest", "at loss"]]
        for axis, (ratios, _, p) in found.items():
            i = int(np.argmax(ratios))
            rows.append([AXES[axis], named(axis, -1), "" if math.isnan(p) else f"{p:.2g}", named(axis, i), f"{levels[i]:.3f}"])
        error = "" if math.isnan(found["step"][1][-1]) else " In brackets: one standard error."
        text.append("## Sooner by\n\n"
                    f"How many times what {names[0]} needs for a validation loss {names[1]} needs: above 1, {names[0]} is sooner. Losses "
                    f"from {levels[0]:.3f} to {levels[-1]:.3f}, which all runs reach; interpolated in log-loss.{error} The largest is "
                    f"picked from {len(levels)} losses, so chance lifts it.")
        text.append(markdown(rows))
    elif two:
        text.append("## Sooner by\n\nThere is no loss that all runs reach between two evaluations of their own.")

    groups, gains = defaultdict(list), []
    for (mode, train, test, *rest), values in ner_scores(arms):
        groups[mode, train, *rest].append((test, values))
        if two and mode != "majority":
            gains.append(difference(*values, False)[0])
    for (mode, train, *rest), tests in groups.items():
        settings = ", ".join(f"{name} {value}" for name, value in zip(NER_KEY[3:7], rest) if value)
        rows = [row for test, values in tests for row in compared(test, values, ".1f")]
        text += [f"## Universal NER, {mode}, trained on {train} ({settings})",
                 "Span F1 in percent; of a run the mean over its fine-tuning seeds.", markdown([head, *rows])]

    verdicts = []
    for name, runs in zip(names, arms):
        section, counts = phases(runs)
        if counts:
            verdicts.append(f"{name}: {counts[BOTH]} of {counts.total()} curves do")
            text += [f"## Phases of {name}", *section]

    if two:
        worse = [key for key in domains if np.mean(last(arms, key)[0]) > np.mean(last(arms, key)[1])]
        flops = found.get("flops")
        rows = [["in arXiv 2508.02189", "here"],
                ["the same loss up to 1.6 times sooner",
                 f"{flops[0][-1]:.2f} times in FLOPs at the last loss that both reach, at most {flops[0].max():.2f}" if flops else ""],
                ["2 to 3 points more F1 on Universal NER, medium and large models", f"{np.mean(gains):+.1f} on average" if gains else ""],
                ["perplexity worse on text of other domains at most sizes",
                 f"worse on {len(worse)} of {len(domains)} validation domains" if domains else ""],
                ["effective rank and head entropy rise, then fall", "; ".join(verdicts)]]
        text.insert(2, "## Beside the paper\n\n" + markdown([row for row in rows if row[1]], right=False))
    return "\n\n".join(text) + "\n"


# ---- the figure ----


def figure(arms, names):
    """All panels for which there are data, at most three in a row, at the width of a page."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def arms_key(ax):
        ax.legend(handles=[Line2D([], [], color=color, label=name) for name, color in zip(names, COLORS)])

    def losses(axis):
        def draw(ax):
            every = []
            for runs, color in zip(arms, COLORS):
                for run in runs:
                    c = curve(run, "val/loss")
                    every.append(c["val/loss"])
                    ax.plot(c[axis], every[-1], color=color, lw=1, alpha=1 if len(runs) == 1 else 0.6)
            low, high = min(y.min() for y in every), max(y[min(1, len(y) - 1)] for y in every)
            margin = 0.04 * (high - low) or 0.1
            # The fall from the untrained model would flatten the rest.
            ax.set(xlabel=AXES[axis], ylabel="nats", title="validation loss", ylim=(low - margin, high + margin))
            arms_key(ax)
        return draw

    levels, found = sooner(arms) if len(arms) == 2 else (None, {})

    def ratios(ax):
        for axis, color in zip(found, ("black", "#8e44ad", "#27ae60", "#d68910")):
            ratio, error, _ = found[axis]
            ax.plot(levels, ratio, color=color, lw=1, label=AXES[axis])
            ax.fill_between(levels, ratio * np.exp(-error), ratio * np.exp(error), color=color, alpha=0.12, lw=0)
        ax.axhline(1, color="gray", lw=0.6)
        ax.invert_xaxis()
        ax.set(xlabel="validation loss, nats", ylabel="times", title=f"{names[0]} sooner by")
        ax.legend()

    def accuracy(ax):
        for runs, color in zip(arms, COLORS):
            for run in runs:
                for key, style in (("meta/query_acc", "-"), ("meta/query_acc_unadapted", "--")):
                    c = curve(run, key)
                    ax.plot(c["step"], c[key], style, color=color, lw=1)
        ax.set(xlabel=AXES["step"], title="query accuracy, adapted (-) and not (--)", ylim=(0, None))

    def domains(ax):
        y = np.arange(len(keys))
        for i, (runs, color) in enumerate(zip(arms, COLORS)):
            final = np.array([[curve(run, key)[key][-1] for run in runs] for key in keys])  # (domains, runs)
            error = final.std(1, ddof=1) if len(runs) > 1 else None
            ax.errorbar(final.mean(1), y + 0.2 * (i - (len(arms) - 1) / 2), xerr=error, fmt="o", ms=4, color=color, capsize=2)
        ax.set_yticks(y, [key.removeprefix("val/") for key in keys])
        ax.set_ylim(len(keys) - 0.5, -0.5)
        ax.grid(axis="y", lw=0.3)
        ax.set(xlabel="nats", title="validation loss by domain")
        arms_key(ax)

    marked = set()  # curves that rise and fall

    def layers(runs, what, limits):
        def draw(ax):
            curves = [layer_curves(run, what) for run in runs]
            for layer in sorted(set().union(*curves)):
                every = [c[layer] for c in curves if layer in c]
                end = min(steps[-1] for steps, _ in every)
                steps = every[0][0][every[0][0] <= end]
                values = np.mean([np.interp(steps, *c) for c in every], axis=0)
                ax.plot(steps, values, color=colors[layer], lw=1)
                found = [phase(*c) for c in every]
                both = [p for p in found if p["verdict"] == BOTH]
                if 2 * len(both) > len(found):
                    marked.add(what)
                    for mark, marker in MARKS.items():
                        x = np.mean([p[mark] for p in both])
                        ax.plot(x, np.interp(x, steps, values), marker, color=colors[layer], ms=4, mec="black", mew=0.4)
            ax.set(xlabel=AXES["step"], title=CURVES[what], ylim=limits)
        return draw

    def layers_key(ax):
        ax.axis("off")
        some = list(colors)[::-(-len(colors) // 12)]
        handles = [Line2D([], [], color=colors[layer], label=f"layer {layer}") for layer in some]
        if marked:  # by the panels before this one
            handles += [Line2D([], [], marker=marker, color="gray", mec="black", mew=0.4, lw=0, label=f"{mark} of a rise and fall")
                        for mark, marker in MARKS.items()]
        ax.legend(handles=handles, loc="center", ncols=1 + (len(handles) > 8))

    keys = domain_keys(arms)
    axes = [axis for axis in ("tokens", "flops", "seconds")
            if all(axis in c and c[axis].any() for runs in arms for run in runs for c in [curve(run, "val/loss")])]
    second = [ratios] * bool(found) + [accuracy] * any(map(len, last(arms, "meta/query_acc"))) + [domains] * bool(keys)
    rows = [("", [losses(axis) for axis in axes or ["step"]]), ("", second)]
    names_of_layers = sorted({layer for runs in arms for run in runs for what in CURVES for layer in layer_curves(run, what)})
    colors = {layer: colormaps["viridis"](0.95 * i / max(len(names_of_layers) - 1, 1)) for i, layer in enumerate(names_of_layers)}
    for name, runs in zip(names, arms):
        panels = []
        for what in CURVES:
            # One scale for both arms; what lies in the first tenth of a run, the random start, may lie outside.
            shown = [y[steps >= 0.1 * steps[-1]] for rs in arms for run in rs for steps, y in layer_curves(run, what).values()]
            if any(layer_curves(run, what) for run in runs):
                low, high = min(y.min() for y in shown), max(y.max() for y in shown)
                margin = 0.05 * (high - low) or 0.5
                panels.append(layers(runs, what, (low - margin, high + margin)))
        panels += [layers_key] * bool(panels)
        rows += [(f"{name}, by layer" if i == 0 else "", panels[i:i + 3]) for i in range(0, len(panels), 3)]
    rows = [row for row in rows if row[1]]

    style = {"font.size": 7, "axes.titlesize": 7.5, "legend.fontsize": 6.5, "legend.frameon": False, "axes.spines.top": False,
             "axes.spines.right": False, "axes.linewidth": 0.6}
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    with rc_context(style):
        fig = Figure(figsize=(7.5, 1.9 * len(rows)), layout="constrained", dpi=150)
        for part, (title, panels) in zip(np.atleast_1d(fig.subfigures(len(rows), 1)), rows):
            if title:
                part.suptitle(title, fontsize=8)
            for ax, draw in zip(np.atleast_1d(part.subplots(1, len(panels))), panels):
                draw(ax)
                if draw is not layers_key:
                    ax.set_title(f"({next(letters)}) {ax.get_title()}")
    return fig


def main(argv):
    given = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    cfg = config.load(Config, [arg for arg in argv if arg not in given], __doc__)
    folders = [[folder for folder in arm.split(",") if folder] for arm in given]
    if not 1 <= len(folders) <= 2 or not all(folders):
        raise UserError("give one or two arms, each a run's folder or several with commas between; "
                        f"got {len(given)}: {' '.join(given) or '-'}")
    every = [Path(folder).resolve() for arm in folders for folder in arm]
    if twice := [folder for folder, n in Counter(every).items() if n > 1]:
        raise UserError(f"{twice[0]} is named twice")
    arms = [[read_run(folder) for folder in arm] for arm in folders]
    for runs in arms:
        runs.sort(key=lambda run: (run["seed"] is None, run["seed"]))
    # out/hybrid-1,out/hybrid-2 is "hybrid"; out/hybrid/1,out/hybrid/2 too
    names = [every[0].name if len(every) == 1 else re.sub(r"[-_.]?\d+$", "", every[0].name) or every[0].parent.name
             for every in [[Path(folder).resolve() for folder in arm] for arm in folders]]
    if len(set(names)) < len(names):
        names = given
    out = Path(re.sub(r"\.(md|png)$", "", cfg.out))
    if not out.name:
        raise UserError(f"out = {cfg.out!r} must be a path of a file without its ending, for instance out/report")
    text, fig = tables(arms, names), figure(arms, names)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(out.with_name(out.name + ".png"))
        out.with_name(out.name + ".md").write_text(text + f"\n![{' against '.join(names)}]({out.name}.png)\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}.md and .png: {error.strerror}") from None
    print(text.split("## Phases")[0] + f"files     {out}.md (these tables, and the phases of every layer), {out}.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
