"""What did meta-learning buy? Compares finished runs: tables in Markdown and a figure.

    python report.py out/hybrid out/vanilla                          # two arms of one run each; the second is the baseline
    python report.py out/hybrid-1,out/hybrid-2 out/vanilla-1,out/vanilla-2 --out=report     # several runs (seeds) an arm
    python report.py out/demo                                        # one arm: curves and phases alone

Writes OUT.md and OUT.png. Reads config.json, log.jsonl, and where they are there probes.jsonl and ner.jsonl.
"""
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from probes import phase

AXES = {"step": "updates", "tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds"}
CURVES = {"rank/resid": "rank, residual stream", "rank/v_proj": "rank, v_proj", "rank/o_proj": "rank, o_proj",
          "rank/down_proj": "rank, down_proj", "entropy": "attention entropy"}
COLORS = ("#c0392b", "#2c6fbb")  # of the arms
NER_KEY = ("mode", "train", "test", "shots", "label", "bidirectional", "lr")  # what makes two results comparable


@dataclass(frozen=True)
class Config:
    out: str = "report"  # path of the report without its ending; OUT.md and OUT.png are written


# ---- reading runs ----


def read_jsonl(path):
    """The objects of a .jsonl file, [] where there is none. A torn last line (the run goes on) is passed over."""
    found = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: no JSON: {line[:80]!r}") from None
    return found


def read_run(folder):
    """{"name", "config", "log", "probes", "ner"} of a run's folder."""
    folder = Path(folder)
    log = read_jsonl(folder / "log.jsonl")
    if not any("val/loss" in line for line in log):
        raise UserError(f"{folder} holds no run with a validation loss in log.jsonl: name a folder that train.py wrote to")
    cfg = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return {"name": folder.name, "config": cfg, "log": log, "probes": read_jsonl(folder / "probes.jsonl"),
            "ner": read_jsonl(folder / "ner.jsonl")}


def curve(lines, key):
    """The lines that have `key`, as arrays: {"step", "tokens", "flops", "seconds" where they are there, and `key`}."""
    lines = [line for line in lines if key in line]
    return {name: np.array([line[name] for line in lines], float) for name in (*AXES, key) if lines and name in lines[0]}


def mean_curve(curves, key):
    """(steps, mean over runs) at the steps that all have."""
    steps = sorted(set.intersection(*(set(c["step"].tolist()) for c in curves)))
    return np.array(steps), np.mean([[dict(zip(c["step"], c[key]))[step] for step in steps] for c in curves], axis=0)


def domain_keys(arms):
    """The metrics val/<domain> that all runs have."""
    return sorted(set.intersection(*({key for line in run["log"] for key in line if re.fullmatch("val/(?!loss$).*", key)}
                                     for runs in arms for run in runs)))


def layer_curves(runs, what):
    """{layer: (steps, values)} of a curve of probes.jsonl, the mean over runs and, of entropies, over heads."""
    found = {}
    for layer in sorted({key.split("/")[len(what.split("/"))] for run in runs for line in run["probes"] for key in line
                         if key.startswith(what + "/")}):
        keys = [key for key in runs[0]["probes"][0] if key == f"{what}/{layer}" or key.startswith(f"{what}/{layer}/")]
        curves = []
        for run in runs:
            lines = [line for line in run["probes"] if all(key in line for key in keys)]
            curves.append({"step": np.array([line["step"] for line in lines], float),
                           "y": np.array([np.mean([line[key] for key in keys]) for line in lines])})
        found[layer] = mean_curve(curves, "y")
    return {layer: c for layer, c in found.items() if len(c[0])}


# ---- comparing ----


def reach(losses, x, level):
    """Where a loss curve first reaches `level`, interpolated in log-loss between two evaluations; nan where it never does."""
    lowest = np.minimum.accumulate(losses)
    i = int(np.argmax(lowest <= level))
    if lowest[i] > level or i == 0 and losses[0] > level:
        return math.nan
    if i == 0:
        return x[0] if losses[0] == level else math.nan  # it was there before the first evaluation
    high, low = math.log(lowest[i - 1]), math.log(losses[i])
    return x[i - 1] + (x[i] - x[i - 1]) * (high - math.log(level)) / (high - low)


