"""The tables and the figure of README.md, from logs/. run.sh calls it.

    python results/tables.py results                  # fills README.md between its marks, draws figure.png
    python results/tables.py results --collect=out    # first takes over what is finished in out/

A run is compared with vanilla training of the same seed: same first weights, same text in the same order.
"""
import itertools
import json
import math
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plan  # noqa: E402

import report  # noqa: E402
from report import difference, last_values, markdown, mean_std  # noqa: E402

BASELINE = "share-0"
NAMES = {"share-0": "vanilla", "share-5": "5%", "share-10": "10%", "share-25": "25%", "share-50": "50%",
         "decay-0.5": "vanilla, weight decay 0.5", "half": "vanilla, half as long"}
MISSING = "not run"


# ---- logs ----


def rounded(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def copy_lines(source, target, leave_out=()):
    """Copies a .jsonl with five digits of each number, which is what it is good for."""
    lines = [{key: rounded(value) for key, value in json.loads(line).items() if not key.startswith(leave_out)}
             for line in source.read_text().splitlines()]
    target.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def collect(out, logs):
    """Copies the logs of finished runs."""
    rates = (f"rate-{rate}" for rate in plan.RATES)
    kinds = ("books", "pydocs", "scarce", "foreign", "found", "scarce-search", *rates)
    for folder in sorted(path.parent for kind in kinds for path in out.glob(f"{kind}/*/log.jsonl")):
        settings = json.loads((folder / "config.json").read_text())
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        if last["step"] < settings["max_steps"] or "final/mask_query_acc" not in last:
            continue
        target = logs / folder.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "config.json", target)
        copy_lines(folder / "log.jsonl", target / "log.jsonl")
        if (folder / "probes.jsonl").exists() and settings["max_steps"] > 0:
            copy_lines(folder / "probes.jsonl", target / "probes.jsonl", ("entropy_nats",))
        if (folder / "ner.jsonl").exists():
            copy_lines(folder / "ner.jsonl", target / "ner.jsonl", ("per_type", "checkpoint"))


LOGS = Path(__file__).with_name("logs")  # main may set another folder


@cache
def runs(corpus, arm):
    """The finished runs of an arm, by seed."""
    folders = [path.parent for path in LOGS.glob(f"{corpus}/{arm}-*/log.jsonl")]
    folders = [folder for folder in folders if re.fullmatch(re.escape(arm) + r"-\d+", folder.name)]
    return sorted((report.read_run(folder) for folder in folders), key=lambda run: run["seed"])


# ---- statistics ----


@cache
def detectable(n):
    """The paired difference, in standard deviations, that n pairs show at p < 0.05 four times in five."""
    t = stats.t.isf(0.025, n - 1)
    return optimize.brentq(lambda d: stats.nct.sf(t, n - 1, d * math.sqrt(n)) - 0.8, 0.0, 20.0)


def paired(corpus, arm, measure):
    """(values of the arm, values of vanilla training) of the seeds that both have."""
    values = [{run["seed"]: measure(run) for run in runs(corpus, name)} for name in (arm, BASELINE)]
    seeds = [seed for seed in values[0] if not math.isnan(values[0][seed] - values[1].get(seed, math.nan))]
    return [[of_arm[seed] for seed in seeds] for of_arm in values]


def compared(corpus, arm, measure, form):
    """"difference (p; could have been seen)" of an arm and vanilla training, paired by seed."""
    ours, theirs = paired(corpus, arm, measure)
    if not ours:
        return MISSING
    delta, _, p = difference(ours, theirs, paired=True)
    if len(ours) < 3:  # of two pairs a test says nothing
        return format(delta, "+" + form)
    seen = detectable(len(ours)) * np.std(np.subtract(ours, theirs), ddof=1)
    return f"{format(delta, '+' + form)} ({p:.1g}; {format(seen, form)})"


def spread(corpus, arm, measure, form):
    found = [value for run in runs(corpus, arm) if not math.isnan(value := measure(run))]
    return mean_std(found, form) if found else MISSING


# ---- measures: run -> number ----


def last(key):
    return lambda run: last_values([[run]], key)[0][0]


def best(key):
    """Of the evaluations of a run the lowest: where early stopping would have stopped, had it known."""
    return lambda run: float(report.curve(run, key)[key].min())


