"""Compares runs, for instance hybrid with vanilla ones: tables in Markdown and CSV, and a figure.

    python report.py out/demo                         # one run: its curves and their phases
    python report.py out/hybrid out/vanilla           # two groups of one run each; vanilla is the baseline
    python report.py out/hybrid-1,out/hybrid-2 out/vanilla-1,out/vanilla-2 --out=out/seeds  # two runs a group
    python report.py out/sweep --sort=loss            # all runs below, grouped where only seeds differ

Writes OUT.md, OUT.png and, for several runs, OUT.csv from each run's log.jsonl and, if present, config.json,
run.json, probes.jsonl, ner.jsonl. Groups with runs of the same seeds are compared pair by pair: such runs
start from the same weights and read the same text. The report first says what makes a comparison wrong or
doubtful, and marks the rows concerned (nanomaml/compare.py). A metric of probes.jsonl named <what>/<layer> or
<what>/<layer>/<head> is a curve: it gets a panel in the figure and rows in the table of phases. For another
evaluation, add a function to SECTIONS: from (groups, their names) to paragraphs of Markdown, [] if the runs
have nothing for it.
"""
import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomaml import compare, config, drawing, files, phases, runs
from nanomaml.stats import difference, escaped, markdown, mean_std, speedup


@dataclass(frozen=True)
class Config(config.Settings):
    out: str = ""  # path without extension; empty: report, or comparison, in the first run's folder
    sort: str = ""  # column by which the table of runs is sorted, such as loss; empty: as given


def compared(groups, label, values, form, test=True, comparable=True, whole=True):
    """[a row]: the mean of each group, its difference from the last group's, and the p-value of that.

    values: [[a number of each run] for each group]. [] if a group is empty or, if not `whole`, all are.
    test=False omits p-values, comparable=False differences too.
    """
    if not (all if whole else any)(values):
        return []
    cells, notes = [mean_std(of_group, form) if of_group else "" for of_group in values], []
    for group, of_group in zip(groups[:-1], values):
        delta, p = "", math.nan
        if comparable and of_group and values[-1]:
            paired = len(of_group) == len(group) and runs.in_pairs([group, groups[-1]])
            delta, _, p = difference(of_group, values[-1], paired and len(values[-1]) == len(group))
            delta = format(delta, "+" + form)
        notes.append([delta, f"{p:.2g}" if test and not math.isnan(p) else ""])
    if len(groups) == 2:
        return [[label, *cells, *notes[0]]]
    beside = [f" ({delta}{', p ' * bool(p)}{p})" * bool(delta) for delta, p in notes]
    return [[label, *map(str.__add__, cells, [*beside, ""])]]


def comparison(names, rows):
    """The Markdown table of rows of `compared`."""
    return markdown([["", *names, *(["difference", "p"] if len(names) == 2 else [])], *rows])


def adaptation_rows(groups, what, label):
    """Query accuracy or loss at the end; no row if a run lacks it or was measured on other episodes."""
    rows, found = [], compare.caveats(groups)
    for kind, words in runs.WORDS.items() if not {"other text", "other instrument"} & found.keys() else []:
        for read_out, (where, _) in runs.READ_OUTS.items():
            values = runs.last_values(groups, f"final/{read_out}_{kind}query_{what}")
            if [*map(len, values)] == [*map(len, groups)]:
                rows += compared(groups, f"{label} on {words}, {where}{compare.mark(found)}", values, ".3f")
    return rows


def ner_rows(groups, tests, options):
    """The mean F1 over treebanks that all runs were scored on, in a training language and in others."""
    rows, found = [], compare.caveats(groups)
    for is_own, what in ((True, "in-language"), (False, "zero-shot")):
        complete = [scores for test, scores in tests.items() if runs.in_language(options[0], test) == is_own
                    and [*map(len, scores)] == [*map(len, groups)]]
        if complete:
            means = [np.mean([scores[i] for scores in complete], axis=0).tolist() for i in range(len(groups))]
            label = f"mean F1 on Universal NER, {what} ({', '.join(options[1:])}; treebanks: {len(complete)})"
            rows += compared(groups, label + compare.mark(found), means, ".1f")
    return rows


