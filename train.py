"""Pretrains a small LLaMA: next-token prediction mixed with first-order MAML on Subset-Masked-LM episodes.

    python train.py configs/demo.py                                      # a laptop: two cores, five minutes
    python train.py configs/11m.py configs/vanilla.py --out_dir=out/11m-vanilla    # files overlay each other
    torchrun --standalone --nproc_per_node=8 train.py configs/570m.py    # eight GPUs
    python train.py out/11m-vanilla --max_steps=9000                     # lengthens a run
    python watch.py out                                                  # all of them, live

The same command again resumes from the newest checkpoint in out_dir. Ctrl-C, SIGTERM or SIGHUP finishes the
step, writes a checkpoint and exits with 0. nanomaml/trouble.py watches for what can go wrong.
"""
import math
import os
import re
import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import probes
from adaptation import AdaptationTest
from meta import Head, Learner
from model import Decoder, ModelConfig
from nanomaml import bins, checkpoint, config, console, logs, machine, phases, ranks, record, resume, trouble
from nanomaml.config import Count, Natural, NonNegative, Positive, Share, UserError, one_line, require
from nanomaml.machine import Dtype
from nanomaml.ranks import print0
from nanomaml.tokenizer import NoDownload
from nanomaml.wandb_logs import Wandb
from schedule import Schedule, read_ahead

Beta = Annotated[float, "in [0, 1)", lambda x: 0 <= x < 1]
Several = Annotated[int, "at least 2", lambda n: n >= 2]
Limited = Annotated[int, "in 0 to 10**9", lambda n: 0 <= n <= 10**9]  # a larger number would never end


