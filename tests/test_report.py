"""report.py on synthetic runs whose answers are known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report
from config import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder, speed=1.0, layers=2, domains=(), episodes=False, probes=True, ner=None, noise=0.0, last=400, every=10, seed=None):
    """A run whose validation loss is 8 * (1 + speed * step / 10) ** -0.3: at the same loss, `speed` times as far as at speed 1."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(1000 * speed) + layers)
    steps = range(0, last + 1, every)
    log = []
    for step in steps:
        loss = 8 * (1 + speed * step / 10) ** -0.3 * math.exp(noise * rng.standard_normal())
        log.append({"step": step, "tokens": 100 * step, "flops": 2e9 * step, "seconds": 0.5 * step, "val/loss": loss}
                   | {f"val/{name}": loss + i for i, name in enumerate(domains)})
        if episodes:
            log.append({"step": step, "tokens": 100 * step, "meta/query_acc": step / 1000, "meta/query_acc_unadapted": 0.0625})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 4')  # torn, as of a run that goes on
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    if probes:
        lines = []
        for step in steps:
            line = {"step": step, "tokens": 0}
            for layer in range(layers):
                bump = 10 + 10 * math.exp(-(((step - 100 - 10 * layer) / 50) ** 2))
                line |= {f"rank/{what}/{layer:02d}": bump for what in ("resid", "v_proj", "o_proj", "down_proj")}
                line |= {f"entropy/{layer:02d}/{head:02d}": 0.9 - step / 1000 - head / 100 for head in range(3)}
            lines.append(line)
        (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ner is not None:
        rows = [{"mode": mode, "train": "da_ddt", "test": test, "seed": seed, "step": step, "f1": ner + 0.01 * seed + shift, "shots": shots,
                 "label": "first", "bidirectional": shots > 0, "lr": 1e-3}
                for mode in ("head", "full") for test in ("da_ddt", "en_ewt") for shots in (0, 8)
                for step, shift in ((2, 0.5), (2, 0.1 * (shots > 0)), (1, 0.7)) for seed in (1, 2, 3)]
        (folder / "ner.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def arms(*folders):
    return [[report.read_run(folder) for folder in arm] for arm in folders]


def test_sooner_by_is_the_ratio_that_was_built_in(tmp_path):
    """The first arm goes 1.5 times as fast: 1.5 at every loss, but for interpolating in log-loss, and in each unit."""
    both = arms([write_run(tmp_path / "a", speed=1.5)], [write_run(tmp_path / "b")])
    levels, found = report.sooner(both)
    # From where the slower one is at its second evaluation to where it ends.
    assert levels[0] == pytest.approx(8 * 2.5**-0.3) and levels[-1] == pytest.approx(8 * 41**-0.3)
    for axis in ("step", "tokens", "flops", "seconds"):
        ratios, errors, p = found[axis]
        assert len(ratios) == 41 and math.isnan(p)
        assert ratios == pytest.approx(1.5, rel=0.05) and ratios[20:] == pytest.approx(1.5, rel=0.003) and np.isnan(errors).all()
    turned = report.sooner(both[::-1])[1]["step"][0]
    assert turned == pytest.approx(1 / 1.5, rel=0.05)


def test_a_level_is_interpolated_in_log_loss_and_never_extrapolated():
    losses, x = np.array([8.0, 4.0, 5.0, 1.0]), np.array([0.0, 10.0, 20.0, 30.0])
    assert report.reach(losses, x, math.sqrt(32)) == pytest.approx(5)
    assert report.reach(losses, x, 4.0) == pytest.approx(10)
    assert report.reach(losses, x, 3.99) == pytest.approx(20 + 10 * math.log(5 / 3.99) / math.log(5))  # from where the curve then was
    assert math.isnan(report.reach(losses, x, 0.9)) and math.isnan(report.reach(losses, x, 8.1))


def test_a_loss_that_rises_at_first_and_a_run_without_lm_tokens(tmp_path):
    """The level of the first evaluation has no way to it: it gave a largest ratio of nan; no tokens gave inf."""
    both = arms([write_run(tmp_path / "a", speed=1.5)], [write_run(tmp_path / "b")])
    for run in (run for runs in both for run in runs):
        run["log"][0]["val/loss"] = run["log"][1]["val/loss"] - 0.1
    levels, found = report.sooner(both)
    assert all(np.isfinite(ratios).all() for ratios, _, _ in found.values()) and len(levels) == 40
    for line in both[0][0]["log"]:
        line["tokens"] = 0
    assert list(report.sooner(both)[1]) == ["step", "flops", "seconds"]
    assert "inf" not in report.tables(both, ["a", "b"]) and len(report.figure(both, ["a", "b"]).subfigs[0].get_axes()) == 2


def test_arms_without_a_common_loss_are_told_so(tmp_path):
    far, near = write_run(tmp_path / "far", speed=1e6), write_run(tmp_path / "near")
    text = report.tables(arms([far], [near]), ["far", "near"])
    assert "no loss that all runs reach" in text and "at loss" not in text
    report.figure(arms([far], [near]), ["far", "near"])


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (3, 7), (20, 5)])
def test_difference_equals_scipy(n, m):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, n), rng.normal(rng.choice([0, 1, 5]), 3, m)
        d, error, p = report.difference(a, b, False)
        theirs = stats.ttest_ind(a, b, equal_var=False)
        assert d == pytest.approx(a.mean() - b.mean()) and d / error == pytest.approx(theirs.statistic)
        assert p == pytest.approx(theirs.pvalue, rel=1e-4, abs=1e-9)
        if n == m:
            d, error, p = report.difference(a, b, True)
            theirs = stats.ttest_rel(a, b)
            assert d / error == pytest.approx(theirs.statistic) and p == pytest.approx(theirs.pvalue, rel=1e-4, abs=1e-9)
    assert math.isnan(report.difference([1.0], [1.0, 2.0], False)[2])
    assert report.difference([1, 1], [1, 1], False)[2] == 1 and report.difference([1, 1], [2, 2], False)[2] == 0


