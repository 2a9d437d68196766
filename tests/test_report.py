"""report.py, and nanomaml's runs, stats, phases and drawing, on runs and curves whose answers are known."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

import report
from nanomaml import compare, config, drawing, phases, runs, stats
from nanomaml.config import UserError

STEPS = np.arange(0, 1000, 20)
RISE_AND_FALL = "diversify-then-compress"
CURVES = {RISE_AND_FALL: lambda x: 50 + 30 * np.exp(-(((x - 400) / 150) ** 2)),
          "only rise": lambda x: 50 + 30 / (1 + np.exp((400 - x) / 80)), "flat": lambda x: 60 + 0 * x,
          "fall, then rise": lambda x: 130 - bump(x), "only fall": lambda x: 130 - rise(x)}
bump, rise, flat, dip, fall = CURVES.values()
T_TEST = {True: scipy_stats.ttest_rel, False: lambda a, b: scipy_stats.ttest_ind(a, b, equal_var=False)}


def write_jsonl(path, lines):
    torn = '{"step": 4'  # as of a run that is still going
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def write_run(folder, speed=1.0, layers=2, domains="", episodes=False, ner=None, steps=range(0, 401, 10),
              seed=None):
    """A run of validation loss 8 * (1 + speed * step / 10) ** -0.3: `speed` times as fast to any loss."""
    folder.mkdir()
    log, probes = [], []
    for step in steps:
        axes = {"step": step, "tokens": 100 * step, "flops": 2e9 * step, "seconds": 0.5 * step}
        loss = 8 * (1 + speed * step / 10) ** -0.3
        log.append({**axes, "val/loss": loss, **{f"val/{name}": loss + i for i, name in enumerate(domains)}})
        if episodes:
            log[-1] |= {f"adapt/{x}query_acc": step / 1000 for x in ("", "mask_", "context_", "context_new_")}
            log[-1] |= {"final/mask_query_acc": 0.3, "final/context_query_acc": 0.4}
        probes.append({**axes})
        for layer in range(layers):
            bump = 10 + 10 * math.exp(-(((step - 100 - 10 * layer) / 50) ** 2))
            names = "resid", "v_proj", "o_proj", "down_proj"
            probes[-1] |= {f"rank/{name}/{layer:02d}": bump for name in names}
            probes[-1] |= {f"{kind}/{layer:02d}/{head:02d}": 0.9 - step / 1000 - head / 100
                           for kind in ("entropy", "entropy_nats") for head in range(3)}
    write_jsonl(folder / "log.jsonl", log)
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    if layers:
        write_jsonl(folder / "probes.jsonl", probes)
    if ner is not None:
        write_jsonl(folder / "ner.jsonl", [
            {"mode": mode, "train": "da_ddt", "test": test, "seed": seed, "step": step, "lr": 1e-3,
             "f1": ner + 0.01 * seed + shift, "shots": shots, "label": "first", "bidirectional": shots > 0}
            for mode in ("head", "full") for test in ("da_ddt", "en_ewt") for shots in (0, 8)
            for step, shift in ((2, 0.5), (2, 0.1 * (shots > 0)), (1, 0.7)) for seed in (1, 2, 3)])
    return str(folder)


def two_groups(folder, n=1, **options):
    """a and b of n runs each, of the same seeds if n > 1; a list for an option gives each group its own."""
    own = [{key: x[i] if isinstance(x, list) else x for key, x in options.items()} for i in (0, 1)]
    return runs.read_groups([[write_run(folder / f"{name}-{seed}", seed=seed if n > 1 else None, **of_group)
                              for seed in range(n)] for name, of_group in zip("ab", own)])


def row(text, start):
    """The cells of the first row of a table that starts so, without its label."""
    line = next(line for line in text.splitlines() if line.startswith("| " + start))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def tables(groups):
    return report.tables(groups, ["a", "b"][:len(groups)])


def panels(groups):
    return [ax for ax in drawing.figure(groups, ["a", "b"][:len(groups)]).axes if ax.get_title()]


def test_speedup_is_the_ratio_that_was_built_in(tmp_path):
    """1.5 at every loss, on every axis, but for the interpolation."""
    groups = two_groups(tmp_path, speed=[1.5, 1.0])
    levels, speedups = stats.speedup(groups)
    assert levels[[0, -1]] == pytest.approx([8 * 2.5**-0.3, 8 * 41**-0.3])  # a's second loss to b's last
    for axis in ("step", "tokens", "flops", "seconds"):
        ratios, errors, p = speedups[axis]
        assert len(ratios) == 41 and math.isnan(p) and np.isnan(errors).all()
        assert ratios == pytest.approx(1.5, rel=0.05) and ratios[20:] == pytest.approx(1.5, rel=0.003)
    assert stats.speedup(groups[::-1])[1]["step"][0] == pytest.approx(1 / 1.5, rel=0.05)


@pytest.mark.parametrize(("level", "at"), [
    (32**0.5, 5), (4.0, 10), (3.99, 20 + 10 * math.log(5 / 3.99, 5)), (0.9, math.nan), (8.1, math.nan)])
def test_a_level_is_interpolated_in_log_loss_and_never_extrapolated(level, at):
    reached = stats.reach(np.array([8.0, 4.0, 5.0, 1.0]), np.array([0.0, 10.0, 20.0, 30.0]), level)
    assert reached == pytest.approx(at, nan_ok=True)


def test_a_loss_that_rises_at_first_a_run_without_lm_tokens_and_no_common_loss(tmp_path):
    """The level of the first evaluation, not reached from above, gave a ratio of nan; no tokens gave inf."""
    groups = two_groups(tmp_path, speed=[1.5, 1.0])
    for [run] in groups:
        run["log"][0]["val/loss"] = run["log"][1]["val/loss"] - 0.1
    levels, speedups = stats.speedup(groups)
    assert all(np.isfinite(ratios).all() for ratios, _, _ in speedups.values()) and len(levels) == 40
    for line in groups[0][0]["log"]:
        line["tokens"] = 0
    assert list(stats.speedup(groups)[1]) == ["step", "flops", "seconds"] and "inf" not in tables(groups)
    assert [ax.get_xlabel() for ax in panels(groups)][:2] == ["FLOPs", "seconds of training"]
    for line in groups[0][0]["log"]:
        line["val/loss"] /= 100
    assert "no loss that all runs reach" in tables(groups) and "at loss" not in tables(groups)


def test_no_report_is_lost_to_a_name(tmp_path):
    """$ began a formula, | another column, and a line break a line."""
    name = "a$_{|<b>\n$c"
    groups = runs.read_groups([[write_run(tmp_path / "x", domains=[name, "d"], ner=0.5)]])
    groups[0][0]["probes"] = [line | {f"{name}/00": 1.0} for line in groups[0][0]["probes"]]
    text = report.tables(groups, [name])
    assert f"validation loss, {stats.escaped(name)}" in text and f"## Phases of {stats.escaped(name)}" in text
    assert stats.escaped(name) == r"a\$_{\|\<b\> \$c" and name not in text
    drawing.figure(groups, [name]).savefig(tmp_path / "a.png")


PAIRS = [  # what differs in the second run, the mark, and what is then not compared
    ({}, "", ()),
    ({"record": {"validation": {"val": "2"}}}, "other text", ("loss", "speedup", "accuracy")),
    ({"record": {"tokenizer": "u"}}, "other text", ("loss", "speedup", "accuracy")),
    ({"config": {"eval_sequences": 8}}, "other text", ("loss", "speedup", "accuracy")),
    ({"config": {"init_from": "out/a"}}, "other start", ()),
    ({"config": {"max_steps": 500}}, "unfinished", ()),
    ({"record": {"lengths": [100]}}, "lengthened", ()),
    *[({"config": {key: 3}}, "other instrument", ("accuracy",)) for key in (
        "eval_ways", "eval_shots", "inner_lr", "word_targets", "max_word_share")],
    ({"log": {"final/ways": 7}}, "other instrument", ("accuracy",)),
    ({"log": {"final/words": 4}}, "other instrument", ("accuracy",)),
]


@pytest.mark.parametrize("change, mark, absent", PAIRS)
def test_what_must_not_be_compared_is_not_or_is_marked(tmp_path, change, mark, absent):
    """Other text gave "-1.472 nats at equal FLOPs", four words against 16 ways "+0.383", without a word."""
    groups = two_groups(tmp_path, speed=[1.5, 1.0], episodes=True, domains="xy")
    gain = f"{8 * (61**-0.3 - 41**-0.3):.3f}"
    for [run] in groups:
        run["config"] |= {"max_steps": 400, "init_from": "", "eval_ways": 16}
        run["record"] |= {"validation": {"val": "1"}, "tokenizer": "t"}
        run["log"][-1] |= {"final/ways": 16, "final/words": 64}
    run["config"] |= change.get("config", {})
    run["record"] |= change.get("record", {})
    run["log"][-1] |= change.get("log", {})
    text, titles = tables(groups), [ax.get_title() for ax in panels(groups)]
    for what, start in (("loss", "| validation loss at equal"), ("speedup", "## Speedup"),
                        ("accuracy", "| query acc")):
        assert any(line.startswith(start) for line in text.splitlines()) == (what not in absent), what
        assert what != "accuracy" or any("query acc" in title for title in titles) == (what not in absent)
    assert (f"**{mark.capitalize()}.**" in text) == bool(mark) and ("** " in text) == bool(mark)
    assert row(text, "validation loss, nats")[2:] == (["", ""] if "loss" in absent else [gain, ""])
    if mark and mark != "other instrument":
        assert f"nats [{mark}]" in text and f"validation loss [{mark}]" in titles[0]


def test_where_a_run_says_less_than_another_no_claim_is_made(tmp_path):
    """Without its run.json other text was taken for equal, and without config.json "the same weights"."""
    groups = two_groups(tmp_path)
    groups[1][0]["record"] = {"validation": {"val": "1"}, "tokenizer": "t"}
    groups[1][0]["config"] |= {"init_from": ""}
    assert list(compare.caveats(groups)) == ["unknown text"] and "nats [unknown text]" in tables(groups)


def test_a_foreign_config_or_run_json_ends_no_report(tmp_path):
    """max_steps as text was a traceback, and rates that differ in the 7th digit were one."""
    for name, seed, lr in (("a", "x", 0.1), ("b", 2, 0.10000001)):
        folder = Path(write_run(tmp_path / name))
        (folder / "config.json").write_text(json.dumps({"seed": seed, "max_steps": "many", "lr": lr}))
        (folder / "run.json").write_text('{"state": {}, "lengths": 3, "validation": [1]}')
    groups, names = compare.read([str(tmp_path)])
    assert names == ["lr=0.1", "lr=0.10000001"] and groups[0][0]["seed"] is None
    assert "[lengthened]" in report.tables(groups, names)


def test_vanilla_is_the_baseline_wherever_it_stands(tmp_path):
    """Named first, it was the hero: "1.24 times sooner"."""
    folders = [write_run(tmp_path / name, seed=1) for name in ("vanilla", "hybrid")]
    for folder, share in zip(folders, (0.0, 0.5)):
        Path(folder, "config.json").write_text(json.dumps({"seed": 1, "meta_share": share}))
    for given in (folders, folders[::-1]):
        groups, names = compare.read(given)
        assert names == ["hybrid", "vanilla"] and groups[1][0]["config"]["meta_share"] == 0
    assert row(report.tables(groups, names), "meta_share") == ["0.5", "0"]


@pytest.mark.parametrize("given", [["{}"], ["{}/*"], ["{}/a", "{}/b/1", "{}/b/2", "{}/c"]])
def test_a_sweep_is_grouped_by_what_differs(tmp_path, given):
    """A folder, a quoted glob and three groups ended in errors. Runs that differ in the seed are a group."""
    out = tmp_path / "out"
    for name, seed, lr in (("a", 1, 0.1), ("b/1", 1, 0.2), ("b/2", 2, 0.2), ("c", 1, 0.3)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_run(out / name, speed=10 * lr, seed=seed, ner=0.5)
        settings = {"seed": seed, "lr": lr, "max_steps": 400, "keep": lr}
        (out / name / "config.json").write_text(json.dumps(settings))
    (out / "begun").mkdir()
    (out / "begun" / "log.jsonl").write_text('{"step": 0}\n')
    groups, names = compare.read([text.format(out) for text in given])
    assert names == ["lr=0.1", "lr=0.2", "lr=0.3"] and [*map(len, groups)] == [1, 2, 1]
    report.main([*(text.format(out) for text in given), f"--out={tmp_path}/x", "--sort", "loss"])
    table = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [line["lr"] for line in table] == ["0.3", "0.2", "0.2", "0.1"] and "keep" not in table[0]
    assert {line["state"] for line in table} == {"finished"}
    text = (tmp_path / "x.md").read_text()
    cells = row(text, "validation loss, nats")
    assert len(cells) == 3 and cells[0] == f"2.626 (+{2.626 - 8 * 121**-0.3:.3f})"
    assert "begun" not in text and "In brackets: the difference from lr=0.3" in text
    with pytest.raises(UserError, match="sort = 'size' is not one of the columns run, group"):
        report.main([str(out), "--sort=size", f"--out={tmp_path}/x"])


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (3, 7), (20, 5)])
def test_difference_equals_scipy(n, m):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, n), rng.normal(rng.choice([0, 1, 5]), 3, m)
        for paired in (False, True) if n == m else (False,):
            (delta, error, p), test = stats.difference(a, b, paired), T_TEST[paired](a, b)
            assert [delta, delta / error] == pytest.approx([a.mean() - b.mean(), test.statistic])
            assert p == pytest.approx(test.pvalue, rel=1e-4, abs=1e-9)
    assert math.isnan(stats.difference([1.0], [1.0, 2.0], False)[2])
    assert [stats.difference([1, 1], b, False)[2] for b in ([1, 1], [2, 2])] == [1, 0]


@pytest.mark.parametrize("paired", [False, True])
def test_several_runs_give_spread_and_significance(tmp_path, paired):
    """Runs of the same seeds are compared pair by pair, in the order of their seeds."""
    a = [write_run(tmp_path / f"a-{i}", speed=1.5 + 0.1 * i, seed=i) for i in range(3)]
    b = [write_run(tmp_path / f"b-{i}", speed=1 + 0.1 * i, seed=i if paired else i + 7) for i in (2, 0, 1)]
    groups = runs.read_groups([a, b])
    levels, speedups = stats.speedup(groups)
    ratios, errors, p = speedups["flops"]
    speeds = np.log([[1.5, 1.6, 1.7], [1.0, 1.1, 1.2]])
    assert ratios[-1] == pytest.approx(math.exp(speeds[0].mean() - speeds[1].mean()), rel=0.005)
    pair_error, welch_error = (speeds[0] - speeds[1]).std(ddof=1), speeds.var(1, ddof=1).sum() ** 0.5
    assert errors[-1] == pytest.approx((pair_error if paired else welch_error) / 3**0.5, rel=0.1)
    assert p == pytest.approx(T_TEST[paired](*speeds).pvalue, rel=0.3)
    final = np.array([[run["log"][-1]["val/loss"] for run in group] for group in groups])
    cells = row(tables(groups), "validation loss, nats")
    expected = [final[0].mean(), final[0].std(ddof=1), final[0].mean() - final[1].mean()]
    assert [float(x) for x in [*cells[0].split("±"), cells[2]]] == pytest.approx(expected, abs=6e-4)
    assert float(cells[3]) == pytest.approx(T_TEST[paired](*final).pvalue, rel=0.06)
    assert ("paired by seed" if paired else "Welch's t-test") in tables(groups)
    cells = row(tables(groups).partition("## Speedup")[2], "FLOPs")
    assert cells[0].startswith(f"{ratios[-1]:.2f} (") and cells[2].startswith(f"{ratios.max():.2f} (")
    assert [float(x) for x in cells[1::2]] == pytest.approx([p, levels[ratios.argmax()]], rel=0.05)


def test_the_answer_comes_first(tmp_path):
    """Three seeds: a loss that is worse, an accuracy that does not differ, one that is worse, one better."""
    groups = two_groups(tmp_path, n=3, layers=1, episodes=True)
    for shift, group in zip((0.5, 0.0), groups):
        for i, run in enumerate(group):
            run["config"]["max_steps"] = 400
            for line in run["log"]:
                line["val/loss"] += shift + 0.001 * i * shift
                line["final/mask_query_acc"] = 0.3 + 0.05 * (i == (1 if shift else 2))
                line["final/context_query_acc"] = 0.4 - 0.2 * shift + 0.001 * i * shift
                line["final/context_new_query_acc"] = 0.2 + 0.2 * shift + 0.001 * i * shift
    title, same, table, *_ = tables(groups).split("\n\n")
    assert title == "# a against b" and same == "The runs differ in no setting but the seed."
    assert row(table, "curves that")[:2] == ["4 of 5", "4 of 5"]
    for label, difference, significant in (
            *((f"validation loss at equal {axis} ", 0.5, True) for axis in ("LM tokens", "FLOPs", "seconds")),
            ("query accuracy on held-out text, before the word", -0.1, True),
            ("query accuracy on held-out text, at the mask", 0, False),
            ("query accuracy on held-out words, before the word", 0.1, True)):
        *_, shown, p = row(table, label)
        assert float(shown) == pytest.approx(difference, abs=0.002) and (float(p) < 0.05) == significant
    alone = row(tables([group[:1] for group in groups]), "validation loss at equal FLOPs  ")
    assert alone[2:] == ["+0.500", ""] and "at equal" not in tables(groups[:1])
    assert tables([group[:1] for group in groups]).count("One run in a group: no test") == 1


def test_losses_are_compared_where_both_runs_are_and_the_schedule_is_said(tmp_path):
    """At equal FLOPs of two runs of other lengths: one has decayed its learning rate, the other not."""
    groups = two_groups(tmp_path, steps=[range(0, 201, 10), range(0, 391, 30)])
    groups[0][0]["config"]["max_steps"], groups[1][0]["config"]["max_steps"] = 200, 390
    (a, b), shares = runs.losses_at_equal(groups, "flops")
    assert a == [pytest.approx(8 * 21**-0.3)] and b == [pytest.approx(a[0], abs=0.02)]
    assert shares == [1.0, 200 / 390] and row(tables(groups), "updates") == ["200", "390", "-190", ""]
    assert "at equal FLOPs (100% and 51% of the schedule)" in tables(groups)


def test_adaptation_is_compared_only_where_it_was_measured_alike(tmp_path):
    """A 2-way run against a 4-way one was "better by 0.246"; a run without the metric was a traceback."""
    groups = two_groups(tmp_path, n=3, episodes=True)
    assert "query accuracy on held-out text" in tables(groups)
    groups[0][1]["config"]["eval_ways"] = 2
    assert "query accuracy" not in tables(groups)
    del groups[0][1]["config"]["eval_ways"]
    for line in groups[1][2]["log"]:
        del line["final/mask_query_acc"], line["final/context_query_acc"]
    assert "query accuracy" not in tables(groups)


def test_the_last_value_counts_not_the_best(tmp_path):
    """And metrics of held-out episodes are no validation domains."""
    groups = two_groups(tmp_path, domains="xyz", episodes=True)
    assert runs.domain_keys(groups) == ["val/x", "val/y", "val/z"]
    groups[0][0]["log"][-1] |= {"val/loss": 3.5, "val/y": 7.0}  # worse than the evaluation before
    assert [row(tables(groups), f"validation loss, {x}")[0] for x in ("nats", "y")] == ["3.500", "7.000"]


def test_a_probe_of_any_name_is_shown(tmp_path):
    """Curves are discovered in probes.jsonl: a fork's probe needs no change here. Known ones come first."""
    groups = two_groups(tmp_path)
    for line in (line for [run] in groups for line in run["probes"]):
        line |= {"norm/resid/00": 10.0 + line["step"], "norm/resid/01": 3.0}
        line |= {"loss/of/probe": 1.0, "note/1": 2.0}  # no curves of layers
    assert not {"tokens", "flops", "seconds"} & runs.layer_curves(groups[0]).keys()  # axes of every line
    text = tables(groups)
    layer, verdict, _, _, rise, peak, fall, settled, _ = row(text, "effective rank, residual stream |    01")
    assert (layer, verdict, peak) == ("01", RISE_AND_FALL, "110")
    assert 85 < float(rise[:-1]) < 100 and 45 < float(fall[:-1]) <= 50
    assert int(settled) == pytest.approx(110 + 50 * math.log(10) ** 0.5, abs=10)
    for label, verdict in (("attention entropy", "only fall"), ("norm/resid ", "only rise")):
        assert row(text, label)[:2] == ["00", verdict]
    assert not any(name in text for name in ("of/probe", "note", "entropy_nats"))
    assert text.index("| norm/resid ") > text.index("| effective rank, down_proj")
    assert row(text, "curves that")[0] == "8 of 10"  # those that the paper speaks of
    titles = [ax.get_title().split(") ")[1] for ax in panels(groups)]
    assert titles[4:7] == ["attention entropy", "norm/resid", "effective rank, v_proj"]
    groups[0][0]["probes"][0] |= {f"probe{i}/00": 1.0 for i in range(30)}
    assert len(panels(groups)) == len(panels(groups[:1])) == 12


