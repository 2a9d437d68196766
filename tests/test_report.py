"""report.py on synthetic runs and curves whose answers are known."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report
from config import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, speed=1.0, layers=2, domains=(), episodes=False, probes=True, ner=None, noise=0.0,
              last=400, every=10, seed=None, flops=2e9):
    """A run of validation loss 8 * (1 + speed * step / 10) ** -0.3: `speed` times as fast to any loss."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(1000 * speed) + layers)
    steps = range(0, last + 1, every)
    log = []
    for step in steps:
        loss = 8 * (1 + speed * step / 10) ** -0.3 * math.exp(noise * rng.standard_normal())
        log.append({"step": step, "tokens": 100 * step, "flops": flops * step, "seconds": 0.5 * step}
                   | {"val/loss": loss} | {f"val/{name}": loss + i for i, name in enumerate(domains)})
        if episodes:
            log.append({"step": step, "tokens": 100 * step,
                        "lr": 1e-3, "train/loss": loss, "meta/query_loss": 2.5, "share/episodes": 0.5,
                        "val/mask_query_acc": step / 1000, "val/context_query_acc": step / 900,
                        "final/mask_query_acc": 0.3, "final/context_query_acc": 0.4})
    write_jsonl(folder / "log.jsonl", log)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 4')  # torn, as of a run that is still going
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    if probes:
        lines = []
        for step in steps:
            line = {"step": step, "tokens": 0, "flops": flops * step, "seconds": 0.5 * step}
            for layer in range(layers):
                bump = 10 + 10 * math.exp(-(((step - 100 - 10 * layer) / 50) ** 2))
                for kind in ("rank/resid", "rank/v_proj", "rank/o_proj", "rank/down_proj"):
                    line[f"{kind}/{layer:02d}"] = bump
                for head in range(3):
                    entropy = 0.9 - step / 1000 - head / 100
                    line[f"entropy/{layer:02d}/{head:02d}"] = entropy
                    line[f"entropy_nats/{layer:02d}/{head:02d}"] = 3 * entropy
            lines.append(line)
        write_jsonl(folder / "probes.jsonl", lines)
    if ner is not None:
        write_jsonl(folder / "ner.jsonl", [
            {"mode": mode, "train": "da_ddt", "test": test, "seed": seed, "step": step, "lr": 1e-3,
             "f1": ner + 0.01 * seed + shift, "shots": shots, "label": "first", "bidirectional": shots > 0}
            for mode in ("head", "full") for test in ("da_ddt", "en_ewt") for shots in (0, 8)
            for step, shift in ((2, 0.5), (2, 0.1 * (shots > 0)), (1, 0.7)) for seed in (1, 2, 3)])
    return str(folder)


def read(*groups):
    return [[report.read_run(folder) for folder in group] for group in groups]


def table_row(text, start):
    """The cells of the first row that starts so, without its label."""
    row = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def titled_axes(fig):
    return [ax for part in fig.subfigs for ax in part.get_axes() if ax.get_title()]


# ---- comparing groups ----


def test_speedup_is_the_ratio_that_was_built_in(tmp_path):
    """The first group is 1.5 times as fast: 1.5 at every loss, on every axis, but for the interpolation."""
    groups = read([write_run(tmp_path / "a", speed=1.5)], [write_run(tmp_path / "b")])
    levels, speedups = report.speedup(groups)
    # From where the slower one is at its second evaluation to where it ends.
    assert levels[0] == pytest.approx(8 * 2.5**-0.3) and levels[-1] == pytest.approx(8 * 41**-0.3)
    for axis in ("step", "tokens", "flops", "seconds"):
        ratios, errors, p = speedups[axis]
        assert len(ratios) == 41 and math.isnan(p) and np.isnan(errors).all()
        assert ratios == pytest.approx(1.5, rel=0.05) and ratios[20:] == pytest.approx(1.5, rel=0.003)
    reverse = report.speedup(groups[::-1])[1]["step"][0]
    assert reverse == pytest.approx(1 / 1.5, rel=0.05)


def test_a_level_is_interpolated_in_log_loss_and_never_extrapolated():
    losses, x = np.array([8.0, 4.0, 5.0, 1.0]), np.array([0.0, 10.0, 20.0, 30.0])
    assert report.reach(losses, x, math.sqrt(32)) == pytest.approx(5)
    assert report.reach(losses, x, 4.0) == pytest.approx(10)
    after_the_rise = 20 + 10 * math.log(5 / 3.99) / math.log(5)
    assert report.reach(losses, x, 3.99) == pytest.approx(after_the_rise)
    assert math.isnan(report.reach(losses, x, 0.9)) and math.isnan(report.reach(losses, x, 8.1))