@pytest.mark.parametrize("paired", [False, True])
def test_several_runs_give_spread_and_significance(tmp_path, paired):
    """Runs of the same seeds are compared pair by pair, in the order of their seeds."""
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5 + 0.1 * i, seed=i) for i in range(3)]
    b = [write_run(tmp_path / f"vanilla-{i}", speed=1 + 0.1 * i, seed=i if paired else i + 7) for i in (2, 0, 1)]
    both = [sorted(runs, key=lambda run: run["seed"]) for runs in arms(a, b)]
    levels, found = report.sooner(both)
    ratios, errors, p = found["flops"]
    speeds = np.log([[1.5, 1.6, 1.7], [1.0, 1.1, 1.2]])
    assert ratios[-1] == pytest.approx(math.exp(speeds[0].mean() - speeds[1].mean()), rel=0.005)
    expected = (speeds[0] - speeds[1]).std(ddof=1) / 3**0.5 if paired else (speeds.var(1, ddof=1).sum() / 3) ** 0.5
    assert errors[-1] == pytest.approx(expected, rel=0.1)
    test = stats.ttest_rel(*speeds) if paired else stats.ttest_ind(*speeds, equal_var=False)
    assert p == pytest.approx(test.pvalue, rel=0.3)
    done = report.tables(both, ["hybrid", "vanilla"])
    finals = [[run["log"][-1]["val/loss"] for run in runs] for runs in both]
    row = next(line for line in done.splitlines() if line.startswith("| validation loss")).split("|")
    assert float(row[2].split("±")[0]) == pytest.approx(np.mean(finals[0]), abs=6e-4)
    assert float(row[2].split("±")[1]) == pytest.approx(np.std(finals[0], ddof=1), abs=6e-4)
    assert float(row[4]) == pytest.approx(np.mean(finals[0]) - np.mean(finals[1]), abs=6e-4)
    test = stats.ttest_rel(*finals) if paired else stats.ttest_ind(*finals, equal_var=False)
    assert float(row[5]) == pytest.approx(test.pvalue, rel=0.06)
    assert ("paired by seed" if paired else "of Welch") in done and "In brackets: one standard error" in done
    row = next(line for line in done.splitlines() if line.startswith("| FLOPs") and "to" in line).split("|")
    assert row[2].strip().startswith(f"{ratios[-1]:.2f} (") and row[4].strip().startswith(f"{ratios.max():.2f} (")
    assert float(row[5]) == pytest.approx(levels[ratios.argmax()], abs=6e-4)