def test_ner_of_both_with_differences(tmp_path):
    """The newest checkpoint counts, and the later of two results; settings are not mixed; fine-tuning seeds
    are no trials of the pretraining."""
    groups = two_groups(tmp_path, n=2, ner=[0.2, 0.1])
    groups[0][0]["ner"] = [line | {"f1": line["f1"] - 0.02} for line in groups[0][0]["ner"]]
    text = tables(groups)
    for mode in ("head", "full"):
        for settings in ("label first, lr 0.001", "shots 8, label first, bidirectional True, lr 0.001"):
            assert f"## Universal NER, {mode}, trained on da_ddt ({settings})" in text
        for shots, ours, theirs in (("all", "21.0 ± 1.4", "12.0 ± 0.0"), ("8", "31.0 ± 1.4", "22.0 ± 0.0")):
            for what in ("in-language", "zero-shot"):  # English was pooled with zero-shot treebanks
                label = f"mean F1 on Universal NER, {what} ({mode}, da_ddt, {shots} sentences; treebanks: 1)"
                assert row(text, label) == [ours, theirs, "+9.0", "0.07"]
    assert row(text, "en_ewt")[:3] == ["21.0 ± 1.4", "12.0 ± 0.0", "+9.0"]
    assert "| da_ddt (in-language)" in text
    assert runs.in_language("en_ewt:dev,hr_set", "en_pud") and runs.in_language("all", "zh_pud")
    assert not runs.in_language("en_ewt", "ceb_gja") and not runs.in_language("all", "tl_trg")
    groups[0][0]["ner"] = []  # a run that was not scored leaves the others' means, but no answer
    assert row(tables(groups), "en_ewt")[:2] == ["22.0", "12.0 ± 0.0"] and "mean F1" not in tables(groups)
    (groups[1][0]["ner"], groups[1][1]["ner"]), kept = ([], []), groups[0][1]["ner"]
    groups[0][1]["ner"] = [*kept, *(line | {"mode": "majority", "f1": 0.125} for line in kept)]
    text = tables(groups)
    assert row(text, "en_ewt") == ["22.0", "", "", ""], "few-shot rows of a run that stands alone"
    assert row(text, "no model: each word's most frequent tag")[0] == "12.5"
    for line in groups[0][1]["ner"]:
        line["tags"] = "MISC,PER"
    assert "mean F1" not in tables(groups), "scores of other tag sets"
    assert "(tags MISC,PER, label first, lr" in tables(groups[:1])