@dataclass(frozen=True)
class Config(ModelConfig):
    out_dir: str = "out/run"  # checkpoints and logs go here; a run already there is resumed
    data: str = data.EMBEDDED  # folder of token bins; this default is prepared automatically if missing
    init_from: str = ""  # run's folder or checkpoint whose model a new run starts from; a resume ignores it
    seed: Natural = 1  # for everything: weights, order of the data, episodes, kinds of micro-steps
    # optimisation
    max_steps: Limited = 6000  # length of the run in updates (optimizer steps)
    global_batch_size: Count = 256  # sequences per update, over all ranks and micro-steps
    batch_size: Count = 16  # sequences per micro-step on each rank
    lr: Positive = 3e-4  # peak learning rate
    warmup_steps: config.Updates = 5 / 12  # warm-up from 0, then decay to 0 at max_steps; below 1: a share
    weight_decay: NonNegative = 0.1  # AdamW, on matrices only
    beta1: Beta = 0.9  # AdamW, decay of the mean gradient
    beta2: Beta = 0.95  # AdamW, decay of the mean squared gradient
    grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0: off
    # episodes
    meta_share: Share = 0.5  # probability that a block of micro-steps reads episodes; 0: off (vanilla)
    meta_blocks: Count = 2  # blocks of an update, each of a random kind; must divide its micro-steps
    meta_start: config.Updates = 0  # updates before the first episode; below 1: a share of max_steps
    meta_weight: NonNegative = 1.0  # factor on the query loss
    read_out: Literal["mask", "context"] = "mask"  # where a word is read: at its mask or one position before
    ways: Several = 32  # N, words to tell apart in an episode
    shots: Count = 4  # K, support windows per word
    queries: Count = 1  # Q, query windows per word
    window: Several = 128  # tokens of a window, including a mask at its end
    word_targets: Literal["spaced", "any"] = "spaced"  # classes: words after a space; any: letters (Chinese)
    max_word_share: Positive = 1e-3  # words more frequent than this share of the text are not classes
    episodes: Count = 1  # episodes per micro-step on each rank
    inner_steps: Natural = 10  # SGD steps of the inner loop
    inner_lr: NonNegative = 0.0  # rate of the inner steps; 0: 25.6 / d_model, for a linear head from zero
    adapt: str = "head"  # what the inner loop adapts: head, all, or a regular expression (model.*, head.*)
    first_order: bool = True  # False: second-order MAML, with gradients through the inner loop
    head_layers: Count = 1  # layers of the episode head; 1: linear
    head_width: Count = 128  # width of the head's hidden layers
    head_start: Literal["zero", "random"] = "zero"  # output layer at an episode's start; random: learned
    # what is written, and how often (in updates, and always after the last; 0: never)
    log_every: Count = 10  # updates between lines of training metrics
    eval_every: Natural = 250  # updates between evaluations
    eval_sequences: Count = 64  # validation sequences of each domain
    eval_episodes: Natural = 64  # episodes of held-out text at each evaluation, in vanilla runs too; 0: off
    eval_ways: Several = 16  # N of the eval_episodes; the same in all runs that are compared
    eval_shots: Count = 4  # K of the eval_episodes
    eval_queries: Count = 2  # Q of the eval_episodes
    eval_window: Count = 32  # tokens of text before the word
    probe_every: Natural = 100  # updates between probes of effective rank and attention entropy
    checkpoint_every: Natural = 500  # updates between checkpoints
    keep: Count = 2  # newest checkpoints kept
    keep_every: Natural = 0  # checkpoints at multiples of this are kept too; 0: none
    report: bool = True  # at the end, write report.md and report.png to out_dir, as report.py does
    wandb: Wandb = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # name of the project there
    # machine
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: Dtype = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it
    compile: bool | None = None  # torch.compile the layers; None: on CUDA

    def __post_init__(self):
        super().__post_init__()
        for key in ("warmup_steps", "meta_start"):
            value = getattr(self, key)
            object.__setattr__(self, key, round(value * self.max_steps) if value < 1 else int(value))
        if self.inner_lr == 0:  # the squared norm of a normalised feature is d_model
            object.__setattr__(self, "inner_lr", 25.6 / self.d_model)
        require(self.vocab_size <= bins.MAX_IDS,
                f"vocab_size = {self.vocab_size} is above {bins.MAX_IDS}: bins hold uint16 ids")
        require(self.global_batch_size % self.batch_size == 0,
                f"global_batch_size = {self.global_batch_size} must be a multiple of batch_size = "
                f"{self.batch_size}")
        require(self.eval_episodes == 0 or self.context >= 2, "eval_episodes needs a context of at least 2")
        require(self.meta_share == 0 or self.window <= self.context,
                f"window = {self.window} must be at most context = {self.context}")
        try:
            re.compile(self.adapt)
        except re.error as error:
            raise UserError(f"adapt = {self.adapt!r} is neither head, all nor a regular expression: {error}"
                            ) from None


# ---- what each micro-step reads ----


class Source(NamedTuple):
    """Where the batches of one kind of micro-step come from.

    A batch is a NamedTuple of tensors with two properties: `tokens`, how many it reads, and `lm_tokens`,
    how many a next-token loss counts. Its loss is `Learner.<kind>_loss`, its cost `Learner.<kind>_flops`.
    """

    batches: object  # batches[range of numbers] -> batch, a pure function of the numbers
    size: int  # sequences or episodes per micro-step on each rank


def build_sources(cfg, kinds, corpus, tokenizer):
    """{kind: Source} of the kinds of micro-step that this run has."""
    sources = {"lm": Source(data.Sequences(corpus, cfg.context, cfg.seed), cfg.batch_size)}
    if "episodes" in kinds:
        episodes = data.Episodes(
            corpus, tokenizer, ways=cfg.ways, shots=cfg.shots, queries=cfg.queries, window=cfg.window,
            seed=cfg.seed, read_out=cfg.read_out, word_targets=cfg.word_targets, max_share=cfg.max_word_share)
        sources["episodes"] = Source(episodes, cfg.episodes)
    for batches, size in sources.values():  # so that a text with too few words fails now
        for index in range(8):
            batches[range(index * size, (index + 1) * size)]
    return sources