def sooner(arms, n=41):
    """(levels, {axis: (ratios, standard errors of their logs)}): how much sooner the first arm reaches a loss than the second.

    Ratios of geometric means over the runs of an arm, at `n` losses that all runs reach, evenly spaced in log-loss. The first segment
    of a curve, from the untrained model to the first evaluation after it, is left out: too much falls within it to interpolate.
    """
    curves = [[curve(run["log"], "val/loss") for run in runs] for runs in arms]
    every = [c for cs in curves for c in cs]
    if min(len(c["val/loss"]) for c in every) < 3:
        return np.array([]), {}
    high = min(c["val/loss"][1] for c in every)
    low = max(c["val/loss"].min() for c in every)
    if low >= high:
        return np.array([]), {}
    levels = np.exp(np.linspace(math.log(high), math.log(low), n))
    levels[0], levels[-1] = high, low  # to the last bit, so that the curves that touch them reach them
    found = {}
    for axis in AXES:
        logs = [np.log([[reach(c["val/loss"], c[axis], level) for level in levels] for c in cs]) for cs in curves]  # (runs, n)
        error = np.sqrt(sum(x.var(0, ddof=1) / len(x) for x in logs)) if min(map(len, logs)) > 1 else np.full(n, math.nan)
        found[axis] = np.exp(logs[1].mean(0) - logs[0].mean(0)), error
    return levels, found


def welch(a, b):
    """Two-sided p-value of Welch's t-test that two samples have one mean (Welch 1947); nan with fewer than two values each."""
    if min(len(a), len(b)) < 2:
        return math.nan
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if va + vb == 0:
        return 1.0 if np.mean(a) == np.mean(b) else 0.0
    t = abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    # P(|T| > t) is the integral of cos(angle)^(df - 1) from atan(t / sqrt(df)) to pi / 2 over that from 0
    angle = math.atan2(t, math.sqrt(df))
    angles = [np.linspace(start, math.pi / 2, 20001) for start in (angle, 0)]
    tail, whole = (np.trapezoid(np.cos(x) ** (df - 1), x) for x in angles)
    return float(tail / whole)


def ner_scores(arms):
    """[(NER_KEY's values, [F1 in percent of each run] of each arm)] of what all arms were scored on; of a result written twice the later.

    Of a run the mean over its fine-tuning seeds, which are no independent trials of the pretraining; in an arm of one run each seed.
    """
    scores = [defaultdict(lambda: defaultdict(dict)) for _ in arms]
    for found, runs in zip(scores, arms):
        for i, run in enumerate(runs):
            for line in run["ner"]:
                found[tuple(line.get(key) for key in NER_KEY)][i][line["seed"]] = 100 * line["f1"]

    def values(runs):
        return [np.mean(list(seeds.values())) for seeds in runs.values()] if len(runs) > 1 else list(next(iter(runs.values())).values())

    return [(key, [values(found[key]) for found in scores]) for key in scores[0] if all(key in found for found in scores)]


# ---- tables ----


