"""The tables of README.md and details.md, and the figure, from the files of evidence.py. run.sh calls it.

    python results/tables.py results                     # fills both between their marks, draws figure.png
    python results/tables.py results --collect=out       # first takes over what is finished in out/
    python results/tables.py out/quick/report --quick    # a new details.md: the tables that were run

A run is compared with vanilla training of the same seed: same first weights, same text in the same order.
"""
import itertools
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evidence  # noqa: E402
import plan  # noqa: E402

from nanomaml import drawing, phases  # noqa: E402
from nanomaml import runs as finished  # noqa: E402
from nanomaml.stats import markdown, mean_std, reach, speedup  # noqa: E402

BASELINE = "share-0"
NAMES = {"share-0": "vanilla", "share-5": "5%", "share-10": "10%", "share-25": "25%", "share-50": "50%",
         "late": "late, light", "half": "half as long", "batch": "from the batch", "meta-0": "vanilla",
         "meta-50": "50%", "meta-weight0": "50% at weight 0", "meta-word": "masked word",
         "meta-word-0.5": "masked word at 0.5",
         **{f"last-{arm}": arm.replace("-", " at ") for arm in plan.LAST}, "last-lm": "LM alone"}
MISSING, NOT_RUN = "not measured", "*Not run yet.*"
FOLDER = Path(__file__).parent  # main may set another


def runs(corpus, arm):
    """The finished runs of an arm, by seed."""
    return evidence.read(FOLDER).get((corpus, arm), [])


# ---- statistics ----


def paired(corpus, arm, measure, baseline=BASELINE):
    """(values of the arm, values of the baseline) of the seeds that both have."""
    values = [{run["seed"]: measure(run) for run in runs(corpus, name)} for name in (arm, baseline)]
    seeds = [seed for seed in values[0] if not math.isnan(values[0][seed] - values[1].get(seed, math.nan))]
    return [[of_arm[seed] for seed in seeds] for of_arm in values]


def compared(corpus, columns, measure, form, has_interval=True):
    """A cell for each (arm, baseline): "mean difference (95% interval)", paired by seed.

    Three or four pairs say little about a spread, so it is pooled over the arms of all columns: what is left
    of their runs after an effect of the arm and one of the seed. Columns that share runs are not independent,
    so the spread of their differences could not simply be averaged. has_interval: False for scores of one
    draw of sentences, whose spread over seeds is not the one over draws.
    """
    found = [np.subtract(*paired(corpus, arm, measure, base)) for arm, base in columns]
    spread, freedom = residual(corpus, dict.fromkeys(itertools.chain(*columns)), measure)
    cells = []
    for gains in found:
        is_known = freedom and len(gains)
        half = stats.t.isf(0.025, freedom) * spread * math.sqrt(2 / len(gains)) if is_known else 0
        ends = interval(gains.mean(), half, form) if half else ""
        cells.append(MISSING if not len(gains) else format(gains.mean(), "+" + form)
                     + f" ({ends if ends and has_interval else count(gains)})")
    return cells


def residual(corpus, arms, measure):
    """(standard deviation, degrees of freedom) of runs around the sum of their arm's and seed's effects."""
    values = {(arm, run["seed"]): measure(run) for arm in arms for run in runs(corpus, arm)}
    values = {pair: value for pair, value in values.items() if not math.isnan(value)}
    if not values:
        return math.nan, 0
    levels = [sorted({pair[i] for pair in values}) for i in (0, 1)]
    X = np.array([[pair[i] == level for i in (0, 1) for level in levels[i]] for pair in values], float)
    y = np.array(list(values.values()))
    freedom = len(y) - np.linalg.matrix_rank(X)
    if freedom == 0:
        return math.nan, 0
    left = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    return math.sqrt((left ** 2).sum() / freedom), freedom


def interval(mean, half, form):
    """The ends of mean ± half; of one that would be 0.0, its first other digit."""
    ends = (mean - half, mean + half)
    return " to ".join(text if float(text := format(end, form)) else
                       np.format_float_positional(end, 1, fractional=False, trim="-") for end in ends)


def count(pairs):
    return f"{len(pairs)} pair{'s' * (len(pairs) > 1)}"


def random_effects(gains):
    """(mean, its standard error) of {(seed, draw): gain}, with seeds and draws as random effects, by REML."""
    seeds, draws = (np.array([[pair[i] == level for level in {pair[i] for pair in gains}] for pair in gains],
                             float) for i in (0, 1))
    y, one = np.array(list(gains.values())), np.ones(len(gains))

    def fit(log_variances):
        of_seed, of_draw, rest = np.exp(log_variances)
        V = of_seed * seeds @ seeds.T + of_draw * draws @ draws.T + rest * np.eye(len(y))
        inverse = np.linalg.inv(V)
        information = one @ inverse @ one
        mean = one @ inverse @ y / information
        r = y - mean
        return np.linalg.slogdet(V)[1] + math.log(information) + r @ inverse @ r, mean, information ** -0.5

    starts = itertools.product([-4.0, 0.0], [-4.0, 0.0], [math.log(y.var() + 1e-9)])
    found = [optimize.minimize(lambda x: fit(x)[0], start, bounds=[(-12, 12)] * 3) for start in starts]
    best = min(found, key=lambda result: result.fun)
    return fit(best.x)[1:]


