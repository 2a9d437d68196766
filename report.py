"""Compares finished runs, for instance hybrid with vanilla ones: tables in Markdown and a figure.

    python report.py out/demo                         # one run: its curves and their phases
    python report.py out/hybrid out/vanilla           # two groups of one run each; the second is the baseline
    python report.py out/hybrid-1,out/hybrid-2 out/vanilla-1,out/vanilla-2 --out=out/seeds  # two runs a group

Writes OUT.md and OUT.png from each run's log.jsonl and, if present, config.json, probes.jsonl, ner.jsonl.
Groups with runs of the same seeds are compared pair by pair: such runs start from the same weights and read
the same text. A metric of probes.jsonl named <what>/<layer> or <what>/<layer>/<head> is a curve: it gets a
panel in the figure and rows in the table of phases. For another evaluation, add a function to SECTIONS: from
(groups, their names) to paragraphs of Markdown, [] if the runs have nothing for it.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomaml import config, drawing, files, phases, runs
from nanomaml.stats import difference, escaped, markdown, mean_std, speedup


@dataclass(frozen=True)
class Config(config.Settings):
    out: str = "report"  # path of the report without its ending; OUT.md and OUT.png are written


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


def adaptation_rows(groups, what, label):
    """Query accuracy or loss at the end; no row where a run lacks it or was measured by other episodes."""
    rows = []
    instruments = {str([run["config"].get(key) for key in runs.INSTRUMENT]) for run in sum(groups, [])}
    for kind, words in runs.WORDS.items():
        for read_out, (where, _) in runs.READ_OUTS.items():
            values = runs.last_values(groups, f"final/{read_out}_{kind}query_{what}")
            if len(instruments) == 1 and [*map(len, values)] == [*map(len, groups)]:
                rows += compared(f"{label} on {words}, {where}", values, ".3f", runs.in_pairs(groups))
    return rows


def answer(groups, names):
    """What did meta-learning buy, if the first group has it and the second has not?"""
    if len(groups) != 2:
        return []
    rows, paired = [], runs.in_pairs(groups)
    for axis in runs.shared_axes(groups):
        losses, shares = runs.losses_at_equal(groups, axis)
        label = f"validation loss at equal {runs.AXES[axis]}"
        if abs(shares[0] - shares[1]) > 0.02:  # a loss falls as the learning rate decays
            label += f" ({shares[0]:.0%} and {shares[1]:.0%} of the schedule)"
        rows += compared(label, losses, ".3f", paired)
    rows += adaptation_rows(groups, "acc", "query accuracy")
    for (mode, train, _, shots, *_), tests in runs.ner_scores(groups).items():
        complete = [scores for scores in tests.values() if [*map(len, scores)] == [*map(len, groups)]]
        if complete and mode != "majority":
            options = f"{mode}, {escaped(train)}, {shots or 'all'} sentences; treebanks: {len(complete)}"
            means = [np.mean([scores[i] for scores in complete], axis=0).tolist() for i in range(2)]
            rows += compared(f"mean F1 on Universal NER ({options})", means, ".1f", paired)
    counts = [[phases.majority(of_layer)[0] for kind, by_layer in runs.layer_curves(group).items()
               if kind in runs.LABELS for of_layer in by_layer.values()] for group in groups]
    if any(counts):
        cells = [f"{verdicts.count(phases.RISE_AND_FALL)} of {len(verdicts)}" for verdicts in counts]
        rows.append(["curves that diversify, then compress", *cells, "", ""])
    return [comparison(names, rows)] if rows else []


def end_of_training(groups, names):
    """The last value of each loss and accuracy, not the best, and what the runs took."""
    rows = []
    for key in ["val/loss", *runs.domain_keys(groups)]:
        label = f"validation loss, {'nats' if key == 'val/loss' else escaped(key.removeprefix('val/'))}"
        rows += compared(label, runs.last_values(groups, key), ".3f", runs.in_pairs(groups))
    rows += adaptation_rows(groups, "acc", "query accuracy")
    rows += adaptation_rows(groups, "loss", "query loss, nats")
    for key, label in runs.AXES.items():
        form = ".0f" if key in ("step", "seconds") else ".3g"
        rows += compared(label, runs.last_values(groups, key), form, test=False)
    return ["## At the end of training", comparison(names, rows)]


def speedup_to_equal_loss(groups, names):
    """How much sooner the first group reaches the losses that all runs reach."""
    if len(groups) != 2:
        return []
    levels, speedups = speedup(groups)
    if not speedups:
        return ["## Speedup to equal loss", "There is no loss that all runs reach between two evaluations."]

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
    return ["## Speedup to equal loss", note, markdown(rows)]


def universal_ner(groups, names):
    """Span F1 on each treebank that all groups were scored on, a table for each way of fine-tuning."""
    paragraphs = []
    for (mode, train, *rest), tests in runs.ner_scores(groups).items():
        rows = [row for test, scores in tests.items() for row in compared(escaped(test), scores, ".1f")]
        if rows:
            options = ", ".join(f"{name} {value}" for name, value in zip(runs.NER_KEY[2:7], rest) if value)
            paragraphs += [f"## Universal NER, {mode}, trained on {escaped(train)} ({escaped(options)})",
                           "Span F1 in percent; of each run the mean over fine-tuning seeds.",
                           comparison(names, rows)]
    return paragraphs


def phases_of_curves(groups, names):
    """The phases of every curve and layer, a table for each group, and the order of the layers in them."""
    note = ("The rise goes from start to peak. The fall comes after it; 90% of it has happened where it "
            "settled. Before: a fall before the start. Start, peak and settled are updates; before, rise and "
            "fall are percentages of the level that they start from. Changes within the noise do not count. "
            "Of several runs: the verdict of most, and the means over these.")
    paragraphs = []
    for name, group in zip(names, groups):
        rows = [["curve", "layer", "verdict", "before", "start", "rise", "peak", "fall", "settled", "noise"]]
        orders = []
        for kind, by_layer in runs.layer_curves(group).items():
            found = {layer: phases.majority(curves) for layer, curves in by_layer.items()}
            for key, verb in (("peak", "peak"), ("settled", "settle again")):
                means = {layer: np.mean([result[key] for result in results])
                         for layer, (verdict, results) in found.items() if verdict == phases.RISE_AND_FALL}
                times = ", ".join(f"{layer} ({means[layer]:.0f})" for layer in sorted(means, key=means.get))
                label = runs.LABELS.get(kind, escaped(kind))
                orders += [f"- {label}: layers {verb} in the order {times}"] if times else []
            for (layer, curves), (verdict, results) in zip(by_layer.items(), found.values()):
                of = f" ({len(results)} of {len(curves)})" if len(group) > 1 else ""
                rows.append([runs.LABELS.get(kind, escaped(kind)), layer, verdict + of])
                for key in rows[0][3:]:
                    values = [result[key] for result in results]
                    if key in ("start", "peak", "settled"):
                        rows[-1].append("" if values[0] is None else mean_std(values, ".0f"))
                    else:
                        rows[-1].append(f"{np.mean(values):.1%}" if values[0] else "")
        if len(rows) > 1:
            order = ["\n".join(orders)] if orders else []
            paragraphs += [f"## Phases of {name}", note, markdown(rows), *order]
    return paragraphs


# In the order of the report. Phases come last: the console shows what stands before them.
SECTIONS = [end_of_training, speedup_to_equal_loss, universal_ner, phases_of_curves]


def tables(groups, names):
    """The report as Markdown."""
    names = list(map(escaped, names))
    paths = [", ".join(escaped(run["path"]) for run in group) for group in groups]
    listed = [f"{name}: {of_group}" for name, of_group in zip(names, paths)]
    note = " Mean ± standard deviation over runs." if max(map(len, groups)) > 1 else ""
    if len(groups) == 2 and min(map(len, groups)) > 1:
        test = "t-test, paired by seed" if runs.in_pairs(groups) else "Welch's t-test"
        note += f" p: {test}, not corrected for the number of tests."
    head = [f"# {' against '.join(names)}", *answer(groups, names), f"Runs: {'; '.join(listed)}.{note}"]
    return "\n\n".join(sum((section(groups, names) for section in SECTIONS), head)) + "\n"


def write(groups, out):
    """Writes OUT.md and OUT.png and returns the tables as Markdown.

    groups: one or two lists of run folders; of two, the second is the baseline. out: a path without ending.
    Raises UserError if a run has no validation loss.
    """
    found, names, out = runs.read_groups(groups), runs.group_names(groups), Path(out)
    config.require(out.name, f"out must be a path without ending, such as out/report, got {str(out)!r}")
    text = tables(found, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.figure(found, names).savefig(f"{out}.png")
    files.replace(f"{out}.md", f"{text}\n![{escaped(' against '.join(names))}](<{out.name}.png>)\n")
    return text


def main(argv):
    given, flags = config.operands(argv)
    cfg = config.load(Config, flags, __doc__)
    text = write([[folder for folder in arg.split(",") if folder] for arg in given], cfg.out)
    print(text.split("## Phases of")[0].rstrip() + "\n")
    print(f"files     {cfg.out}.md (these tables, and the phases of every layer), {cfg.out}.png")


if __name__ == "__main__":
    config.run(main)
