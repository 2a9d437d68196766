"""Where a run stands: counted while it trains, saved with the parameters, restored on a resume.

    progress, saved_cfg = resume(cfg, corpus, digests, learner, optimizers)  # None, None: out_dir is new
    checkpoint.save(out_dir, checkpoint_state(cfg, corpus, digests, learner, optimizers, progress), keep=2)
"""
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import data
import logs
from config import UserError

# These may differ from the checkpoint's on a resume: they do not change what is computed, or (device,
# dtype and compile) only how it rounds; init_from acts on a new run alone, max_steps on what is yet to come.
MAY_CHANGE_ON_RESUME = {
    "out_dir", "data", "init_from", "max_steps", "log_every", "eval_every", "eval_sequences", "eval_episodes",
    "probe_every", "probe_gradients", "checkpoint_every", "keep", "keep_every", "report", "wandb",
    "wandb_project", "device", "dtype", "compile",
}


INTERVAL = ("steps", "seconds", "waited", "tokens", "flops")


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds it whole, so a run may stop and resume between two log lines."""

    step: int = 0  # updates done
    tokens: int = 0  # of next-token prediction, over all ranks
    flops: int = 0  # counted, over all ranks
    seconds: float = 0.0  # of training; evaluation, probes and checkpoints do not count
    run_id: str = field(default_factory=lambda: os.urandom(4).hex())  # of wandb
    stuck_logs: int = 0  # log lines in a row whose query loss is at ln N
    # Since the last log line: steps, seconds of training and of these waiting for data on this rank;
    # tokens of all kinds and FLOPs over all ranks; and this rank's micro-steps of each kind.
    interval: dict = field(default_factory=lambda: dict.fromkeys(INTERVAL, 0))
    micro_steps: dict = field(default_factory=dict)
    # Tensors stay on the device, since reading them waits for it.
    sums: dict = field(default_factory=dict)  # {metric: (sum, micro-steps)} since the last log line
    skipped: torch.Tensor = field(default_factory=lambda: torch.zeros(2))  # updates skipped: in all, in a row
    gradient_grams: dict = field(default_factory=dict)  # of a probe at this step; a resume may finish it
    unlogged: list = field(default_factory=list)  # [file, line] of logs that could not be written

    def to(self, device):
        self.sums = {name: total.to(device) for name, total in self.sums.items()}
        self.skipped = self.skipped.to(device)
        return self

    def axes(self):
        """What each line of the logs begins with."""
        return {axis: getattr(self, axis) for axis in logs.AXES}

    def count(self, kind, tokens, lm_tokens, flops):
        """Counts a micro-step: its tokens, and those of them that a next-token loss read."""
        self.tokens += lm_tokens
        self.flops += flops
        self.interval["tokens"] += tokens
        self.interval["flops"] += flops
        self.micro_steps[kind] = self.micro_steps.get(kind, 0) + 1

    def finish_update(self, totals, is_bad, waited):
        """Adds an update's {metric: (sum, micro-steps)}, unless it `is_bad` and so skipped.

        waited: seconds that it waited for data.
        """
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
        """Means and rates since the last log line, for log.jsonl. peak_flops: what MFU is a share of."""
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


def data_digests(folder, corpus):
    """{what: digest} of the training data and their tokenizer, the same over a run and its resumes."""
    spec = data.tokenizer_spec(folder)
    spec = json.dumps({key: value for key, value in spec.items() if key != "name"}, sort_keys=True)
    return {"training data": corpus.digest(), "tokenizer": hashlib.sha256(spec.encode()).hexdigest()[:16]}


def what_ranks_share(cfg):
    """{what: value} that must be the same on all ranks: settings, code and PyTorch.

    Paths and the device may differ, since nodes may see one folder under several names.
    """
    own = {"out_dir", "data", "init_from", "wandb", "wandb_project", "device"}
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.name.encode() + path.read_bytes())
    settings = {key: value for key, value in asdict(cfg).items() if key not in own}
    return settings | {"the digest of the source files": code.hexdigest()[:16], "PyTorch": torch.__version__}


def checkpoint_state(cfg, corpus, digests, learner, optimizers, progress):
    """What a checkpoint holds: "model" as transformers loads it, and all else that a resume needs."""
    state = learner.state_dict()
    return {
        "model": learner.decoder.state_dict(),
        "learner": {name: p for name, p in state.items() if not name.startswith("decoder.")},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "optimizer_options": list(map(optimizer_options, optimizers)),
        "config": asdict(cfg), "corpus_tokens": corpus.tokens, "data_order": data.ORDER, "digests": digests,
        **vars(progress),
    }


def optimizer_options(optimizer):
    """What load_state_dict would silently replace: the class and the options of each group."""
    groups = [{key: group[key] for key in sorted(group) if key not in ("params", "lr")}
              for group in optimizer.param_groups]
    return repr((type(optimizer).__name__, groups))


def resume(cfg, corpus, digests, learner, optimizers):
    """Restores the newest good checkpoint of out_dir: its Progress and settings, or None, None without one.

    Refuses one whose settings differ in a field that matters, or whose data or parameters do, and one that
    went further than max_steps.
    """
    state = checkpoint.newest(cfg.out_dir, "optimizers")
    if state is None:
        for path in (Path(cfg.out_dir, "log.jsonl"), Path(cfg.out_dir, "probes.jsonl")):
            last = max((step or 0 for step, _ in logs.read_steps(path)), default=0)
            if last > 0:
                raise UserError(f"{path} holds a run up to step {last} whose checkpoints are gone: put one "
                                "back, take another --out_dir, or remove the file to start again")
        return None, None
    if "imported_from" in state["config"]:
        raise UserError(f"{cfg.out_dir} holds an imported model, no run to resume: take another --out_dir, "
                        f"with --init_from={cfg.out_dir} for its weights")
    saved_cfg = checkpoint.load_config(type(cfg), state)
    saved, now = asdict(saved_cfg), asdict(cfg)
    differences = [f"{key} = {saved[key]!r} there, {now[key]!r} here" for key in now
                   if key not in MAY_CHANGE_ON_RESUME and saved[key] != now[key]]
    if differences:
        raise UserError(f"{cfg.out_dir} holds a run with another config ({'; '.join(differences)}): take its "
                        "values, or another --out_dir")
    if cfg.max_steps < state["step"]:
        raise UserError(f"{cfg.out_dir} holds a run that has done {state['step']} steps, max_steps = "
                        f"{cfg.max_steps}: take at least as many, or another --out_dir")
    decay_end = cfg.meta_start + cfg.meta_decay * min(cfg.max_steps, saved["max_steps"])
    decays = cfg.meta_share > 0 and cfg.meta_decay > 0
    if cfg.max_steps != saved["max_steps"] and decays and state["step"] > decay_end:
        raise UserError(f"{cfg.out_dir}: with meta_decay = {cfg.meta_decay}, max_steps = {cfg.max_steps} in "
                        f"place of {saved['max_steps']} would change which updates before step "
                        f"{state['step']} read episodes: start a new run with --init_from={cfg.out_dir}")
    needed = {"learner", "optimizer_options", "corpus_tokens"}
    if not needed <= state.keys() or state.get("data_order") != data.ORDER:
        raise UserError(f"{cfg.out_dir} holds a run of an older version, whose checkpoints can be evaluated "
                        f"but not resumed: take another --out_dir, with --init_from={cfg.out_dir} for its "
                        "weights")
    if state["corpus_tokens"] != corpus.tokens:
        raise UserError(f"{cfg.out_dir} holds a run on {state['corpus_tokens']:,} training tokens, "
                        f"{cfg.data} has {corpus.tokens:,}: give its --data, or another --out_dir")
    others = [what for what, digest in state.get("digests", digests).items() if digest != digests[what]]
    if others:
        raise UserError(f"{cfg.out_dir} holds a run with other data than {cfg.data} "
                        f"({' and '.join(others)}): give its --data, or another --out_dir")
    if state["optimizer_options"] != list(map(optimizer_options, optimizers)):
        raise UserError(f"{cfg.out_dir} holds a run with other optimizers: take another --out_dir")
    try:
        parameters = {f"decoder.{name}": p for name, p in state["model"].items()} | state["learner"]
        learner.load_state_dict(parameters)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for p, of_p in optimizer.state.items():  # PyTorch does not look
                for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & of_p.keys():
                    if of_p[name].shape != p.shape:
                        raise ValueError(f"{name} of shape {tuple(of_p[name].shape)} for a parameter of "
                                         f"{tuple(p.shape)}")
            if len({frozenset(of_p) for of_p in optimizer.state.values()}) > 1:
                raise ValueError("the optimizer keeps other values of some parameters than of others")
        progress = Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state})
        for name, blank in vars(Progress()).items():
            if type(getattr(progress, name)) is not type(blank):
                raise TypeError(f"{name} is of type {type(getattr(progress, name)).__name__}, not "
                                f"{type(blank).__name__}")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{cfg.out_dir} holds a run with other parameters ({reason}): take another --out_dir"
                        ) from None
    return progress, saved_cfg


def require_same_step(progress, world, out_dir):
    """All ranks resume from the same step, or the run ends: they may see different folders."""
    if world > 1:
        steps = torch.tensor([progress.step, -progress.step])
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise UserError(f"ranks found checkpoints of steps {-steps[1]} to {steps[0]} in {out_dir}: all "
                            "nodes must share this folder")
