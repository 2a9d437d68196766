"""Where a run stands: counted while it trains, saved with the parameters, restored on a resume.

    progress, cfg = open_run(cfg, digests, learner, optimizers, device, lock)
    checkpoint.save(out_dir, state_of(cfg, digests, learner, optimizers, progress), keep=2)

Imports `ModelConfig` of model.py.
"""
import hashlib
import json
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from shlex import quote

import torch
import torch.distributed as dist

from model import ModelConfig
from nanomaml import bins, checkpoint, files, logs, ranks
from nanomaml.config import one_line, require
from nanomaml.tokenizer import read_spec

VERSION = 3  # of what a checkpoint holds besides the model; another version is evaluated, not resumed
# These may differ from the checkpoint's on a resume: they do not change what is computed, or (device,
# dtype and compile) only how it rounds; init_from acts only on a new run, max_steps on what is yet to come.
MAY_CHANGE = {
    "out_dir", "data", "init_from", "max_steps", "log_every", "eval_every", "eval_sequences", "eval_episodes",
    "probe_every", "checkpoint_every", "keep", "keep_every", "report", "wandb",
    "wandb_project", "device", "dtype", "compile",
}
INTERVAL = ("steps", "seconds", "waited", "tokens", "flops")
# What a run writes besides checkpoints: a folder that holds one of these must be a run's.
WRITTEN = ("config.json", "run.json", "tokenizer.json", "report.md", "report.png", "ner.jsonl", *logs.NAMES)


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds it whole, so a run may stop and resume between two log lines."""

    step: int = 0  # updates done
    tokens: int = 0  # of next-token prediction, over all ranks
    flops: int = 0  # counted, over all ranks
    seconds: float = 0.0  # of training; evaluation, probes and checkpoints do not count
    run_id: str = field(default_factory=lambda: os.urandom(4).hex())  # of wandb
    stuck_logs: int = 0  # log lines in a row whose query loss is at ln N
    # Since the last log line: steps, seconds of training and, within them, of waiting for data on this rank;
    # tokens of all kinds and FLOPs over all ranks; and this rank's micro-steps of each kind.
    interval: dict = field(default_factory=lambda: dict.fromkeys(INTERVAL, 0))
    micro_steps: dict = field(default_factory=dict)
    # Tensors stay on the device, since reading them waits for it.
    sums: dict = field(default_factory=dict)  # {metric: (sum, micro-steps)} since the last log line
    skipped: torch.Tensor = field(default_factory=lambda: torch.zeros(2))  # updates skipped: in all, in a row
    unlogged: list = field(default_factory=list)  # [file, line] of logs that could not be written

    resumed_at = None  # the step of the checkpoint that this process began from, and its max_steps
    old_max_steps = None

    def axes(self):
        """What each line of the logs begins with."""
        return {axis: getattr(self, axis) for axis in ("step", "tokens", "flops", "seconds")}

    def is_due(self, interval, last):
        """Is what comes every `interval` updates (0: never) and after the `last` due? Not on a resume."""
        return interval > 0 and self.step != self.resumed_at and (
            self.step % interval == 0 or self.step == last)

    def count(self, kind, tokens, lm_tokens, flops):
        """Counts a micro-step: its tokens, and how many of them a next-token loss read."""
        self.tokens += lm_tokens
        self.flops += flops
        self.interval["tokens"] += tokens
        self.interval["flops"] += flops
        self.micro_steps[kind] = self.micro_steps.get(kind, 0) + 1

    def finish_update(self, totals, is_bad, waited):
        """Adds an update's {metric: (sum, micro-steps)} unless it `is_bad`; waited: seconds for data."""
        for name, total in totals.items():
            self.sums[name] = self.sums.get(name, 0) + total.where(is_bad == 0, 0)
        self.skipped = torch.stack((self.skipped[0] + is_bad, (self.skipped[1] + 1) * is_bad))
        self.step += 1
        self.interval["steps"] += 1
        self.interval["waited"] += waited

    def add_seconds(self, seconds):
        self.seconds += seconds
        self.interval["seconds"] += seconds

    def interval_metrics(self, peak_flops):
        """Means and rates since the last log line, for log.jsonl. peak_flops: what MFU is relative to."""
        interval, sums = self.interval, {name: total.tolist() for name, total in self.sums.items()}
        return {
            **{name: total / count for name, (total, count) in sums.items() if count},
            **{f"share/{kind}": n / sum(self.micro_steps.values()) for kind, n in self.micro_steps.items()},
            "tok_per_s": interval["tokens"] / interval["seconds"],
            "mfu": interval["flops"] / interval["seconds"] / peak_flops,
            "data_wait": interval["waited"] / interval["seconds"],
            "skipped": int(self.skipped[0]),
        }

    def start_interval(self):
        self.interval, self.micro_steps, self.sums = dict.fromkeys(INTERVAL, 0), {}, {}


