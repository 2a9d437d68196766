"""The evidence behind README.md: the finished runs of out/ in three small files, and back.

    python results/tables.py results --collect=out    # collect() is called there

runs.csv has a line a run: its settings and last metrics; curves.csv.gz a line a step, logged or probed;
ner.csv.gz a line a score. Each begins with corpus, arm and seed. The same runs give the same bytes.
"""
import csv
import gzip
import io
import json
import re
from collections import defaultdict
from functools import cache

import plan

from nanomaml import config
from nanomaml.runs import read_run

RUN, SCORE = ("corpus", "arm", "seed"), ("mode", "train", "test", "shots", "draw", "step")
FILES = {  # the columns after RUN, and which more there may be
    "runs.csv": (("flags", "meta_share", "inner_lr", "step", "tokens", "flops", "seconds"),
                 "(train|val|meta|share|final)/.*"),
    "curves.csv.gz": (("step", "flops", "train/loss", "val/loss"),
                      "meta/(query_loss|query_acc|others.*)|share/episodes|(rank|entropy)/.*"),
    "ner.csv.gz": ((*SCORE, "f1", "precision", "recall"), ""),
}
CORPORA = ("books", "pydocs", "scarce", "foreign", "found", "scarce-search",
           *(f"rate-{rate}" for rate in plan.RATES),
           *("all-{}-{}".format(*setting) for setting in plan.ADAPT_ALL))


def parsed(text):
    return json.loads(text) if re.fullmatch(r"-?\d[-+.e\d]*", text) else text


def read_table(path):
    """{(corpus, arm, seed): [{column: value} of each of its lines]} of a file, if it is there."""
    table = defaultdict(list)
    if path.exists():
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                line = {column: parsed(text) for column, text in line.items() if text}
                table[tuple(map(line.pop, RUN))].append(line)
    return table


def write_table(path, table):
    """Rounds to five digits, probes to four; leaves out what FILES does not name."""
    def rounded(column, value):
        digits = 4 if column.startswith(("rank/", "entropy/")) else 5
        return float(f"{value:.{digits}g}") if isinstance(value, float) else value

    columns, more = FILES[path.name]
    found = {column for lines in table.values() for line in lines for column in line} - {*columns}
    columns = [*columns, *(column for column in sorted(found) if re.fullmatch(more, column))]
    rows = [[*run, *(rounded(column, line.get(column)) for column in columns)]
            for run in sorted(table) for line in table[run]]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*RUN, *columns], *rows])
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def collect(out, folder):
    """Takes over what is finished in `out`; a run collected before stays unless `out` has it again.

    flags: what a run's config.json adds to plan.FILES, as these are when it is collected.
    """
    of_runs, curves, scores = tables = [read_table(folder / name) for name in FILES]
    usual = vars(config.load(plan.train.Config, [str(plan.ROOT / name) for name in plan.FILES]))
    for path in (path.parent for corpus in CORPORA for path in out.glob(f"{corpus}/*/log.jsonl")):
        run = read_run(path)
        settings, steps = run["config"], defaultdict(dict)
        last = {key: value for line in run["log"] for key, value in line.items()}
        if not any(key.startswith("final/") for key in last) or last["step"] < settings["max_steps"]:
            continue
        arm, _, seed = path.name.rpartition("-")
        key = path.parent.name, arm, int(seed)
        flags = " ".join(f"--{name}={value}" for name, value in settings.items()
                         if name not in ("out_dir", "seed") and value != usual.get(name))
        of_runs[key] = [last | {"flags": flags, "meta_share": settings["meta_share"],
                                "inner_lr": settings["inner_lr"]}]
        for line in [*run["log"], *run["probes"]] if settings["max_steps"] else []:
            steps[line["step"]] |= line
        curves[key] = [steps[step] for step in sorted(steps)]
        lines = [line | {"draw": line["seed"]} for line in run["ner"]]
        newest = {tuple(map(line.get, SCORE)): line for line in lines}  # of two results the later counts
        if newest:  # not yet scored again: the old scores stay
            scores[key] = [newest[score] for score in sorted(newest)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in zip(FILES, tables):
        write_table(folder / name, table)


@cache
def read(folder):
    """{(corpus, arm): its runs by seed}: dicts as nanomaml.runs.read_run gives, but log and probes in one."""
    of_runs, curves, scores = (read_table(folder / name) for name in FILES)
    found = defaultdict(list)
    for (corpus, arm, seed), [last] in sorted(of_runs.items()):
        log = curves[corpus, arm, seed] or [{}]
        log[-1] |= {key: value for key, value in last.items() if not any(key in line for line in log)}
        ner = [line | {"seed": line["draw"]} for line in scores[corpus, arm, seed]]
        settings = {"inner_lr": last["inner_lr"], "max_steps": last["step"]}
        found[corpus, arm].append({"arm": arm, "seed": seed, "config": settings, "log": log, "probes": log,
                                   "ner": ner})
    return found