def answer(groups, names):
    """Each group against the last, the baseline: final values, not the best ones, and what runs cost."""
    rows, found = [], compare.caveats(groups)
    is_same_text = "other text" not in found
    for axis in runs.shared_axes(groups) if is_same_text and len(groups) > 1 else []:
        losses, shares = runs.losses_at_equal(groups, axis)
        label = f"validation loss at equal {runs.AXES[axis]}"
        if max(shares) - min(shares) > 0.02:  # a loss falls as the learning rate decays
            label += f" ({' and '.join(f'{share:.0%}' for share in shares)} of the schedule)"
        rows += compared(groups, label + compare.mark(found), losses, ".3f")
    for key in ["val/loss", *runs.domain_keys(groups)]:
        label = "validation loss, " + ("nats" if key == "val/loss" else escaped(key[len("val/"):]))
        label += compare.mark(found, "other text", *compare.DOUBTS)
        rows += compared(groups, label, runs.last_values(groups, key), ".3f", comparable=is_same_text)
    rows += adaptation_rows(groups, "acc", "query accuracy")
    rows += adaptation_rows(groups, "loss", "query loss, nats")
    for (mode, train, _, shots, *_), tests in runs.ner_scores(groups).items() if len(groups) > 1 else []:
        if mode != "majority":
            rows += ner_rows(groups, tests, (train, mode, escaped(train), f"{shots or 'all'} sentences"))
    for key, label in runs.AXES.items():
        form = ".0f" if key in ("step", "seconds") else ".3g"
        rows += compared(groups, label, runs.last_values(groups, key), form, test=False)
    counts = [[phases.majority(of_layer)[0] for kind, by_layer in runs.layer_curves(group).items()
               if kind in runs.LABELS for of_layer in by_layer.values()] for group in groups]
    if any(counts):
        cells = [f"{verdicts.count(phases.RISE_AND_FALL)} of {len(verdicts)}" for verdicts in counts]
        rows.append(["curves that diversify, then compress", *cells, *[""] * (2 * (len(groups) == 2))])
    return [comparison(names, rows)]


def speedup_to_equal_loss(groups, names):
    """How much sooner the first group reaches the losses that all runs reach."""
    found = compare.caveats(groups)
    if len(groups) != 2 or "other text" in found:
        return []
    title, (levels, speedups) = f"## Speedup to equal loss{compare.mark(found)}", speedup(groups)
    if not speedups:
        return [title, "There is no loss that all runs reach between two evaluations."]

    def cell(ratio, error):
        interval = f" ({ratio * math.exp(-error):.2f} to {ratio * math.exp(error):.2f})"
        return f"{ratio:.2f}" + ("" if math.isnan(error) else interval)

    rows = [["", f"final, at loss {levels[-1]:.3f}", "p", "largest", "at loss"]]
    for axis, (ratios, errors, p) in speedups.items():
        i = int(np.argmax(ratios))
        rows.append([runs.AXES[axis], cell(ratios[-1], errors[-1]), "" if math.isnan(p) else f"{p:.2g}",
                     cell(ratios[i], errors[i]), f"{levels[i]:.3f}"])
    note = (f"What {names[1]} needs to reach a loss, divided by what {names[0]} needs: above 1, "
            f"{names[0]} is sooner. In brackets: one standard error. The largest is biased upwards: it is "
            f"picked from {len(levels)} losses, {levels[0]:.3f} to {levels[-1]:.3f}.")
    return [title, note, markdown(rows)]


def universal_ner(groups, names):
    """Span F1 on each treebank, a table for each way of fine-tuning; its last row is without a model."""
    paragraphs, scores = [], runs.ner_scores(groups)
    for (mode, train, *rest), tests in scores.items():
        def own(test):
            return " (in-language)" * runs.in_language(train, test)  # noqa: B023

        rows = [row for test, values in tests.items()
                for row in compared(groups, escaped(test) + own(test), values, ".1f", whole=False)]
        for (other, of, _, shots, *_), without in scores.items():
            shared = [without[test] for test in tests if test in without]
            if other == "majority" != mode and (of, shots) == (train, rest[1]) and shared:
                of_groups = [sum((values[i] for values in shared), []) for i in range(len(groups))]
                means = [[float(np.mean(values))] if values else [] for values in of_groups]
                label = f"no model: each word's most frequent tag, mean of {len(shared)}"
                rows += compared(groups, label, means, ".1f", comparable=False, whole=False)
        options = ", ".join(f"{name} {value}" for name, value in zip(runs.NER_KEY[2:7], rest) if value)
        paragraphs += [f"## Universal NER, {mode}, trained on {escaped(train)} ({escaped(options)})",
                       "Span F1 in percent; for each run the mean over fine-tuning seeds.",
                       comparison(names, rows)]
    return paragraphs