def data_digests(folder):
    """{what: digest} of the tokenizer and of every Corpus that the run has opened, the same on a resume."""
    spec = {key: value for key, value in read_spec(folder).items() if key != "name"}
    tokenizer = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    corpora = {f"corpus {i}, {corpus.paths[0].name}": corpus.digest for i, corpus in enumerate(bins.opened)}
    return {"tokenizer": tokenizer} | corpora


def what_ranks_share(cfg):
    """{what: value} that must be the same on all ranks: settings, code and PyTorch.

    Paths and the device may differ, since nodes may see one folder under several names. Code is every source
    file that is imported by now, except Python's own and installed packages.
    """
    own, code = {"out_dir", "data", "init_from", "wandb", "wandb_project", "device"}, hashlib.sha256()
    foreign = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    modules = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    for name, path in sorted(modules.items()):
        is_installed = path and {"site-packages", "dist-packages"} & {*Path(path).parts}
        if path and os.path.isabs(path) and not path.startswith(foreign) and not is_installed:
            code.update(name.encode() + Path(path).read_bytes())
    settings = {key: value for key, value in asdict(cfg).items() if key not in own}
    return settings | {"the digest of the source files": code.hexdigest()[:16], "PyTorch": torch.__version__}


def optimizer_options(optimizer):
    """What load_state_dict would silently replace: the class and the options of each group."""
    groups = [{key: group[key] for key in sorted(group) if key not in ("params", "lr")}
              for group in optimizer.param_groups]
    return repr((type(optimizer).__name__, groups))


def initial_weights(cfg):
    """The decoder's weights in init_from, of the same shape and tokenizer; None if empty, or on a resume."""
    if not cfg.init_from or checkpoint.paths(cfg.out_dir):
        return None
    state, source = checkpoint.load(cfg.init_from), Path(cfg.init_from)
    folder = source if source.is_dir() else source.parent
    require((folder / "tokenizer.json").exists(), f"init_from = {source}: no tokenizer.json beside it says "
            "which tokenizer it has; give the checkpoint in its run's folder")
    theirs, ours = read_spec(folder), read_spec(cfg.data)
    require(theirs.get("tokenizer", theirs) == ours.get("tokenizer", ours),
            f"init_from = {source} has the tokenizer {theirs['name']}, {cfg.data} has another "
            f"({ours['name']}): prepare the data with --tokenizer={quote(str(folder))}")
    saved = asdict(checkpoint.load_config(ModelConfig, state))
    differences = [f"{key} = {value} there, {getattr(cfg, key)} here" for key, value in saved.items()
                   if value != getattr(cfg, key) and key != "context"]
    require(not differences, f"init_from = {source} holds another model ({'; '.join(differences)}): use its "
                             "values")
    return state["model"]


def state_of(cfg, digests, learner, optimizers, progress):
    """What a checkpoint holds: "model" as transformers loads it, and everything else that a resume needs."""
    state = learner.state_dict()
    return {
        "model": learner.decoder.state_dict(),
        "learner": {name: p for name, p in state.items() if not name.startswith("decoder.")},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "optimizer_options": list(map(optimizer_options, optimizers)),
        "config": asdict(cfg), "digests": digests, "version": VERSION,
        **{f.name: getattr(progress, f.name) for f in fields(progress)},
    }


