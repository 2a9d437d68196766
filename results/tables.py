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
         "late": "10%, late", "half": "vanilla, half as long"}
MISSING = "not run"
# Of a NER result: what no table shows and is alike in all of them.
NOT_COPIED = ("per_type", "checkpoint", "f1_strict", "words", "label", "bidirectional", "patience",
              "batch_size")


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
            copy_lines(folder / "ner.jsonl", target / "ner.jsonl", NOT_COPIED)


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
    """"difference (p; could have been seen)" of an arm and vanilla training, paired by seed.

    Without a test of fewer than three pairs, whose number is given instead.
    """
    ours, theirs = paired(corpus, arm, measure)
    if not ours:
        return MISSING
    delta, _, p = difference(ours, theirs, paired=True)
    if len(ours) < 3:
        return f"{format(delta, '+' + form)} ({len(ours)} pair{'s' * (len(ours) > 1)})"
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


def at_rates(key, *rates):
    """The best value of a metric over inner rates; nan unless it was measured at each of them."""
    def measure(run):
        arm = run["path"].name.rpartition("-")[0]
        found = {run["config"]["inner_lr"]: last(key)(run)}
        found |= {rate: last(key)(other) for rate in rates for other in runs(f"rate-{rate}", arm)
                  if other["seed"] == run["seed"]}
        return max(found.get(rate, math.nan) for rate in rates)

    return measure


def ner(mode, shots, tests, train="en_ewt:dev"):
    """The mean F1 in percent over treebanks and fine-tuning seeds; nan if a run was not scored on all."""
    def measure(run):
        scores = {(line["test"], line["seed"]): 100 * line["f1"] for line in run["ner"]
                  if (line["mode"], line["train"], line["shots"]) == (mode, train, shots)}  # the later counts
        seeds = {seed for _, seed in scores}
        return np.mean([scores.get(key, math.nan) for key in itertools.product(tests, seeds)] or math.nan)

    return measure


LOSS = ("validation loss, nats", last("val/loss"), ".3f")
KEYS = {f"accuracy on {words}, {where}": f"final/{read_out}_{kind}query_acc"
        for kind, words in report.WORDS.items() for read_out, (where, _) in report.READ_OUTS.items()}
ACCURACIES = [(label, last(key), ".3f") for label, key in KEYS.items()]
BETTER = [(f"accuracy on {words}, the better read-out", better(kind), ".3f")
          for kind, words in report.WORDS.items()]
READ = [("updates", lambda run: run["log"][-1]["step"], ".0f"),
        ("tokens read as text, millions", lambda run: run["log"][-1]["tokens"] / 1e6, ".2f")]
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
    rows = [["", *(label.removeprefix("accuracy on held-out ") for label, _, _ in measures), "flags"]]
    for name, flags in plan.SEARCH.items():
        cells = [MISSING] * len(measures)
        if base and runs_of[name]:
            sign = "" if name == "vanilla" else "+"
            cells = [format(measure(runs_of[name][0]) - (value if sign else 0), sign + form)
                     for (_, measure, form), value in zip(measures, base)]
        rows.append([name, *cells, f"`{' '.join(plan.merged(flags))}`"])
    return markdown(rows)


def own_language(mode, shots):
    """As `ner`, each of the four trainable treebanks that are not English by models fine-tuned on its own."""
    def measure(run):
        return np.mean([ner(mode, shots, [name], train=name)(run) for name in plan.IN_LANGUAGE])

    return measure


def ner_table(corpus, arms):
    """F1 of no model and of vanilla training, and the arms' differences to the latter."""
    rows = [["", "no model", f"vanilla ({sum(bool(run['ner']) for run in runs(corpus, BASELINE))})",
             *(f"{NAMES.get(arm, arm)} - vanilla" for arm in arms)]]

    def add(label, measure, no_model=None):
        rows.append([label, spread(corpus, BASELINE, no_model, ".1f").partition(" ")[0] if no_model else "",
                     spread(corpus, BASELINE, measure, ".1f"),
                     *(compared(corpus, arm, measure, ".1f") for arm in arms)])

    for mode, shots in itertools.product(("head", "full"), (8, 32, 128, 0)):
        for label, tests in plan.TESTS.items():
            add(f"{mode}, {shots or 'all'} sentences, {label}", ner(mode, shots, tests),
                ner("majority", shots, tests))
    for mode, shots in (("head", 32), ("head", 0), ("full", 1000)):
        add(f"{mode}, {shots or 'all'} sentences, in-language (4)", own_language(mode, shots))
    return markdown(rows)


def rises_and_falls(steps, values):
    """The phases of a curve that ends below the peak of its rise, else None: it has not just paused."""
    p = report.phase(steps, values)
    is_one = p["verdict"] == report.RISE_AND_FALL and values[-1] < values[list(steps).index(p["peak"])]
    return p if is_one else None


