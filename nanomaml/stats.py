"""Statistics of finished runs: t-tests, the speedup to equal loss, means and tables in Markdown."""
import math
import re

import numpy as np

from nanomaml.config import one_line
from nanomaml.runs import curve, in_pairs, shared_axes


def mean_std(values, form):
    """The mean, with ± standard deviation if there are several values, both in the number format `form`."""
    mean = format(np.mean(values), form)
    return mean + (f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else "")


def escaped(name):
    """A name that a user or a file gave, as text in Markdown, whatever characters it has."""
    return re.sub(r"[\\`*<>|$\[\]]", r"\\\g<0>", one_line(name))


def markdown(rows, right=True):
    """A table whose first row is the header; right: columns after the first are aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rule = ["-" * (width - 1) + (":" if i and right else "-") for i, width in enumerate(widths)]
    forms = [f"{'>' if i and right else '<'}{width}" for i, width in enumerate(widths)]
    lines = [" | ".join(map(format, row, forms)) for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(f"| {line} |" for line in lines)


def student_p(t, df):
    """P(|T| > t) of Student's t-distribution with df degrees of freedom, by integrating cos(x)^(df - 1)."""
    angles = [np.linspace(start, math.pi / 2, 20001) for start in (math.atan2(abs(t), math.sqrt(df)), 0)]
    tail, whole = (np.trapezoid(np.cos(x) ** (df - 1), x) for x in angles)
    return float(tail / whole)


def difference(a, b, paired):
    """(mean(a) - mean(b), its standard error, p of a t-test, paired or Welch's (1947), that it is 0)."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    delta = a.mean() - b.mean()
    if min(len(a), len(b)) < 2:
        return delta, math.nan, math.nan
    if paired:
        error, df = (a - b).std(ddof=1) / math.sqrt(len(a)), len(a) - 1
    else:
        var_a, var_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        error = math.sqrt(var_a + var_b)
        df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1)) if error else 1
    return delta, error, student_p(delta / error, df) if error else float(delta == 0)


def reach(losses, x, level):
    """Where a loss curve falls to `level`, interpolated in log-loss; nan if it never does or starts there."""
    i = int(np.argmax(losses <= level))
    if losses[i] > level or i == 0:
        return math.nan
    high, low = math.log(losses[i - 1]), math.log(losses[i])
    return x[i - 1] + (x[i] - x[i - 1]) * (high - math.log(level)) / (high - low)


def speedup(groups, n=41):
    """How much sooner the first group reaches a loss: (levels, {axis: (ratios, errors, p)}).

    levels: n losses that all runs reach, evenly spaced in log-loss. The first segment of a curve, from the
    untrained model to the next evaluation, is left out: the loss falls too far in it to interpolate. A ratio
    is what the second group needs, divided by what the first needs, in geometric means over runs. Errors are
    standard errors of the ratios' logs. p tests that the ratio at the last level is 1.
    ([], {}) if there is no loss that all runs reach.
    """
    curves = [[curve(run, "val/loss") for run in runs] for runs in groups]
    losses = [c["val/loss"] for of_group in curves for c in of_group]
    high, low = min(y[:2].min() for y in losses), max(y.min() for y in losses)
    if min(map(len, losses)) < 3 or low >= high:
        return np.array([]), {}
    levels = np.exp(np.linspace(math.log(high), math.log(low), n))
    levels[0], levels[-1] = high, low  # exactly, since rounding could put them out of a curve's reach
    speedups, finite = {}, np.ones(n, bool)
    for axis in shared_axes(groups):
        with np.errstate(divide="ignore"):
            first, second = (np.log([[reach(c["val/loss"], c[axis], level) for c in of_group]
                                     for level in levels]) for of_group in curves)  # (levels, runs)
        deltas, errors, p = np.transpose([difference(*runs, in_pairs(groups)) for runs in zip(second, first)])
        speedups[axis] = np.exp(deltas), errors, p[-1]
        finite &= np.isfinite(deltas)
    return levels[finite], {axis: (ratios[finite], errors[finite], p)
                            for axis, (ratios, errors, p) in speedups.items() if finite.any()}