def test_a_loss_that_rises_at_first_and_a_run_without_lm_tokens(tmp_path):
    """The level of the first evaluation, not reached from above, gave a ratio of nan; no tokens gave inf."""
    groups = read([write_run(tmp_path / "a", speed=1.5)], [write_run(tmp_path / "b")])
    for run in (run for runs in groups for run in runs):
        run["log"][0]["val/loss"] = run["log"][1]["val/loss"] - 0.1
    levels, speedups = report.speedup(groups)
    assert all(np.isfinite(ratios).all() for ratios, _, _ in speedups.values()) and len(levels) == 40
    for line in groups[0][0]["log"]:
        line["tokens"] = 0
    assert list(report.speedup(groups)[1]) == ["step", "flops", "seconds"]
    assert "inf" not in report.tables(groups, ["a", "b"])
    axes = titled_axes(report.figure(groups, ["a", "b"]))
    assert [ax.get_xlabel() for ax in axes if ax.get_title()[4:] == "validation loss"] == [
        "FLOPs", "seconds of training"]


def test_groups_without_a_common_loss_are_reported_as_such(tmp_path):
    groups = read([write_run(tmp_path / "far", speed=1e6)], [write_run(tmp_path / "near")])
    text = report.tables(groups, ["far", "near"])
    assert "no loss that all runs reach" in text and "at loss" not in text
    report.figure(groups, ["far", "near"])


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (3, 7), (20, 5)])
def test_difference_equals_scipy(n, m):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, n), rng.normal(rng.choice([0, 1, 5]), 3, m)
        for paired in (False, True) if n == m else (False,):
            delta, error, p = report.difference(a, b, paired)
            expected = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
            assert delta == pytest.approx(a.mean() - b.mean())
            assert delta / error == pytest.approx(expected.statistic)
            assert p == pytest.approx(expected.pvalue, rel=1e-4, abs=1e-9)
    assert math.isnan(report.difference([1.0], [1.0, 2.0], False)[2])
    assert report.difference([1, 1], [1, 1], False)[2] == 1
    assert report.difference([1, 1], [2, 2], False)[2] == 0


@pytest.mark.parametrize("paired", [False, True])
def test_several_runs_give_spread_and_significance(tmp_path, paired):
    """Runs of the same seeds are compared pair by pair, in the order of their seeds."""
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5 + 0.1 * i, seed=i) for i in range(3)]
    b = [write_run(tmp_path / f"vanilla-{i}", speed=1 + 0.1 * i, seed=i if paired else i + 7)
         for i in (2, 0, 1)]
    groups = report.read_groups([a, b])
    levels, speedups = report.speedup(groups)
    ratios, errors, p = speedups["flops"]
    speeds = np.log([[1.5, 1.6, 1.7], [1.0, 1.1, 1.2]])
    assert ratios[-1] == pytest.approx(math.exp(speeds[0].mean() - speeds[1].mean()), rel=0.005)
    pair_errors = (speeds[0] - speeds[1]).std(ddof=1) / 3**0.5
    welch_errors = (speeds.var(1, ddof=1).sum() / 3) ** 0.5
    assert errors[-1] == pytest.approx(pair_errors if paired else welch_errors, rel=0.1)

    def p_value(x, y):
        return (stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)).pvalue

    assert p == pytest.approx(p_value(*speeds), rel=0.3)
    text = report.tables(groups, ["hybrid", "vanilla"])
    final = np.array([[run["log"][-1]["val/loss"] for run in runs] for runs in groups])
    row = table_row(text, "| validation loss")
    mean, std = map(float, row[0].split("±"))
    assert mean == pytest.approx(final[0].mean(), abs=6e-4)
    assert std == pytest.approx(final[0].std(ddof=1), abs=6e-4)
    assert float(row[2]) == pytest.approx(final[0].mean() - final[1].mean(), abs=6e-4)
    assert float(row[3]) == pytest.approx(p_value(*final), rel=0.06)
    assert ("paired by seed" if paired else "Welch's t-test") in text
    assert "In brackets: one standard error" in text
    row = table_row(text[text.index("## Speedup"):], "| FLOPs")
    assert row[0].startswith(f"{ratios[-1]:.2f} (") and row[2].startswith(f"{ratios.max():.2f} (")
    assert float(row[3]) == pytest.approx(levels[ratios.argmax()], abs=6e-4)


# ---- tables ----


def test_the_last_value_counts_not_the_best(tmp_path):
    groups = read([write_run(tmp_path / "a", domains="xyz", episodes=True)],
                  [write_run(tmp_path / "b", speed=0.9, domains="xyz")])
    groups[0][0]["log"][-2] |= {"val/loss": 3.5, "val/y": 7.0}  # the last evaluation, worse than that before
    text = report.tables(groups, ["a", "b"])
    assert table_row(text, "| validation loss, nats")[0] == "3.500"
    assert table_row(text, "| validation loss, y")[0] == "7.000"
    assert "query accuracy" not in text, "of one group alone"
    assert "worse on 1 of 3 validation domains" in text
    axes = {ax.get_title()[4:]: ax for ax in titled_axes(report.figure(groups, ["a", "b"]))}
    lines = axes["validation loss by domain"].lines
    assert next(line.get_xdata()[1] for line in lines if len(line.get_xdata()) == 3) == 7.0


