"""What a run writes while it goes: JSON lines, lines for the console, and, if asked to, Weights & Biases.

    {"step": 100, "tokens": 819200, "train/loss": 5.43, "lr": 0.0029, ...}      # one object a line

wandb never stops a run: where it is disabled or fails to start nothing is sent, and where it fails it warns.
"""
import json
import math
import os
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


def start_wandb(cfg, name, folder, run_id=None):
    """(send, finish) of a new wandb run, or of the run `run_id` continued; both do nothing if wandb is off.

    cfg: a dataclass with the fields wandb (a mode) and wandb_project. send(line): a dict of scalars, "step"
    among them; entropies of attention heads are also drawn as a heatmap.
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

        run = wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg), mode=cfg.wandb, dir=folder,
                         id=run_id, resume="allow")
        run.define_metric("*", step_metric="step")  # wandb's own step may not go back, as a resume does

        def send(line):
            if "entropy/00/00" in line:
                line = line | {"entropy/heatmap": wandb.Image(heatmap(line))}
            run.log(line)
        return guarded(send), guarded(run.finish)

    started = guarded(start)() if cfg.wandb != "disabled" else None
    return started or (lambda line: None, lambda: None)


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
