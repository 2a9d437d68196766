"""Pretrains a small LLaMA with next-token prediction and first-order MAML on Subset-Masked-LM episodes, mixed.

    python train.py configs/demo.py                                      # a laptop: two cores, five minutes
    python train.py configs/11m.py configs/vanilla.py --out_dir=out/11m-vanilla    # files overlay each other, flags come last
    torchrun --standalone --nproc_per_node=8 train.py configs/570m.py    # eight GPUs

The same command goes on from the newest checkpoint in out_dir. Ctrl-C or SIGTERM finishes the step, writes a checkpoint and exits with 0.
"""
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import data
import probes
from config import UserError
from meta import Head, Learner
from model import Decoder, ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    out_dir: str = "out/run"  # checkpoints, logs and config.json go here; a run that is there already is resumed
    data: str = data.EMBEDDED  # folder of token bins; this default is prepared by itself where it is missing
    seed: int = 1  # of everything: weights, order of the data, episodes, which micro-step is which
    # optimisation
    max_steps: int = 6000  # length of the run in updates (optimizer steps)
    global_batch_size: int = 256  # sequences of an update, over all ranks and micro-steps
    batch_size: int = 16  # sequences of a micro-step on each rank
    lr: float = 3e-4  # peak learning rate
    warmup_steps: int = 2500  # updates of linear warm-up from 0; then linear decay to 0 at max_steps
    weight_decay: float = 0.1  # AdamW, on matrices only
    beta1: float = 0.9  # AdamW, decay of the mean gradient
    beta2: float = 0.95  # AdamW, decay of the mean squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0: off
    # episodes
    meta_share: float = 0.5  # probability that a draw is episodes, not next-token prediction; 0: off (vanilla)
    meta_draws: int = 2  # draws per update, each for an equal part of its micro-steps; so the mix is the same on any number of GPUs
    meta_start: int = 0  # updates before the first episode
    meta_weight: float = 1.0  # factor on the query loss
    ways: int = 32  # N, words to tell apart in an episode
    shots: int = 4  # K, support windows per word
    queries: int = 1  # Q, query windows per word
    window: int = 128  # tokens of a window, the mask at its end included
    episodes: int = 1  # episodes of a micro-step on each rank
    inner_steps: int = 10  # SGD steps of the inner loop
    inner_lr: float = 0.1  # their rate; for a linear head that starts at zero, about 25.6 / d_model
    adapt: str = "head"  # what the inner loop adapts: head, all, or a regular expression over names (model.*, head.*)
    first_order: bool = True  # False: second-order MAML, through the inner loop
    head_layers: int = 1  # layers of the episode head; 1: linear
    head_width: int = 128  # of the head's hidden layers
    head_start: str = "zero"  # the head's output layer at an episode's start: zero, or random (learned, one row per way, as published)
    # what is written, and when (in updates; the last one always counts; 0: never)
    log_every: int = 10  # training metrics
    eval_every: int = 250  # validation loss
    eval_sequences: int = 64  # validation sequences, of each domain
    probe_every: int = 100  # effective rank and attention entropy
    probe_gradients: bool = False  # the effective rank of the gradients too
    checkpoint_every: int = 500  # checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of this are kept too; 0: none
    wandb: str = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # project there
    # machine
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: str = "auto"  # of the matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it
    compile: bool | None = None  # torch.compile the layers; None: on CUDA

    def __post_init__(self):
        super().__post_init__()

        def need(ok, text):
            if not ok:
                raise UserError(text)

        for key in ("global_batch_size", "batch_size", "meta_draws", "shots", "queries", "episodes", "head_layers", "head_width",
                    "log_every", "eval_sequences", "keep"):
            need(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("seed", "max_steps", "warmup_steps", "weight_decay", "grad_clip", "meta_start", "meta_weight", "inner_steps",
                    "eval_every", "probe_every", "checkpoint_every", "keep_every"):
            need(getattr(self, key) >= 0, f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("lr", "inner_lr"):
            need(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        for key in ("beta1", "beta2"):
            need(0 <= getattr(self, key) < 1, f"{key} must lie in [0, 1), got {getattr(self, key)}")
        for key, choices in (("head_start", ("zero", "random")), ("wandb", ("disabled", "offline", "online")),
                             ("dtype", ("auto", "bfloat16", "float32"))):
            need(getattr(self, key) in choices, f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}")
        need(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        need(0 <= self.meta_share <= 1, f"meta_share must lie in [0, 1], got {self.meta_share}")
        need(self.ways >= 2, f"ways must be at least 2, got {self.ways}")
        need(2 <= self.window <= self.context, f"window = {self.window} must lie in 2 to context = {self.context}")
        need(self.global_batch_size % self.batch_size == 0,
             f"global_batch_size = {self.global_batch_size} must be a multiple of batch_size = {self.batch_size}")
        try:
            re.compile(self.adapt)
        except re.error as error:
            raise UserError(f"adapt = {self.adapt!r} is neither head, all nor a regular expression: {error}") from None


# May differ from the checkpoint on a resume: they do not change what is computed (device, dtype and compile change how it rounds).
FREE = {"out_dir", "data", "log_every", "eval_every", "eval_sequences", "probe_every", "probe_gradients", "checkpoint_every", "keep",
        "keep_every", "wandb", "wandb_project", "device", "dtype", "compile"}
MAX_SKIPPED = 10  # updates skipped in a row for a non-finite gradient that end a run
METRICS = ("train/loss", "meta/query_loss", "meta/query_acc", "meta/query_acc_unadapted", "meta/support_acc")
PEAK = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s by data sheet


def accumulation(cfg, world):
    """Micro-steps of an update on each of `world` ranks."""
    micro_steps, rest = divmod(cfg.global_batch_size, cfg.batch_size * world)
    if rest or micro_steps == 0:
        raise UserError(f"global_batch_size = {cfg.global_batch_size} must be a multiple of "
                        f"batch_size x ranks = {cfg.batch_size} x {world}")
    if cfg.meta_share > 0 and micro_steps % cfg.meta_draws:
        raise UserError(f"{micro_steps} micro-steps of an update (global_batch_size / (batch_size x ranks)) must be a multiple of "
                        f"meta_draws = {cfg.meta_draws}: lower meta_draws or batch_size")
    return micro_steps


def draw_kinds(cfg):
    """(max_steps, meta_draws) bool: which draws are episodes. A prefix of one series, so step n is the same whatever max_steps."""
    kinds = np.random.default_rng([cfg.seed, 2]).random((cfg.max_steps, cfg.meta_draws)) < cfg.meta_share
    kinds[:cfg.meta_start] = False
    return kinds


def batch_indices(cfg, kinds, step, micro, rank, world):
    """(is it episodes, range of numbers): what this rank works on in a micro-step.

    Next-token batches are numbered apart from episodes, so a hybrid run sees the sequences of a vanilla one, in the same order.
    Each draw covers the same set for any number of ranks.
    """
    if cfg.meta_share == 0:
        first = ((step * accumulation(cfg, world) + micro) * world + rank) * cfg.batch_size
        return False, range(first, first + cfg.batch_size)
    per_draw = accumulation(cfg, world) // cfg.meta_draws  # micro-steps
    draw, i = divmod(micro, per_draw)
    episode = bool(kinds[step, draw])
    before = int((kinds[:step] == episode).sum() + (kinds[step, :draw] == episode).sum())  # draws of this kind
    size = cfg.episodes if episode else cfg.batch_size
    first = (((before * per_draw) + i) * world + rank) * size
    return episode, range(first, first + size)


def lr_at(cfg, step):
    """Learning rate of the update that follows `step` others."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    return cfg.lr * (cfg.max_steps - step) / (cfg.max_steps - cfg.warmup_steps)


def pick_device(cfg):
    """(torch.device, torch.dtype) for cfg.device and cfg.dtype; each rank of a node takes a GPU of its own."""
    name, alone = cfg.device, int(os.environ.get("WORLD_SIZE", 1)) == 1
    if name == "auto":  # gloo, the only backend of ranks on a Mac, does not know MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if not alone and name not in ("cuda", "cpu"):
        raise UserError(f"device = {cfg.device!r} with several ranks: give cuda (each rank takes its own GPU) or cpu")
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"device must be auto, cuda, mps or cpu, got {name!r}")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError: whatever the backend raises
        raise UserError(f"device {name} is not to be had here: {str(error).splitlines()[0]}") from None
    if cfg.dtype != "auto":
        return device, getattr(torch, cfg.dtype)
    if device.type == "cpu":  # without these instructions bfloat16 is emulated, a hundred times slower than float32
        has = torch.cpu.get_capabilities()
        fast = has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16")
    else:
        fast = device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if fast else torch.float32


def peak_flops(device, dtype):
    """FLOP/s that MFU is measured against: the GPU's data sheet, or what a large matrix product reaches here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in PEAK.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=dtype)
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - start))
    return max(rates)


def build_learner(cfg, device, dtype):
    """(Learner, AdamW) of a fresh run."""
    generator = torch.Generator().manual_seed(cfg.seed)
    decoder = Decoder(cfg, generator)
    head = Head(cfg.d_model, cfg.head_layers, cfg.head_width, cfg.head_start, cfg.ways, generator)
    learner = Learner(decoder, head, cfg.adapt, cfg.inner_steps, cfg.inner_lr, cfg.first_order, dtype).to(device)
    params = list(learner.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return learner, torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


@torch.no_grad()
def evaluate(learner, domains, device, rank, world):
    """{"val/loss": mean over domains, "val/<domain>": ... where there are several}: cross-entropy in nats a token; ranks share the work."""
    totals = torch.zeros(2, len(domains), device=device)
    for i, batch in enumerate(domains.values()):
        for ids, targets in list(zip(batch.ids.split(8), batch.targets.split(8)))[rank::world]:
            loss, _ = learner(data.LMBatch(ids.to(device), targets.to(device)))
            totals[:, i] += torch.stack((loss * ids.numel(), loss.new_tensor(ids.numel())))
    if world > 1:
        dist.all_reduce(totals)
    losses = (totals[0] / totals[1]).tolist()
    by_domain = {f"val/{name}": loss for name, loss in zip(domains, losses)} if len(domains) > 1 else {}
    return {"val/loss": sum(losses) / len(losses)} | by_domain


def start_wandb(cfg, name, folder, run_id=None):
    """(log, finish) of a new wandb run, or of the run `run_id` continued. wandb never stops training: where it is off or fails to start
    they do nothing, and where they fail they warn."""
    def guarded(call):
        def attempt(*args):
            try:
                return call(*args)
            except Exception as error:
                print(f"warning: wandb failed, the run goes on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return attempt

    def start():
        import wandb
        run = wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg), mode=cfg.wandb, dir=folder, id=run_id, resume="allow")
        run.define_metric("*", step_metric="step")  # wandb's own step may not go back, as a resume does

        def send(line):
            if "entropy/00/00" in line:
                canvas = probes.heatmap(line).canvas
                canvas.draw()
                line = line | {"entropy/heatmap": wandb.Image(np.asarray(canvas.buffer_rgba()))}
            run.log(line)
        return guarded(send), guarded(run.finish)

    started = guarded(start)() if cfg.wandb != "disabled" else None
    return started or (lambda line: None, lambda: None)


def resume_from(cfg, corpus):
    """The newest good checkpoint of out_dir or None; refuses one whose config differs in a field that matters, or whose data."""
    state = checkpoint.newest(cfg.out_dir)
    if state is not None:
        saved, now = state["config"], asdict(cfg)
        differ = [f"{key} = {saved.get(key)!r} there, {now[key]!r} here" for key in now if key not in FREE and saved.get(key) != now[key]]
        if differ:
            raise UserError(f"{cfg.out_dir} holds a run with another config ({'; '.join(differ)}): take its values, or another --out_dir")
        if state["corpus_tokens"] != corpus.tokens:
            raise UserError(f"{cfg.out_dir} holds a run on {state['corpus_tokens']:,} training tokens, {cfg.data} has {corpus.tokens:,}: "
                            "give its --data, or another --out_dir")
    return state


def forget_after(path, step):
    """Drops the lines of a .jsonl file that lie after `step` (or are torn): the run is about to write them again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                pass
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    device, dtype = pick_device(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    micro_steps = accumulation(cfg, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    print0 = print if rank == 0 else lambda *args, **kwargs: None
    out_dir = Path(cfg.out_dir)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    ranks = f"{world} rank{'s' * (world > 1)}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f" of {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print0(f"machine   {machine}, {str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}, {ranks}{threads}")

    # Data: bins, tokenizer, fixed validation and probe batches
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and cfg.data == data.EMBEDDED and not Path(cfg.data).exists():
        print0(f"data      {cfg.data} is missing: preparing it from the documentation of Python, NumPy and PyTorch here", flush=True)
        try:
            data.prepare(data.Prepare())
        except UserError:
            if not Path(cfg.data, "meta.json").exists():  # else another node was first
                raise
    if world > 1:
        dist.barrier()
    corpus, validation = data.open_corpus(cfg.data)
    domains = {name: data.eval_sequences(split, cfg.context, cfg.eval_sequences) for name, split in validation.items()}
    probe_ids = probes.fixed_batch(validation, cfg.d_model, cfg.context).to(device)
    sequences = data.Sequences(corpus, cfg.context, cfg.seed)
    entropy = data.unigram_entropy(corpus)
    kinds, ln_n = draw_kinds(cfg), math.log(cfg.ways)
    tokenizer = episodes = None
    try:
        tokenizer = data.load_tokenizer(cfg.data)
    except UserError:  # bins of GPT-2 tokens, offline: next-token prediction needs no tokenizer
        if kinds.any():
            raise
    if tokenizer is not None and tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"the tokenizer of {cfg.data} has {tokenizer.n_vocab} ids, vocab_size = {cfg.vocab_size}: raise vocab_size")
    for split in (corpus, *validation.values()):  # episodes look words up by their ids
        split.check(tokenizer.n_vocab if kinds.any() else cfg.vocab_size, rank, world)
    if kinds.any():
        episodes = data.Episodes(corpus, tokenizer, cfg.ways, cfg.shots, cfg.queries, cfg.window, cfg.seed)
        for index in range(8):
            episodes.episode(index)  # text with too few words fails here, not at meta_start

    # Model, optimizer, and where they stand
    learner, optimizer = build_learner(cfg, device, dtype)
    decoder, params = learner.decoder, list(learner.parameters())
    step, tokens, flops, seconds, run_id = 0, 0, 0, 0.0, os.urandom(4).hex()
    # Kept on the device, since reading them waits for it: the sum of each metric and its micro-steps since the last log, over all
    # ranks; updates skipped so far and in a row. What the host counts since the last log is in `since`.
    sums = torch.zeros(2, len(METRICS), device=device)
    skipped = torch.zeros(2, device=device)
    since = {"steps": 0, "seconds": 0.0, "waited": 0.0, "tokens": 0, "flops": 0, "episodes": 0, "stuck": 0}
    state = resume_from(cfg, corpus)
    if state is not None:
        decoder.load_state_dict(state["model"])
        learner.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, flops, seconds, run_id = (state[key] for key in ("step", "tokens", "flops", "seconds", "run_id"))
        since |= state["since"]
        sums, skipped = state["sums"].to(device), state["skipped"].to(device)
    resumed = step if state is not None else None
    del state  # three times the model
    if world > 1:
        found = torch.tensor([step, -step])
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found[0] != -found[1]:
            raise UserError(f"ranks found checkpoints of steps {-found[1]} to {found[0]} in {out_dir}: all nodes must share this folder")
    if rank == 0:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to out_dir = {out_dir}: {error.strerror}") from None
        if tokenizer is not None:
            data.save_tokenizer(tokenizer, out_dir)
        for name in ("log.jsonl", "probes.jsonl"):
            forget_after(out_dir / name, -1 if resumed is None else resumed)
    if compiled and not (cfg.first_order or learner.head_only):
        compiled = False
        print0("note      not compiled: torch.compile has no second derivative, which first_order=False needs of the layers")
    if compiled:
        decoder.compile()
    # A kind of step leaves the other kind's parameters without gradient; all ranks draw the same kinds, so none waits for another.
    model = DistributedDataParallel(learner, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False,
                                    gradient_as_bucket_view=True, find_unused_parameters=True) if world > 1 else learner
    log_wandb, finish_wandb = start_wandb(cfg, out_dir.name, cfg.out_dir, run_id) if rank == 0 else (None, lambda: None)
    peak = peak_flops(device, dtype) * world

    held_out = sum(split.tokens for split in validation.values())
    sizes = [sum(p.numel() for p in module.parameters()) for module in (decoder, learner.head)]
    print0(f"data      {cfg.data}: {corpus.tokens:,} training tokens, {held_out:,} for validation; unigram entropy {entropy:.3f} nats")
    print0(f"model     {sizes[0]:,} parameters, and {sizes[1]:,} in the episode head")
    print0(f"update    {cfg.global_batch_size} sequences x {cfg.context} tokens = {cfg.global_batch_size * cfg.context:,}: "
           f"{micro_steps} micro-steps x {cfg.batch_size} sequences x {ranks}")
    if episodes is not None:
        print0(f"episodes  {cfg.meta_share:.0%} of micro-steps from step {cfg.meta_start} on: {cfg.ways}-way {cfg.shots}-shot, queries "
               f"{cfg.queries} a word, {cfg.inner_steps} inner steps at {cfg.inner_lr:g}; chance {1 / cfg.ways:.3f}, ln N {ln_n:.3f}")
    if cfg.warmup_steps >= cfg.max_steps > 0:
        print0(f"note      max_steps = {cfg.max_steps} ends within warmup_steps = {cfg.warmup_steps}: lr = {cfg.lr:g} is never reached")
    if resumed is not None:
        print0(f"resume    from {out_dir}/ckpt_{step:06d}.pt" + (": the run is finished" if step >= cfg.max_steps else ""))
    sys.stdout.flush()

    def log(name, line):
        if rank == 0:
            line = {"step": step, "tokens": tokens} | {key: value for key, value in line.items() if math.isfinite(value)}  # JSON has no NaN
            with open(out_dir / name, "a") as file:
                file.write(json.dumps(line) + "\n")
            log_wandb(line)

    def build(at):
        """The batch of micro-step `at`, counted over the whole run; in the background, one ahead."""
        episode, numbers = batch_indices(cfg, kinds, *divmod(at, micro_steps), rank, world)
        batch = (episodes if episode else sequences)[numbers]
        return type(batch)(*(t.pin_memory() for t in batch)) if device.type == "cuda" else batch

    stop = False

    def on_signal(number, frame):
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    pool = ThreadPoolExecutor(1)
    ahead = pool.submit(build, step * micro_steps) if step < cfg.max_steps else None
    last_probe, gradient_ranks = None, {}
    val_loss, means = math.nan, {}

    def due(every):
        return every > 0 and step != resumed and (step % every == 0 or step == cfg.max_steps)

    while True:
        # Between updates: evaluate, probe, checkpoint, stop? A resumed step has done all that.
        if due(cfg.eval_every):
            losses = evaluate(learner, domains, device, rank, world)
            val_loss = losses["val/loss"]
            log("log.jsonl", {"flops": flops, "seconds": seconds, **losses})
            print0(f"step {step:>6} | " + " | ".join(f"{name} {loss:.4f}" for name, loss in losses.items()), flush=True)
        if due(cfg.probe_every) and rank == 0:
            metrics = probes.measure(decoder, probe_ids) | gradient_ranks
            log("probes.jsonl", metrics)
            now = [float(np.mean([v for k, v in metrics.items() if k.startswith(prefix)])) for prefix in ("rank/resid/", "entropy/")]
            way = [""] * 2 if last_probe is None else [" up" if new > last else " down" for new, last in zip(now, last_probe)]
            last_probe = now
            print0(f"step {step:>6} | probe, means over layers: effective rank of the residual stream {now[0]:.1f}{way[0]}, "
                   f"attention entropy {now[1]:.3f}{way[1]}", flush=True)
        if world > 1:  # a signal reaches the ranks at different times: stop together
            flag = torch.tensor([int(stop)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop = bool(flag.item())
        if rank == 0 and step != resumed and (due(cfg.checkpoint_every) or stop or step == cfg.max_steps):
            checkpoint.save(out_dir, {
                "model": decoder.state_dict(), "head": learner.head.state_dict(), "optimizer": optimizer.state_dict(),
                "config": asdict(cfg), "step": step, "tokens": tokens, "flops": flops, "seconds": seconds, "run_id": run_id,
                "since": since, "sums": sums, "skipped": skipped, "corpus_tokens": corpus.tokens,
            }, cfg.keep, cfg.keep_every)
        if stop or step >= cfg.max_steps:
            break

        # One update
        began = time.perf_counter()
        update = torch.zeros_like(sums)
        for micro in range(micro_steps):
            at = step * micro_steps + micro
            waiting = time.perf_counter()
            batch, ahead = ahead.result(), pool.submit(build, at + 1) if at + 1 < cfg.max_steps * micro_steps else None
            if device.type != "cuda" or torch.cuda.current_stream().query():  # else the GPU still had work: it did not wait
                since["waited"] += time.perf_counter() - waiting
            batch = type(batch)(*(t.to(device, non_blocking=device.type == "cuda") for t in batch))  # from pinned memory there
            is_lm = isinstance(batch, data.LMBatch)
            with model.no_sync() if world > 1 and micro < micro_steps - 1 else nullcontext():
                loss, metrics = model(batch)
                (loss * ((1.0 if is_lm else cfg.meta_weight) / micro_steps)).backward()
            for i, name in enumerate(METRICS):
                if name in metrics:
                    update[0, i] += metrics[name]
                    update[1, i] += 1
            read = batch.ids.numel() if is_lm else batch.support.numel() + batch.query.numel()
            cost = learner.flops(batch) * world
            tokens, flops = tokens + read * world * is_lm, flops + cost
            for key, amount in (("tokens", read * world), ("flops", cost), ("episodes", not is_lm)):
                since[key] += amount
        if world > 1:
            dist.all_reduce(update)
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)
        if cfg.probe_gradients and rank == 0 and cfg.probe_every and ((step + 1) % cfg.probe_every == 0 or step + 1 == cfg.max_steps):
            paused = time.perf_counter()  # the rest of the probe comes after the update; neither counts as training
            gradient_ranks = probes.gradient_ranks(decoder)
            began += time.perf_counter() - paused
        bad = (~(torch.isfinite(norm) & torch.isfinite(update).all())).float()
        skipped = torch.stack((skipped[0] + bad, (skipped[1] + 1) * bad))
        sums += update.where(bad == 0, 0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, step)
        if device.type == "cuda":  # the way GradScaler makes fused AdamW leave an update out, without waiting for the device
            optimizer.grad_scale, optimizer.found_inf = None, bad
        if device.type == "cuda" or not bad:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        since["steps"] += 1
        if device.type != "cpu" and (step % cfg.log_every == 0 or step == cfg.max_steps):
            torch.accelerator.synchronize()
        since["seconds"] += time.perf_counter() - began
        seconds += time.perf_counter() - began

        if step % cfg.log_every == 0 or step == cfg.max_steps:
            means = {name: total / count for name, total, count in zip(METRICS, *sums.tolist()) if count}
            line = {"flops": flops, "seconds": seconds, **means, "lr": lr_at(cfg, step - 1), "grad_norm": norm.item(),
                    "tok_per_s": since["tokens"] / since["seconds"], "mfu": since["flops"] / since["seconds"] / peak,
                    "data_wait": since["waited"] / since["seconds"], "skipped": int(skipped[0])}
            log("log.jsonl", line)
            share = since["episodes"] / (since["steps"] * micro_steps)
            parts = [f"step {step:>6}", "loss " + (f"{means['train/loss']:.4f}" if "train/loss" in means else "-")]
            if "meta/query_loss" in means:
                parts += [f"query {means['meta/query_loss']:.3f} acc {means['meta/query_acc']:.3f} "
                          f"(unadapted {means['meta/query_acc_unadapted']:.3f})"]
            parts += [f"lr {line['lr']:.2e}", f"grad {line['grad_norm']:.2f}", f"{1000 * since['seconds'] / since['steps']:.0f} ms",
                      f"{line['tok_per_s']:,.0f} tok/s", f"MFU {line['mfu']:.0%}"]
            parts += [f"episodes {share:.0%}"] * (episodes is not None) + [f"skipped {line['skipped']}"] * (line["skipped"] > 0)
            parts += [f"waited for data {line['data_wait']:.0%}"] * (line["data_wait"] > 0.05)
            print0(" | ".join(parts), flush=True)
            stuck = since["stuck"]  # log lines in a row; no verdict while the learning rate is still small
            if "meta/query_loss" in means and step > cfg.warmup_steps:
                stuck = stuck + 1 if means["meta/query_loss"] > 0.99 * ln_n else 0
                if stuck == 5:
                    print0(f"warning: the adapted query loss stays at ln N = {ln_n:.3f}: the episodes teach nothing; "
                           "try another inner_lr, a later meta_start, or fewer ways", flush=True)
            since = dict.fromkeys(since, 0) | {"stuck": stuck}
            sums = torch.zeros_like(sums)

        if step % MAX_SKIPPED == 0 and skipped[1] >= MAX_SKIPPED:
            raise UserError(f"the gradient was not finite in {int(skipped[1])} updates in a row (step {step}); they were skipped. "
                            f"Lower lr = {cfg.lr} or inner_lr = {cfg.inner_lr}; checkpoints are in {out_dir}")

    for number, handler in handlers.items():
        signal.signal(number, handler)
    pool.shutdown()
    if stop and step < cfg.max_steps:
        print0(f"stopped   at step {step}; the same command goes on from there")
    elif resumed != step:
        loss = f"validation loss {val_loss:.3f}, where" if math.isfinite(val_loss) else "not evaluated;"
        print0(f"done      {loss} knowing only how frequent each token is gives {entropy:.3f}")
        if "meta/query_acc" in means:
            print0(f"          query accuracy {means['meta/query_acc']:.3f} after adaptation, {means['meta/query_acc_unadapted']:.3f} "
                   f"before it; chance {1 / cfg.ways:.3f}")
        if tokenizer is not None and rank == 0:
            prompt = torch.tensor([tokenizer.encode_ordinary("The function returns")], device=device)
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                ids = decoder.generate(prompt, 40, 0.8, top_k=50, generator=torch.Generator(device).manual_seed(cfg.seed))
            print0(f"sample    {tokenizer.decode([i for i in ids[0].tolist() if i < tokenizer.n_vocab])!r}")
    print0(f"files     {out_dir / f'ckpt_{step:06d}.pt'} (checkpoint), {out_dir / 'log.jsonl'} (losses), "
           f"{out_dir / 'probes.jsonl'} (effective ranks, attention entropies)", flush=True)
    finish_wandb()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        sys.exit(130)