def markdown(rows, right=True):
    """The first row is the head; columns after the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * (w - 1) + (":" if i and right else "-") for i, w in enumerate(widths)], *rows[1:]]
    lines = ([cell.rjust(w) if i and right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values, form):
    mean = format(np.mean(values), form)
    return mean + (f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else "")


def compared(label, values, form):
    """A row: the mean of each arm, and of two arms the difference and its p-value. Empty where an arm has no value."""
    if not all(values):
        return []
    row = [label, *(spread(v, form) for v in values)]
    if len(values) == 2:
        p = welch(*values)
        row += [format(np.mean(values[0]) - np.mean(values[1]), "+" + form), "" if math.isnan(p) else f"{p:.2g}"]
    return [row]


def phases(runs):
    """The phases of every curve and layer: (paragraphs of Markdown, a count of the verdicts)."""
    rows, orders, counts = [["curve", "layer", "verdict", "start", "peak", "rise", "settled", "fall", "noise"]], [], Counter()
    for what, label in CURVES.items():
        found = {layer: phase(*c) for layer, c in layer_curves(runs, what).items()}
        counts.update(p["verdict"] for p in found.values())
        for layer, p in found.items():
            cells = {key: "" if p[key] is None else str(p[key]) for key in ("start", "peak", "settled")}
            cells |= {key: f"{p[key]:.1%}" if p[key] else "" for key in ("rise", "fall", "noise")}
            rows.append([label, layer, p["verdict"], *(cells[key] for key in rows[0][3:])])
        both = [layer for layer, p in found.items() if p["verdict"] == "diversify-then-compress"]
        for key, word in (("peak", "peak"), ("settled", "settle again")):
            order = [f"{layer} ({found[layer][key]})" for layer in sorted(both, key=lambda layer: found[layer][key])]
            orders += [f"- {label}: layers {word} in the order {', '.join(order)}"] * bool(both)
    note = "The largest rise, from start to peak, and the fall after it, of which 90% are made where it has settled; in updates. " \
           "What stays within the noise counts as none."
    return [note, markdown(rows), *(["\n".join(orders)] if orders else [])], counts


def tables(arms, names):
    """The report as Markdown."""
    head = ["", *names] + ["difference", "p"] * (len(names) == 2)
    listed = "; ".join(f"{name}: {', '.join(run['name'] for run in runs)}" for name, runs in zip(names, arms))
    text = [f"# {' against '.join(names)}", f"Runs: {listed}. Mean ± standard deviation over runs; p: Welch's t-test."]

    def last(key):  # of each run that has it
        values = [[[line[key] for line in run["log"] if key in line] for run in runs] for runs in arms]
        return [[v[-1] for v in runs if v] for runs in values]

    domains = domain_keys(arms)
    rows = compared("validation loss, nats", last("val/loss"), ".3f")
    for key in domains:
        rows += compared(f"validation loss, {key.removeprefix('val/')}", last(key), ".3f")
    for key, label in (("meta/query_acc", "query accuracy, adapted"), ("meta/query_acc_unadapted", "query accuracy, unadapted")):
        values = last(key)
        if any(values):
            mean = [spread(v, ".3f") if v else "" for v in values]
            rows.append([label, *mean] + ["", ""] * (len(names) == 2))
    for key, label in (("step", "updates"), ("tokens", "LM tokens"), ("flops", "FLOPs"), ("seconds", "seconds of training")):
        rows += [row[:-1] + [""] if len(names) == 2 else row for row in compared(label, last(key), ".3g" if key != "step" else ".0f")]
    text += ["## At the end of training", markdown([head, *rows])]

    levels, found = sooner(arms) if len(arms) == 2 else (None, {})
    if found:
        def named(axis, i):
            ratio, error = found[axis][0][i], found[axis][1][i]
            return f"{ratio:.2f}" + ("" if math.isnan(error) else f" ({ratio * math.exp(-error):.2f} to {ratio * math.exp(error):.2f})")

        rows = [["", "largest", "at loss", f"final, at loss {levels[-1]:.3f}"]]
        for axis, label in AXES.items():
            i = int(np.argmax(found[axis][0]))
            rows.append([label, named(axis, i), f"{levels[i]:.3f}", named(axis, -1)])
        error = "" if math.isnan(found["step"][1][0]) else " In brackets: one standard error."
        text.append("## Sooner by\n\n"
                    f"How many times what {names[0]} needs for a validation loss {names[1]} needs: above 1, {names[0]} is sooner. Losses "
                    f"from {levels[0]:.3f} to {levels[-1]:.3f}, which all runs reach; interpolated in log-loss.{error}")
        text.append(markdown(rows))
    elif len(arms) == 2:
        text.append("## Sooner by\n\nThere is no loss that all runs reach between two evaluations of their own.")

    groups, gains = defaultdict(list), []
    for (mode, train, test, *rest), values in ner_scores(arms):
        groups[mode, train, *rest].append((test, values))
    for (mode, train, *rest), tests in groups.items():
        settings = ", ".join(f"{name} {value}" for name, value in zip(NER_KEY[3:], rest) if value)
        rows = [row for test, values in tests for row in compared(test, values, ".1f")]
        text += [f"## Universal NER, {mode}, trained on {train} ({settings})\n\nSpan F1 in percent.", markdown([head, *rows])]
        gains += [np.mean(values[0]) - np.mean(values[-1]) for _, values in tests if mode != "majority"]

    verdicts = []
    for name, runs in zip(names, arms):
        section, counts = phases(runs)
        if counts:
            verdicts.append(f"{name}: {counts['diversify-then-compress']} of {counts.total()} curves rise and fall")
            text += [f"## Phases of {name}", *section]

    if len(arms) == 2:
        worse = [key for key in domains if np.mean(last(key)[0]) > np.mean(last(key)[1])]
        rows = [["in arXiv 2508.02189", "here"],
                ["the same loss up to 1.6 times sooner", f"at most {max(found['flops'][0]):.2f} in FLOPs" if found else ""],
                ["2 to 3 points more F1 on Universal NER, medium and large models", f"{np.mean(gains):+.1f} on average" if gains else ""],
                ["perplexity worse on text of other domains at most sizes", f"worse on {len(worse)} of {len(domains)}" if domains else ""],
                ["effective rank and head entropy rise, then fall", "; ".join(verdicts)]]
        text.insert(2, "## Beside the paper\n\n" + markdown([row for row in rows if row[1]], right=False))
    return "\n\n".join(text) + "\n"


# ---- the figure ----


def figure(arms, names):
    """All panels for which there is data, row by row."""
    from matplotlib import rc_context
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    def losses(axis):
        def draw(ax):
            every = []
            for runs, name, color in zip(arms, names, COLORS):
                for i, run in enumerate(runs):
                    c = curve(run["log"], "val/loss")
                    every.append(c["val/loss"])
                    ax.plot(c[axis], every[-1], color=color, lw=1.2, alpha=1 if len(runs) == 1 else 0.6, label=name if i == 0 else None)
            ax.set(xlabel=AXES[axis], title="validation loss", yscale="log")
            low, high = min(y.min() for y in every), max(y[min(1, len(y) - 1)] for y in every)
            ax.set_ylim(low * 0.98, high * 1.02)  # the fall from the untrained model would flatten the rest
            ticks = np.linspace(low, high, 5)
            ax.set_yticks(ticks, [f"{tick:.2f}" for tick in ticks])
            ax.minorticks_off()
            ax.legend()
        return draw

    levels, found = sooner(arms) if len(arms) == 2 else (None, {})

    def ratios(ax):
        for (axis, label), style in zip(AXES.items(), ("-", "--", "-.", ":")):
            ratio, error = found[axis]
            ax.plot(levels, ratio, style, color="black", lw=1.2, label=label)
            if not np.isnan(error).any():
                ax.fill_between(levels, ratio * np.exp(-error), ratio * np.exp(error), color="black", alpha=0.08, lw=0)
        ax.axhline(1, color="gray", lw=0.8)
        ax.invert_xaxis()
        ax.set(xlabel="validation loss", title=f"{names[0]} sooner by, where above 1")
        ax.legend()

    def accuracy(ax):
        for runs, name, color in zip(arms, names, COLORS):
            for i, run in enumerate(runs):
                for key, style, word in (("meta/query_acc", "-", "adapted"), ("meta/query_acc_unadapted", "--", "unadapted")):
                    c = curve(run["log"], key)
                    if c:
                        ax.plot(c["step"], c[key], style, color=color, lw=1.2, label=f"{name}, {word}" if i == 0 else None)
        ax.set(xlabel=AXES["step"], title="query accuracy, adapted (solid) and not", ylim=(0, None))
        ax.legend()

    def domains(keys):
        def draw(ax):
            y = np.arange(len(keys))
            for i, (runs, color) in enumerate(zip(arms, COLORS)):
                final = np.array([[curve(run["log"], key)[key][-1] for run in runs] for key in keys])  # (domains, runs)
                error = final.std(1, ddof=1) if len(runs) > 1 else None
                ax.barh(y + 0.4 * (i - (len(arms) - 1) / 2), final.mean(1), 0.38, xerr=error, color=color)
            ax.set_yticks(y, [key.removeprefix("val/") for key in keys])
            ax.invert_yaxis()
            ax.set(xlabel="nats", title="final validation loss by domain")
        return draw

    def layers(curves, title, limits, key):
        def draw(ax):
            from matplotlib import colormaps
            from matplotlib.cm import ScalarMappable
            from matplotlib.ticker import MaxNLocator
            scale = ScalarMappable(Normalize(0, len(curves) - 1 or 1), colormaps["viridis"])
            for i, (layer, (steps, values)) in enumerate(curves.items()):
                color = scale.to_rgba(i)
                ax.plot(steps, values, color=color, lw=1.1, label=f"layer {layer}")
                found = phase(steps, values)
                if found["verdict"] == "diversify-then-compress":
                    for mark, marker in (("start", "v"), ("peak", "^"), ("settled", "s")):
                        ax.plot(found[mark], np.interp(found[mark], steps, values), marker, color=color, ms=5, mec="black", mew=0.5)
            ax.set(xlabel=AXES["step"], title=title, ylim=limits)
            if key and len(curves) <= 4:
                ax.legend()
            elif key:
                ax.figure.colorbar(scale, ax=ax, label="layer", ticks=MaxNLocator(4, integer=True)).outline.set_visible(False)
        return draw

    rows = [[None, *(losses(axis) for axis in ("tokens", "flops", "seconds"))]]
    keys = domain_keys(arms)
    second = [ratios] * bool(found)
    second += [accuracy] * any("meta/query_acc" in line for runs in arms for run in runs for line in run["log"])
    second += [domains(keys)] * bool(keys)
    rows += [[None, *second]] * bool(second)
    drawn = [{what: layer_curves(runs, what) for what in CURVES} for runs in arms]
    for name, curves in zip(names, drawn):
        panels = []
        for what, label in CURVES.items():
            if curves[what]:  # the same scale for both arms
                values = np.concatenate([y for c in drawn for _, y in c[what].values()])
                margin = 0.05 * (values.max() - values.min() or 1)
                last = what == [what for what in CURVES if curves[what]][-1]  # one key is enough for the row
                panels.append(layers(curves[what], label, (values.min() - margin, values.max() + margin), last))
        rows += [[f"{name}, by layer; where a curve rises and falls again: start, peak and settled", *panels]] * bool(panels)

    style = {"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False,
             "axes.spines.right": False}
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    with rc_context(style):
        fig = Figure(figsize=(13, 2.6 * len(rows)), layout="constrained", dpi=130)
        for part, (title, *panels) in zip(np.atleast_1d(fig.subfigures(len(rows), 1)), rows):
            if title:
                part.suptitle(title, fontsize=9)
            for ax, draw in zip(np.atleast_1d(part.subplots(1, len(panels))), panels):
                draw(ax)
                ax.set_title(f"({next(letters)}) {ax.get_title()}")
    return fig


def main(argv):
    given = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    cfg = config.load(Config, [arg for arg in argv if arg not in given], __doc__)
    if not 1 <= len(given) <= 2:
        raise UserError(f"give one or two arms, each a run's folder or several with commas between; got {len(given)}")
    arms = [[read_run(folder) for folder in arm.split(",") if folder] for arm in given]
    names = [re.sub(r"[-_]?\d*$", "", runs[0]["name"]) or runs[0]["name"] if len(runs) > 1 else runs[0]["name"] for runs in arms]
    if len(set(names)) < len(names):
        names = given
    out = Path(cfg.out)
    text = tables(arms, names)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".md").write_text(text + f"\n![{' against '.join(names)}]({out.name}.png)\n", encoding="utf-8")
        figure(arms, names).savefig(out.with_name(out.name + ".png"))
    except OSError as error:
        raise UserError(f"cannot write {out}.md and .png: {error.strerror}") from None
    print(text.split("## Phases")[0] + f"files     {out}.md (these tables, and the phases of every layer), {out}.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