def test_runs_that_do_not_match_are_reported_all_the_same(tmp_path):
    """The first run without probes, runs of other lengths and probe steps, a line without a metric, groups of
    2 and 4 layers. Phases are judged run by run: two of three rise and fall here; the other is flat."""
    folders = [write_run(tmp_path / "a-1", layers=0), write_run(tmp_path / "a-2"),
               write_run(tmp_path / "a-3", steps=range(0, 381, 20)), write_run(tmp_path / "a-4")]
    groups = runs.read_groups([folders, [write_run(tmp_path / "b", layers=4)]])
    for i, run in enumerate(groups[0]):
        for line in run["probes"]:
            line["rank/resid/00"] = 10.0 + 10 * math.exp(-(((line["step"] - 200) / 50) ** 2)) * (i < 3)
    del groups[1][0]["probes"][0]["rank/resid/00"]
    cells = row(tables(groups), "effective rank, residual stream")
    assert cells[1] == "diversify-then-compress (2 of 3)" and cells[5] == "190 ± 14"  # 180 and 200
    assert "nan" not in tables(groups) and "Phases" not in tables([groups[0][:1]])
    resid = next(ax for ax in panels(groups) if "residual" in ax.get_title())
    assert resid.lines[0].get_xdata()[-1] == 380  # where the shortest ends


