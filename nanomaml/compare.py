"""What is compared: runs found and grouped, settings that differ, and what makes a comparison doubtful."""
import csv
import glob
import io
import sys
from pathlib import Path

import numpy as np

from nanomaml import runs
from nanomaml.config import UserError, require

# Settings that change no number of a report: where and how often a run writes.
SILENT = {"out_dir", "log_every", "checkpoint_every", "keep", "keep_every", "report", "wandb",
          "wandb_project", "probe_every", "eval_every", "probe_gradients"}


def find_runs(place):
    """The run folders that a place names: a run's folder, a folder with runs below it, or a glob of such."""
    places = sorted(glob.glob(place)) if glob.has_magic(place) else [place]
    found = []
    for folder in filter(Path.is_dir, map(Path, places)):
        is_run = (folder / "log.jsonl").exists()
        found += [folder] if is_run else sorted(path.parent for path in folder.rglob("log.jsonl"))
    return list(map(str, dict.fromkeys(found))) or [place]  # what is no run is refused where it is read


def read(places):
    """(groups of runs, their names). Of two groups of which one is vanilla, or of more, it comes last.

    places: as typed. Folders with commas between are one group, and so is each of one or two run folders.
    Otherwise runs that differ in their seed alone are a group, named by the settings in which it differs.
    """
    found = [[folder for place in text.split(",") if place for folder in find_runs(place)] for text in places]
    if any("," in text for text in places) or len(places) <= 2 and all(
            folders == [place] for folders, place in zip(found, places)):
        groups, names = runs.read_groups(found), runs.group_names(found)
    else:
        by_settings, failed = {}, []
        for folder in dict.fromkeys(sum(found, [])):
            try:
                run = runs.read_run(folder)
                by_settings.setdefault(str(settings(run, "seed")), []).append(run)
            except UserError as error:  # such as one that has just begun
                failed.append(error)
        if failed and not by_settings:
            raise failed[0]
        if failed:
            print(f"note      left out: {'; '.join(map(str, failed))}", file=sys.stderr, flush=True)
        groups = [sorted(group, key=runs.by_seed) for group in by_settings.values()]
        names = [", ".join(f"{key}={values[0]}" for key, values in of_group.items())
                 for of_group in differing_settings(groups)]
        if not all(0 < len(name) <= 60 for name in names):
            names = runs.group_names([[run["path"] for run in group] for group in groups])
    is_vanilla = [all(run["config"].get("meta_share") == 0 for run in group) for group in groups]
    order = range(len(groups))
    if sum(is_vanilla) == 1:
        order = sorted(order, key=is_vanilla.__getitem__)
    return [groups[i] for i in order], [names[i] for i in order]


def settings(run, *without):
    return {key: value for key, value in run["config"].items() if key not in {*SILENT, *without}}


def shown(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing_settings(groups):
    """[{setting: [its values in a group]} of settings that are not the same in all runs, for each group]"""
    everything = [settings(run, "seed") for group in groups for run in group]
    keys = [key for key in dict.fromkeys(key for of_run in everything for key in of_run)
            if len({str(of_run.get(key)) for of_run in everything}) > 1]
    return [{key: list(dict.fromkeys(shown(run["config"].get(key, "unknown")) for run in group))
             for key in keys} for group in groups]


def is_finished(run):
    """Whether a run has reached its max_steps; None where that is not known."""
    most = run["config"].get("max_steps")
    return None if most is None else run["log"][-1]["step"] >= most


def state(run):
    """Finished, or what its run.json says, in a word."""
    return "finished" if is_finished(run) else run["record"].get("state", "unfinished")


def ways_and_words(run):
    """How many words the final episodes had, and how many ways; None before the end."""
    keys = [f"final/{kind}{what}" for kind in runs.WORDS for what in ("ways", "words")]
    return {key: line[key] for line in run["log"] for key in keys if key in line} or None


def caveats(groups):
    """{mark: sentence} of what makes a comparison of these runs wrong or doubtful.

    The marks "other text" and "other instrument" forbid to compare losses, and figures of adaptation.
    """
    everything, found = [run for group in groups for run in group], {}

    def differ(what):
        values = [what(run) for run in everything]
        return len({str(value) for value in values if value is not None}) > 1

    def named(which):
        return ", ".join(str(run["path"]) for run in everything if which(run))

    if any(differ(lambda run: run["record"].get(what)) for what in ("validation", "tokenizer")):  # noqa: B023
        found["other text"] = ("The runs were measured on different validation text, or with different "
                               "tokenizers: their losses and accuracies cannot be compared.")
    if differ(ways_and_words) or differ(lambda run: [run["config"].get(key) for key in runs.INSTRUMENT]):
        found["other instrument"] = ("Adaptation was measured by different episodes (settings, words or "
                                     "number of ways): it is not compared.")
    if differ(lambda run: run["config"].get("init_from")):
        names = named(lambda run: run["config"].get("init_from"))
        found["other start"] = f"Not all runs start from the same weights: {names} from those of another run."
    if names := named(lambda run: is_finished(run) is False):
        found["unfinished"] = f"Not finished, so its learning rate has not decayed: {names}."
    if names := named(lambda run: run["record"].get("lengths")):
        found["lengthened"] = f"Made longer or shorter while it ran, so with another schedule: {names}."
    return found


def mark(found, *kinds):
    """" [unfinished, other start]" of the caveats `found`, of `kinds` or of all doubts; "" without any."""
    kinds = kinds or ("other start", "unfinished", "lengthened")
    present = [kind for kind in kinds if kind in found]
    return f" [{', '.join(present)}]" if present else ""


def table(groups, names, sort=""):
    """Rows, with a head, of all runs: what they are, how they ended. sort: a column's name, of numbers."""
    differing = differing_settings([[run] for group in groups for run in group])
    rows = [["run", "group", "state", *(differing[0] if differing else {}), "seed", "loss",
             "accuracy at the mask", "before the word", "rank", "F1", "hours"]]
    everything = [(run, name) for group, name in zip(groups, names) for run in group]

    def number(values, form):
        return format(values[0], form) if values else ""

    for (run, name), differences in zip(everything, differing):
        resid = runs.layer_curves([run]).get("rank/resid", {}).values()
        f1 = [scores[0][0] for tests in runs.ner_scores([[run]]).values() for scores in tests.values()]
        changed = [values[0] for values in differences.values()]
        rows.append([
            str(run["path"]), name, state(run), *changed, str(run["seed"]),
            number(runs.last_values([[run]], "val/loss")[0], ".4f"),
            number(runs.last_values([[run]], "final/mask_query_acc")[0], ".3f"),
            number(runs.last_values([[run]], "final/context_query_acc")[0], ".3f"),
            f"{np.mean([curves[0][1][-1] for curves in resid]):.1f}" if resid else "",
            f"{np.mean(f1):.1f}" if f1 else "", number([run["log"][-1].get("seconds", 0) / 3600], ".2f")])
    if sort:
        require(sort in rows[0], f"sort = {sort!r} is none of the columns {', '.join(rows[0])}")
        column = rows[0].index(sort)

        def key(row):
            try:
                return 0, float(row[column]), ""
            except ValueError:
                return 1, 0.0, row[column]
        rows[1:] = sorted(rows[1:], key=key)
    return rows


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
