"""The figure of finished runs: panels, each a function that draws on one matplotlib Axes."""
from functools import partial

import numpy as np

from nanomaml import phases, runs
from nanomaml.config import one_line
from nanomaml.stats import speedup

COLORS = ("#c0392b", "#2c6fbb")  # of the groups
MARKERS = {"start": ("v", "start of the rise"), "peak": ("^", "peak"), "settled": ("s", "90% of the fall")}
MARKER_STYLE = {"mec": "black", "mew": 0.4, "lw": 0}


def plain(name):
    """A name as text of a figure: one line, and a $ begins no formula."""
    return one_line(name, 60).replace("$", r"\$")


def styled_runs(groups):
    """[(run, how its line is drawn), ...] of all runs."""
    return [(run, {"color": color, "alpha": 1 if len(group) == 1 else 0.6})
            for group, color in zip(groups, COLORS) for run in group]


def legend(ax, styles, **where):
    """A legend of {label: how its line is drawn}, whatever the panel shows."""
    ax.legend(handles=[ax.plot([], [], label=label, **style)[0] for label, style in styles.items()], **where)


def y_limits(curves):
    """Limits for curves (steps, values) without the first tenth of a run: the fall from the random start."""
    shown = np.concatenate([values[steps >= 0.1 * steps[-1]] for steps, values in curves])
    margin = 0.05 * np.ptp(shown) or 0.5
    return shown.min() - margin, shown.max() + margin


def loss_panel(ax, groups, names, axis):
    losses = []
    for run, style in styled_runs(groups):
        c = runs.curve(run, "val/loss")
        losses.append(c["val/loss"])
        ax.plot(c[axis], losses[-1], **style)
    # From the second evaluation: the fall from the untrained model would flatten the rest.
    low, high = min(y.min() for y in losses), max(y[:2][-1] for y in losses)
    margin = 0.04 * (high - low) or 0.1
    ax.set(xlabel=runs.AXES[axis], ylabel="nats", title="validation loss", ylim=(low - margin, high + margin))
    legend(ax, {name: {"color": color} for name, color in zip(names, COLORS)})


def speedup_panel(ax, names, levels, speedups):
    for axis, color in zip(speedups, ("black", "#8e44ad", "#27ae60", "#d68910")):
        y, errors, _ = speedups[axis]
        ax.plot(levels, y, color=color, label=runs.AXES[axis])
        ax.fill_between(levels, y / np.exp(errors), y * np.exp(errors), color=color, alpha=0.12, lw=0)
    ax.axhline(1, color="gray", lw=0.6)
    ax.invert_xaxis()
    ax.set(xlabel="validation loss, nats", ylabel="ratio", title=f"speedup of {names[0]} to equal loss")
    ax.legend()


def adaptation_panel(ax, groups, kind):
    for run, style in styled_runs(groups):
        for read_out, (_, dashes) in runs.READ_OUTS.items():
            c = runs.curve(run, key := f"adapt/{read_out}_{kind}query_acc")
            ax.plot(c["step"], c[key], dashes, **style)
    ax.set(xlabel=runs.AXES["step"], title=f"query accuracy, {runs.WORDS[kind]}", ylim=(0, None))
    legend(ax, {where: {"color": "gray", "ls": dashes} for where, dashes in runs.READ_OUTS.values()})


def domains_panel(ax, groups, names):
    keys = runs.domain_keys(groups)
    y = np.arange(len(keys))
    for i, (group, color) in enumerate(zip(groups, COLORS)):
        final = np.array([runs.last_values([group], key)[0] for key in keys])  # (domains, runs)
        error = final.std(1, ddof=1) if len(group) > 1 else None
        offset = 0.2 * (i - (len(groups) - 1) / 2)
        ax.errorbar(final.mean(1), y + offset, xerr=error, fmt="o", ms=4, color=color, capsize=2)
    ax.set_yticks(y, [plain(key.removeprefix("val/")) for key in keys])
    ax.grid(axis="y", lw=0.3)
    ax.set(xlabel="nats", title="validation loss by domain", ylim=(len(keys) - 0.5, -0.5))
    legend(ax, {name: {"color": color} for name, color in zip(names, COLORS)})