def test_the_last_value_is_taken_and_the_best_is_not(tmp_path):
    both = arms([write_run(tmp_path / "a", domains="xyz", episodes=True)], [write_run(tmp_path / "b", speed=0.9, domains="xyz")])
    both[0][0]["log"][-2] |= {"val/loss": 3.5, "val/y": 7.0}  # the last evaluation, worse than the one before
    text = report.tables(both, ["a", "b"])
    assert "| validation loss, nats     | 3.500 |" in text and "| validation loss, y        | 7.000 |" in text
    assert "| query accuracy, adapted   | 0.400 |" in text and "| query accuracy, unadapted | 0.062 |" in text
    assert "worse on 1 of 3 validation domains" in text
    axes = {ax.get_title()[4:]: ax for part in report.figure(both, ["a", "b"]).subfigs for ax in part.get_axes()}
    dots = [line.get_xdata()[1] for line in axes["validation loss by domain"].lines if len(line.get_xdata()) == 3]
    assert dots[0] == 7.0


def test_phases_and_their_order_are_reported(tmp_path):
    text = report.tables(arms([write_run(tmp_path / "a", layers=3)]), ["a"])
    row = next(line for line in text.splitlines() if line.startswith("| rank, residual stream |    01"))
    row = [cell.strip() for cell in row.split("|")]
    assert row[3] == "diversify-then-compress" and row[7] == "110" and 85 < float(row[6][:-1]) < 100 and 45 < float(row[8][:-1]) <= 50
    assert int(row[9]) == pytest.approx(110 + 50 * math.log(10) ** 0.5, abs=10)
    # Of several runs each is judged by itself: two of three peak later here.
    runs = [report.read_run(write_run(tmp_path / f"b{i}", layers=1)) for i in range(3)]
    for run in runs[1:]:
        for line in run["probes"]:
            line["rank/resid/00"] = 10 + 10 * math.exp(-(((line["step"] - 200) / 50) ** 2))
    for line in runs[0]["probes"]:
        line["rank/resid/00"] = 10.0
    several = report.tables([runs], ["b"])
    assert "diversify-then-compress (2 of 3)" in several and "200 ± 0" in several
    assert "- rank, residual stream: layers peak in the order 00 (" in text and "settle again in the order 00 (" in text
    assert "only fall" in next(line for line in text.splitlines() if line.startswith("| attention entropy"))
    assert "Beside the paper" not in text and "Sooner" not in text


