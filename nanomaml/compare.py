"""What is compared: runs found and grouped, settings that differ, and what makes a comparison doubtful."""
import glob
import os
from pathlib import Path

import numpy as np

from nanomaml import runs
from nanomaml.config import one_line, require

# Settings that change no number of a report: where and how often a run writes.
SILENT = {"seed", "out_dir", "log_every", "checkpoint_every", "keep", "keep_every", "report", "wandb",
          "wandb_project", "probe_every", "eval_every"}
DOUBTS = ("unknown text", "other start", "unfinished", "lengthened")


def find_runs(place):
    """The run folders that a place names: a run's folder, a folder with runs below it, or a glob of them."""
    places = sorted(glob.glob(place)) if glob.has_magic(place) else [place]
    found = []
    for folder in filter(Path.is_dir, map(Path, places)):
        is_run = (folder / "log.jsonl").exists()
        found += [folder] if is_run else sorted(path.parent for path in folder.rglob("log.jsonl"))
    return list(map(str, dict.fromkeys(found))) or [place]  # refused on reading if it is not a run


def read(places):
    """(groups of runs, their names). If exactly one group is vanilla, it comes last.

    places: as typed. Folders joined by commas are one group, and so is each of one or two run folders.
    Otherwise runs that differ only in their seed are a group, named by the settings in which it differs.
    """
    places = [",".join(os.path.normpath(place) for place in text.split(",") if place) for text in places]
    require(places and all(places), f"give the folders of runs, or groups of them with commas; got {places}")
    found = [[folder for place in text.split(",") for folder in find_runs(place)] for text in places]
    if "," in "".join(places) or len(places) <= 2 and found == [[place] for place in places]:
        groups, names = runs.read_groups(found), runs.group_names(found)
    else:
        by_settings = {}
        for folder in dict.fromkeys(sum(found, [])):
            run = runs.read_run(folder)
            if runs.is_measured(run):  # otherwise it has just begun
                by_settings.setdefault(str(settings(run)), []).append(run)
        require(by_settings, f"no run with a validation loss in {', '.join(places)}")
        groups = [sorted(group, key=runs.by_seed) for group in by_settings.values()]
        names = [one_line(", ".join(f"{key}={of_group[key][0]}" for key in of_group) or "all runs", 60)
                 for of_group in differing_settings(groups)]
        names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    is_vanilla = [all(run["config"].get("meta_share") == 0 for run in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: is_vanilla[i] and sum(is_vanilla) == 1)
    return [groups[i] for i in order], [names[i] for i in order]


def settings(run):
    """The settings that may change a number of a report, except the seed."""
    return {key: f"{value:.15g}" if isinstance(value, float) else str(value)
            for key, value in run["config"].items() if key not in SILENT}


def differing_settings(groups):
    """[{setting: [its values in a group]} of settings that are not the same in all runs, for each group]"""
    everything = [[settings(run) for run in group] for group in groups]
    all_runs = sum(everything, [])
    differing = [key for key in dict.fromkeys(key for of_run in all_runs for key in of_run)
                 if len({of_run.get(key) for of_run in all_runs}) > 1]
    return [{key: list(dict.fromkeys(of_run.get(key, "unknown") for of_run in group)) for key in differing}
            for group in everything]


def is_finished(run):
    """Whether a run has reached its max_steps; None where that is not known."""
    last = run["config"].get("max_steps")
    return None if last is None else run["log"][-1]["step"] >= last


def caveats(groups):
    """{mark: sentence} of what makes a comparison of these runs wrong or doubtful.

    The mark "other text" rules out comparing losses and accuracies, "other instrument" adaptation.
    """
    everything, found = [run for group in groups for run in group], {}

    def differ(what):
        return len({str(what(run)) for run in everything if what(run)}) > 1

    def named(which):
        return ", ".join(str(run["path"]) for run in everything if which(run))

    def ways_and_words(run):  # of the final episodes
        keys = [f"final/{kind}{what}" for kind in runs.WORDS for what in ("ways", "words")]
        return {key: line[key] for line in run["log"] for key in keys if key in line}

    def text(run):
        return [run["record"][key] for key in ("validation", "tokenizer") if key in run["record"]]

    def sequences(run):
        return [run["config"].get(key) for key in ("eval_sequences", "context")]

    if differ(text) or differ(sequences):
        found["other text"] = ("The runs were measured on different validation text or sequences of it, "
                               "or with different tokenizers: losses and accuracies cannot be compared.")
    elif any(map(text, everything)) and not all(map(text, everything)):
        names = named(lambda run: not text(run))
        found["unknown text"] = f"No run.json says on which text these runs were measured: {names}."
    if differ(ways_and_words) or differ(lambda run: [run["config"].get(key) for key in runs.INSTRUMENT]):
        found["other instrument"] = ("Adaptation was measured on different episodes (settings, words or "
                                     "number of ways): it is not compared.")
    if len({run["config"].get("init_from") or "" for run in everything}) > 1:
        names = named(lambda run: run["config"].get("init_from"))
        found["other start"] = f"Not all runs start from the same weights: {names} from another run's."
    if names := named(lambda run: is_finished(run) is False):
        found["unfinished"] = f"Not finished, so the learning rate has not decayed: {names}."
    if names := named(lambda run: run["record"].get("lengths")):
        found["lengthened"] = f"Made longer or shorter while it ran, so with another schedule: {names}."
    return found


def mark(found, *kinds):
    """" [unfinished, other start]" of the caveats `found`, of `kinds` or of DOUBTS; "" without any."""
    present = [kind for kind in kinds or DOUBTS if kind in found]
    return f" [{', '.join(present)}]" if present else ""


def table(groups, names, sort=""):
    """Rows, the first a header, of all runs: what they are, how they ended. sort: a column's name."""
    differing = differing_settings([[run] for group in groups for run in group])
    rows = [["run", "group", "state", *differing[0], "seed", "loss", "accuracy at the mask",
             "before the word", "rank", "hours"]]
    everything = [(run, name) for group, name in zip(groups, names) for run in group]
    for (run, name), values in zip(everything, differing):
        finals = [runs.last_values([[run]], key)[0][:1] for key in (
            "val/loss", "final/mask_query_acc", "final/context_query_acc")]
        resid = [curves[0][1][-1] for curves in runs.layer_curves([run]).get("rank/resid", {}).values()]
        hours = [run["log"][-1].get("seconds", 0) / 3600]
        state = "finished" if is_finished(run) else run["record"].get("state", "")
        rows.append([str(run["path"]), name, state, *(value for [value] in values.values()), str(run["seed"]),
                     *(f"{np.mean(x):.4g}" if x else "" for x in (*finals, resid, hours))])
    if sort:
        require(sort in rows[0], f"sort = {sort!r} is not one of the columns {', '.join(rows[0])}")
        column = rows[0].index(sort)
        try:
            rows[1:] = sorted(rows[1:], key=lambda row: float(row[column] or "inf"))
        except ValueError:
            rows[1:] = sorted(rows[1:], key=lambda row: row[column])
    return rows