def test_phases_and_their_order_are_reported(tmp_path):
    text = report.tables(read([write_run(tmp_path / "a", layers=3)]), ["a"])
    row = table_row(text, "| effective rank, residual stream |    01")
    layer, verdict, _, _, rise, peak, fall, settled, _ = row
    assert (layer, verdict, peak) == ("01", "diversify-then-compress", "110")
    assert 85 < float(rise[:-1]) < 100 and 45 < float(fall[:-1]) <= 50
    assert int(settled) == pytest.approx(110 + 50 * math.log(10) ** 0.5, abs=10)
    assert "- effective rank, residual stream: layers peak in the order 00 (" in text
    assert "settle again in the order 00 (" in text
    assert table_row(text, "| attention entropy")[1] == "only fall"
    assert "Compared with the paper" not in text and "Speedup" not in text and "entropy_nats" not in text


def test_phases_are_judged_run_by_run(tmp_path):
    """Two of three peak later here; the other is flat."""
    runs = [report.read_run(write_run(tmp_path / f"b{i}", layers=1)) for i in range(3)]
    for run in runs[1:]:
        for line in run["probes"]:
            line["rank/resid/00"] = 10 + 10 * math.exp(-(((line["step"] - 200) / 50) ** 2))
    for line in runs[0]["probes"]:
        line["rank/resid/00"] = 10.0
    text = report.tables([runs], ["b"])
    assert "diversify-then-compress (2 of 3)" in text and "200 ± 0" in text


def test_a_probe_of_any_name_is_shown(tmp_path):
    """Curves are discovered in probes.jsonl: a fork's probe needs no change here. Known ones come first."""
    groups = read([write_run(tmp_path / "a")], [write_run(tmp_path / "b")])
    for line in (line for runs in groups for run in runs for line in run["probes"]):
        line |= {"norm/resid/00": 10.0 + line["step"], "norm/resid/01": 3.0}
        line |= {"loss/of/probe": 1.0, "note/1": 2.0}  # no curves of layers
    assert not {"tokens", "flops", "seconds"} & report.layer_curves(groups[0]).keys()  # axes of every line
    text = report.tables(groups, ["a", "b"])
    assert table_row(text, "| norm/resid ")[:2] == ["00", "only rise"]
    assert table_row(text, "| norm/resid                      |    01")[1] == "flat"
    assert "of/probe" not in text and "note" not in text
    assert text.index("| norm/resid ") > text.index("| effective rank, down_proj")
    assert "a: 8 of 10 curves do" in text  # those that the paper speaks of
    titles = [ax.get_title().split(") ")[1] for ax in titled_axes(report.figure(groups, ["a", "b"]))]
    assert titles.count("norm/resid") == 2 and titles[-1] == "norm/resid"
    assert titles.index("norm/resid") == titles.index("effective rank, down_proj") + 1


def test_another_evaluation_is_one_function(tmp_path, monkeypatch):
    for name, score in (("a", 0.75), ("b", 0.5)):
        write_jsonl(Path(write_run(tmp_path / name)) / "recall.jsonl", [{"task": "copy", "score": score}])

    def recall(groups, names):
        def scores(task):
            return [[line["score"] for run in runs for line in report.read_jsonl(run["path"] / "recall.jsonl")
                     if line["task"] == task] for runs in groups]

        rows = report.compared("copy", scores("copy"), ".2f") + report.compared("sort", scores("sort"), ".2f")
        return ["## Recall", report.comparison(names, rows)] if rows else []

    monkeypatch.setattr(report, "SECTIONS", [report.end_of_training, recall])
    text = report.tables(read([tmp_path / "a"], [tmp_path / "b"]), ["a", "b"])
    assert table_row(text[text.index("## Recall"):], "| copy") == ["0.75", "0.50", "+0.25", ""]


def test_ner_of_both_with_differences(tmp_path):
    """The newest checkpoint counts, and the later of two results; settings are not mixed; fine-tuning seeds
    are no trials of the pretraining."""
    groups = read([write_run(tmp_path / "a", ner=0.2)], [write_run(tmp_path / "b", ner=0.1)])
    text = report.tables(groups, ["a", "b"])
    for mode in ("head", "full"):
        for settings in ("label first, lr 0.001", "shots 8, label first, bidirectional True, lr 0.001"):
            assert f"## Universal NER, {mode}, trained on da_ddt ({settings})" in text
    rows = [table_row(line, "| en_ewt") for line in text.splitlines() if line.startswith("| en_ewt")]
    assert rows == [["22.0", "12.0", "+10.0", ""], ["32.0", "22.0", "+10.0", ""]] * 2
    assert "+10.0 on average" in text
    runs = read(*([write_run(tmp_path / f"{group}{i}", ner=0.1 * i, speed=1 + i / 10) for i in (1, 2)]
                  for group in "cd"))
    assert report.ner_scores(runs)[0][1][0] == pytest.approx([12.0, 22.0])
    runs[0][0]["ner"] = []  # a run that was not scored leaves the others' means
    assert report.ner_scores(runs)[0][1] == [pytest.approx([22.0]), pytest.approx([12.0, 22.0])]