def spread(corpus, arm, measure, form):
    """Mean ± standard deviation over seeds, with the number of seeds where not all have the measure."""
    found = [value for run in runs(corpus, arm) if not math.isnan(value := measure(run))]
    number = f" ({len(found)})" if len(found) < len(runs(corpus, arm)) else ""
    return mean_std(found, form) + number if found else MISSING


# ---- measures: run -> number ----


def last(key):
    return lambda run: finished.last_values([[run]], key)[0][0]


def of_training(key):
    """The mean over the last tenth of a run's lines that have the metric."""
    def measure(run):
        values = finished.curve(run, key)[key]
        return values[-max(len(values) // 10, 1):].mean() if len(values) else math.nan

    return measure


def lowest(key):
    """The lowest of a run's evaluations, where ideal early stopping would have stopped."""
    return lambda run: float(finished.curve(run, key)[key].min())


def better(kind):
    """Accuracy at the read-out that suits the run: at the mask, or before the word."""
    return lambda run: max(last(f"final/{read_out}_{kind}query_acc")(run) for read_out in finished.READ_OUTS)


def last_probe(kind):
    """The last value of a kind of curve, a mean over layers (and heads)."""
    def measure(run):
        return np.mean([values[-1] for [(_, values)] in finished.layer_curves([run])[kind].values()])

    return measure


def rises_and_falls(steps, values):
    """The phases of a curve that ends below the peak of its rise, else None: it has not just paused."""
    p = phases.phase(steps, values)
    is_one = p["verdict"] == phases.RISE_AND_FALL and values[-1] < values[list(steps).index(p["peak"])]
    return p if is_one else None


def head_curves(runs):
    """The curves of attention entropy as `finished.layer_curves` has them, but by layer/head."""
    curves = {}
    for run in runs:
        heads = (key for line in run["probes"] for key in line if key.startswith("entropy/"))
        for head in dict.fromkeys(heads):
            points = [(line["step"], line[head]) for line in run["probes"] if head in line]
            curves.setdefault(head.removeprefix("entropy/"), []).append(np.array(points).T)
    return curves


def heads_that_rise_and_fall(run):
    """How many in a hundred of a run's attention heads have an entropy that rises and then falls."""
    found = [bool(rises_and_falls(*head)) for [head] in head_curves([run]).values()]
    return 100 * np.mean(found) if found else math.nan


def at_rates(key, *rates):
    """The best value of a metric over inner rates; nan unless it was measured at each of them."""
    def measure(run):
        found = {run["config"]["inner_lr"]: last(key)(run)}
        found |= {rate: last(key)(other) for rate in rates for other in runs(f"rate-{rate}", run["arm"])
                  if other["seed"] == run["seed"]}
        return max(found.get(rate, math.nan) for rate in rates)

    return measure


def ner(mode, shots, tests, train=plan.ENGLISH, draws=None, key="f1"):
    """The mean F1, or that of another `key`, in percent, over numbers of sentences, treebanks and draws.

    It is nan if any was not scored. Without given `draws` it takes those that all arms have.
    """
    def common(n):
        return range(1, 1 + min(row.draws for row in plan.FINE_TUNING
                                if (row.mode, row.train) == (mode, train) and n in row.shots))

    wanted = [(n, test, draw) for n in shots for test in tests for draw in draws or common(n)]

    def measure(run):
        scores = {(line["shots"], line["test"], line["seed"]): 100 * line[key] for line in run["ner"]
                  if (line["mode"], line["train"], line["step"]) == (mode, train, run["config"]["max_steps"])}
        return np.mean([scores.get(score, math.nan) for score in wanted])

    return measure


LOSS = ("validation loss, nats", last("val/loss"), ".3f")
KEYS = {f"accuracy on {words}, {where}": f"final/{read_out}_{kind}query_acc"
        for kind, words in finished.WORDS.items() for read_out, (where, _) in finished.READ_OUTS.items()}
ACCURACIES = [(label, last(key), ".3f") for label, key in KEYS.items()]
BETTER = [(f"accuracy on {words}, the better read-out", better(kind), ".3f")
          for kind, words in finished.WORDS.items()]
READ = [("updates", lambda run: run["log"][-1]["step"], ".0f"),
        ("tokens read as text, millions", lambda run: run["log"][-1]["tokens"] / 1e6, ".2f")]
QUERIES = [("query loss in training, nats", of_training("meta/query_loss"), ".3f"),
           ("query accuracy in training", of_training("meta/query_acc"), ".3f")]
# Of the published rule, by which nine queries in ten are of class 0.
OTHERS = [("accuracy in training on queries of other classes than 0",
           lambda run: of_training("meta/others_right")(run) / of_training("meta/others")(run), ".3f")]
PROBES = [("effective rank of the residual stream", last_probe("rank/resid"), ".1f"),
          *[(f"effective rank of {name}", last_probe(f"rank/{name}"), ".1f")
            for name in ("v_proj", "o_proj", "down_proj")],
          ("attention entropy", last_probe("entropy"), ".3f"),
          ("heads whose entropy rises, then falls, %", heads_that_rise_and_fall, ".0f")]


def domain_losses(corpus):
    keys = finished.domain_keys([runs(corpus, BASELINE)]) if runs(corpus, BASELINE) else []
    return [(f"loss on {key.removeprefix('val/')}", last(key), ".3f") for key in keys]


# ---- tables: rows of Markdown ----


def named(arm):
    return NAMES.get(arm, arm)


def values_table(corpus, arms, measures):
    """A column for each arm: mean ± standard deviation over seeds."""
    head = ["", *(f"{named(arm)} ({len(runs(corpus, arm))})" for arm in arms)]  # how many seeds
    return markdown([head, *([label, *(spread(corpus, arm, measure, form) for arm in arms)]
                             for label, measure, form in measures)])


def differences_table(corpus, columns, measures):
    """A column for each (arm, baseline) that has runs: the difference of those of the same seeds."""
    columns = [pair for pair in columns if all(runs(corpus, arm) for arm in pair)]
    head = ["", *(f"{named(arm)} - {named(base)}" for arm, base in columns)]
    return markdown([head, *([label, *compared(corpus, columns, measure, form)]
                             for label, measure, form in measures)])


def to_vanilla(*arms):
    return [(arm, BASELINE) for arm in arms]


# Of the search: what the arms were chosen by; all others are in runs.csv, corpus "found".
SHOWN = ("vanilla", "mask", "mask-weight0", "mask-late", "mask-all", "batch32x32-0.05", "half-0", "half-0.1",
         "half-0.5", "word-query-0.1", "word-query-0.5")


def found_table():
    """What the search tried: of one run each, the differences to vanilla training."""
    measures = [LOSS, *ACCURACIES]
    runs_of = {name: runs("found", name) for name in SHOWN}
    base = [measure(runs_of["vanilla"][0]) for _, measure, _ in measures] if runs_of["vanilla"] else []
    rows = [["", *(label.removeprefix("accuracy on held-out ") for label, _, _ in measures)]]
    for name in filter(runs_of.get, plan.SEARCH if base else ()):
        sign = "" if name == "vanilla" else "+"
        rows.append([name, *(format(measure(runs_of[name][0]) - (value if sign else 0), sign + form)
                             for (_, measure, form), value in zip(measures, base))])
    return markdown(rows)


def own_language(mode, shots):
    """As `ner`, each of the four trainable treebanks that are not English by models fine-tuned on its own."""
    def measure(run):
        return np.mean([ner(mode, shots, [name], train=name)(run) for name in plan.IN_LANGUAGE])

    return measure


ALL = (0,)
GROUPS = {"English": plan.EVERYWHERE[:2], "zero-shot, all six": plan.EVERYWHERE[2:],
          "of these da, hr, pt, sk": plan.IN_LANGUAGE, "of these ceb and tl": plan.EVERYWHERE[6:]}


def ner_rows(settings):
    """(label, F1, F1 of no model) of settings (mode, numbers of sentences, label) and groups of treebanks."""
    for mode, shots, label in settings:
        for group, tests in list(GROUPS.items())[:4 if (mode, shots) == ("full", plan.FEW) else 2]:
            yield f"{mode}, {label}, {group}", ner(mode, shots, tests), ner("majority", shots, tests)


def ner_summary():
    """All that was scored, pooled over few sentences."""
    yield from ner_rows((mode, shots, label) for mode in ("head", "full")
                        for shots, label in ((plan.FEW, "few sentences"), (ALL, "all")))
    for mode, shots, label in (("head", (32,), "32 sentences"), ("head", ALL, "all"),
                               ("full", (1000,), "1,000 sentences")):
        yield f"{mode}, {label}, in-language, da, hr, pt, sk", own_language(mode, shots), None


def zero_shot_gains(arm, baseline, seeds, shots=plan.FEW, key="f1", group="zero-shot, all six"):
    """{(seed, draw): gain in F1} zero-shot, mean over numbers of sentences, of full fine-tuning."""
    tests, base, gains = GROUPS[group], {}, {}
    for run in [*runs("books", baseline), *runs("books", arm)]:
        for draw in range(1, 9):
            f1, pair = ner("full", shots, tests, draws=[draw], key=key)(run), (run["seed"], draw)
            if run["arm"] == baseline:
                base[pair] = f1
            elif run["seed"] in seeds and not math.isnan(f1 - base.get(pair, math.nan)):
                gains[pair] = f1 - base[pair]
    return gains


def again_table():
    """Zero-shot F1 after full fine-tuning on few sentences: each seed on each draw, and estimates of all."""
    rows = [["draw", *(f"seed {seed}" for seed in range(1, 7)), "half as long: seed 5", "seed 6"]]
    gains, of_half = (zero_shot_gains(arm, BASELINE, ALL_SEEDS) for arm in ("share-50", "half"))
    for draw in range(1, 9):
        cells = [gains.get((seed, draw)) for seed in range(1, 7)]
        cells += [of_half.get((seed, draw)) for seed in plan.AGAIN]
        rows.append([str(draw), *("" if gain is None else f"{gain:+.1f}" for gain in cells)])
    return markdown(rows)


def estimate(gains):
    """[gain, its 95% interval, seeds] as cells, of what `zero_shot_gains` returns; [] of nothing.

    Seeds and draws are random effects. Fewer than three seeds show no spread over seeds: the interval is then
    one over draws, and says so.
    """
    if not gains:
        return []
    used, draws = (sorted({pair[i] for pair in gains}) for i in (0, 1))
    if len(used) > 2:
        mean, error = random_effects(gains)
        half, note = stats.t.isf(0.025, len(used) - 1) * error, ""
    else:
        of_draw = [np.mean([gain for (_, d), gain in gains.items() if d == draw]) for draw in draws]
        mean, note = np.mean(of_draw), ", over draws"
        half = stats.t.isf(0.025, len(draws) - 1) * stats.sem(of_draw) if len(draws) > 1 else math.nan
    return [f"{mean:+.1f}", interval(mean, half, ".1f") + note, ", ".join(map(str, used))]


ALL_SEEDS = range(1, 7)  # of share-0 and share-50


def new_seeds(**cut):
    """The gains of 50% with the seeds that were decided upon after the first four had gained."""
    return (zero_shot_gains("share-50", BASELINE, plan.AGAIN, **cut)
            | zero_shot_gains("meta-50", "meta-0", plan.META_SEEDS, **cut))


def estimates_table():
    """Gains in zero-shot F1: of new seeds, the confirmation first, and of all."""
    again = partial(zero_shot_gains, "share-50", BASELINE, plan.AGAIN)
    first = partial(zero_shot_gains, "share-50", BASELINE, ALL_SEEDS)
    larger = {"group": "of these da, hr, pt, sk"}
    rows = [("50% - vanilla, confirmation: new seeds, eight draws", again()),
            *((f"the same with {n} sentences", again((n,))) for n in plan.FEW),
            ("50% - vanilla, all new seeds", new_seeds()),
            ("50% - vanilla, all seeds and draws", first() | new_seeds()),
            ("the same, da, hr, pt, sk alone (post hoc)", first(**larger) | new_seeds(**larger)),
            ("half as long - vanilla, seeds 1 to 6", zero_shot_gains("half", BASELINE, ALL_SEEDS)),
            ("50% - half as long, seeds 1 to 6", zero_shot_gains("share-50", "half", ALL_SEEDS))]
    head = ["zero-shot F1, full fine-tuning on few sentences", "gain", "95% interval", "seeds"]
    return markdown([head, *([label, *cells] for label, gains in rows if (cells := estimate(gains)))])


META_PAIRS = [*((f"meta-{arm}", "meta-0") for arm in ("50", "weight0", "word")), ("meta-50", "meta-word")]
# Added later, with fewer seeds: in tables of their own, so that no interval of the pairs above depends on it.
WEIGHT_PAIRS = [("meta-50", "meta-0"), ("meta-word-0.5", "meta-0"), ("meta-50", "meta-word-0.5")]
LAST_PAIRS = [(f"last-{arm}", f"last-{base}") for base, arm in itertools.combinations(plan.CHOSEN, 2)]


def gains_table(pairs, seeds):
    """Gains in zero-shot F1 with their intervals, and without: by number of sentences, precision, recall."""
    rows = [["", "F1", *(f"{n} sentences" for n in plan.FEW), "precision", "recall", "da, hr, pt, sk",
             "(English)", "seeds"]]
    cuts = [*(((n,), "f1") for n in plan.FEW), *((plan.FEW, key) for key in ("precision", "recall")),
            *((plan.FEW, "f1", group) for group in ("of these da, hr, pt, sk", "English"))]
    for pair in pairs:
        if cells := estimate(zero_shot_gains(*pair, seeds)):
            parts = [estimate(zero_shot_gains(*pair, seeds, *cut))[0] for cut in cuts]
            rows.append([" - ".join(map(named, pair)), f"{cells[0]} ({cells[1]})", *parts, cells[2]])
    return markdown(rows)


def when_all_adapt(steps, rate, key):
    """What adapt_all.py measured of a run: words that were never a class, told apart at the mask."""
    def measure(run):
        others = {other["seed"]: other for other in runs(f"all-{steps}-{rate}", run["arm"])}
        other = others.get(run["seed"])
        return last(f"final/mask_new_query_{key}")(other) if other else math.nan

    return measure


def choice_table():
    """Of the seed that chooses: accuracy (query loss) at each number of steps and rate of the backbone."""
    rows = [["accuracy (query loss)", *(f"{steps} steps at {rate}" for steps, rate in plan.ADAPT_ALL)]]
    for arm in plan.LAST:
        for run in (run for run in runs("books", f"last-{arm}") if run["seed"] == plan.CHOOSING):
            values = [[when_all_adapt(*setting, key)(run) for key in ("acc", "loss")]
                      for setting in plan.ADAPT_ALL]
            rows.append([named(run["arm"]), *map("{0[0]:.3f} ({0[1]:.3f})".format, values)])
    return markdown(rows)


def last_table():
    """Differences of the last fifths, of the seeds that did not choose a rate.

    All parameters adapt at the rate that was best for LM alone in the seed that chose.
    """
    def of_others(measure):
        return lambda run: math.nan if run["seed"] == plan.CHOOSING else measure(run)

    measures = [LOSS, *ACCURACIES]
    for lm_alone in (run for run in runs("books", "last-lm") if run["seed"] == plan.CHOOSING):
        for steps, settings in itertools.groupby(plan.ADAPT_ALL, key=lambda setting: setting[0]):
            best = min(settings, key=lambda setting: when_all_adapt(*setting, "loss")(lm_alone))
            label = f"the same after {steps} steps of all parameters, the backbone at {best[1]}"
            measures.append((label, when_all_adapt(*best, "acc"), ".3f"))
    return differences_table("books", LAST_PAIRS, [(label, of_others(measure), form)
                                                   for label, measure, form in measures])


def ner_table(corpus, columns, rows):
    """F1 of no model and of vanilla training, and differences of the columns (arm, baseline)."""
    table = [["", "no model", "vanilla", *(f"{named(arm)} - {named(base)}" for arm, base in columns)]]
    for label, measure, no_model in rows:
        of_words = spread("books", BASELINE, no_model, ".1f").partition(" ±")[0] if no_model else ""
        table.append([label, of_words, spread(corpus, BASELINE, measure, ".1f"),
                      *compared(corpus, columns, measure, ".1f", has_interval="1,000" not in label)])
    return markdown(table)


def layer_ranges(layers):
    """["00", "01", "02", "05"] as "00-02, 05"."""
    ranges = []
    for layer in layers:
        if ranges and int(layer) == int(ranges[-1][-1]) + 1:
            ranges[-1] = [ranges[-1][0], layer]
        else:
            ranges.append([layer])
    return ", ".join(map("-".join, ranges))


def phases_table(corpus, arms):
    """How many curves (layers or heads x seeds) rise and then fall, and by how much of the peak, by kind.

    The last column is of all runs, of these arms and all others; kinds without any such curve are left out.
    """
    groups = {named(arm): runs(corpus, arm) for arm in arms}
    groups["all runs"] = sum(evidence.read(FOLDER).values(), [])
    rows = [["", *groups]]
    curves = [finished.layer_curves(group) for group in groups.values()]
    kinds = {kind: finished.LABELS[kind] for kind in curves[0]}
    if "entropy" in kinds:
        kinds = {"entropy/head": "attention entropy, head by head", **kinds}
        for of_group, group in zip(curves, groups.values()):
            of_group["entropy/head"] = head_curves(group)
    for kind, label in kinds.items():
        cells = []
        for of_group in curves:
            by_layer = of_group.get(kind, {})
            results = [(layer[:2], rises_and_falls(*c)) for layer, of_layer in by_layer.items()
                       for c in of_layer]
            do = [(layer, p) for layer, p in results if p]
            cell = f"{len(do)} of {len(results)}"
            if do:
                peaks = sorted(p["peak"] for _, p in do)
                fall = np.median([p["fall"] for _, p in do])
                cell += (f": layers {layer_ranges(sorted({layer for layer, _ in do}))}, "
                         f"peak at {peaks[len(peaks) // 2]}, falls by {fall:.0%}")
            cells.append(cell)
        if not cells[-1].startswith("0 of"):
            rows.append([label, *cells])
    return markdown(rows, right=False)


def speedup_table(corpus, arms):
    """How much sooner an arm reaches the last loss that it and vanilla training all reach, in FLOPs."""
    rows = [["", "loss", "vanilla's FLOPs / its own", "95% interval"]]
    for arm in arms:
        of_both = {run["seed"] for run in runs(corpus, arm)} & {run["seed"] for run in runs(corpus, BASELINE)}
        groups = [[run for run in runs(corpus, name) if run["seed"] in of_both] for name in (arm, BASELINE)]
        if not of_both:
            continue
        levels, speedups = speedup(groups)
        cells = ["no loss that all reach", "", ""]
        if "flops" in speedups:
            ratios, errors, _ = speedups["flops"]
            cells = [f"{levels[-1]:.3f}", f"{ratios[-1]:.2f}", count(of_both)]
            if len(of_both) > 2:
                t = stats.t.isf(0.025, len(of_both) - 1)
                ends = (ratios[-1] * math.exp(sign * t * errors[-1]) for sign in (-1, 1))
                cells[2] = "{:.2f} to {:.2f}".format(*ends)
        rows.append([named(arm), *cells])
    return markdown(rows)


def training_curve(run, mixed):
    """(steps, training loss in nats), a running mean over five lines; mixed: averaged with the query losses.

    The published trainer averages the losses of all micro-steps, whatever their kind, into one curve. A query
    loss is of N words, not of a vocabulary, so it is lower without any language being learned.
    """
    steps, losses = [], []
    for line in run["log"]:
        share = line.get("share/episodes", 0.0) if mixed else 0.0
        parts = [(1 - share, line.get("train/loss")), (share, line.get("meta/query_loss"))]
        if all(loss is not None for weight, loss in parts if weight > 0):
            steps.append(line["step"])
            losses.append(sum(weight * loss for weight, loss in parts if weight > 0))
    return np.array(steps[4:], float), np.convolve(losses, np.ones(5) / 5, "valid")


def sooner(pairs, mixed, fifths):
    """How many times sooner an arm reaches a training loss, in updates (FLOPs), as a cell.

    pairs: of its runs and the baseline's, whose loss is taken after so many fifths of the run. "at once": a
    run is below it at its first point.
    """
    ratios = []
    for curves in [[training_curve(run, mixed) for run in pair] for pair in pairs]:
        level = curves[1][1][fifths * len(curves[1][1]) // 5 - 1]
        if curves[0][1][0] <= level:
            return "at once"
        own, vanilla = (reach(losses, steps, level) for steps, losses in curves)
        ratios.append(math.log(vanilla / own))
    updates = [np.mean([run["log"][-1]["step"] for run in runs]) for runs in zip(*pairs)]
    ratio = math.exp(np.mean(ratios))  # all runs have spent as many FLOPs
    return "not reached" if math.isnan(ratio) else f"{ratio:.2f} ({ratio * updates[0] / updates[1]:.2f})"


def mixed_table(corpus, columns):
    """How much sooner an arm has five training losses: of text, and mixed with query losses."""
    rows = [["times as fast, updates (FLOPs)", "curve", "last loss (vanilla's)",
             *(f"at {i}/5 of vanilla's run" for i in range(1, 6))]]
    for arm, baseline in columns:
        own, others = ({run["seed"]: run for run in runs(corpus, name)} for name in (arm, baseline))
        pairs = [[own[seed], others[seed]] for seed in own if seed in others]
        for name, mixed in (("text", False), ("mixed", True)) if pairs else ():
            last = np.mean([[training_curve(run, mixed)[1][-1] for run in pair] for pair in pairs], axis=0)
            rows.append([f"{named(arm)} ({len(pairs)})", name, "{:.3f} ({:.3f})".format(*last),
                         *(sooner(pairs, mixed, i) for i in range(1, 6))])
    return markdown(rows, right=False)


# ---- the figure ----

COLORS = {"share-0": "#2c6fbb", "share-10": "#e08e2b", "share-50": "#c0392b", "late": "#8e44ad",
          "batch": "#27ae60", "half": "#7f8c8d"}


def dose_panel(ax, title, lines):
    """Against the share of episodes: each run a dot, open on a dashed line, which joins the arms' means.

    A diamond is the mean of "late, light", a triangle that of half as long, which reads as much text as 50%.
    """
    for label, measure, style in lines:
        points = [(int(arm.removeprefix("share-")), y) for arm in plan.DOSES
                  for name in (arm, arm.replace("share", "meta"))  # the same, with seeds 21 to 26
                  for y in map(measure, runs("books", name)) if not math.isnan(y)]
        shares = sorted({share for share, _ in points})
        means = [np.mean([y for x, y in points if x == share]) for share in shares]
        ax.plot(shares, means, label=label, **style)
        filled = {"mfc": "none"} if style.get("ls") == "--" else {}
        ax.plot([x for x, _ in points], [y for _, y in points], "o", color=style["color"], ms=3, **filled)
        for arm, share, marker in (("late", 5, "D"), ("half", 50, "v")):
            values = [y for y in map(measure, runs("books", arm)) if not math.isnan(y)]
            if values:
                ax.plot(share, np.mean(values), marker, color=style["color"], mfc="none", ms=6)
    ax.set(xlabel="share of episodes, %", title=title)
    if len(lines) > 1:
        low, high = ax.get_ylim()
        ticks = [y for y in ax.get_yticks() if low <= y <= high]
        ax.set_ylim(low - 0.8 * (high - low), high)  # room for the legend
        ax.set_yticks(ticks)
        ax.legend(loc="lower left")


def ner_panel(ax):
    """F1 by few sentences."""
    lines = [(f"{mode}, {label}", ner(mode, plan.FEW, GROUPS[group]), {"color": color, "ls": dashes})
             for label, group, color in (("English", "English", "#1b4f72"),
                                         ("zero-shot", "zero-shot, all six", "#5dade2"))
             for mode, dashes in (("full", "-"), ("head", "--"))]
    dose_panel(ax, "F1 on NER, %, few sentences", lines)


def over_time_panel(ax, kind, title, legend):
    curves = []
    for arm, color in COLORS.items():
        by_layer = finished.layer_curves(runs("books", arm)).get(kind, {})
        means = [finished.mean_curve(of_layer) for of_layer in by_layer.values()]
        if means:
            curves.append(finished.mean_curve(means))
            style = "--" if arm == "batch" else "-"  # it lies on vanilla's
            ax.plot(*curves[-1], color=color, ls=style, label=named(arm))
    ax.set(xlabel="updates", title=title, ylim=drawing.y_limits(curves))
    if legend:
        ax.legend()


def domains_panel(ax):
    for arm in filter(partial(runs, "books"), ARMS):
        found = [np.subtract(*paired("books", arm, measure)) for _, measure, _ in domain_losses("books")]
        for y, values in enumerate(found):
            ax.plot(values, [y] * len(values), ".", color=COLORS[arm], ms=5)
        ax.plot([], [], ".", color=COLORS[arm], label=named(arm))
    labels = [label.removeprefix("loss on ") for label, _, _ in domain_losses("books")]
    ax.set_yticks(range(len(labels)), labels)
    ax.axvline(0, color="gray", lw=0.6)
    ax.set(xlabel="nats above vanilla", title="loss by domain")
    ax.legend()


def figure():
    """Dose and response, and the probes over training."""
    loss = [("", LOSS[1], {"color": "black"})]
    accuracies = [(label.removeprefix("accuracy on "), measure, {"color": color, "ls": dashes})
                  for (label, measure, _), (color, dashes) in zip(ACCURACIES, itertools.product(
                      ("#2c6fbb", "#c0392b"), ("-", "--")))]
    panels = [partial(dose_panel, title="validation loss, nats", lines=loss),
              partial(dose_panel, title="query accuracy", lines=accuracies)]
    if any(run["ner"] for run in runs("books", BASELINE)):
        panels.append(ner_panel)
    panels += [domains_panel,
               partial(over_time_panel, kind="rank/resid", title=finished.LABELS["rank/resid"], legend=False),
               partial(over_time_panel, kind="entropy", title=finished.LABELS["entropy"], legend=True)]
    return drawing.draw([("", panels)], size=(3.4, 2.7), font=10)


# ---- README.md and details.md ----

ARMS = ("share-10", "share-50", "late", "batch")


CONTROL = [*((arm, "vanilla") for arm in ("half-0.1", "half-0.5", "word-query-0.1")),
           ("half-0.1", "word-query-0.1")]  # is it meta-learning


def questions_table():
    """The six questions of README.md, with what half of the micro-steps as episodes do."""
    doses = [*(arm for arm in plan.DOSES if arm != BASELINE), "late", "batch"]
    columns = [*to_vanilla(*doses), ("half", BASELINE), ("share-50", "half")]
    pairs, to_word = str(len(paired("books", "share-50", LOSS[1])[0])), ("meta-50", "meta-word")

    def effect(measure, form, columns=columns, pair=("share-50", BASELINE)):
        cell = compared("books", columns, measure, form)[columns.index(pair)]
        mean, _, ends = cell.removesuffix(")").partition(" (")
        return mean, ends, str(len(paired("books", pair[0], measure, pair[1])[0]))

    if not runs("books", "share-50"):
        return markdown([["question"]])
    accuracy = {label: measure for label, measure, _ in ACCURACIES}
    times = speedup_table("books", ["share-50"]).splitlines()[-1].split("|")
    new, every, *of_meta = ((gain, ends, str(len(seeds.split(",")))) for gain, ends, seeds in (
        estimate(gains) or (MISSING, "", "") for gains in (
            new_seeds(), zero_shot_gains("share-50", BASELINE, ALL_SEEDS) | new_seeds(),
            *(zero_shot_gains(*pair, plan.META_SEEDS)
              for pair in (to_word, ("meta-word", "meta-0"), WEIGHT_PAIRS[-1])))))
    heads = effect(heads_that_rise_and_fall, ".0f")
    return markdown([
        ["question", "50% episodes - vanilla, unless said otherwise", "effect", "95% interval", "pairs",
         "verdict"],
        ["Lower loss of text?", "nats", *effect(LOSS[1], ".3f"), "no: it costs, and in every domain"],
        ["The same loss sooner?", "vanilla's FLOPs / its own", times[3].strip(), times[4].strip(), pairs,
         "no: later; with query losses averaged in, the published settings look 1.4 to 2.0 times as fast "
         "(one seed)"],
        ["Better adaptation?", "accuracy at the better read-out, words never used as a class",
         *effect(better("new_"), ".3f"), "no"],
        ["", "the same, at the mask", *effect(accuracy["accuracy on held-out words, at the mask"], ".3f"),
         "yes: next-token prediction does not train the mask"],
        ["", "the same, before the word",
         *effect(accuracy["accuracy on held-out words, before the word"], ".3f"),
         "no: vanilla training adapts slightly better there"],
        ["More F1 on NER?", "zero-shot, full fine-tuning on few sentences; new seeds", *new,
         "yes, but less than half of what the first four seeds gained"],
        ["", "the same, all seeds and draws", *every,
         "yes, in one of eight settings; the first four seeds suggested it"],
        ["Is that *meta*-learning?", "accuracy at the mask, 50% episodes - masked word",
         *effect(accuracy["accuracy on held-out words, at the mask"], ".3f", META_PAIRS, to_word),
         "not at the mask: masked words do as well, for 0.15 nats less"],
        ["", "F1 as above, 50% episodes - masked word", *of_meta[0],
         "undecided, by the rule set beforehand: the interval barely includes 0"],
        ["", "F1 as above, masked word - vanilla", *of_meta[1],
         "none seen, so the gain is not called one of masked words"],
        ["", "F1 as above, 50% episodes - masked word at their weight", *of_meta[2],
         "undecided; added later. With these seeds 50% - vanilla includes 0 too"],
        ["Do rank and entropy rise, then fall?", "heads whose entropy does, %", *heads,
         "a minority of heads; rank never ends below its peak"],
    ], right=False)


def tables():
    """{name of a mark in README.md or details.md: Markdown}"""
    adaptation = [*ACCURACIES, *BETTER]
    losses = [LOSS, ("lowest validation loss", lowest("val/loss"), ".3f")]
    scarce = [*losses, *adaptation]
    doses = [*(arm for arm in plan.DOSES if arm != BASELINE), "late", "batch"]
    published = ("published-vanilla", "published-0.001", "published-0.01")
    rule = ("rule-vanilla", "rule-0.001", "rule-0.01")
    mixed = [*to_vanilla("share-10", "share-50"), *((arm, published[0]) for arm in published[1:]),
             *((arm, rule[0]) for arm in rule[1:])]
    at_best_rate = [(label, at_rates(key, *plan.RATES), ".3f") for label, key in KEYS.items()]
    to_half = [("half", BASELINE), ("share-50", "half")]
    ner_columns = [*to_vanilla(*ARMS), *to_half]
    return {
        "questions": questions_table(),
        "dose": values_table("books", [BASELINE, *doses, "half"],
                             [*READ, LOSS, *adaptation, PROBES[0], *PROBES[4:]]),  # not of weights
        "differences": differences_table("books", [*to_vanilla(*doses), *to_half],
                                         [LOSS, *adaptation, *PROBES]),
        "domains": differences_table("books", to_vanilla(*ARMS), domain_losses("books")),
        "speedup": speedup_table("books", ARMS),
        "mixed": mixed_table("books", mixed),
        "published": values_table("books", [BASELINE, *published], [LOSS, *QUERIES, *at_best_rate, *PROBES]),
        "rule": values_table("books", rule[1:], [*QUERIES, *OTHERS]),
        "rule-differences": differences_table("books", [(arm, rule[0]) for arm in rule[1:]],
                                              [LOSS, *ACCURACIES]),
        "found": found_table(),
        "control": differences_table("found", CONTROL, [LOSS, *ACCURACIES]),
        "meta": differences_table("books", META_PAIRS, [LOSS, *ACCURACIES]),
        "meta-ner": gains_table(META_PAIRS, plan.META_SEEDS),
        "weight": differences_table("books", WEIGHT_PAIRS[1:], [LOSS, *ACCURACIES]),
        "weight-ner": gains_table(WEIGHT_PAIRS, plan.META_SEEDS[:3]),
        "choice": choice_table(),
        "last": last_table(),
        "last-ner": gains_table(LAST_PAIRS, plan.LAST_SEEDS),
        "ner": ner_table("books", ner_columns, ner_summary()),
        "ner-again": again_table(),
        "ner-estimates": estimates_table(),
        "ner-pydocs": ner_table("pydocs", [*to_vanilla("share-50"), *to_half],
                                ner_rows([("full", plan.FEW, "few sentences")])),
        "phases": phases_table("books", [BASELINE, "half", *ARMS]),
        "foreign": differences_table("foreign", [*to_vanilla("share-50"), *to_half],
                                     [LOSS, *domain_losses("foreign"), *ACCURACIES]),
        "scarce-differences": differences_table("scarce", [*to_vanilla("share-50", "batch"), *to_half],
                                                scarce),
    }


def outline(text):
    """A details.md without prose: the tables that were run, headings and questions over them, the figure."""
    figure = r"|!\[.*" if runs("books", BASELINE) else ""
    parts = rf"^(?:#+ .*|\*\*[^*\n]*\?\*\*|<!-- [\w-]+ -->\n(?s:.*?)<!-- end -->{figure})"
    kept, below = [], 0  # from the last; below: the level of the last one kept: 7 of a question, 8 of a table
    for part in reversed(re.findall(parts, text, re.M)):
        level = {"#": part.find(" "), "*": 7}.get(part[0], 8)
        if NOT_RUN not in part and (level == 8 or level < below):
            kept.append(part)
            below = level
    return "\n\n".join(reversed(kept)) + "\n"


def main(folder, *options):
    global FOLDER
    FOLDER, quick = Path(folder), "--quick" in options
    for option in options:
        if option.startswith("--collect="):
            evidence.collect(Path(option.removeprefix("--collect=")), FOLDER)
    made = tables()
    for page in ("details.md",) if quick else ("README.md", "details.md"):
        text = filled((Path(__file__).parent if quick else FOLDER).joinpath(page).read_text(), made)
        (FOLDER / page).write_text(outline(text) if quick else text)
    if runs("books", BASELINE):
        figure().savefig(FOLDER / "figure.png")
        with Image.open(FOLDER / "figure.png") as image:  # 256 colours: a third of the bytes
            image.convert("RGB").quantize(256).save(FOLDER / "figure.png", optimize=True)


def filled(text, tables):
    """The text with each table between its marks."""
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        cells = [cell for line in table.splitlines()[2:] for cell in line.split("|")[2:-1]]
        if all(cell.strip() in ("", MISSING, "0 of 0") for cell in cells):
            table = NOT_RUN
        if mark:
            text = before + mark + table + "\n" + rest[rest.index("<!-- end -->"):]
    return text


if __name__ == "__main__":
    main(*sys.argv[1:])
