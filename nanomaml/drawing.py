"""The figure of finished runs: panels, each a function that draws on one matplotlib Axes."""
from functools import partial

import numpy as np

from nanomaml import compare, runs
from nanomaml.config import one_line

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")  # of the
# groups: Okabe & Ito's, which colour-blind readers tell apart
DASHES = {"-": "first layer", "--": "middle layer", ":": "last layer"}  # where colours show groups
MOST = 12  # panels


def styled(names):
    """[(name or group, its colour), ...]"""
    return [(name, COLORS[i % len(COLORS)]) for i, name in enumerate(names)]


def plain(name):
    """A name as text of a figure: one line, in which $ does not begin a formula."""
    return one_line(name, 60).replace("$", r"\$")


def styled_runs(groups):
    """[(run, how its line is drawn), ...] of all runs."""
    return [(run, {"color": color, "alpha": 1 if len(group) == 1 else 0.6})
            for group, color in styled(groups) for run in group]


def legend(ax, styles):
    """A legend of {label: how its line is drawn} under a panel, where it hides no curve."""
    handles = [ax.plot([], [], label=label, **style)[0] for label, style in styles.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, borderaxespad=4)


def y_limits(curves):
    """Limits for curves (steps, values) that ignore a run's first tenth, the fall from the random start."""
    shown = np.concatenate([values[steps >= 0.1 * steps[-1]] for steps, values in curves])
    margin = 0.05 * np.ptp(shown) or 0.5
    return shown.min() - margin, shown.max() + margin


def loss_panel(ax, groups, names, axis, mark):
    curves = []
    for run, style in styled_runs(groups):
        c = runs.curve(run, "val/loss")
        curves.append((c[axis], c["val/loss"]))
        ax.plot(*curves[-1], **style)
    ax.set(xlabel=runs.AXES[axis], ylabel="nats", title=f"validation loss{mark}", ylim=y_limits(curves))
    legend(ax, {name: {"color": color} for name, color in styled(names)})


def adaptation_panel(ax, groups, kind):
    for run, style in styled_runs(groups):
        for read_out, (_, dashes) in runs.READ_OUTS.items():
            c = runs.curve(run, key := f"adapt/{read_out}_{kind}query_acc")
            ax.plot(c["step"], c[key], dashes, **style)
    ax.set(xlabel=runs.AXES["step"], title=f"query accuracy, {runs.WORDS[kind]}", ylim=(0, None))
    legend(ax, {where: {"color": "gray", "ls": dashes} for where, dashes in runs.READ_OUTS.values()})


def layers_panel(ax, kind, curves, names):
    """The first, middle and last layer of each group over each other. curves: `runs.layer_curves` of each."""
    shown = []
    for of_group, color in styled(curves):
        layers = list(of_group.get(kind, {}).values())
        places = {len(layers) - 1: ":", (len(layers) - 1) // 2: "--", 0: "-"}  # the same with few layers
        for place, dash in places.items() if layers else []:
            shown.append(runs.mean_curve(layers[place]))
            ax.plot(*shown[-1], dash, color=color)
    ax.set(xlabel=runs.AXES["step"], title=plain(runs.LABELS.get(kind, kind)), ylim=y_limits(shown))
    styles = {name: {"color": color} for name, color in styled(names)}
    legend(ax, styles | {label: {"color": "gray", "ls": dash} for dash, label in DASHES.items()})


def figure(groups, names):
    """All panels for which there are data, at most MOST, three in a row, at the width of a page."""
    names, found = list(map(plain, names)), compare.caveats(groups)
    axes = [axis for axis in runs.shared_axes(groups) if axis != "step"] or ["step"]
    marks = compare.mark(found, "other text", *compare.DOUBTS)
    panels = [partial(loss_panel, groups=groups, names=names, axis=axis, mark=marks) for axis in axes]
    panels += [partial(adaptation_panel, groups=groups, kind=kind) for kind in runs.WORDS
               if any(runs.last_values(groups, f"adapt/context_{kind}query_acc"))
               and not {"other text", "other instrument"} & found.keys()]
    curves = [runs.layer_curves(group) for group in groups]
    kinds = dict.fromkeys(kind for of_group in curves for kind in of_group)
    kinds = sorted(kinds, key=lambda kind: kind in list(runs.LABELS)[2:])  # a fork's come before the weights
    panels += [partial(layers_panel, kind=kind, curves=curves, names=names) for kind in kinds]
    return draw([("", panels[:MOST])], size=(2.6, 2.2), font=7)


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
            ax.set_title(f"({chr(ord('a') + i)}) {ax.get_title()}")
    return fig