def better(kind):
    """Accuracy at the read-out that suits the run: at the mask, or before the word."""
    return lambda run: max(last(f"final/{read_out}_{kind}query_acc")(run) for read_out in report.READ_OUTS)


def last_probe(kind):
    """The last value of a kind of curve, a mean over layers (and heads)."""
    def measure(run):
        return np.mean([values[-1] for [(_, values)] in report.layer_curves([run])[kind].values()])

    return measure


def measured(key, *corpora):
    """The best value of a metric over measurements of the run's checkpoint; nan if there is none."""
    def measure(run):
        arm = run["path"].name.rpartition("-")[0]
        return max((last(key)(other) for corpus in corpora for other in runs(corpus, arm)
                    if other["seed"] == run["seed"]), default=math.nan)

    return measure


def ner(mode, shots, tests, train="en_ewt:dev"):
    """The mean F1 in percent over treebanks and fine-tuning seeds; nan if a run was not scored."""
    def measure(run):
        found = [100 * line["f1"] for line in run["ner"] if line["test"] in tests and line["train"] == train
                 and (line["mode"], line["shots"]) == (mode, shots)]
        return np.mean(found) if found else math.nan

    return measure


LOSS = ("validation loss, nats", last("val/loss"), ".3f")
KEYS = {f"accuracy on {words}, {where}": f"final/{read_out}_{kind}query_acc"
        for kind, words in report.WORDS.items() for read_out, (where, _) in report.READ_OUTS.items()}
ACCURACIES = [(label, last(key), ".3f") for label, key in KEYS.items()]
BETTER = [(f"accuracy on {words}, the better read-out", better(kind), ".3f")
          for kind, words in report.WORDS.items()]
PROBES = [("effective rank of the residual stream", last_probe("rank/resid"), ".1f"),
          ("attention entropy", last_probe("entropy"), ".3f")]


def domain_losses(corpus):
    keys = report.domain_keys([runs(corpus, BASELINE)]) if runs(corpus, BASELINE) else []
    return [(f"loss on {key.removeprefix('val/')}", last(key), ".3f") for key in keys]


# ---- tables: rows of Markdown ----


def values_table(corpus, arms, measures):
    """A column for each arm: mean ± standard deviation over seeds."""
    head = ["", *(f"{NAMES.get(arm, arm)} ({len(runs(corpus, arm))})" for arm in arms)]  # how many seeds
    return markdown([head, *([label, *(spread(corpus, arm, measure, form) for arm in arms)]
                             for label, measure, form in measures)])


def differences_table(corpus, arms, measures):
    """A column for each arm: the difference to vanilla training of the same seeds."""
    head = ["", *(f"{NAMES.get(arm, arm)} - vanilla" for arm in arms)]
    return markdown([head, *([label, *(compared(corpus, arm, measure, form) for arm in arms)]
                             for label, measure, form in measures)])


def found_table():
    """What the search tried: flags and, of one run each, the differences to vanilla training."""
    measures = [LOSS, *ACCURACIES]
    runs_of = {name: runs("found", name) for name in plan.SEARCH}
    base = [measure(runs_of["vanilla"][0]) for _, measure, _ in measures] if runs_of["vanilla"] else []
    rows = [["", "flags", *(label for label, _, _ in measures)]]
    for name, flags in plan.SEARCH.items():
        cells = [MISSING] * len(measures)
        if base and runs_of[name]:
            sign = "" if name == "vanilla" else "+"
            cells = [format(measure(runs_of[name][0]) - (value if sign else 0), sign + form)
                     for (_, measure, form), value in zip(measures, base)]
        rows.append([name, f"`{' '.join(plan.merged(flags))}`", *cells])
    return markdown(rows)


IN_LANGUAGE = ("da_ddt", "hr_set", "pt_bosque", "sk_snk")
TESTS = {"English": ("en_ewt", "en_pud"), "zero-shot": IN_LANGUAGE,
         "ceb_gja and tl_trg": ("ceb_gja", "tl_trg")}


def ner_rows(mode, name):
    return [(f"{name}, {shots or 'all'} sentences, {label}", ner(mode, shots, tests), ".1f")
            for shots in (8, 32, 128, 0) for label, tests in TESTS.items()]


NO_MODEL = ner_rows("majority", "no model")
NER = [*ner_rows("head", "head"), *ner_rows("full", "full")]