@pytest.mark.parametrize(("options", "shown"), [
    ({"layers": 2}, [3, 3, 2]), ({"layers": 0}, [3]),
    ({"layers": 12, "domains": "xyz", "episodes": True}, [3, 3, 3, 1])])
def test_the_figure_has_the_panels_there_are_data_for(tmp_path, options, shown):
    """Curves of both groups lie over each other, of the first, middle and last layer."""
    fig = drawing.figure(two_groups(tmp_path, speed=[1.5, 1.0], **options), ["a", "b"])
    assert [sum(ax.get_title() != "" for ax in part.get_axes()) for part in fig.subfigs] == shown
    axes = [ax for ax in fig.axes if ax.get_title()]
    assert [ax.get_title()[:3] for ax in axes] == [f"({chr(97 + i)})" for i in range(len(axes))]
    for ax in (ax for ax in axes if "accuracy" in ax.get_title()):
        assert [line.get_linestyle() for line in ax.lines] == ["-", "--"] * 3  # of two runs, and the legend's
    for ax, factor in zip(axes, (100, 2e9, 0.5)):  # tokens, FLOPs, seconds of a step
        assert ax.lines[0].get_xydata()[-1] == pytest.approx([400 * factor, 8 * 61**-0.3])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    for resid in (ax for ax in axes if "residual" in ax.get_title()):  # both groups, first to last layer
        drawn = [(line.get_color(), line.get_linestyle()) for line in resid.lines if len(line.get_xdata())]
        assert {color for color, _ in drawn} == set(drawing.COLORS[:2])
        assert len(drawn) == len(set(drawn)) == 2 * min(3, options["layers"])
    assert drawing.y_limits([(STEPS, 2.0 * (STEPS < 90) + (STEPS > 900))]) == pytest.approx((-0.05, 1.05))


