"""Phases of a curve: where it rises and falls by more than its noise, in words and numbers."""
import math
from collections import Counter
from pathlib import Path

import numpy as np

from nanomaml.files import read_jsonl
from nanomaml.runs import LABELS, layer_curves

RISE_AND_FALL = "diversify-then-compress"


def despiked_and_smoothed(t, y):
    """(y without single outliers and smoothed, the range that pure white noise would have in it).

    Estimated from how far points lie from the line between their neighbours; at least 1% of the median.
    """
    weight = (t[1:-1] - t[:-2]) / (t[2:] - t[:-2])  # of the right neighbour: steps may be unevenly spaced
    deviations = y[1:-1] - (1 - weight) * y[:-2] - weight * y[2:]
    deviations /= np.sqrt(1 + weight**2 + (1 - weight) ** 2)  # in units of one point's noise
    sigma = 1.4826 * np.median(np.abs(deviations))  # the median, since curvature at some points is not noise
    y = np.median([y, np.r_[y[:1], y[:-1]], np.r_[y[1:], y[-1:]]], axis=0)  # of each point and its neighbours
    width = 1 + 2 * (len(y) // 40)  # of a moving average, shorter at the ends
    window = np.ones(width)
    y = np.convolve(y, window, mode="same") / np.convolve(np.ones_like(y), window, mode="same")
    # The expected range of so many normal values; with few points sigma itself is uncertain.
    noise = 2 * sigma / math.sqrt(width) * math.sqrt(2 * math.log(len(y))) * (1 + 6 / len(y))
    return y, max(noise, 0.01 * np.median(np.abs(y)))


def turning_points(y, noise):
    """Indices where y turns, its two ends included; [] if it stays within the noise.

    From one to the next y changes by more than the noise, and never goes back by as much in between.
    """
    turns, direction = [], 0  # direction: 1 while rising, -1 while falling, 0 before the first change
    lowest = highest = extreme = 0  # extreme: the furthest point in the present direction
    for i in range(len(y)):
        if direction == 0:
            lowest, highest = i if y[i] < y[lowest] else lowest, i if y[i] > y[highest] else highest
            if y[highest] - y[lowest] > noise:
                direction, turns, extreme = (1, [lowest], i) if i == highest else (-1, [highest], i)
        elif direction * (y[i] - y[extreme]) > 0:
            extreme = i
        elif direction * (y[extreme] - y[i]) > noise:
            turns, extreme, direction = [*turns, extreme], i, -direction
    return [*turns, extreme] if direction else []


def phase(steps, values):
    """How a curve rises and falls: a dict of verdict, before, start, rise, peak, fall, settled and noise.

    verdict: "diversify-then-compress", "only rise", "only fall", "fall, then rise", "flat", or "fewer
    than 8 points". The rise goes from step `start` to step `peak`. The fall comes after it; 90% of it
    has happened at step `settled`. `before` is a fall before the start, as from a random initialisation.
    `rise`, `fall` and `before` are fractions of the level that they start from. Of several rises the largest
    that a fall follows counts or, if none, the largest. Single outliers and changes within the noise do
    not count.
    """
    t, y = np.asarray(steps, float), np.asarray(values, float)
    t, y = t[np.isfinite(y)], y[np.isfinite(y)]
    result = {"verdict": "fewer than 8 points", "before": 0.0, "start": None, "rise": 0.0, "peak": None,
              "fall": 0.0, "settled": None, "noise": 0.0}
    if len(y) < 8:
        return result
    y, noise = despiked_and_smoothed(t, y)
    turns = turning_points(y, noise)
    result |= {"verdict": "flat", "noise": float(noise / np.median(np.abs(y))) if y.any() else 0.0}

    def change(i, j):
        return float(abs(y[j] - y[i]) / abs(y[i])) if y[i] else math.inf

    rises = [k for k in range(len(turns) - 1) if y[turns[k + 1]] > y[turns[k]]]
    rise = max(rises, key=lambda k: (k + 2 < len(turns), y[turns[k + 1]] - y[turns[k]]), default=None)
    if rise is not None:
        start, peak = turns[rise:rise + 2]
        result |= {"verdict": "fall, then rise" if rise else "only rise", "start": int(t[start]),
                   "before": change(turns[rise - 1], start) if rise else 0.0,
                   "peak": int(t[peak]), "rise": change(start, peak)}
    if turns and (rise is None or rise + 2 < len(turns)):
        peak, lowest = turns[:2] if rise is None else turns[rise + 1:rise + 3]
        settled = peak + int(np.argmax(y[peak:] <= y[peak] - 0.9 * (y[peak] - y[lowest])))
        result |= {"verdict": "only fall" if rise is None else RISE_AND_FALL, "peak": int(t[peak]),
                   "fall": change(peak, lowest), "settled": int(t[settled])}
    return result


def majority(curves):
    """(the most frequent verdict, the phases of the runs that have it) of a layer's curves, one a run."""
    results = [phase(*c) for c in curves]
    verdict = Counter(result["verdict"] for result in results).most_common(1)[0][0]
    return verdict, [result for result in results if result["verdict"] == verdict]


def summary(folder):
    """For the console, a line on each kind of curve of a run: how many layers show each verdict."""
    lines, run = [], {"probes": read_jsonl(Path(folder, "probes.jsonl"), "step")}
    for kind, by_layer in layer_curves([run]).items():
        results = [phase(*of_run) for [of_run] in by_layer.values()]
        parts = [f"{verdict} in {n}" for verdict, n in Counter(p["verdict"] for p in results).most_common()]
        parts[0] += f" of {len(results)} layers"
        peaks = [p["peak"] for p in results if p["verdict"] == RISE_AND_FALL]
        when = f"; peaks from step {min(peaks)} to {max(peaks)}" if peaks else ""
        lines.append(f"{LABELS.get(kind, kind)}: {', '.join(parts)}{when}")
    is_long = any("fewer than 8" not in line for line in lines)
    return lines if is_long else ["fewer than 8 probes are too few for phases: lower probe_every"]
