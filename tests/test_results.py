"""results/: equal FLOPs, the power of a test, and tables that are those of the committed logs."""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import report

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOGS = RESULTS / "logs"
sys.path.insert(0, str(RESULTS))
plan = pytest.importorskip("plan")
tables = pytest.importorskip("tables", reason="needs scipy of requirements-dev.txt")


@pytest.mark.parametrize("n", [3, 5])
def test_the_power_is_that_of_simulated_experiments(n):
    z = np.random.default_rng(0).standard_normal((100_000, n)) + tables.detectable(n)
    t = z.mean(1) / z.std(1, ddof=1) * math.sqrt(n)
    found = [report.student_p(x, n - 1) < 0.05 for x in t[:4000]]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)


def test_the_final_runs_have_equal_flops():
    """As log.jsonl counted them while they ran, not as the plan did before."""
    logs = [log for corpus in ("books", "pydocs", "scarce") for log in LOGS.glob(f"{corpus}/*/log.jsonl")]
    flops = {log.parent: report.read_jsonl(log, "step")[-1]["flops"] for log in logs}
    assert len(flops) > 5
    for run, value in flops.items():
        share = 0.5 if run.name.startswith("half") else 1.0
        assert value == pytest.approx(share * flops[LOGS / "books" / "share-0-1"], rel=2e-3), run


@pytest.mark.parametrize("arm", ["share-0", "share-50", "best"])
def test_the_plan_gives_the_updates_that_had_equal_flops(arm):
    """Of the committed runs, whose logs the test above compares."""
    config = json.loads((LOGS / "books" / f"{arm}-1" / "config.json").read_text())
    flags = next(flags for corpus, name, flags, _ in plan.RUNS if (corpus, name) == ("books", arm))
    assert plan.updates(plan.merged(flags), plan.STEPS) == config["max_steps"]


def test_quick_runs_read_episodes(monkeypatch):
    """Bug: episodes that begin in the second half of a whole run began after the end of a quick one."""
    monkeypatch.setattr(plan, "final_runs", lambda quick: [("out/late-1", "books", "late", 1, plan.LATE)])
    command, = plan.runs(quick=True)
    flags = dict(flag.split("=") for flag in command.split() if flag.startswith("--"))
    assert int(flags["--meta_start"]) == pytest.approx(int(flags["--max_steps"]) / 2, abs=2)


def test_a_cell_of_differences_is_a_paired_test_by_seed():
    """Read from the logs and tested without report.py; a run of one arm alone does not count."""
    stats = pytest.importorskip("scipy.stats")
    losses = [{}, {}]
    for found, arm in zip(losses, ("share-50", "share-0")):
        for log in LOGS.glob(f"books/{arm}-?/log.jsonl"):
            found[int(log.parent.name[-1])] = json.loads(log.read_text().splitlines()[-1])["val/loss"]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    ours, theirs = ([found[seed] for seed in seeds] for found in losses)
    assert len(seeds) >= 3
    difference, p = np.mean(ours) - np.mean(theirs), stats.ttest_rel(ours, theirs).pvalue
    cell = tables.compared("books", "share-50", tables.LOSS[1], ".3f")
    assert cell.startswith(f"{difference:+.3f} ({p:.1g}; ")


def ner_line(test="en_ewt", seed=1, f1=0.25):
    return {"mode": "head", "train": "en_ewt:dev", "shots": 8, "seed": seed, "test": test, "f1": f1}


def test_f1_is_of_runs_that_were_scored_on_all_treebanks():
    """Bug: what was scored twice, after a stop, counted twice, and half of the treebanks as all of them."""
    measure = tables.ner("head", 8, ("en_ewt", "en_pud"))
    assert math.isnan(measure({"ner": []}))
    assert math.isnan(measure({"ner": [ner_line()]}))
    complete = [ner_line(), ner_line(f1=0.5), ner_line("en_pud", f1=0.3)]
    assert measure({"ner": complete}) == pytest.approx(40)
    assert math.isnan(measure({"ner": [*complete, ner_line(seed=2)]}))


def test_scoring_is_done_when_all_treebanks_are(tmp_path):
    """Bug: a run that stopped after the first treebank was not scored on the others."""
    def commands():
        tests = ["en_ewt", "en_pud"]
        return plan.score(str(tmp_path), "a folder", "en_ewt:dev", tests, "head", 0.03, (8,), 1, 50)

    (tmp_path / "ner.jsonl").write_text(json.dumps(ner_line()) + "\n")
    assert ["--data='a folder'" in command for command in commands()] == [True]
    with open(tmp_path / "ner.jsonl", "a") as file:
        file.write(json.dumps(ner_line("en_pud")))
    assert commands() == []


def test_a_pause_of_a_rise_is_no_compression():
    """Bug: a dip early in a curve that ends at its highest counted as diversify, then compress."""
    steps = np.arange(60.0)
    dip = np.interp(steps, [0, 20, 25, 59], [10, 20, 18, 40])
    assert report.phase(steps, dip)["verdict"] == report.RISE_AND_FALL
    assert tables.rises_and_falls(steps, dip) is None
    assert tables.rises_and_falls(steps, np.interp(steps, [0, 20, 59], [10, 20, 18]))["fall"] > 0.05


def test_the_tables_are_those_of_the_logs(tmp_path):
    shutil.copy(RESULTS / "README.md", tmp_path)
    (tmp_path / "logs").symlink_to(LOGS)
    tables.main(tmp_path)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