def rise_and_fall(curves):
    """{start, peak, settled: mean step} of a layer; {} unless most runs diversify then compress there."""
    verdict, results = phases.majority(curves)
    if verdict != phases.RISE_AND_FALL or 2 * len(results) <= len(curves):
        return {}
    return {name: np.mean([result[name] for result in results]) for name in MARKERS}


def layers_panel(ax, kind, by_layer, limits, colors):
    for layer, curves in by_layer.items():
        steps, values = runs.mean_curve(curves)
        ax.plot(steps, values, color=colors[layer])
        for name, step in rise_and_fall(curves).items():
            y = np.interp(step, steps, values)
            ax.plot(step, y, marker=MARKERS[name][0], color=colors[layer], ms=4, **MARKER_STYLE)
    ax.set(xlabel=runs.AXES["step"], title=plain(runs.LABELS.get(kind, kind)), ylim=limits)


def layers_legend(ax, curves, colors):
    """An empty panel with the legend of a group's layers."""
    ax.axis("off")
    some = list(colors)[::-(-len(colors) // 12)]  # every n-th, if there are more than 12
    styles = {f"layer {layer}": {"color": colors[layer]} for layer in some}
    if any(rise_and_fall(of_layer) for by_layer in curves.values() for of_layer in by_layer.values()):
        styles |= {label: {"marker": marker, "color": "gray", **MARKER_STYLE}
                   for marker, label in MARKERS.values()}
    legend(ax, styles, loc="center", ncols=1 + (len(styles) > 8))


def figure(groups, names):
    """All panels for which there are data, at most three in a row, at the width of a page."""
    from matplotlib import colormaps  # here: matplotlib need not be there before

    names = list(map(plain, names))
    axes = [axis for axis in runs.shared_axes(groups) if axis != "step"] or ["step"]
    panels = [partial(loss_panel, groups=groups, names=names, axis=axis) for axis in axes]
    levels, speedups = speedup(groups) if len(groups) == 2 else ([], {})
    if speedups:
        panels.append(partial(speedup_panel, names=names, levels=levels, speedups=speedups))
    panels += [partial(adaptation_panel, groups=groups, kind=kind) for kind in runs.WORDS
               if any(runs.last_values(groups, f"adapt/context_{kind}query_acc"))]
    if runs.domain_keys(groups):
        panels.append(partial(domains_panel, groups=groups, names=names))
    parts, curves = [("", panels)], [runs.layer_curves(group) for group in groups]
    layers = sorted({layer for of_group in curves for by_layer in of_group.values() for layer in by_layer})
    colors = dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.95, len(layers)))))
    for name, of_group in zip(names, curves):
        panels = []
        for kind, by_layer in of_group.items():
            # One scale for both groups, so that they can be compared.
            limits = y_limits([c for g in curves for of_layer in g.get(kind, {}).values() for c in of_layer])
            panels.append(partial(layers_panel, kind=kind, by_layer=by_layer, limits=limits, colors=colors))
        if panels:
            panels.append(partial(layers_legend, curves=of_group, colors=colors))
        parts.append((f"{name}, by layer", panels))
    return draw(parts, size=(2.5, 1.9), font=7)


def draw(parts, size, font):
    """A figure of parts [(heading or "", [panel, ...])]: panels of a size in inches, three in a row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": font, "axes.titlesize": 1.07 * font, "legend.fontsize": 0.93 * font,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "lines.linewidth": font / 7, "axes.formatter.use_mathtext": True,
    }
    rows = [("" if i else heading, panels[i:i + 3])
            for heading, panels in parts for i in range(0, len(panels), 3)]
    columns = max(len(panels) for _, panels in rows)
    with rc_context(style):
        fig = Figure(figsize=(size[0] * columns, size[1] * len(rows)), layout="constrained", dpi=150)
        for part, (heading, panels) in zip(np.atleast_1d(fig.subfigures(len(rows), 1)), rows):
            if heading:
                part.suptitle(heading, fontsize=1.14 * font)
            for column, panel in enumerate(panels):
                panel(part.add_subplot(1, columns, column + 1))
        for i, ax in enumerate(ax for ax in fig.axes if ax.get_title()):
            letter = chr(ord("a") + i % 26) * (1 + i // 26)  # a, b, ... z, aa, bb, ...
            ax.set_title(f"({letter}) {ax.get_title()}")
    return fig