def test_labels_are_whole_and_no_legend_lies_on_them(tmp_path):
    """Bug: "nats" was cut off at the edge of the figure, and legends lay on the names of the x axes."""
    groups = two_groups(tmp_path, speed=[1.5, 1.0], layers=4, episodes=True)
    fig = drawing.figure(groups, ["a", "b"])
    fig.savefig(tmp_path / "a.png")
    for ax in fig.axes:
        assert not ax.get_ylabel() or ax.yaxis.label.get_window_extent().x0 >= 0
        if legend := ax.get_legend():
            assert legend.get_window_extent().y1 <= ax.xaxis.label.get_window_extent().y0


def test_the_command_writes_markdown_and_a_figure(tmp_path):
    """Of one run, as train.py calls it; of two groups; without torch: a laptop that holds the logs alone.
    Groups of one name are told apart."""
    assert runs.group_names([["x/run"], ["y/run"]]) == ["x/run", "y/run"]
    assert runs.group_names([["x/run-1", "x/run-2"], ["y/a/1", "y/a/2"]]) == ["run", "a"]
    text, out = report.write([write_run(tmp_path / "a")])
    assert out == tmp_path / "a" / "report" and text.startswith("# a\n")
    assert "## Phases of a" in text and "Speedup" not in text
    assert (tmp_path / "a" / "report.md").read_text() == text + "\n![a](<report.png>)\n"
    a, b = [write_run(tmp_path / f"lr=1-{i}", speed=1.5) for i in (1, 2)], write_run(tmp_path / "b")
    code = "import sys, report; report.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, ",".join(a), b, f"--out={tmp_path}/new/x"]
    done = subprocess.run(command, cwd=Path(report.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, image = (tmp_path / "new" / "x.md").read_text(), (tmp_path / "new" / "x.png").read_bytes()
    assert f"lr=1: {a[0]}, {a[1]}; b: {b}" in text and "## Phases" in text and image[:4] == b"\x89PNG"
    assert text[:200] in done.stdout and "## Phases" not in done.stdout


def test_bad_input_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    a, damaged = write_run(tmp_path / "a", layers=0), []
    for line in (b"garbage", b"5", b'{"val/loss": 1}', b"\xff", b'{"step": 3, "val/loss": NaN}'):
        damaged.append(write_run(tmp_path / f"damaged-{len(damaged)}", layers=0))
        Path(damaged[-1], "log.jsonl").write_bytes(line + b"\n" + Path(a, "log.jsonl").read_bytes())
    assert runs.read_run(damaged.pop())["log"][0] == {"step": 3}  # not finite: as if it was not there
    for given, message in (([], "give the folders of runs"), ([",", a], "give the folders of runs"),
                           (["no/such"], "no/such holds no run with a validation loss in log.jsonl"),
                           ([f"{a},{a}"], "a run is named twice"),
                           ([a, f"--out={a}/log.jsonl/x"], "log.jsonl"), ([a, "--out=."], "extension"),
                           *(([folder], "log.jsonl, line 1: expected JSON with step") for folder in damaged)):
        monkeypatch.setattr(sys, "argv", ["report.py", *given])
        with pytest.raises(SystemExit) as end:
            config.run(report.main)
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1, error
    (tmp_path / "a" / "config.json").write_text("{")
    assert runs.read_run(a)["seed"] is None


# 30 up from 50 and down from 80; 90% of the fall at 400 + 150 sqrt(ln 10) = 628. {key: (value, tolerances)}
KNOWN = {RISE_AND_FALL: {"peak": (400, 50, 60), "settled": (628, 50, 90), "rise": (30 / 50, 0.05, 0.1),
                         "fall": (30 / 80, 0.05, 0.1), "before": (0, 0.1, 0), "start": (125, 125, 0)},
         "fall, then rise": {"before": (30 / 80, 0.05, 0.1), "rise": (30 / 50, 0.07, 0.1)}}


@pytest.mark.parametrize("n", [20, 50, 200, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("verdict", CURVES)
def test_phases_of_known_curves_under_noise(verdict, noise, n):
    steps, found = np.linspace(0, 980, n), []
    for seed in range(20):
        white = noise * np.random.default_rng(seed).standard_normal(n)
        found.append(phases.phase(steps, CURVES[verdict](steps) + white))
    right = [p for p in found if p["verdict"] == verdict]
    assert len(right) >= (18 if noise else 20)
    for key, (value, clean, per_noise) in KNOWN.get(verdict, {}).items():
        assert all(p[key] == pytest.approx(value, abs=clean + per_noise * noise) for p in right), key


def test_noise_alone_is_flat_at_every_length():
    """The floor once ignored the smoothing: too high for long curves, too low for short ones."""
    def verdicts(clean, seeds):
        noise = [5 * np.random.default_rng(seed).standard_normal(len(clean)) for seed in range(seeds)]
        return [phases.phase(np.arange(len(clean)), clean + white)["verdict"] for white in noise]

    for n in (8, 12, 20, 50, 200, 1000):
        assert verdicts(np.full(n, 100.0), 100).count("flat") >= 92, n
    for n in (50, 200, 1000):  # and a bump of five times the noise is detected where there are points enough
        clean = 100 + 25 * np.exp(-(((np.arange(n) / n - 0.45) / 0.15) ** 2))
        assert verdicts(clean, 20).count(RISE_AND_FALL) >= 18, n


@pytest.mark.parametrize(("values", "verdict", "ranges"), [
    # Weights start at nearly full rank and lose it at once: the highest point is the first.
    (bump(STEPS) + 200 * np.exp(-STEPS / 20), RISE_AND_FALL,
     {"peak": (400, 400), "start": (60, 160), "before": (0.7, 1)}),
    (rise(STEPS) + 200 * np.exp(-STEPS / 20), "fall, then rise", {}),
    (bump(STEPS) + 100 / (1 + np.exp((900 - STEPS) / 20)), RISE_AND_FALL,  # before a larger rise that goes on
     {"peak": (400, 400), "rise": (0.57, 0.63)}),
    (np.where(STEPS % 100 == 0, np.nan, bump(STEPS)), RISE_AND_FALL, {}),
    (60 + 2 * (STEPS == 400), "flat", {}),
    (60 + 0.5 * (bump(STEPS) - 50) / 30, "flat", {}),  # less than 1%
    (0 * STEPS, "flat", {}), (bump(STEPS)[:7], "fewer than 8 points", {}), ([], "fewer than 8 points", {})])
def test_phases_of_special_curves(values, verdict, ranges):
    p = phases.phase(STEPS[:len(values)], values)
    assert p["verdict"] == verdict and all(low <= p[key] <= high for key, (low, high) in ranges.items()), p


def test_steps_may_be_unevenly_spaced_and_the_scale_does_not_matter():
    rng = np.random.default_rng(0)
    uneven = np.sort(rng.choice(np.arange(1000), 60, replace=False))
    line = phases.phase(uneven, 50 + uneven / 10)  # straight, so no point lies off its neighbours
    assert line["noise"] == pytest.approx(0.01) and line["verdict"] == "only rise"
    values = bump(uneven) + rng.standard_normal(60)
    p, scaled = phases.phase(uneven, values), phases.phase(uneven, 0.01 * values)
    assert p["verdict"] == RISE_AND_FALL and abs(p["peak"] - 400) < 60 and 0.02 < p["noise"] < 0.2
    assert scaled.pop("verdict") == p.pop("verdict") and scaled == pytest.approx(p)


def test_the_summary_has_a_line_for_each_kind_of_curve(tmp_path):
    """For the console: how many layers show each verdict, and when they peak."""
    curves = {"entropy": [fall, flat, fall], "rank/resid": [dip],
              "norm": [bump, rise, lambda x: bump(x - 100)]}
    lines = [{"step": int(step)} | {f"{kind}/{layer:02d}": float(function(step)) for kind in curves
                                    for layer, function in enumerate(curves[kind])} for step in STEPS]
    write_jsonl(tmp_path / "probes.jsonl", lines)
    assert phases.summary(str(tmp_path)) == [
        "effective rank, residual stream: fall, then rise in 1 of 1 layers",
        "attention entropy: only fall in 2 of 3 layers, flat in 1",
        "norm: diversify-then-compress in 2 of 3 layers, only rise in 1; peaks from step 400 to 500"]
    write_jsonl(tmp_path / "probes.jsonl", lines[:6])
    for folder in (tmp_path, tmp_path / "none"):
        assert phases.summary(folder) == ["fewer than 8 probes are too few for phases: lower probe_every"]