def load_data(cfg, has_episodes):
    """(train Corpus, {domain: validation Corpus}, tokenizer or None), prepared where needed and checked."""
    if ranks.local_rank() == 0 and cfg.data == data.EMBEDDED and not Path(cfg.data).exists():
        import prepare

        print0(f"data      {cfg.data} is missing: preparing it from the documentation of Python, NumPy and "
               "PyTorch here")
        try:
            prepare.prepare(prepare.Config())
        except UserError:
            if not Path(cfg.data, "meta.json").exists():  # otherwise another node was first
                raise
    if dist.is_initialized():
        dist.barrier()
    bins.opened.clear()
    corpus, validation = data.open_corpus(cfg.data)
    try:
        tokenizer = data.load_tokenizer(cfg.data, cfg.vocab_size)
    except NoDownload:  # bins of GPT-2 tokens, offline: next-token prediction needs no tokenizer
        if has_episodes:
            raise
        tokenizer = None
    for split in (corpus, *validation.values()):  # episodes look words up by their ids
        split.check(tokenizer.n_vocab if has_episodes else cfg.vocab_size)
    return corpus, validation, tokenizer


# ---- what is trained ----


def build_learner(cfg, dtype, weights=None):
    """The Learner with its first weights; weights: a decoder's state dict to start from (init_from)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    decoder = Decoder(cfg, generator)
    if weights is not None:
        try:
            decoder.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"init_from = {cfg.init_from} has other parameters: {one_line(error)}") from None
    if cfg.meta_share > 0:
        head = Head(cfg.d_model, cfg.head_layers, cfg.head_width, cfg.head_start, cfg.ways, generator)
    else:  # nothing adapts
        head = Head(cfg.d_model, 1, 0, "zero", 2)
    return Learner(decoder=decoder, head=head, adapted=cfg.adapt if cfg.meta_share > 0 else "head",
                   inner_steps=cfg.inner_steps, inner_lr=cfg.inner_lr, first_order=cfg.first_order,
                   dtype=dtype)


def build_optimizers(cfg, learner):
    """A list, so that a fork may give some parameters to another optimizer."""
    params = dict(learner.named_parameters())
    matrices = [name for name, p in params.items() if p.dim() >= 2]
    groups = [{"params": [params[name] for name in matrices], "weight_decay": cfg.weight_decay},
              {"params": [params[name] for name in params if name not in matrices], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # the peak rate, which lr_factor scales
    return optimizers


def lr_factor(cfg, step):
    """The learning rate of the update after `step` others, as a share of the peak rate."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return (cfg.max_steps - step) / (cfg.max_steps - cfg.warmup_steps)


