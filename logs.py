"""What a run writes while it goes: JSON lines, lines for the console, and, if asked to, Weights & Biases.

    {"step": 100, "tokens": 819200, "train/loss": 5.43, "lr": 0.0029, ...}      # one object a line

wandb never stops a run: where it is disabled or fails to start nothing is sent, and where it fails it warns
once and is left alone.
"""
import json
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import UserError

WANDB_MODES = ("disabled", "offline", "online")
AXES = ("step", "tokens", "flops", "seconds")  # in every line of a run; wandb draws over the first


def finite(line):
    """The dict `line` without numbers that are not finite: JSON has no NaN."""
    return {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}


def append(path, line):
    """Appends the dict `line` as JSON, on a line of its own: one that a kill or a full disk tore is removed.

    UserError where the file cannot be written.
    """
    try:
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(max(0, end - 2**24))
                torn = file.read().rpartition(b"\n")[2]
                if parse(torn) is None:
                    file.truncate(end - len(torn))
                else:  # whole but for its end
                    file.write(b"\n")
            file.write(json.dumps(finite(line)).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def parse(text):
    """The object in a line of a .jsonl file (bytes), None where it holds none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def read_steps(path):
    """[(step, line)] of a .jsonl file: its lines in bytes, without their ends; step None where there is none.

    [] where there is no such file.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    steps = [(parse(line) or {}).get("step") for line in lines]
    return [(step if type(step) is int else None, line) for step, line in zip(steps, lines) if line]


def truncate_log(path, step):
    """Drops the lines of a .jsonl file after `step`, which a resumed run writes again, and damaged ones."""
    lines = read_steps(path)
    kept = [line for at, line in lines if at is not None and at <= step]
    damaged = [number for number, (at, _) in enumerate(lines[:-1], 1) if at is None]
    if damaged:  # a torn last line is nothing unusual
        print(f"warning: {path} loses {len(damaged)} damaged lines, the first is line {damaged[0]}",
              file=sys.stderr, flush=True)
    if len(kept) < len(lines):
        replace(path, b"".join(line + b"\n" for line in kept))


def replace(path, content):
    """Writes a file anew, so that a crash or a full disk leaves the old one or the new one, whole."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


class RunLog:
    """Writes the lines of a run to its .jsonl files and to wandb, on the first rank alone.

    A line that cannot be written waits in progress.unlogged, which a checkpoint holds; `failure` says why.
    """

    def __init__(self, cfg, progress, rank, facts):
        self.folder, self.waiting, self.is_first = Path(cfg.out_dir), progress.unlogged, rank == 0
        self.failure = None  # the UserError of the first line that could not be written
        self.send, self.finish = (lambda line: None), (lambda: None)
        if self.is_first:
            self.write_waiting()
            self.send, self.finish = start_wandb(cfg, self.folder.name, cfg.out_dir, progress.run_id, facts)

    def write(self, name, line):
        if self.is_first:
            line = finite(line)
            self.waiting.append([name, line])
            self.write_waiting()
            self.send(line)

    def write_waiting(self):
        try:
            while self.waiting:
                name, line = self.waiting[0]
                append(self.folder / name, line)
                del self.waiting[0]
        except UserError as error:
            self.failure = self.failure or error


# ---- the console ----


class Console:
    """A text stream whose failure is told once, on stderr, and else goes unheard."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except OSError as error:
            with suppress(OSError):  # what is still buffered goes there too, at the latest when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            with suppress(OSError):
                print(f"warning: nothing more is printed ({error.strerror}); the run goes on",
                      file=sys.__stderr__, flush=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def lasting_console():
    """While it lasts, a reader that went away (`| head`) or a full disk under the output ends nothing."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


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
    has_failed = False

    def guarded(call):
        def attempt(*args):
            nonlocal has_failed
            try:
                return None if has_failed else call(*args)
            except Exception as error:
                has_failed = True
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

        def finish():
            guarded(run.finish)()
            if has_failed:  # else its exit handler prints a traceback
                with suppress(Exception):
                    wandb.teardown()

        for line in earlier_lines(folder) if run_id else []:
            update_best(best, line) if run.resumed else send(line)
        return guarded(send), finish

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
