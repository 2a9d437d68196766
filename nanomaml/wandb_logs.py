"""Weights & Biases: a run's lines are sent there too, and its failures never stop the run."""
import re
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Literal

import numpy as np

from nanomaml.files import read_jsonl

Wandb = Literal["disabled", "offline", "online"]
HEAD = re.compile(r"(.+/\d\d+)/\d\d+")  # <what>/<layer>/<head>


def start_wandb(cfg, name, folder, run_id=None, facts=None):
    """(send, finish) of a new wandb run, or of the run `run_id` continued; both do nothing if wandb is off.

    cfg: a dataclass with the fields wandb (a mode) and wandb_project; facts: shown in wandb's config besides
    its fields. send(line): a dict of scalars, "step" among them. The heads of a layer are sent as their mean,
    entropies also as a heatmap: a panel for each head would make hundreds.

    If wandb does not know what the run did before, since it was offline or off then, the lines of the
    logs in `folder` are sent first: `wandb sync` lets the newest part of a run replace the others.
    """
    has_failed = False

    def guarded(call):
        def attempt(*args):
            nonlocal has_failed
            try:
                return None if has_failed else call(*args)
            except Exception as error:
                has_failed = True
                print(f"warning: wandb failed, the run goes on: {type(error).__name__}: {error}",
                      file=sys.stderr, flush=True)
        return attempt

    def start():
        import wandb

        run = wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg) | (facts or {}), dir=folder,
                         mode=cfg.wandb, id=run_id, resume="allow" if cfg.wandb == "online" else None)
        run.define_metric("*", step_metric="step")  # wandb's own step may not go back, as a resume does
        for axis in ("step", "tokens", "flops", "seconds"):  # by name: axes to choose, not curves over "step"
            run.define_metric(axis)

        def send(line):
            image = {"entropy/heatmap": wandb.Image(heatmap(line))} if "entropy/00/00" in line else {}
            run.log(layer_means(line) | image)

        def finish():
            guarded(run.finish)()
            if has_failed:  # otherwise its exit handler prints a traceback
                with suppress(Exception):
                    wandb.teardown()

        logs = ("probes.jsonl", "log.jsonl") if run_id and not run.resumed else ()
        earlier = [line for log in logs for line in read_jsonl(f"{folder}/{log}", "step")]
        for line in sorted(earlier, key=lambda line: line["step"]):
            send(line)
        return guarded(send), finish

    started = guarded(start)() if cfg.wandb != "disabled" else None
    return started or (lambda line: None, lambda: None)


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
