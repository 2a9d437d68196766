"""What a run writes while it goes: JSON lines, lines for the console, and, if asked to, Weights & Biases.

    {"step": 100, "tokens": 819200, "train/loss": 5.43, "lr": 0.0029, ...}      # one object a line

wandb never stops a run: where it is disabled or fails to start nothing is sent, and where it fails it warns.
"""
import json
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

WANDB_MODES = ("disabled", "offline", "online")


def finite(line):
    """The dict `line` without numbers that are not finite: JSON has no NaN."""
    return {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}


def append(path, line):
    """Appends the dict `line` as JSON."""
    line = finite(line)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def truncate_log(path, step):
    """Drops the lines of a .jsonl file after `step`, and torn ones: a resumed run writes them again."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            pass
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


# ---- the console ----


def evaluation_line(step, metrics, probe):
    """An evaluation for the console, and the last probe: {} before the first, else with its "step"."""
    losses = {name: loss for name, loss in metrics.items() if "query" not in name}
    parts = [f"step {step:>6}", *(f"{name} {loss:.4f}" for name, loss in losses.items())]
    for name, label in (("val/query_acc", "query acc"), ("val/new_query_acc", "of new words")):
        parts += [f"{label} {metrics[name]:.3f}"] if name in metrics else []
    for prefix, label in (("rank/resid/", "effective rank"), ("entropy/", "attention entropy")):
        values = [value for name, value in probe.items() if name.startswith(prefix)]
        parts += [f"{label} {np.mean(values):.3g}"] if values else []
    if probe.get("step", step) != step:
        parts[-1] += f" (step {probe['step']})"
    return " | ".join(parts)


def training_line(progress, line):
    """`line` of log.jsonl for the console."""
    interval, parts = progress.interval, [f"step {progress.step:>6}"]
    parts += ["loss " + (f"{line['train/loss']:.4f}" if "train/loss" in line else "-")]
    if "meta/query_loss" in line:
        parts += [f"query {line['meta/query_loss']:.3f} acc {line.get('meta/query_acc', math.nan):.3f}"]
    parts += [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.2f}",
              f"{1000 * interval['seconds'] / interval['steps']:.0f} ms", f"{line['tok_per_s']:,.0f} tok/s",
              f"MFU {line['mfu']:.0%}"]
    parts += [f"{kind} {line[f'share/{kind}']:.0%}" for kind in progress.micro_steps if kind != "lm"]
    parts += [f"skipped {line['skipped']}"] * (line["skipped"] > 0)
    parts += [f"waited for data {line['data_wait']:.0%}"] * (line["data_wait"] > 0.05)
    return " | ".join(parts)


# ---- Weights & Biases ----


AXES = ("step", "tokens", "flops", "seconds")  # of a run's lines; the first is what panels are drawn over
HEAD = re.compile(r"(.+/\d\d+)/\d\d+")  # <what>/<layer>/<head>


def start_wandb(cfg, name, folder, run_id=None, facts=None):
    """(send, finish) of a new wandb run, or of the run `run_id` continued; both do nothing if wandb is off.

    cfg: a dataclass with the fields wandb (a mode) and wandb_project; facts: what wandb's config shows beside
    its fields. send(line): a dict of scalars, "step" among them. The heads of a layer are sent as their mean,
    entropies as a heatmap too: one panel for each head would be hundreds.

    Where wandb does not know what the run did before, since it was offline then (or off), the lines of the
    logs in `folder` are sent first: each part of a run is the whole run up to there, and `wandb sync`, which
    lets the newest part of a run replace the others, gives one.
    """
    def guarded(call):
        def attempt(*args):
            try:
                return call(*args)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                print(f"warning: wandb failed, the run goes on: {reason}", file=sys.stderr, flush=True)
        return attempt

    def start():
        import wandb

        run = wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg) | (facts or {}), dir=folder,
                         mode=cfg.wandb, id=run_id, resume="allow" if cfg.wandb == "online" else None)
        run.define_metric("*", step_metric="step")  # wandb's own step may not go back, as a resume does
        for axis in AXES:  # by name, so that they are no curves over "step" but axes to choose
            run.define_metric(axis)
        best = {}

        def send(line):
            image = {"entropy/heatmap": wandb.Image(heatmap(line))} if "entropy/00/00" in line else {}
            run.log(layer_means(line) | image)
            if update_best(best, line):  # define_metric's own minimum would start anew on a resume
                run.summary.update(best)

        for line in earlier_lines(folder) if run_id else []:
            update_best(best, line) if run.resumed else send(line)
        return guarded(send), guarded(run.finish)

    started = guarded(start)() if cfg.wandb != "disabled" else None
    return started or (lambda line: None, lambda: None)


def earlier_lines(folder):
    """What a run has logged so far, in order of the steps."""
    paths = [Path(folder, name) for name in ("probes.jsonl", "log.jsonl")]
    texts = [path.read_text(encoding="utf-8").splitlines() for path in paths if path.exists()]
    return sorted((json.loads(text) for text in sum(texts, [])), key=lambda line: line["step"])


def update_best(best, line):
    """Keeps in {"best/<metric>": value} the best of what is measured on held-out data; whether `line` has it.

    Accuracies and F1 are better when higher, losses when lower; standard errors have no best.
    """
    measured = [key for key in line if key.startswith("val/") and not key.endswith("_error")
                or key.endswith("dev_f1")]
    for key in measured:
        better = max if key.endswith(("_acc", "_f1")) else min
        best[f"best/{key}"] = better(line[key], best.get(f"best/{key}", line[key]))
    return bool(measured)


def layer_means(line):
    """`line` with <what>/<layer>, the mean over heads, instead of each <what>/<layer>/<head>."""
    heads = {}
    for key, value in line.items():
        if match := HEAD.fullmatch(key):
            heads.setdefault(match[1], []).append(value)
    rest = {key: value for key, value in line.items() if not HEAD.fullmatch(key)}
    return rest | {layer: sum(values) / len(values) for layer, values in heads.items()}


def heatmap(metrics):
    """The "entropy/<layer>/<head>" of `metrics` as an image of layers x heads, (height, width, 4) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only wandb needs it
    from matplotlib.figure import Figure

    names = sorted(name for name in metrics if name.startswith("entropy/"))
    layers = len({name.split("/")[1] for name in names})
    values = np.array([metrics[name] for name in names]).reshape(layers, -1)  # (L, H)
    figure = Figure(figsize=(1.5 + 0.35 * values.shape[1], 1.2 + 0.35 * layers), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # draws without a window
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, vmin=0, vmax=1, cmap="viridis"), label="attention entropy")
    axes.set(xlabel="head", ylabel="layer", xticks=range(values.shape[1]), yticks=range(layers))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