def restore(cfg, digests, learner, optimizers):
    """(Progress, settings) of the newest good checkpoint, (None, None) without; refuses another run."""
    state = checkpoint.newest(cfg.out_dir, "optimizers")
    if state is None:
        for path in (Path(cfg.out_dir, name) for name in logs.NAMES):
            steps = [line["step"] for line in files.read_jsonl(path, "step", skip_damaged=True)]
            last = max(steps, default=0)
            require(last <= 0, f"{path} holds a run up to step {last} whose checkpoints are gone: put one "
                               "back, give another --out_dir, or remove the file to start again")
        return None, None

    def refuse_if(is_so, what):
        require(not is_so, f"{cfg.out_dir} holds {what}. Another --out_dir starts a new run, with "
                           f"--init_from={quote(cfg.out_dir)} from these weights; train.py "
                           f"{quote(cfg.out_dir)} resumes this one with its own settings")

    refuse_if("imported_from" in state["config"], "an imported model and not a run")
    refuse_if(state.get("version") != VERSION, "a run of another version of this code")
    saved_cfg, options = checkpoint.load_config(type(cfg), state), list(map(optimizer_options, optimizers))
    saved, now = asdict(saved_cfg), asdict(cfg)
    different = [f"{key} = {saved[key]!r} there, {now[key]!r} here" for key in now
                 if key not in MAY_CHANGE and saved[key] != now[key]]
    refuse_if(different, f"a run with another config ({'; '.join(different)})")
    refuse_if(cfg.max_steps < state["step"],
              f"a run that has done {state['step']} steps, max_steps = {cfg.max_steps}")
    try:  # it may come from anywhere, with anything in it
        theirs = dict(state.get("digests", {}))
        different = [what for what in sorted({*digests, *theirs}) if digests.get(what) != theirs.get(what)]
        refuse_if(different, f"a run with other data than {cfg.data} ({', '.join(different)})")
        refuse_if(state.get("optimizer_options") != options, "a run with other optimizers")
        weights = {f"decoder.{name}": p for name, p in state["model"].items()}
        learner.load_state_dict(weights | state["learner"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            check_moments(optimizer)
        refuse_if(options != list(map(optimizer_options, optimizers)), "a run with other optimizers")
        progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        check_progress(progress)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        refuse_if(True, f"a run with other parameters or counters ({one_line(error)})")
    return progress, saved_cfg


def check_moments(optimizer):
    """ValueError if moments do not fit their parameters, or only some have them: PyTorch does not check."""
    moments = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    fits = [of_p[name].shape == p.shape for p, of_p in optimizer.state.items() for name in moments & {*of_p}]
    fits += [float(of_p["step"]) >= 0 for of_p in optimizer.state.values() if "step" in of_p]
    if not all(fits) or len({frozenset(of_p) for of_p in optimizer.state.values()}) > 1:
        raise ValueError("an optimizer's moments do not fit its parameters")


def check_progress(progress):
    """TypeError or ValueError if a saved field is not what a run writes: lines may only go to the logs."""
    for name, blank in vars(Progress()).items():
        if type(getattr(progress, name)) is not type(blank):
            raise TypeError(f"{name} is of type {type(getattr(progress, name)).__name__}")
    counts = [progress.step, progress.tokens, progress.flops, progress.seconds, progress.stuck_logs,
              *progress.interval.values(), *progress.micro_steps.values()]
    pairs = [progress.skipped, *progress.sums.values()]
    numbers = [n for _, line in progress.unlogged for n in line.values()]
    if not (progress.interval.keys() == {*INTERVAL} and all(0 <= n < 2**63 for n in counts)
            and {type(n) for n in [*counts, *numbers]} <= {int, float}
            and all(type(name) is str for name in [*progress.sums, *progress.micro_steps])
            and all(pair.shape == (2,) and pair.dtype == torch.float32 for pair in pairs)
            and progress.skipped.isfinite().all()
            and all(file in logs.NAMES and type(line["step"]) is int and {*map(type, line)} == {str}
                    for file, line in progress.unlogged)):
        raise ValueError("its counters or unwritten lines are not what a run saves")


def require_own_folder(out_dir, data):
    """Refuses a folder that holds files with names that a run writes, but is not a run."""
    folder = Path(out_dir)
    require(folder.resolve() != Path(data).resolve(), f"out_dir = {out_dir} is the data's folder: change one")
    try:
        is_run = "out_dir" in (files.parse((folder / "config.json").read_bytes()) or {})
    except OSError:
        is_run = False
    foreign = [name for name in WRITTEN if (folder / name).exists()]
    require(not foreign or is_run or checkpoint.paths(folder), f"out_dir = {out_dir} holds "
            f"{', '.join(foreign)} but is not a run of train.py: name another folder, nothing is overwritten")


def open_run(cfg, digests, learner, optimizers, device, lock):
    """(Progress, settings) of the run in out_dir, resumed or new, with its folder ready to be written to.

    The settings are `cfg`, but a resumed run keeps the init_from that it started from. lock: an ExitStack in
    which rank 0 holds out_dir/lock. UserError if another process holds it, ranks see different folders, or
    the run there is another one.
    """
    writer = ranks.only_writer(Path(cfg.out_dir, "lock"), f"out_dir = {cfg.out_dir}")
    ranks.on_first(lambda: (require_own_folder(cfg.out_dir, cfg.data), lock.enter_context(writer)))
    restored, saved_cfg = restore(cfg, digests, learner, optimizers)
    progress = restored or Progress()
    rank, world = ranks.rank_and_world()
    if world > 1:
        steps = torch.tensor([progress.step, -progress.step])
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        require(steps[0] == -steps[1], f"ranks found checkpoints of steps {-steps[1]} to {steps[0]} in "
                                       f"{cfg.out_dir}: all nodes must share this folder")
    if restored:
        progress.resumed_at, progress.old_max_steps = progress.step, saved_cfg.max_steps
        cfg = replace(cfg, init_from=saved_cfg.init_from)
    if rank == 0:
        files.replace(Path(cfg.out_dir, "config.json"), json.dumps(asdict(cfg), indent=1) + "\n")
        files.replace(Path(cfg.out_dir, "tokenizer.json"), json.dumps(read_spec(cfg.data)))
        logs.truncate(cfg.out_dir, progress.step if restored else -1)
        if progress.step > 0 and not Path(cfg.out_dir, "log.jsonl").exists():
            print(f"note      {cfg.out_dir}/log.jsonl is missing: it begins after step {progress.step}")
    progress.sums = {name: total.to(device) for name, total in progress.sums.items()}
    progress.skipped = progress.skipped.to(device)
    return progress, cfg