def phases_table(corpus, arms):
    """How many curves (layers x seeds) rise and then fall, and by how much of the peak, by kind of curve."""
    rows = [["", *(NAMES.get(arm, arm) for arm in arms)]]
    kinds = report.layer_curves(runs(corpus, BASELINE))
    for kind in kinds:
        cells = []
        for arm in arms:
            by_layer = report.layer_curves(runs(corpus, arm)).get(kind, {})
            results = [(layer, rises_and_falls(*c)) for layer, curves in by_layer.items() for c in curves]
            do = [(layer, p) for layer, p in results if p]
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
    """How much sooner an arm reaches the last loss that it and vanilla training all reach, in FLOPs."""
    rows = [["", "loss", "vanilla's FLOPs / its own", "95% interval", "p"]]
    for arm in arms:
        of_both = {run["seed"] for run in runs(corpus, arm)} & {run["seed"] for run in runs(corpus, BASELINE)}
        groups = [[run for run in runs(corpus, name) if run["seed"] in of_both] for name in (arm, BASELINE)]
        if not of_both:
            continue
        levels, speedups = report.speedup(groups)
        cells = ["no loss that all reach", "", "", ""]
        if "flops" in speedups:
            ratios, errors, p = speedups["flops"]
            cells = [f"{levels[-1]:.3f}", f"{ratios[-1]:.2f}", f"{len(of_both)} pairs", ""]
            if len(of_both) > 2:
                t = stats.t.isf(0.025, len(of_both) - 1)
                ends = (ratios[-1] * math.exp(sign * t * errors[-1]) for sign in (-1, 1))
                cells[2:] = ["{:.2f} to {:.2f}".format(*ends), f"{p:.1g}"]
        rows.append([NAMES.get(arm, arm), *cells])
    return markdown(rows)


def mixed(corpus, arm):
    groups = [runs(corpus, arm), runs(corpus, BASELINE)]
    if not all(groups):
        return ""
    return "\n\n".join(report.mixed_curve(groups, [NAMES[arm], "vanilla"])[2:])


# ---- the figure ----

COLORS = {"share-0": "#2c6fbb", "share-10": "#e08e2b", "share-50": "#c0392b", "late": "#8e44ad",
          "best": "#27ae60"}


def dose_panel(ax, title, lines):
    """Against the share of episodes: each run a dot, the arms' means a line."""
    for label, measure, style in lines:
        points = [(int(arm.removeprefix("share-")), y) for arm in plan.DOSES
                  for y in map(measure, runs("books", arm)) if not math.isnan(y)]
        shares = sorted({share for share, _ in points})
        means = [np.mean([y for x, y in points if x == share]) for share in shares]
        ax.plot(shares, means, label=label, **style)
        ax.plot([x for x, _ in points], [y for _, y in points], ".", color=style["color"], ms=4)
    ax.set(xlabel="share of episodes, %", title=title)
    if len(lines) > 1:
        low, high = ax.get_ylim()
        ticks = [y for y in ax.get_yticks() if low <= y <= high]
        ax.set_ylim(low - 0.8 * (high - low), high)  # room for the legend
        ax.set_yticks(ticks)
        ax.legend(loc="lower left")


def ner_panel(ax):
    """F1 by all sentences, and as thin lines that of no model."""
    lines = [(f"{mode}, {label}", ner(mode, 0, plan.TESTS[label]), {"color": color, "ls": dashes})
             for label, color in (("English", "#1b4f72"), ("zero-shot", "#5dade2"))
             for mode, dashes in (("full", "-"), ("head", "--"))]
    for label, _, style in lines[::2]:
        no_model = map(ner("majority", 0, plan.TESTS[label.removeprefix("full, ")]), runs("books", BASELINE))
        ax.axhline(np.nanmean(list(no_model)), color=style["color"], lw=0.6)
    dose_panel(ax, "F1 on NER, all sentences", lines)


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
    loss = [("", LOSS[1], {"color": "black"})]
    accuracies = [(label.removeprefix("accuracy on "), measure, {"color": color, "ls": dashes})
                  for (label, measure, _), (color, dashes) in zip(ACCURACIES, itertools.product(
                      ("#2c6fbb", "#c0392b"), ("-", "--")))]
    panels = [partial(dose_panel, title="validation loss, nats", lines=loss),
              partial(dose_panel, title="query accuracy", lines=accuracies)]
    if any(run["ner"] for run in runs("books", BASELINE)):
        panels.append(ner_panel)
    panels += [domains_panel,
               partial(over_time_panel, kind="rank/resid", title=report.LABELS["rank/resid"]),
               partial(over_time_panel, kind="entropy", title=report.LABELS["entropy"])]
    return report.draw(report.in_threes("", panels), size=(3.4, 2.7), font=10)


# ---- README.md ----

ARMS = ("share-10", "share-50", "late", "best")
SCARCE = ("share-50", "half", "best")
PYDOCS = ("share-50", "half")


def tables():
    """{name of a mark in README.md: Markdown}"""
    adaptation = [*ACCURACIES, *BETTER]
    losses = [LOSS, ("lowest validation loss", best("val/loss"), ".3f")]
    scarce = [*losses, *adaptation]
    doses = [*(arm for arm in plan.DOSES if arm != BASELINE), "late", "best"]
    published = ("share-0", "published-vanilla", "published-0.001", "published-0.01")
    return {
        "dose": values_table("books", [BASELINE, *doses], [*READ, LOSS, *adaptation, *PROBES]),
        "differences": differences_table("books", doses, [LOSS, *adaptation, *PROBES]),
        "rates": differences_table("books", ARMS, [
            (label, at_rates(key, *plan.RATES), ".3f") for label, key in KEYS.items()]),
        "domains": differences_table("books", ARMS, domain_losses("books")),
        "speedup": speedup_table("books", ARMS),
        "mixed": mixed("books", "share-50"),
        "published": values_table("books", published, [
            LOSS, *((label, at_rates(key, *plan.RATES), ".3f") for label, key in KEYS.items()), *PROBES]),
        "found": found_table(),
        "found-scarce": values_table("scarce-search", list(plan.SCARCE_SEARCH), losses),
        "ner": ner_table("books", (*ARMS, "half")),
        "phases": phases_table("books", ["share-0", *ARMS]),
        "pydocs": differences_table("pydocs", PYDOCS, [LOSS, *adaptation, *PROBES]),
        "foreign": differences_table("foreign", PYDOCS, [LOSS, *domain_losses("foreign"), *adaptation]),
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