def test_runs_that_do_not_match_are_reported_all_the_same(tmp_path):
    """The first run without probes, runs of other lengths and probe steps, a line without a metric, groups of
    2 and 4 layers."""
    first = [write_run(tmp_path / "h-1", probes=False), write_run(tmp_path / "h-2", every=20, last=380),
             write_run(tmp_path / "h-3")]
    groups = read(first, [write_run(tmp_path / "v", layers=4)])
    del groups[1][0]["probes"][0]["rank/resid/00"]
    text = report.tables(groups, ["h", "v"])
    assert "diversify-then-compress (2 of 2)" in text and "nan" not in text
    report.figure(groups, ["h", "v"])
    report.brief_figure(groups, ["h", "v"])
    text = report.tables(read([first[0]]), ["h"])
    assert "Phases" not in text and "validation loss" in text


# ---- figures ----


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({"layers": 2}, [3, 1, 3, 2, 3, 2]),
        ({"layers": 12, "domains": ("news", "prose"), "episodes": True}, [3, 3, 3, 2, 3, 2]),
        ({"probes": False}, [3, 1]),
    ],
)
def test_the_figure_has_the_panels_there_are_data_for(tmp_path, options, panels):
    groups = read([write_run(tmp_path / "a", speed=1.3, **options)], [write_run(tmp_path / "b", **options)])
    fig = report.figure(groups, ["a", "b"])
    assert [sum(ax.get_title() != "" for ax in part.get_axes()) for part in fig.subfigs] == panels
    axes = titled_axes(fig)
    letters = "abcdefghijklmnopqrstuvwxyz"[:len(axes)]
    assert [ax.get_title()[:3] for ax in axes] == [f"({letter})" for letter in letters]
    for ax, factor in zip(axes, (100, 2e9, 0.5)):  # tokens, FLOPs, seconds of a step
        assert ax.lines[0].get_xdata()[-1] == 400 * factor
        assert ax.lines[0].get_ydata()[-1] == pytest.approx(8 * 53**-0.3)
    assert axes[3].lines[0].get_ydata()[-1] == pytest.approx(1.3, rel=0.01)
    if options.get("probes", True):
        resid = next(ax for ax in axes if "residual" in ax.get_title())
        peaks = [line for line in resid.lines if line.get_marker() == "^"]
        assert len(peaks) == options["layers"] and float(np.ravel(peaks[1].get_xdata())[0]) == 110


def test_more_panels_than_letters(tmp_path):
    groups = read([write_run(tmp_path / "a")])
    for line in groups[0][0]["probes"]:
        line |= {f"probe{i}/00": 1.0 for i in range(30)}
    titles = [ax.get_title() for ax in titled_axes(report.figure(groups, ["a"]))]
    assert len(titles) == 38 and titles[25].startswith("(z) ") and titles[26].startswith("(aa) ")


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({"episodes": True},
         ["validation loss", "query accuracy, held-out text", "effective rank, residual stream"]),
        ({}, ["validation loss", "effective rank, residual stream"]),
        ({"probes": False, "flops": 0}, ["validation loss"]),
    ],
)
def test_the_brief_figure_is_one_row(tmp_path, options, titles):
    a = [write_run(tmp_path / f"a{i}", speed=1 + i / 10, layers=3, **options) for i in range(2)]
    groups = read(a, [write_run(tmp_path / "b", **options | {"episodes": False})])
    fig = report.brief_figure(groups, ["a", "b"])
    axes = titled_axes(fig)
    assert len(fig.subfigs) == 1 and [ax.get_title()[4:] for ax in axes] == titles
    assert axes[0].get_xlabel() == ("updates" if options.get("flops") == 0 else "FLOPs")
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a", "b"]
    colors = [line.get_color() for line in axes[0].lines]
    assert colors == [report.COLORS[0], report.COLORS[0], report.COLORS[1]]
    if "residual" in titles[-1]:
        lines = axes[-1].lines
        assert [line.get_color() for line in lines] == colors
        at_100 = np.mean([10 + 10 * math.exp(-((10 * layer / 50) ** 2)) for layer in range(3)])
        assert lines[0].get_ydata()[10] == pytest.approx(at_100)  # the mean over layers, at step 100


# ---- the command and its messages ----