def optimizer_step(optimizers, factor, is_bad):
    """Sets each group's rate to `factor` times its peak, steps unless `is_bad` (0 or 1), zeroes gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if is_bad.is_cuda and isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
            # Fused AdamW reads the flag on the device, as with GradScaler, so the host need not wait.
            optimizer.grad_scale, optimizer.found_inf = None, is_bad
            optimizer.step()
        elif not is_bad:  # other optimizers ignore the flag: the host waits for the device and checks it
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compile_layers(cfg, device, learner):
    """Compiles the decoder in place if the settings ask for it and it is possible."""
    is_wanted = device.type == "cuda" if cfg.compile is None else cfg.compile
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    require(not is_wanted or shutil.which(compiler),
            f"compile needs a C++ compiler, and there is no {compiler}: install it, or give --compile=False")
    if is_wanted and (cfg.first_order or learner.head_only):
        learner.decoder.compile()
    elif is_wanted:
        print0("note      not compiled: torch.compile has no second derivative, and with "
               "first_order=False the layers that adapt need one")


def wrap_for_ranks(learner, device):
    """The learner in DistributedDataParallel where there are several ranks."""
    if not dist.is_initialized():
        return learner
    # Each kind of micro-step leaves some parameters without gradient. All ranks do the same kind.
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(learner, device_ids=device_ids, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True, find_unused_parameters=True)


# ---- evaluation and metrics ----


@torch.no_grad()
def validation_losses(learner, eval_batches, device):
    """{"val/loss": mean over domains, "val/<domain>" if several}, in nats a token; ranks share the work."""
    rank, world = ranks.rank_and_world()
    totals = torch.zeros(2, len(eval_batches), device=device)  # summed loss and tokens of each domain
    for i, batch in enumerate(eval_batches.values()):
        for ids, targets in list(zip(batch.ids.split(8), batch.targets.split(8)))[rank::world]:
            loss = learner("lm", data.LMBatch(ids.to(device), targets.to(device)))[0]["lm"]
            totals[:, i] += torch.stack((loss * ids.numel(), loss.new_tensor(ids.numel())))
    if world > 1:
        dist.all_reduce(totals)
    losses = (totals[0] / totals[1]).tolist()
    by_domain = {f"val/{name}": loss for name, loss in zip(eval_batches, losses)} if len(losses) > 1 else {}
    return {"val/loss": sum(losses) / len(losses)} | by_domain


@torch.no_grad()
def sum_over_ranks(metrics, device):
    """{metric: [scalar of each micro-step]} -> {metric: (sum, number of micro-steps)}, over all ranks."""
    rows = []
    for values in metrics.values():
        values = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in values])
        rows.append(torch.stack((values.sum(), values.new_tensor(len(values)))))
    table = torch.stack(rows)  # (metrics, 2)
    if dist.is_initialized():  # all ranks do the same kinds of micro-steps, so they have the same metrics
        dist.all_reduce(table)
    return dict(zip(metrics, table))


def write_report(out_dir):
    """Writes report.md and report.png of a finished run, and prints the phases of its curves."""
    try:
        import report  # which imports matplotlib

        report.write([out_dir])
        print0(f"report    {out_dir / 'report.md'}, {out_dir / 'report.png'}")
        print0("curves    " + "\n          ".join(phases.summary(out_dir)))
    except Exception as error:  # the run is done, whatever is wrong with its report
        print0(f"note      no report: {type(error).__name__}: {error}")


# ---- the loop ----

BAD_LOSSES = "micro-steps whose loss is not finite"  # summed with the metrics, but not logged


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    with console.lasting_console(), ExitStack() as lock:  # held by rank 0 until the report is written
        with ranks.connected(device):
            is_finished = train(cfg, device, dtype, lock)
        if is_finished and cfg.report and ranks.rank_and_world()[0] == 0:
            write_report(Path(cfg.out_dir))


def train(cfg, device, dtype, lock):
    """Trains until max_steps or a signal. Returns whether a report is due. lock: an ExitStack."""
    # What each micro-step reads
    rank, world = ranks.rank_and_world()
    schedule = Schedule(cfg, world)
    print0(f"machine   {machine.describe(device, dtype)}")
    ranks.require_same(resume.what_ranks_share(cfg))
    corpus, validation, tokenizer = load_data(cfg, schedule.names != {"lm"})
    sources = build_sources(cfg, schedule.names, corpus, tokenizer)
    digests = resume.data_digests(cfg.data)
    ranks.require_same(digests)

    # What is trained, and where it stands
    learner = build_learner(cfg, dtype, resume.initial_weights(cfg)).to(device)
    optimizers = build_optimizers(cfg, learner)
    progress, cfg = resume.open_run(cfg, digests, learner, optimizers, device, lock)
    compile_layers(cfg, device, learner)
    model = wrap_for_ranks(learner, device)

    # What is measured between updates, always on the same held-out text
    eval_batches = {name: data.eval_sequences(split, cfg.context, cfg.eval_sequences)
                    for name, split in validation.items()}
    adaptation = AdaptationTest(cfg, validation, tokenizer)
    log = logs.RunLog(cfg, progress, rank, record.facts(learner, device, dtype, digests, validation))
    weights = {"lm": 1.0, "meta": cfg.meta_weight}  # of the parts of a loss
    peak_flops, metrics = machine.peak_flops(device, dtype) * world, {}
    updates = read_ahead(schedule, sources, rank, device, progress.step)
    if rank == 0:
        update_seconds = schedule.mean_flops(learner, sources) / peak_flops
        console.print_setup(cfg, schedule, corpus, validation, learner, adaptation, progress, update_seconds)
    with (probes.Live(cfg, validation, log, progress, device) as live,
          trouble.Guard(cfg, progress, log) as guard):
        while True:
            # Between updates: probe, evaluate, checkpoint, stop? A resume starts after these.
            learner.eval()
            is_last = progress.step >= cfg.max_steps
            live.measure_if_due(learner.decoder)
            if progress.is_due(cfg.eval_every, cfg.max_steps):
                metrics = validation_losses(learner, eval_batches, device)
                if rank == 0:
                    metrics |= adaptation.measure(learner.decoder, dtype, is_last)
                log.write("log.jsonl", progress.axes() | metrics)
                live.write()
                print0(console.evaluation_line(progress.step, metrics, live.last, cfg.max_steps))
            live.write()
            micro_steps, waited = guard.next_of(updates)  # no micro-steps after the last update
            stop = guard.must_stop()
            if progress.step != progress.resumed_at and (
                    progress.is_due(cfg.checkpoint_every, cfg.max_steps) or stop or is_last):
                live.write(progress.step - 1)  # a resume from here does not measure these probes again
                if guard.is_sound(learner, eval_batches, stop or is_last) and rank == 0:
                    checkpoint.save(cfg.out_dir, resume.state_of(cfg, digests, learner, optimizers, progress),
                                    cfg.keep, cfg.keep_every)
            if stop or is_last:
                live.write(progress.step)
                break

            # One update: forward, backward, clip, step
            learner.train()
            start, values = time.perf_counter() - waited, {}
            for micro, (kind, batch) in enumerate(micro_steps):
                batch = type(batch)(*(t.to(device, non_blocking=True) for t in batch))
                # DDP sums the gradients over ranks only in the last backward pass.
                with model.no_sync() if world > 1 and micro < schedule.micro_steps - 1 else nullcontext():
                    losses, new_values = model(kind, batch)
                    loss = sum(loss * (weights[part] / schedule.micro_steps) for part, loss in losses.items())
                    loss.backward()
                for name, value in (new_values | {BAD_LOSSES: ~loss.detach().isfinite()}).items():
                    values.setdefault(name, []).append(value)
                progress.count(kind, batch.tokens * world, batch.lm_tokens * world if "lm" in losses else 0,
                               learner.flops(kind, batch) * world)
            totals = sum_over_ranks(values, device)
            grad_norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), cfg.grad_clip or math.inf)
            is_bad = (~torch.isfinite(grad_norm) | (totals.pop(BAD_LOSSES)[0] > 0)).float()
            optimizer_step(optimizers, lr_factor(cfg, progress.step), is_bad)
            progress.finish_update(totals, is_bad, waited)
            is_log_due = progress.is_due(cfg.log_every, cfg.max_steps)
            if is_log_due:
                machine.synchronize(device)
            progress.add_seconds(time.perf_counter() - start)
            if is_log_due:
                line = progress.interval_metrics(peak_flops)
                line |= {"lr": cfg.lr * lr_factor(cfg, progress.step - 1), "grad_norm": grad_norm.item()}
                log.write("log.jsonl", progress.axes() | line)
                print0(console.training_line(progress, line, cfg.max_steps))
                guard.check(line)
                progress.start_interval()
            guard.require_finite()

    updates.close()
    guard.raise_failure()
    if not is_last:
        print0(f"stopped   at step {progress.step}; the same command {guard.resumption()}")
    elif rank == 0 and progress.step != progress.resumed_at:
        console.print_results(cfg, corpus, learner, tokenizer, eval_batches, metrics)
    print0(f"files     {cfg.out_dir}: ckpt_*.pt, log.jsonl (losses), probes.jsonl (ranks and entropies)")
    log.finish("finished" if is_last else "stopped")
    return is_last and (progress.step != progress.resumed_at or not Path(cfg.out_dir, "report.md").exists())


if __name__ == "__main__":
    config.run(main)