def own_language(mode, shots):
    """As `ner`, each of the four trainable treebanks that are not English by models fine-tuned on its own."""
    def measure(run):
        return np.mean([ner(mode, shots, [name], train=name)(run) for name in IN_LANGUAGE])

    return measure


NER += [(f"{mode}, {shots or 'all'} sentences, in-language (4)", own_language(mode, shots), ".1f")
        for mode, shots in (("head", 32), ("head", 0), ("full", 1000))]


def phases_table(corpus, arms):
    """How many curves (layers x seeds) rise and then fall, and by how much of the peak, by kind of curve."""
    rows = [["", *(NAMES.get(arm, arm) for arm in arms)]]
    kinds = report.layer_curves(runs(corpus, BASELINE))
    for kind in kinds:
        cells = []
        for arm in arms:
            by_layer = report.layer_curves(runs(corpus, arm)).get(kind, {})
            results = [(layer, report.phase(*c)) for layer, curves in by_layer.items() for c in curves]
            do = [(layer, p) for layer, p in results if p["verdict"] == report.RISE_AND_FALL]
            cell = f"{len(do)} of {len(results)}"
            if do:
                peaks = sorted(p["peak"] for _, p in do)
                fall = np.median([p["fall"] for _, p in do])
                cell += (f": layers {report.layer_ranges(sorted({layer for layer, _ in do}))}, "
                         f"peak at {peaks[len(peaks) // 2]}, falls by {fall:.0%}")
            cells.append(cell)
        rows.append([report.LABELS[kind], *cells])
    return markdown(rows, right=False)


def speedup_table(corpus, arms):
    """How much sooner an arm reaches the last loss that it and vanilla training both reach, in FLOPs."""
    rows = [["", "loss", "vanilla's FLOPs / its own", "one standard error", "p"]]
    for arm in filter(partial(runs, corpus), arms):
        levels, speedups = report.speedup([runs(corpus, arm), runs(corpus, BASELINE)])
        ratios, errors, p = speedups["flops"]
        low, high = (ratios[-1] * math.exp(sign * errors[-1]) for sign in (-1, 1))
        spread = ["", ""] if math.isnan(p) else [f"{low:.2f} to {high:.2f}", f"{p:.1g}"]  # of several runs
        rows.append([NAMES.get(arm, arm), f"{levels[-1]:.3f}", f"{ratios[-1]:.2f}", *spread])
    return markdown(rows)


def mixed(corpus, arm):
    groups = [runs(corpus, arm), runs(corpus, BASELINE)]
    if not all(groups):
        return ""
    return "\n\n".join(report.mixed_curve(groups, [NAMES[arm], "vanilla"])[2:])


# ---- the figure ----

COLORS = {"share-0": "#2c6fbb", "share-10": "#e08e2b", "share-50": "#c0392b", "best": "#27ae60"}


def dose_panel(ax, title, lines):
    """Against the share of episodes: each run a dot, the arms' means a line."""
    for (label, measure, _), style in lines:
        points = [(int(arm.removeprefix("share-")), y) for arm in plan.DOSES
                  for y in map(measure, runs("books", arm)) if not math.isnan(y)]
        shares = sorted({share for share, _ in points})
        means = [np.mean([y for x, y in points if x == share]) for share in shares]
        ax.plot(shares, means, label=label, **style)
        ax.plot(*zip(*points), ".", color=style["color"], ms=4)
    ax.set(xlabel="share of episodes, %", title=title)
    if len(lines) > 1:
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.6 * (high - low), high)  # room for the legend
        ax.legend(loc="lower left")


def over_time_panel(ax, kind, title):
    curves = []
    for arm, color in COLORS.items():
        by_layer = report.layer_curves(runs("books", arm)).get(kind, {})
        means = [report.mean_curve(of_layer) for of_layer in by_layer.values()]
        if means:
            curves.append(report.mean_curve(means))
            ax.plot(*curves[-1], color=color, label=NAMES.get(arm, arm))
    ax.set(xlabel="updates", title=title, ylim=report.y_limits(curves))
    ax.legend()