def test_the_command_writes_markdown_and_a_figure(tmp_path):
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5, domains=("x", "y")) for i in (1, 2)]
    b = [write_run(tmp_path / f"vanilla-{i}", domains=("x", "y")) for i in (1, 2)]
    out = tmp_path / "new" / "report"
    command = [sys.executable, "report.py", ",".join(a), ",".join(b), f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.with_suffix(".md").read_text()
    assert text.startswith("# hybrid against vanilla: what did hybrid buy?\n\n- Validation loss")
    assert "| validation loss, x " in text and "![" in text
    assert text[:200] in done.stdout and "## Phases" in text and "## Phases" not in done.stdout
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_write_is_what_train_py_calls(tmp_path):
    """Of one run, or of two groups; --brief changes the figure alone."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    text = report.write([[tmp_path / "a"]], tmp_path / "a" / "report")
    assert text.startswith("# a\n") and "## Phases of a" in text
    assert (tmp_path / "a" / "report.md").read_text() == text + "\n![a](report.png)\n"
    full = report.write([[a], [b]], f"{tmp_path}/full")
    brief = report.write([[a], [b]], f"{tmp_path}/brief", brief=True)
    assert full == brief and full.startswith("# a against b: what did a buy?\n")
    assert (tmp_path / "full.png").read_bytes() != (tmp_path / "brief.png").read_bytes()
    report.main([a, b, "--brief", f"--out={tmp_path}/main.png"])
    assert (tmp_path / "main.png").read_bytes() == (tmp_path / "brief.png").read_bytes()


def test_scores_of_other_tag_sets_are_not_compared(tmp_path):
    a, b = (write_run(tmp_path / name, ner=0.3) for name in "ab")
    for line in (groups := read([a], [b]))[1][0]["ner"]:
        line["tags"] = "MISC,PER"
    assert report.ner_scores(groups) == []
    for line in groups[0][0]["ner"]:
        line["tags"] = "MISC,PER"
    assert "trained on da_ddt (tags MISC,PER, label first, lr" in report.tables(groups, ["a", "b"])


def test_paths_that_hold_a_comma_are_told_apart_by_another_separator(tmp_path):
    a = [write_run(tmp_path / f"lr=1,{i}") for i in (1, 2)]
    b = write_run(tmp_path / "b")
    report.main([";".join(a), b, "--separator=;", f"--out={tmp_path}/x"])
    text = (tmp_path / "x.md").read_text()
    assert f"lr=1: {a[0]}, {a[1]}; b: {b}" in text
    with pytest.raises(UserError, match=f"{tmp_path}/lr=1 holds no run .*; --separator"):
        report.main([a[0]])
    with pytest.raises(UserError, match="separator must not be empty"):
        report.main([b, "--separator="])
    assert "between the runs of a group: another one where a path holds a comma" in subprocess.run(
        [sys.executable, "report.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout


def test_bad_input_is_reported_in_one_line(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "file").write_text("")
    groups = "give one or two groups of runs, each a run's folder or several with commas between; got"
    for given, message in (
        ([], f"{groups} 0: -"),
        ([a, b, a], f"{groups} 3: {a} {b} {a}"),
        ([",", b], groups),
        (["no/such"], "no/such holds no run with a validation loss in log.jsonl"),
        ([f"{a},{a}"], f"{a} is named twice"),
        ([a, "--ot=x"], "unknown key 'ot' in the flags; did you mean 'out'?"),
        ([a, "--out="], "out must not be empty"),
        ([a, f"--out={tmp_path}/file/x"], "cannot write"),
    ):
        with pytest.raises(UserError) as error:
            report.main(given)
        assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a" / "config.json").write_text("{")  # the seed is unknown then
    report.main([a, f"--out={tmp_path}/x.md"])
    assert (tmp_path / "x.md").exists() and (tmp_path / "x.png").exists()


def test_groups_of_one_name_are_told_apart(tmp_path):
    names = [[str(tmp_path / "x" / "run-1"), str(tmp_path / "x" / "run-2")], [str(tmp_path / "y" / "run-1")]]
    assert report.group_names(names) == ["run", "run-1"]
    assert report.group_names([["x/run"], ["y/run"]]) == ["x/run", "y/run"]
    assert report.group_names([["out/hybrid/1", "out/hybrid/2"], ["out/vanilla/1", "out/vanilla/2"]]) == [
        "hybrid", "vanilla"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "a")
    path = tmp_path / "a" / "log.jsonl"
    whole = path.read_text()
    for damage, message in (("garbage", "'garbage'"), ("5", "'5'"), ('{"val/loss": 1}', "val/loss")):
        path.write_text(damage + "\n" + whole)
        with pytest.raises(UserError, match=f"log.jsonl, line 1: expected JSON with step, got .*{message}"):
            report.read_run(folder)
    path.write_bytes(b"\xff" + whole.encode())
    with pytest.raises(UserError, match="cannot read .*log.jsonl"):
        report.read_run(folder)
    path.write_text('{"step": 3, "val/loss": NaN}\n' + whole)
    assert "val/loss" not in report.read_run(folder)["log"][0]


def test_a_report_needs_no_torch():
    """It runs on a laptop that holds the logs alone."""
    code = "import report, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- phases: synthetic curves with known answers ----

STEPS = np.arange(0, 1000, 20)


def bump(x):
    return 50 + 30 * np.exp(-(((x - 400) / 150) ** 2))


def rise(x):
    return 50 + 30 / (1 + np.exp((400 - x) / 80))


def fall(x):
    return 130 - rise(x)


def dip(x):
    return 130 - bump(x)


def flat(x):
    return 60 + 0 * x


def late(x):
    return bump(x - 100)


@pytest.mark.parametrize("n", [20, 50, 200, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.5])
@pytest.mark.parametrize(
    ("curve", "verdict"),
    [(bump, "diversify-then-compress"), (rise, "only rise"), (fall, "only fall"), (flat, "flat"),
     (dip, "fall, then rise")],
    ids=["bump", "rise", "fall", "flat", "dip"],
)
def test_phases_of_known_curves_under_noise(curve, verdict, noise, n):
    steps, wrong = np.linspace(0, 980, n), 0
    for seed in range(20):
        p = report.phase(steps, curve(steps) + noise * np.random.default_rng(seed).standard_normal(n))
        if p["verdict"] != verdict:
            wrong += 1
        elif verdict == "diversify-then-compress":
            # 30 up from 50 and down from 80; 90% of the fall at 400 + 150 sqrt(ln 10) = 628
            assert p["peak"] == pytest.approx(400, abs=50 + 60 * noise) and p["start"] < 250
            assert p["settled"] == pytest.approx(628, abs=50 + 90 * noise)
            assert p["rise"] == pytest.approx(30 / 50, abs=0.05 + 0.1 * noise)
            assert p["fall"] == pytest.approx(30 / 80, abs=0.05 + 0.1 * noise) and p["before"] < 0.1
        elif verdict == "fall, then rise":
            assert p["before"] == pytest.approx(30 / 80, abs=0.05 + 0.1 * noise)
            assert p["rise"] == pytest.approx(30 / 50, abs=0.07 + 0.1 * noise)
    assert wrong <= (2 if noise else 0), wrong


def test_noise_alone_is_flat_at_every_length():
    """The floor once ignored the smoothing: too high for long curves, too low for short ones."""
    def verdicts(clean, seeds):
        noise = [5 * np.random.default_rng(seed).standard_normal(len(clean)) for seed in range(seeds)]
        return [report.phase(np.arange(len(clean)), clean + white)["verdict"] for white in noise]

    for n in (8, 12, 20, 50, 200, 1000):
        assert verdicts(np.full(n, 100.0), 100).count("flat") >= 92, n
    for n in (50, 200, 1000):  # and a bump of five times the noise is detected where there are points enough
        x = np.arange(n) / n
        clean = 100 + 25 * np.exp(-(((x - 0.45) / 0.15) ** 2))
        assert verdicts(clean, 20).count("diversify-then-compress") >= 18, n


def test_the_fall_from_a_random_start_is_not_the_phase():
    """Weights start at nearly full rank and lose it at once: the highest point is the first."""
    drop = 200 * np.exp(-STEPS / 20)
    p = report.phase(STEPS, bump(STEPS) + drop)
    assert p["verdict"] == "diversify-then-compress" and p["peak"] == 400
    assert 60 <= p["start"] <= 160 and p["before"] > 0.7
    assert report.phase(STEPS, rise(STEPS) + drop)["verdict"] == "fall, then rise"


def test_a_bump_before_a_larger_rise_that_goes_on_is_not_missed():
    p = report.phase(STEPS, bump(STEPS) + 100 / (1 + np.exp((900 - STEPS) / 20)))
    assert p["verdict"] == "diversify-then-compress" and p["peak"] == 400
    assert p["rise"] == pytest.approx(0.6, abs=0.03)


def test_steps_may_be_unevenly_spaced_and_the_scale_does_not_matter():
    rng = np.random.default_rng(0)
    uneven = np.sort(rng.choice(np.arange(1000), 60, replace=False))
    line = report.phase(uneven, 50 + uneven / 10)  # straight, so no point lies off its neighbours
    assert line["noise"] == pytest.approx(0.01) and line["verdict"] == "only rise"
    values = bump(uneven) + rng.standard_normal(60)
    p, scaled = report.phase(uneven, values), report.phase(uneven, 0.01 * values)
    assert p["verdict"] == "diversify-then-compress" and abs(p["peak"] - 400) < 60 and 0.02 < p["noise"] < 0.2
    numbers = [key for key in p if key != "verdict"]
    assert [scaled[key] for key in numbers] == pytest.approx([p[key] for key in numbers])
    assert scaled["verdict"] == p["verdict"]


def test_what_is_no_phase():
    """A single outlier, less than 1%, zeros, values that are not finite, too few points."""
    assert report.phase(STEPS, 60 + 2 * (STEPS == 400))["verdict"] == "flat"
    assert report.phase(STEPS, 60 + 0.5 * (bump(STEPS) - 50) / 30)["verdict"] == "flat"
    assert report.phase(STEPS, 0 * STEPS)["verdict"] == "flat"
    holes = np.where(STEPS % 100 == 0, np.nan, bump(STEPS))
    assert report.phase(STEPS, holes)["verdict"] == "diversify-then-compress"
    assert report.phase([0, 1, 2], [1, 2, 1]) | {"verdict": ""} == report.phase([], []) | {"verdict": ""}
    assert report.phase(STEPS[:7], bump(STEPS[:7]))["verdict"] == "too short"


# ---- the summary for the console ----


def write_probes(folder, **curves):
    """probes.jsonl with the curves {kind: [function of the steps for each layer]}; returns its folder."""
    lines = [{"step": int(step)} for step in STEPS]
    for kind, layers in curves.items():
        for layer, function in enumerate(layers):
            for line, value in zip(lines, function(STEPS).tolist()):
                line[f"{kind.replace('rank_', 'rank/')}/{layer:02d}"] = value
    write_jsonl(folder / "probes.jsonl", lines)
    return folder


def test_the_summary_has_a_line_for_each_kind_of_curve(tmp_path):
    folder = write_probes(tmp_path, entropy=[fall, fall, flat, fall], norm=[bump, rise, bump, late],
                          rank_resid=[dip] * 4, size=[late, bump])
    assert report.phase_summary(folder) == [
        "effective rank, residual stream: fall, then rise in 4 of 4 layers",
        "attention entropy: only fall in 3 of 4 layers, flat in 1",
        "norm: diversify-then-compress in 3 of 4 layers (00, 02-03, peak 400-500, settled by 740), "
        "only rise in 1",
        "size: diversify-then-compress in 2 of 2 layers (peak 400-500, settled by 740)",
    ]


def test_the_summary_fits_a_console(tmp_path):
    """Details that do not fit are left out: when layers settle, then when they peak."""
    resid = [*[bump] * 6, rise, rise, *[bump] * 4]
    assert report.phase_summary(write_probes(tmp_path, rank_resid=resid, rank_v_proj=[bump] * 12)) == [
        "effective rank, residual stream: diversify-then-compress in 10 of 12 layers (00-05, 08-11), "
        "only rise in 2",
        "effective rank, v_proj: diversify-then-compress in 12 of 12 layers (peak 400, settled by 640)",
    ]
    assert report.phase_summary(tmp_path / "none") == []


def test_the_summary_of_a_short_run_says_so(tmp_path):
    write_jsonl(tmp_path / "probes.jsonl", [{"step": step, "rank/resid/00": 3.0} for step in range(6)])
    assert report.phase_summary(tmp_path) == [
        "too few probes for phases: 6 of at least 8; lower probe_every"]


# ---- what did meta-learning buy? ----


def items(text):
    """The list at the top of a report."""
    return text.split("\n\n")[1].splitlines()


def test_the_answer_comes_first_and_says_worse_or_nothing(tmp_path):
    """Three seeds: a loss that is worse, accuracies that do not differ, are worse, are better."""
    groups = read(*([write_run(tmp_path / f"{name}-{i}", seed=i, layers=1, episodes=True)
                     for i in range(3)] for name in ("hybrid", "vanilla")))
    for shift, runs in zip((0.5, 0.0), groups):
        for i, run in enumerate(runs):
            run["config"]["max_steps"] = 400
            for line in run["log"]:
                if "val/loss" in line:
                    line["val/loss"] += shift + 0.001 * i * shift
                else:
                    line["final/mask_query_acc"] = 0.3 + 0.05 * (i == (1 if shift else 2))
                    line["final/context_query_acc"] = 0.4 - 0.2 * shift + 0.001 * i * shift
                    line["final/context_new_query_acc"] = 0.2 + 0.2 * shift + 0.001 * i * shift
    text = report.tables(groups, ["hybrid", "vanilla"])
    assert text.splitlines()[:2] == ["# hybrid against vanilla: what did hybrid buy?", ""]
    loss, adaptation, phases = items(text)
    for axis in ("LM tokens", "FLOPs", "seconds of training"):
        assert "worse by 0.500 (p = " in loss and f"at equal {axis}" in loss
    assert "schedule" not in loss
    worse, nothing, better = adaptation.removeprefix("- Adaptation, query accuracy at the end: ").split("; ")
    assert worse.startswith("worse by 0.10") and worse.endswith("on held-out text, before the word")
    assert nothing == "nothing that a test shows (+0.000, p = 1) on held-out text, at the mask"
    assert better.startswith("better by 0.10") and better.endswith("on held-out words, before the word.")
    assert "diversify, then compress: 4 of 5 in hybrid, 4 of 5 in vanilla" in phases
    alone = report.tables([groups[0][:1], groups[1][:1]], ["a", "b"])
    assert "+0.500 (one run in a group: no test) at equal FLOPs" in alone and "worse" not in items(alone)[0]
    assert "what did" not in report.tables(groups[:1], ["hybrid"])


def test_losses_are_compared_where_both_runs_are_and_the_schedule_is_said(tmp_path):
    """At equal FLOPs of two runs of other lengths: one has decayed its learning rate, the other not."""
    groups = read([write_run(tmp_path / "a", last=200)], [write_run(tmp_path / "b", last=390, every=30)])
    for runs, steps in zip(groups, (200, 390)):
        runs[0]["config"]["max_steps"] = steps
    (a, b), shares = report.losses_at_equal(groups, "flops")
    assert a == [pytest.approx(8 * 21**-0.3)] and b == [pytest.approx(a[0], abs=0.02)]
    assert shares == pytest.approx([1.0, 200 / 390])
    assert "at equal FLOPs (a at 100% of its schedule, b at 51%)" in report.tables(groups, ["a", "b"])


def test_adaptation_is_compared_only_where_it_was_measured_alike(tmp_path):
    """A 2-way run against a 4-way one was "better by 0.246"; a run without the metric was a traceback."""
    groups = read(*([write_run(tmp_path / f"{name}-{i}", seed=i, episodes=True) for i in range(3)]
                    for name in "ab"))
    assert "query accuracy on held-out text" in report.tables(groups, ["a", "b"])
    groups[0][1]["config"]["eval_ways"] = 2
    assert "query accuracy" not in report.tables(groups, ["a", "b"])
    del groups[0][1]["config"]["eval_ways"]
    for line in groups[1][2]["log"]:
        for key in [key for key in line if key.startswith("final/")]:
            del line[key]
    assert "query accuracy" not in report.tables(groups, ["a", "b"])


def test_ner_is_judged_for_each_number_of_sentences(tmp_path):
    groups = [[report.read_run(write_run(tmp_path / f"{arm}{i}", ner=f1 + 0.01 * i, speed=1 + i / 10))
               for i in (1, 2)] for arm, f1 in (("c", 0.3), ("d", 0.1))]
    text = "\n".join(items(report.tables(groups, ["c", "d"])))
    assert "points of F1 over 2 treebanks (full, da_ddt): better by 20.0 (p = " in text
    assert "(full, da_ddt, 8 sentences): better by 20.0 (p = " in text
    groups[0][0]["ner"] = []
    assert "points of F1" not in report.tables(groups, ["c", "d"]), "not of some runs alone"


def test_the_mixed_curve_and_its_false_speedup(tmp_path):
    """Half the micro-steps are episodes of loss 2.5: the mean is lower, and vanilla training seems slow."""
    hybrid = write_run(tmp_path / "hybrid", episodes=True)
    groups = read([hybrid], [write_run(tmp_path / "vanilla", last=4000)])
    for line in groups[1][0]["log"]:
        line |= {"lr": 1e-3, "train/loss": line["val/loss"]}
    steps, losses = report.training_curve(groups[0][0], mixed=True, width=1)
    assert losses == pytest.approx(0.5 * 8 * (1 + steps / 10) ** -0.3 + 1.25)
    alone = report.training_curve(groups[0][0], mixed=False, width=1)[1]
    assert alone == pytest.approx(8 * (1 + steps / 10) ** -0.3)
    assert np.array_equal(*(report.training_curve(groups[1][0], mixed)[1] for mixed in (False, True)))
    text = report.tables(groups, ["hybrid", "vanilla"], mixed=True)
    level = report.training_curve(groups[0][0], True)[1][-1]
    # Where vanilla's loss is there, in closed form; the mean of the last five lines is 20 updates later.
    times = (((level / 8) ** (-1 / 0.3) - 1) * 10 + 20) / 400
    shown = re.search(r"own: ([\d.]+) times by next-token prediction alone, ([\d.]+) times", text)
    assert float(shown[2]) == pytest.approx(times, abs=0.006) and times > 1.1
    assert float(shown[1]) == pytest.approx(1, abs=0.02)
    assert "The mixed curve" not in report.tables(groups, ["a", "b"])
    fig = report.figure(groups, ["a", "b"], mixed=True)
    assert any("training loss" in ax.get_title() for part in fig.subfigs for ax in part.get_axes())
    nothing = report.tables(groups[::-1], ["vanilla", "hybrid"], mixed=True)
    assert "There is nothing to mix: vanilla has no micro-steps of episodes" in nothing
    report.figure(groups[::-1], ["vanilla", "hybrid"], mixed=True)


def test_metrics_of_held_out_episodes_are_no_validation_domains(tmp_path):
    groups = read([write_run(tmp_path / "a", episodes=True, domains="xy")])
    for line in groups[0][0]["log"]:
        line["val/query_acc"] = 0.5
    assert report.domain_keys(groups) == ["val/x", "val/y"]