def phases_of_curves(groups, names):
    """The phases of every curve and layer, a table for each group."""
    note = ("The rise goes from start to peak. The fall comes after it; 90% of it has happened where it "
            "settled. Before: a fall before the start. Start, peak and settled are updates; before, rise and "
            "fall are percentages of the level that they start from. Changes within the noise do not count. "
            "With several runs: the most frequent verdict, and means over its runs.")
    paragraphs = []
    for name, group in zip(names, groups):
        rows = [["curve", "layer", "verdict", "before", "start", "rise", "peak", "fall", "settled", "noise"]]
        for kind, by_layer in runs.layer_curves(group).items():
            for layer, curves in by_layer.items():
                verdict, results = phases.majority(curves)
                of = f" ({len(results)} of {len(curves)})" if len(group) > 1 else ""
                rows.append([runs.LABELS.get(kind, escaped(kind)), layer, verdict + of])
                for key in rows[0][3:]:
                    values = [result[key] for result in results]
                    if key in ("start", "peak", "settled"):
                        rows[-1].append("" if values[0] is None else mean_std(values, ".0f"))
                    else:
                        rows[-1].append(f"{np.mean(values):.1%}" if values[0] else "")
        if len(rows) > 1:
            paragraphs += [f"## Phases of {name}", note, markdown(rows)]
    return paragraphs


# In the order of the report. Phases come last: the console shows what comes before them.
SECTIONS = [speedup_to_equal_loss, universal_ner, phases_of_curves]


def settings_that_differ(groups, names):
    """To be read before any number: caveats, and the settings that differ between groups or within them."""
    found = compare.caveats(groups)
    paragraphs = [f"**{kind.capitalize()}.** {escaped(said)}" for kind, said in found.items()]
    differing = compare.differing_settings(groups)
    if differing[0]:
        rows = [[key, *(escaped(", ".join(values[key])) for values in differing)] for key in differing[0]]
        paragraphs.append(markdown([["setting", *names], *rows]))
    elif sum(map(len, groups)) > 1 and all(run["config"] for group in groups for run in group):
        paragraphs.append("The runs differ in no setting but the seed.")
    return paragraphs


def tables(groups, names, sort=""):
    """The report as Markdown."""
    names = list(map(escaped, names))
    paths = [", ".join(escaped(run["path"]) for run in group) for group in groups]
    listed = [f"{name}: {of_group}" for name, of_group in zip(names, paths)]
    note = " Mean ± standard deviation over runs." if max(map(len, groups)) > 1 else ""
    if len(groups) > 1:
        paired = all(runs.in_pairs([group, groups[-1]]) for group in groups[:-1])
        test = "t-test, paired by seed" if paired else "Welch's t-test"
        if len(groups) > 2:
            note += f" In brackets: the difference from {names[-1]}."
        note += " One run in a group: no test, and a difference may be chance." if min(
            map(len, groups)) == 1 else f" p: {test}, not corrected for the number of tests."
    head = [f"# {' against '.join(names)}", *settings_that_differ(groups, names), *answer(groups, names),
            f"Runs: {'; '.join(listed)}.{note}"]
    if sum(map(len, groups)) > 1:
        head += ["## Runs", markdown([list(map(escaped, row)) for row in compare.table(groups, names, sort)])]
    return "\n\n".join(sum((section(groups, names) for section in SECTIONS), head)) + "\n"


def write(places, out="", sort=""):
    """Writes OUT.md, OUT.png and, for several runs, OUT.csv: (the tables as Markdown, OUT).

    places: as `compare.read` takes them; out, sort: as in Config. UserError if a run has no validation loss.
    """
    found, names = compare.read(list(map(str, places)))
    n_runs = sum(map(len, found))
    out = Path(out or Path(found[0][0]["path"], "report" if n_runs == 1 else "comparison"))
    config.require(out.name, f"out must be a path without extension, such as out/report, got {str(out)!r}")
    text = tables(found, names, sort)
    out.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    drawing.figure(found, names).savefig(image)
    files.replace(f"{out}.png", image.getvalue())
    files.replace(f"{out}.md", f"{text}\n![{escaped(' against '.join(names))}](<{out.name}.png>)\n")
    if n_runs > 1:
        rows = io.StringIO()
        csv.writer(rows).writerows(compare.table(found, names, sort))
        files.replace(f"{out}.csv", rows.getvalue())
    return text, out


def main(argv):
    given, flags = config.operands(Config, argv)
    cfg = config.load(Config, flags, __doc__)
    text, out = write(given, cfg.out, cfg.sort)
    print(text.split("## Phases of")[0].rstrip() + "\n")
    print(f"files     {out}.md (these tables, and the phases of every layer), .png; for several runs, .csv")


if __name__ == "__main__":
    config.run(main)
