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


def write_run(folder, speed=1.0, end=2.0, layers=2, domains=(), episodes=False, probes=True, ner=None, noise=0.0, last=400):
    """A run whose validation loss is 8 * (1 + speed * step / 10) ** -0.3: at the same loss, `speed` times as far as at speed 1."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(1000 * speed) + layers)
    steps = range(0, last + 1, 10)
    log = []
    for step in steps:
        loss = 8 * (1 + speed * step / 10) ** -0.3 * math.exp(noise * rng.standard_normal())
        log.append({"step": step, "tokens": 100 * step, "flops": 2e9 * step, "seconds": 0.5 * step, "val/loss": loss}
                   | {f"val/{name}": loss + i for i, name in enumerate(domains)})
        if episodes:
            log.append({"step": step, "tokens": 100 * step, "meta/query_acc": step / 1000, "meta/query_acc_unadapted": 0.0625})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 4')  # torn, as of a run that goes on
    (folder / "config.json").write_text("{}")
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
        rows = [{"mode": mode, "train": "da_ddt", "test": test, "seed": seed, "f1": ner + 0.01 * seed + shift, "shots": 0, "label": "first",
                 "bidirectional": False, "lr": 1e-3}
                for mode in ("head", "full") for test in ("da_ddt", "en_ewt") for shift in (0.5, 0.0) for seed in (1, 2, 3)]
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
        ratios, errors = found[axis]
        assert ratios == pytest.approx(1.5, rel=0.05) and ratios[20:] == pytest.approx(1.5, rel=0.003) and np.isnan(errors).all()
    turned = report.sooner(both[::-1])[1]["step"][0]
    assert turned == pytest.approx(1 / 1.5, rel=0.05)


def test_a_level_is_interpolated_in_log_loss_and_never_extrapolated():
    losses, x = np.array([8.0, 4.0, 5.0, 1.0]), np.array([0.0, 10.0, 20.0, 30.0])
    assert report.reach(losses, x, math.sqrt(32)) == pytest.approx(5)
    assert report.reach(losses, x, 4.0) == pytest.approx(10)
    assert report.reach(losses, x, 2.0) == pytest.approx(20 + 10 * math.log(4 / 2) / math.log(4 / 1))  # from the best so far
    assert math.isnan(report.reach(losses, x, 0.9)) and math.isnan(report.reach(losses, x, 8.1))


def test_arms_without_a_common_loss_are_told_so(tmp_path):
    far, near = write_run(tmp_path / "far", speed=1e6), write_run(tmp_path / "near")
    text = report.tables(arms([far], [near]), ["far", "near"])
    assert "no loss that all runs reach" in text and "at loss" not in text
    report.figure(arms([far], [near]), ["far", "near"])


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (3, 7), (20, 5)])
def test_welch_equals_scipy(n, m):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, n), rng.normal(rng.choice([0, 1, 5]), 3, m)
        assert report.welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-4, abs=1e-9)
    assert math.isnan(report.welch([1.0], [1.0, 2.0])) and report.welch([1.0, 1.0], [1.0, 1.0]) == 1 and report.welch([1.0, 1.0], [2.0, 2.0]) == 0


def test_several_runs_give_spread_and_significance(tmp_path):
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5 + 0.01 * i, noise=0.002) for i in range(3)]
    b = [write_run(tmp_path / f"vanilla-{i}", speed=1 + 0.01 * i, noise=0.002) for i in range(3)]
    both = arms(a, b)
    ratios, errors = report.sooner(both)[1]["flops"]
    assert (0 < errors).all() and (errors < 0.1).all() and ratios == pytest.approx(1.5, rel=0.06)
    finals = [[run["log"][-1]["val/loss"] for run in runs] for runs in both]
    text = report.tables(both, ["hybrid", "vanilla"])
    row = next(line for line in text.splitlines() if line.startswith("| validation loss")).split("|")
    assert float(row[2].split("±")[0]) == pytest.approx(np.mean(finals[0]), abs=6e-4)
    assert float(row[2].split("±")[1]) == pytest.approx(np.std(finals[0], ddof=1), abs=6e-4)
    assert float(row[4]) == pytest.approx(np.mean(finals[0]) - np.mean(finals[1]), abs=6e-4)
    assert float(row[5]) == pytest.approx(stats.ttest_ind(*finals, equal_var=False).pvalue, rel=0.06)
    assert "In brackets: one standard error" in text


def test_phases_and_their_order_are_reported(tmp_path):
    text = report.tables(arms([write_run(tmp_path / "a", layers=3)]), ["a"])
    row = next(line for line in text.splitlines() if line.startswith("| rank, residual stream |    01")).split("|")
    assert row[3].strip() == "diversify-then-compress" and abs(int(row[5]) - 110) <= 10
    assert "- rank, residual stream: layers peak in the order 00 (" in text and "settle again in the order 00 (" in text
    assert "only fall" in next(line for line in text.splitlines() if line.startswith("| attention entropy"))
    assert "Beside the paper" not in text and "Sooner" not in text


def test_ner_of_both_with_differences_and_the_later_of_two_results(tmp_path):
    text = report.tables(arms([write_run(tmp_path / "a", ner=0.2)], [write_run(tmp_path / "b", ner=0.1)]), ["a", "b"])
    for mode in ("head", "full"):
        assert f"## Universal NER, {mode}, trained on da_ddt (label first, lr 0.001)" in text
    row = next(line for line in text.splitlines() if line.startswith("| en_ewt")).split("|")
    assert [cell.strip() for cell in row[2:5]] == ["22.0 ± 1.0", "12.0 ± 1.0", "+10.0"] and float(row[5]) < 0.001
    assert "+10.0 on average" in text
    # Over several runs an arm's spread is that between runs, not between fine-tuning seeds.
    runs = [[report.read_run(write_run(tmp_path / f"{arm}{i}", ner=0.1 * i, speed=1 + i / 10)) for i in (1, 2)] for arm in "cd"]
    (_, values), *_ = report.ner_scores(runs)
    assert values[0] == pytest.approx([12.0, 22.0])


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ({"layers": 2}, [3, 1, 5, 5]),
        ({"layers": 12, "domains": ("news", "prose"), "episodes": True}, [3, 3, 5, 5]),
        ({"probes": False}, [3, 1]),
    ],
)
def test_the_figure_has_the_panels_there_are_data_for(tmp_path, options, panels):
    fig = report.figure(arms([write_run(tmp_path / "a", speed=1.3, **options)], [write_run(tmp_path / "b", **options)]), ["a", "b"])
    titled = [sum(ax.get_title() != "" for ax in part.get_axes()) for part in fig.subfigs]
    assert titled == panels
    titles = [ax.get_title() for part in fig.subfigs for ax in part.get_axes() if ax.get_title()]
    assert [title[:3] for title in titles] == [f"({letter})" for letter in "abcdefghijklmnopqrstuvwxyz"[: len(titles)]]
    assert all(ax.lines or ax.patches for part in fig.subfigs for ax in part.get_axes() if ax.get_title())


def test_the_command_writes_markdown_and_a_figure(tmp_path):
    a = [write_run(tmp_path / f"hybrid-{i}", speed=1.5, domains=("x", "y")) for i in (1, 2)]
    b = [write_run(tmp_path / f"vanilla-{i}", domains=("x", "y")) for i in (1, 2)]
    out = tmp_path / "new" / "report"
    done = subprocess.run([sys.executable, "report.py", ",".join(a), ",".join(b), f"--out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.with_suffix(".md").read_text()
    assert text.startswith("# hybrid against vanilla\n") and "| validation loss, x " in text and "![" in text and text[:200] in done.stdout
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give one or two arms"),
        (["a", "b", "c"], "give one or two arms, each a run's folder or several with commas between; got 3"),
        (["no/such"], "no/such holds no run with a validation loss in log.jsonl"),
        (["--ot=x"], "unknown key 'ot' in the flags; did you mean 'out'?"),
    ],
)
def test_bad_input_is_told_in_one_line(given, message):
    with pytest.raises(UserError) as error:
        report.main(given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "a")
    path = tmp_path / "a" / "log.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(UserError, match="log.jsonl, line 1: no JSON: 'garbage'"):
        report.read_run(folder)