def domains_panel(ax):
    for arm in filter(partial(runs, "books"), ARMS):
        found = [np.subtract(*paired("books", arm, measure)) for _, measure, _ in domain_losses("books")]
        for y, values in enumerate(found):
            ax.plot(values, [y] * len(values), ".", color=COLORS[arm], ms=5)
        ax.plot([], [], ".", color=COLORS[arm], label=NAMES.get(arm, arm))
    labels = [label.removeprefix("loss on ") for label, _, _ in domain_losses("books")]
    ax.set_yticks(range(len(labels)), labels)
    ax.axvline(0, color="gray", lw=0.6)
    ax.set(xlabel="nats above vanilla", title="loss by domain")
    ax.legend()


def figure():
    """Dose and response, and the probes over training."""
    loss = [(LOSS, {"color": "black"})]
    accuracies = [((label.removeprefix("accuracy on "), *rest), {"color": color, "ls": dashes})
                  for (label, *rest), (color, dashes) in zip(ACCURACIES, itertools.product(
                      ("#2c6fbb", "#c0392b"), ("-", "--")))]
    scores = [((f"{shots or 'all'}", ner("head", shots, sum(TESTS.values(), ())), ""), {"color": color})
              for shots, color in zip((8, 32, 128, 0), ("#aed6f1", "#5dade2", "#2e86c1", "#1b4f72"))]
    panels = [partial(dose_panel, title="validation loss, nats", lines=loss),
              partial(dose_panel, title="query accuracy", lines=accuracies)]
    if any(run["ner"] for run in runs("books", BASELINE)):
        panels.append(partial(dose_panel, title="F1 on NER, head, by sentences", lines=scores))
    panels += [domains_panel,
               partial(over_time_panel, kind="rank/resid", title=report.LABELS["rank/resid"]),
               partial(over_time_panel, kind="entropy", title=report.LABELS["entropy"])]
    return report.draw(report.in_threes("", panels), size=(3.4, 2.7), font=10)


# ---- README.md ----

ARMS = ("share-10", "share-50", "best")
SCARCE = ("share-50", "half", "decay-0.5", "best")


def tables():
    """{name of a mark in README.md: Markdown}"""
    adaptation = [*ACCURACIES, *BETTER]
    losses = [LOSS, ("lowest validation loss", best("val/loss"), ".3f")]
    scarce = [*losses, *adaptation]
    rates = [f"rate-{rate}" for rate in plan.RATES]
    published = ("share-0", "published-vanilla", "published-0.001", "published-0.01")
    return {
        "dose": values_table("books", [*plan.DOSES, "best"], [LOSS, *adaptation, *PROBES]),
        "differences": differences_table("books", ARMS, [LOSS, *adaptation, *PROBES]),
        "rates": differences_table("books", ARMS, [
            (label, measured(key, *rates), ".3f") for label, key in KEYS.items()]),
        "domains": differences_table("books", ARMS, domain_losses("books")),
        "speedup": speedup_table("books", ARMS),
        "mixed": mixed("books", "share-50"),
        "published": values_table("books", published, [
            LOSS, *((label, measured(key, "rate-0.1"), ".3f") for label, key in KEYS.items()), *PROBES]),
        "found": found_table(),
        "found-scarce": values_table("scarce-search", list(plan.SCARCE_SEARCH), losses),
        "ner": values_table("books", ["share-0", *ARMS], [*NO_MODEL, *NER]),
        "ner-differences": differences_table("books", ARMS, NER),
        "phases": phases_table("books", ["share-0", *ARMS]),
        "pydocs": differences_table("pydocs", ["share-50"], [LOSS, *adaptation, *PROBES]),
        "foreign": differences_table("foreign", ["share-50"], [*domain_losses("foreign"), *adaptation]),
        "scarce": values_table("scarce", ["share-0", *SCARCE], scarce),
        "scarce-differences": differences_table("scarce", SCARCE, scarce),
    }


def main(folder, collect_from=""):
    global LOGS
    LOGS = Path(folder, "logs")
    if collect_from:
        collect(Path(collect_from.removeprefix("--collect=")), LOGS)
    path = Path(folder, "README.md")
    text = path.read_text()
    for name, table in tables().items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        cells = [cell for line in table.splitlines()[2:] for cell in line.split("|")[2:-1]]
        if all(cell.strip() in (MISSING, "0 of 0") for cell in cells):
            table = "*Not run yet.*"
        if mark:
            text = before + mark + table + "\n" + rest[rest.index("<!-- end -->"):]
    path.write_text(text)
    if runs("books", BASELINE):
        figure().savefig(path.with_name("figure.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