def test_ner_of_both_with_differences(tmp_path):
    """The newest checkpoint and the later of two results count; settings are not mixed; fine-tuning seeds are no trials of pretraining."""
    one = arms([write_run(tmp_path / "a", ner=0.2)], [write_run(tmp_path / "b", ner=0.1)])
    text = report.tables(one, ["a", "b"])
    for mode in ("head", "full"):
        for settings in ("label first, lr 0.001", "shots 8, label first, bidirectional True, lr 0.001"):
            assert f"## Universal NER, {mode}, trained on da_ddt ({settings})" in text
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in text.splitlines() if line.startswith("| en_ewt")]
    assert rows == [["22.0", "12.0", "+10.0", ""], ["32.0", "22.0", "+10.0", ""]] * 2 and "+10.0 on average" in text
    runs = [[report.read_run(write_run(tmp_path / f"{arm}{i}", ner=0.1 * i, speed=1 + i / 10)) for i in (1, 2)] for arm in "cd"]
    assert report.ner_scores(runs)[0][1][0] == pytest.approx([12.0, 22.0])
    runs[0][0]["ner"] = []  # a run that was not scored leaves the others' means
    assert report.ner_scores(runs)[0][1] == [pytest.approx([22.0]), pytest.approx([12.0, 22.0])]


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({"layers": 2}, [3, 1, 3, 2, 3, 2]),
        ({"layers": 12, "domains": ("news", "prose"), "episodes": True}, [3, 3, 3, 2, 3, 2]),
        ({"probes": False}, [3, 1]),
    ],
)
def test_the_figure_has_the_panels_there_are_data_for(tmp_path, options, panels):
    fig = report.figure(arms([write_run(tmp_path / "a", speed=1.3, **options)], [write_run(tmp_path / "b", **options)]), ["a", "b"])
    titled = [sum(ax.get_title() != "" for ax in part.get_axes()) for part in fig.subfigs]
    assert titled == panels
    titles = [ax.get_title() for part in fig.subfigs for ax in part.get_axes() if ax.get_title()]
    assert [title[:3] for title in titles] == [f"({letter})" for letter in "abcdefghijklmnopqrstuvwxyz"[: len(titles)]]
    axes = [ax for part in fig.subfigs for ax in part.get_axes() if ax.get_title()]
    for ax, factor in zip(axes, (100, 2e9, 0.5)):  # tokens, FLOPs, seconds of a step
        assert ax.lines[0].get_xdata()[-1] == 400 * factor and ax.lines[0].get_ydata()[-1] == pytest.approx(8 * 53**-0.3)
    ratio = axes[3].lines[0].get_ydata()
    assert ratio[-1] == pytest.approx(1.3, rel=0.01)
    if options.get("probes", True):
        resid = next(ax for ax in axes if "residual" in ax.get_title())
        peaks = [line for line in resid.lines if line.get_marker() == "^"]
        assert len(peaks) == options["layers"] and float(np.ravel(peaks[1].get_xdata())[0]) == 110


def test_runs_that_do_not_match_are_reported_all_the_same(tmp_path):
    """The first run without probes, runs of other lengths and probe steps, a metric that a line lacks, arms of 2 and 4 layers."""
    first = [write_run(tmp_path / "h-1", probes=False), write_run(tmp_path / "h-2", every=20, last=380), write_run(tmp_path / "h-3")]
    both = arms(first, [write_run(tmp_path / "v", layers=4)])
    del both[1][0]["probes"][0]["rank/resid/00"]
    text = report.tables(both, ["h", "v"])
    assert "diversify-then-compress (2 of 2)" in text and "nan" not in text
    report.figure(both, ["h", "v"])
    only = report.tables(arms([first[0]]), ["h"])
    assert "Phases" not in only and "validation loss" in only


def test_the_command_writes_markdown_and_a_figure(tmp_path):
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5, domains=("x", "y")) for i in (1, 2)]
    b = [write_run(tmp_path / f"vanilla-{i}", domains=("x", "y")) for i in (1, 2)]
    out = tmp_path / "new" / "report"
    done = subprocess.run([sys.executable, "report.py", ",".join(a), ",".join(b), f"--out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.with_suffix(".md").read_text()
    assert text.startswith("# hybrid against vanilla\n") and "| validation loss, x " in text and "![" in text and text[:200] in done.stdout
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_told_in_one_line(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "file").write_text("")
    for given, message in (
        ([], "give one or two arms"),
        ([a, b, a], "give one or two arms, each a run's folder or several with commas between; got 3"),
        ([",", b], "give one or two arms"),
        (["no/such"], "no/such holds no run with a validation loss in log.jsonl"),
        ([f"{a},{a}"], f"{a} is named twice"),
        ([a, "--ot=x"], "unknown key 'ot' in the flags; did you mean 'out'?"),
        ([a, "--out="], "out = '' must be a path of a file"),
        ([a, f"--out={tmp_path}/file/x"], "cannot write"),
    ):
        with pytest.raises(UserError) as error:
            report.main(given)
        assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a" / "config.json").write_text("{")  # of no use here
    report.main([a, f"--out={tmp_path}/x.md"])
    assert (tmp_path / "x.md").exists() and (tmp_path / "x.png").exists()


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
