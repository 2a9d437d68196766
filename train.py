"""Pretrains a small LLaMA: next-token prediction mixed with first-order MAML on Subset-Masked-LM episodes.

    python train.py configs/demo.py                                      # a laptop: two cores, five minutes
    python train.py configs/11m.py configs/vanilla.py --out_dir=out/11m-vanilla    # files overlay each other
    torchrun --standalone --nproc_per_node=8 train.py configs/570m.py    # eight GPUs

The same command again resumes from the newest checkpoint in out_dir. Ctrl-C, SIGTERM or SIGHUP finishes the
step, writes a checkpoint and exits with 0. From top to bottom: the settings, what each micro-step reads, what
is trained, evaluation, messages, the loop.
"""
import json
import math
import re
import signal
import sys
import time
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load prints no traceback

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import data
import logs
import machine
import probes
from adaptation import AdaptationTest
from config import UserError
from meta import Head, Learner
from model import Decoder, ModelConfig
from progress import Progress, checkpoint_state, data_digests, require_same_step, resume, what_ranks_share
from schedule import Schedule, read_ahead

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Config(ModelConfig):
    out_dir: str = "out/run"  # checkpoints and logs go here; a run that is there already is resumed
    data: str = data.EMBEDDED  # folder of token bins; this default is prepared automatically where missing
    init_from: str = ""  # run's folder or checkpoint whose model a new run starts from; a resume ignores it
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
    meta_share: float = 0.5  # probability that a block of micro-steps reads episodes; 0: off (vanilla)
    meta_blocks: int = 2  # parts of an update whose kind is drawn separately; must divide its micro-steps
    meta_start: int = 0  # updates before the first episode
    meta_weight: float = 1.0  # factor on the query loss
    meta_decay: float = 0.0  # share of the run, from meta_start on, in which it falls to 0; 0: constant
    episodes_from: str = "windows"  # windows of their own, or batch: positions of LM sequences, no extra pass
    read_out: str = "mask"  # where a word is read: at its mask, or context: one position before it
    query_lm: bool = False  # the next-token loss of the query windows counts too
    ways: int = 32  # N, words to tell apart in an episode
    shots: int = 4  # K, support windows per word
    queries: int = 1  # Q, query windows per word
    window: int = 128  # tokens of a window, a mask at its end included
    word_targets: str = "spaced"  # classes: words after a space; any: all tokens of letters (Chinese, Thai)
    max_word_share: float = 1e-3  # words that make up more of the text are no classes ("the")
    episodes: int = 1  # episodes of a micro-step on each rank
    inner_steps: int = 10  # SGD steps of the inner loop
    inner_lr: float = 0.0  # their rate; 0: 25.6 / d_model, for a linear head that starts at zero
    adapt: str = "head"  # what the inner loop adapts: head, all, or a regular expression (model.*, head.*)
    first_order: bool = True  # False: second-order MAML, through the inner loop
    head_layers: int = 1  # layers of the episode head; 1: linear
    head_width: int = 128  # of the head's hidden layers
    head_start: str = "zero"  # its output layer at an episode's start: zero, or random (learned; published)
    # what is written, and when (in updates; the last one always counts; 0: never)
    log_every: int = 10  # training metrics
    eval_every: int = 250  # validation loss
    eval_sequences: int = 64  # validation sequences of each domain
    eval_episodes: int = 64  # episodes of held-out text at each evaluation, for vanilla runs too; 0: off
    eval_ways: int = 16  # N of these episodes; alike in all runs that are to be compared
    eval_shots: int = 4  # K of these episodes
    eval_queries: int = 2  # Q of these episodes
    eval_window: int = 32  # tokens of text before the word
    probe_every: int = 100  # effective rank and attention entropy
    probe_gradients: bool = False  # the effective rank of the gradients too
    checkpoint_every: int = 500  # checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of this are kept too; 0: none
    report: bool = True  # at the end, write report.md and report.png to out_dir, as report.py does
    wandb: str = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # project there
    # machine
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it
    compile: bool | None = None  # torch.compile the layers; None: on CUDA

    def __post_init__(self):
        super().__post_init__()
        if self.inner_lr == 0:  # the squared norm of a normalised feature is d_model
            object.__setattr__(self, "inner_lr", 25.6 / self.d_model)
        config.require_at_least(self, 1, "global_batch_size", "batch_size", "log_every", "eval_sequences",
                                "keep")
        config.require_at_least(self, 0, "seed", "max_steps", "warmup_steps", "weight_decay", "grad_clip",
                                "eval_every", "probe_every", "checkpoint_every", "keep_every")
        config.require_positive(self, "lr")
        for key in ("beta1", "beta2"):
            config.require(0 <= getattr(self, key) < 1, f"{key} must lie in [0, 1), got {getattr(self, key)}")
        config.require_choice(self, "wandb", *logs.WANDB_MODES)
        config.require_choice(self, "dtype", *machine.DTYPES)
        config.require(self.vocab_size <= data.MAX_IDS,
                       f"vocab_size = {self.vocab_size} is above {data.MAX_IDS}: bins hold uint16 ids")
        config.require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        config.require(0 <= self.meta_share <= 1, f"meta_share must lie in [0, 1], got {self.meta_share}")
        config.require(self.global_batch_size % self.batch_size == 0,
                       f"global_batch_size = {self.global_batch_size} must be a multiple of "
                       f"batch_size = {self.batch_size}")
        config.require_at_least(self, 0, "eval_episodes")
        config.require_choice(self, "read_out", "mask", "context")
        config.require_choice(self, "word_targets", "spaced", "any")
        config.require_positive(self, "max_word_share")
        config.require_at_least(self, 0, "inner_steps")
        config.require_positive(self, "inner_lr")
        self.check_sizes()
        if self.eval_episodes > 0:
            config.require_at_least(self, 1, "eval_shots", "eval_queries", "eval_window")
            config.require_at_least(self, 2, "eval_ways", "context")
        if self.meta_share > 0:
            self.check_episodes()

    def check_sizes(self):
        """Refuses by arithmetic what the host could never hold, before anything is allocated."""
        d, has_episodes = self.d_model, self.meta_share > 0
        attention = 2 * d**2 * (self.n_heads + self.n_kv_heads) // self.n_heads
        layer = attention + 3 * d * self.d_hidden
        windows = self.episodes * self.ways * (self.shots + self.queries) * has_episodes
        eval_windows = 4 * self.eval_episodes * self.eval_ways * (self.eval_shots + self.eval_queries)
        width = self.head_width * has_episodes
        for size, *keys in (  # bytes: of the schedule, of parameters, of token ids, of features
            (48 * self.max_steps * (self.meta_blocks if has_episodes else 1), "max_steps"),
            (8 * self.vocab_size * d + 4 * self.n_layers * layer, "d_model", "n_layers", "d_hidden",
             "vocab_size"),
            (4 * self.head_layers * width * max(width, d), "head_layers", "head_width"),
            (16 * self.batch_size * self.context, "batch_size", "context"),
            (16 * windows * self.window, "episodes", "ways", "shots", "queries", "window"),
            (4 * eval_windows * d, "eval_episodes", "eval_ways", "eval_shots", "eval_queries"),
        ):
            config.require_fits(self, size, *keys)
        for key in ("n_layers", "head_layers"):
            config.require(getattr(self, key) <= 1000, f"{key} = {getattr(self, key)} is above 1000")

    def check_episodes(self):
        config.require_at_least(self, 1, "meta_blocks", "shots", "queries", "episodes", "head_layers",
                                "head_width")
        config.require_at_least(self, 0, "meta_start", "meta_weight")
        config.require_at_least(self, 2, "ways")
        config.require(0 <= self.meta_decay <= 1, f"meta_decay must lie in [0, 1], got {self.meta_decay}")
        config.require_choice(self, "head_start", "zero", "random")
        config.require_choice(self, "episodes_from", "windows", "batch")
        if self.episodes_from == "batch":
            config.require(self.adapt == "head", "episodes_from = batch runs the backbone once: adapt must "
                           f"be head, got {self.adapt!r}")
            config.require(self.read_out == "context",
                           "episodes_from = batch reads plain text: set read_out = context")
            config.require(self.head_start == "zero", "episodes_from = batch has episodes of fewer ways, "
                           f"which only head_start = zero can do, got {self.head_start!r}")
            config.require(not self.query_lm, "query_lm is for episodes_from = windows: with batch, every "
                           "position has the next-token loss already")
        config.require(not self.query_lm or self.adapt == "head",
                       f"query_lm needs adapt = head, got {self.adapt!r}")
        config.require(2 <= self.window <= self.context,
                       f"window = {self.window} must lie in 2 to context = {self.context}")
        try:
            re.compile(self.adapt)
        except re.error as error:
            raise UserError(f"adapt = {self.adapt!r} is neither head, all nor a regular expression: "
                            f"{error}") from None


BAD_LOSSES = "micro-steps whose loss is not finite"  # travels with the metrics, and is not logged
MAX_SKIPPED = 10  # updates in a row that may be skipped for a gradient that is not finite


# ---- what each micro-step reads ----


class Source(NamedTuple):
    """Where the batches of one kind of micro-step come from.

    A batch is a NamedTuple of tensors with two properties: `tokens`, all that it reads, and `lm_tokens`,
    those of which a next-token loss is taken. The kind's loss is `Learner.<kind>_loss`, its cost
    `Learner.<kind>_flops`.
    """

    batches: object  # batches[range of numbers] -> batch, a pure function of them
    size: int  # sequences or episodes of a micro-step on each rank


def build_sources(cfg, kinds, corpus, tokenizer):
    """{kind: Source} of the kinds of micro-step that this run has."""
    sequences = data.Sequences(corpus, cfg.context, cfg.seed)
    sources = {"lm": Source(sequences, cfg.batch_size)}
    episode = (cfg.ways, cfg.shots, cfg.queries)
    if "episodes" in kinds:
        windows = data.Episodes(corpus, tokenizer, *episode, cfg.window, cfg.seed, cfg.read_out,
                                word_targets=cfg.word_targets, max_share=cfg.max_word_share)
        sources["episodes"] = Source(windows, cfg.episodes)
    if "joint" in kinds:
        batches = data.BatchEpisodes(sequences, tokenizer, *episode, cfg.episodes, cfg.seed, cfg.word_targets)
        sources["joint"] = Source(batches, cfg.batch_size)
    for kind, (batches, size) in sources.items():  # text with too few words fails now
        first = [batches[range(index * size, (index + 1) * size)] for index in range(8)]
        if kind == "joint" and not any(batch.words.shape[1] for batch in first):
            raise UserError("episodes_from = batch: in none of 8 micro-steps do two words come in shots + "
                            f"queries = {cfg.shots + cfg.queries} of the {size} sequences: lower these, "
                            "raise batch_size, or set word_targets = any for text without spaces")
    return sources


def loss_weights(cfg, step):
    """{part of a loss: its weight} in the update that follows `step` others."""
    decay = (step - cfg.meta_start) / (cfg.meta_decay * cfg.max_steps) if cfg.meta_decay > 0 else 0.0
    return {"lm": 1.0, "meta": cfg.meta_weight * max(0.0, 1.0 - decay)}


def load_data(cfg, has_episodes, rank, world):
    """(train Corpus, {domain: validation Corpus}, tokenizer or None), prepared where needed and checked."""
    if machine.is_first_on_node() and cfg.data == data.EMBEDDED and not Path(cfg.data).exists():
        import prepare

        if rank == 0:
            print(f"data      {cfg.data} is missing: preparing it from the documentation of Python, NumPy "
                  "and PyTorch here", flush=True)
        try:
            prepare.prepare(prepare.Config())
        except UserError:
            if not Path(cfg.data, "meta.json").exists():  # else another node was first
                raise
    if world > 1:
        dist.barrier()
    corpus, validation = data.open_corpus(cfg.data)
    try:
        tokenizer = data.load_tokenizer(cfg.data)
    except data.NoDownload:  # bins of GPT-2 tokens, offline: next-token prediction needs no tokenizer
        if has_episodes:
            raise
        tokenizer = None
    if tokenizer is not None and tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"the tokenizer of {cfg.data} has {tokenizer.n_vocab} ids, vocab_size = "
                        f"{cfg.vocab_size}: raise vocab_size")
    for split in (corpus, *validation.values()):  # episodes look words up by their ids
        split.check(tokenizer.n_vocab if has_episodes else cfg.vocab_size)
    return corpus, validation, tokenizer


# ---- what is trained ----


def build_learner(cfg, dtype):
    generator = torch.Generator().manual_seed(cfg.seed)
    decoder = Decoder(cfg, generator)
    if cfg.meta_share > 0:
        head = Head(cfg.d_model, cfg.head_layers, cfg.head_width, cfg.head_start, cfg.ways, generator)
        adapt = cfg.adapt
    else:  # nothing adapts, and the settings of episodes are not checked
        head, adapt = Head(cfg.d_model, 1, 0, "zero", 2), "head"
    return Learner(decoder, head, adapt, cfg.inner_steps, cfg.inner_lr, cfg.first_order, cfg.query_lm, dtype)


def load_initial_model(cfg, learner):
    """Gives the decoder the weights of init_from, which must have the same shape and tokenizer.

    The episode head and the optimizers start anew.
    """
    state, source = checkpoint.load(cfg.init_from), Path(cfg.init_from)
    folder = source if source.is_dir() else source.parent
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"init_from = {source}: no tokenizer.json beside it tells which tokenizer it has; "
                        "give the checkpoint in its run's folder")
    theirs, ours = data.tokenizer_spec(folder), data.tokenizer_spec(cfg.data)
    if theirs != ours:
        another = "another one named " if theirs["name"] == ours["name"] else ""
        raise UserError(f"init_from = {source} has the tokenizer {theirs['name']}, {cfg.data} has "
                        f"{another}{ours['name']}: prepare the data with --tokenizer={folder}")
    saved = checkpoint.load_config(ModelConfig, state)
    differences = [f"{key} = {value} there, {getattr(cfg, key)} here" for key, value in asdict(saved).items()
                   if value != getattr(cfg, key) and key != "context"]
    if differences:
        raise UserError(f"init_from = {source} holds another model ({'; '.join(differences)}): take its "
                        "values")
    try:
        learner.decoder.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"init_from = {source} holds a model of other parameters ({reason})") from None


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
    """The learning rate of the update that follows `step` others, as a share of the peak rate."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return (cfg.max_steps - step) / (cfg.max_steps - cfg.warmup_steps)


def optimizer_step(optimizers, factor, is_bad):
    """Sets each group's rate to `factor` times its own, steps unless `is_bad`, and clears the gradients.

    is_bad: a float tensor, 0 or 1, on the device.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if is_bad.is_cuda and isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
            # It looks at the flag on the device, as for GradScaler, so nothing waits.
            optimizer.grad_scale, optimizer.found_inf = None, is_bad
            optimizer.step()
        elif not is_bad:  # most ignore the flag: the host waits for the device and looks
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compile_layers(cfg, device, learner):
    """Compiles the decoder in place where the settings say so and it is possible: whether it did."""
    is_wanted = device.type == "cuda" if cfg.compile is None else cfg.compile
    # torch.compile has no second derivative, which second order needs of the layers that adapt.
    is_possible = cfg.first_order or learner.head_only
    if is_wanted and is_possible:
        learner.decoder.compile()
    elif is_wanted and machine.rank_and_world()[0] == 0:
        print("note: not compiled, since torch.compile has no second derivative, which first_order=False "
              "needs of the layers that adapt", file=sys.stderr, flush=True)
    return is_wanted and is_possible


def wrap_for_ranks(learner, device, world):
    """The learner in DistributedDataParallel where there are several ranks.

    Each kind of micro-step leaves some parameters without gradient. All ranks do the same kind, so none
    waits.
    """
    if world == 1:
        return learner
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(learner, device_ids=device_ids, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True, find_unused_parameters=True)


@contextmanager
def catch_signals():
    """Yields a list that signals add to: the step in progress ends well. A second Ctrl-C kills.

    SIGINT, SIGTERM, and SIGHUP of a terminal that is closed, except under nohup.
    """
    received = []

    def on_signal(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- evaluation and metrics ----


def build_measurements(cfg, validation, tokenizer):
    """What is measured between updates, always on the same held-out text.

    {domain: LMBatch} for the validation loss, the ids (B, T) of the probes, and the AdaptationTest, None
    where it is off or the data have no tokenizer here.
    """
    batches = {name: data.eval_sequences(split, cfg.context, cfg.eval_sequences)
               for name, split in validation.items()}
    probe_ids = probes.fixed_batch(validation, cfg.d_model, cfg.context)
    is_on = tokenizer is not None and cfg.eval_episodes > 0
    return batches, probe_ids, AdaptationTest(cfg, validation, tokenizer) if is_on else None


@torch.no_grad()
def evaluate(learner, eval_batches, device, rank, world):
    """{"val/loss": mean over domains, and "val/<domain>" where there are several}, in nats a token.

    The ranks share the work.
    """
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
def sum_over_ranks(metrics, device, world):
    """{metric: [scalar of each micro-step]} -> {metric: (sum, number of micro-steps)}, over all ranks.

    What is nan was not measured in that micro-step and does not count.
    """
    rows = []
    for values in metrics.values():
        values = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in values])
        rows.append(torch.stack((values.nansum(), (~values.isnan()).sum())))
    table = torch.stack(rows)  # (metrics, 2)
    if world > 1:  # all ranks do the same kinds of micro-steps, so they have the same metrics
        dist.all_reduce(table)
    return dict(zip(metrics, table))


# ---- the run's folder, signals, messages ----


def open_run_folder(cfg, last_step):
    """Writes config.json and tokenizer.json to out_dir; its logs lose what lies after `last_step`."""
    out_dir = Path(cfg.out_dir)
    logs.replace(out_dir / "config.json", json.dumps(asdict(cfg), indent=1).encode() + b"\n")
    logs.replace(out_dir / "tokenizer.json", json.dumps(data.tokenizer_spec(cfg.data)).encode())
    for name in ("log.jsonl", "probes.jsonl"):
        logs.truncate_log(out_dir / name, last_step)
    if last_step > 0 and not (out_dir / "log.jsonl").exists():
        print(f"note      {out_dir}/log.jsonl is missing: the new one begins after step {last_step}")


def wandb_facts(device, dtype, world, learner):
    """What wandb's config shows beside the settings; device and dtype are what "auto" came to."""
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "ranks": world,
            "machine": machine.describe(device, dtype),
            "parameters": sum(p.numel() for p in learner.decoder.parameters()),
            "head_parameters": sum(p.numel() for p in learner.head.parameters())}


def print_setup(cfg, is_compiled, schedule, corpus, validation, learner, adaptation, resumed_at, saved_cfg):
    world = schedule.world
    held_out = sum(split.tokens for split in validation.values())
    sizes = [sum(p.numel() for p in module.parameters()) for module in (learner.decoder, learner.head)]
    print(f"data      {cfg.data}: {corpus.tokens:,} training tokens, {held_out:,} for validation; unigram "
          f"entropy {data.unigram_entropy(corpus):.3f} nats")
    print(f"model     {sizes[0]:,} parameters, and {sizes[1]:,} in the episode head; "
          f"{'compiled' if is_compiled else 'eager'}")
    print(f"update    {cfg.global_batch_size} sequences x {cfg.context} tokens = "
          f"{cfg.global_batch_size * cfg.context:,}: {schedule.micro_steps} micro-steps x {cfg.batch_size} "
          f"sequences x {world} rank{'s' * (world > 1)}")
    if (schedule.kinds != "lm").any():
        print(f"episodes  {cfg.meta_share:.0%} of micro-steps from step {cfg.meta_start} on: {cfg.ways}-way "
              f"{cfg.shots}-shot, {cfg.queries} queries a word, {cfg.inner_steps} inner steps at "
              f"{cfg.inner_lr:g}; chance {1 / cfg.ways:.3f}, ln N {math.log(cfg.ways):.3f}")
    if adaptation is None and cfg.eval_episodes > 0:
        print("adapting  on held-out text is not measured: the data have no tokenizer here")
    elif adaptation is not None:
        print(f"adapting  on held-out text at each evaluation: {adaptation.describe()}")
    if cfg.warmup_steps >= cfg.max_steps > 0:
        print(f"note      max_steps = {cfg.max_steps} ends within warmup_steps = {cfg.warmup_steps}: "
              f"lr = {cfg.lr:g} is never reached")
    if cfg.meta_share > 0 and cfg.meta_start >= cfg.max_steps > 0:
        print(f"note      max_steps = {cfg.max_steps} ends before meta_start = {cfg.meta_start}: no episode "
              "is read")
    if resumed_at is not None:
        finished = ": the run is finished" if resumed_at >= cfg.max_steps else ""
        print(f"resume    from {cfg.out_dir}/ckpt_{resumed_at:06d}.pt{finished}")
        if cfg.max_steps != saved_cfg.max_steps:
            print(new_length_note(cfg, saved_cfg.max_steps, resumed_at))
    elif cfg.init_from:
        print(f"start     from the model of {cfg.init_from}")
    sys.stdout.flush()


def new_length_note(cfg, old_max_steps, step):
    """One line on what the schedule does when a run goes on from `step` to another max_steps."""
    note = f"length    max_steps = {cfg.max_steps}, {old_max_steps} before: "
    if step == cfg.max_steps:
        return note + "the run ends here, its learning rate not decayed to 0"
    decays = cfg.meta_share > 0 and cfg.meta_decay > 0
    decay = "; the weight of the episodes decays over the new length too" if decays else ""
    rise = f", rises to {cfg.lr:.2e} at step {cfg.warmup_steps}" if step < cfg.warmup_steps else ""
    if cfg.warmup_steps >= cfg.max_steps:
        return note + f"it ends within warmup_steps = {cfg.warmup_steps}{decay}"
    rate = cfg.lr * lr_factor(cfg, step)
    return note + (f"the learning rate goes on at {rate:.2e}{rise} and falls to 0 at step {cfg.max_steps}"
                   f"{decay}")


def stuck_warning(cfg, progress, line):
    """One line where the query loss was at ln N in five log lines in a row, else ""; never during warm-up."""
    if "meta/query_loss" not in line or progress.step <= cfg.warmup_steps:
        return ""
    ln_n = math.log(line.get("meta/ways", cfg.ways))
    progress.stuck_logs = progress.stuck_logs + 1 if line["meta/query_loss"] > 0.99 * ln_n else 0
    if progress.stuck_logs != 5:
        return ""
    return (f"warning: the adapted query loss stays at ln N = {ln_n:.3f}: the episodes teach nothing; "
            "try another inner_lr, a later meta_start, or fewer ways")


def require_finite(cfg, progress, look):
    """Ends the run after MAX_SKIPPED bad updates in a row, or where all were bad; else, was the last one?

    Looks at the last update of a run, after every MAX_SKIPPED, and, with `look`, now: each look waits for
    the device. Given what it returned, it misses no run of them.
    """
    if not look and progress.step % MAX_SKIPPED and progress.step < cfg.max_steps:
        return False
    in_a_row = int(progress.skipped[1])
    if in_a_row >= min(MAX_SKIPPED, cfg.max_steps):
        raise UserError(f"the gradient was not finite in {in_a_row} updates in a row (step {progress.step}); "
                        f"they were skipped. {ways_out(cfg)}")
    return in_a_row > 0


def ways_out(cfg):
    """What to do about numbers that are not finite: other settings are refused in the same folder."""
    newest = [f", from the last good model with --init_from={path}" for path in checkpoint.paths(cfg.out_dir)]
    return (f"Start again in another --out_dir{''.join(newest[-1:])}, with a lower lr (here {cfg.lr:g}) or "
            f"inner_lr ({cfg.inner_lr:g})")


@torch.no_grad()
def is_sound(cfg, learner, progress, eval_batches, device, is_end):
    """Whether all parameters and buffers, and the loss on a few sequences, are finite on all ranks.

    Says so where they are not, and raises UserError where the run has come to max_steps. In a row of bad
    updates it waits how that ends, unless this `is_end`.
    """
    batch = next(iter(eval_batches.values()))
    with learner.decoder.eager():  # another batch size would be compiled anew
        loss = learner("lm", data.LMBatch(batch.ids[:8].to(device), batch.targets[:8].to(device)))[0]["lm"]
    is_bad = not all(value.isfinite().all() for value in (loss, *learner.state_dict().values()))
    if not machine.any_rank(is_bad or progress.skipped[1] > 0 and not is_end):
        return True
    message = f"a gradient, a parameter or the loss is not finite at step {progress.step}"
    if progress.step >= cfg.max_steps:
        raise UserError(f"{message}. {ways_out(cfg)}")
    if machine.rank_and_world()[0] == 0:
        print(f"warning: {message}: no checkpoint of it is written", flush=True)
    return False


def print_results(cfg, corpus, learner, tokenizer, device, metrics):
    """The last lines of a finished run; `metrics`: those of its last evaluation, {} where there was none."""
    loss = f"validation loss {metrics['val/loss']:.3f}, where" if metrics else "not evaluated;"
    print(f"done      {loss} token frequencies alone give {data.unigram_entropy(corpus):.3f}")
    for key, words in (("query_acc", "held-out text"), ("new_query_acc", "held-out words")):
        if f"val/mask_{key}" in metrics:
            print(f"          query accuracy on {words} {metrics[f'val/mask_{key}']:.3f} at the mask, "
                  f"{metrics[f'val/context_{key}']:.3f} before the word; chance {1 / cfg.eval_ways:.3f}")
    if cfg.meta_share > 0:
        print("          what the episodes bring is the difference to a run with configs/vanilla.py")
    if tokenizer is not None:
        prompt = torch.tensor([tokenizer.encode_ordinary("The function returns")], device=device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        with learner.decoder.eager():  # each length would be compiled anew
            ids = learner.decoder.generate(prompt, 40, 0.8, top_k=50, generator=generator)[0].tolist()
        print(f"sample    {tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])!r}")


def write_report(out_dir):
    """report.md and report.png of a finished run, and the phases of its curves on the console."""
    try:
        import report  # and with it matplotlib

        report.write([[str(out_dir)]], out_dir / "report")
        summary = report.phase_summary(str(out_dir))
    except Exception as error:  # the run is done, whatever is wrong with its report
        print(f"note      no report: {type(error).__name__}: {error}")
        return
    print(f"report    {out_dir / 'report.md'}, {out_dir / 'report.png'}")
    for i, text in enumerate(summary):
        print(f"{'curves' if i == 0 else '':<9} {text}")


# ---- the loop ----


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    with logs.lasting_console(), ExitStack() as lock:  # held by rank 0 until the report is written
        with machine.ranks(device):
            is_finished = train(cfg, device, dtype, lock)
        if is_finished and cfg.report and machine.rank_and_world()[0] == 0:
            write_report(Path(cfg.out_dir))


def train(cfg, device, dtype, lock):
    """Trains until max_steps or a signal: whether it has finished the run. lock: an ExitStack."""
    # The data, and what each micro-step reads
    rank, world = machine.rank_and_world()
    schedule, out_dir = Schedule(cfg, world), Path(cfg.out_dir)
    print0 = print if rank == 0 else lambda *args, **kwargs: None
    print0(f"machine   {machine.describe(device, dtype)}", flush=True)
    machine.require_same_on_ranks(what_ranks_share(cfg))
    kinds = set(schedule.kinds.flat)
    corpus, validation, tokenizer = load_data(cfg, kinds != {"lm"}, rank, world)
    digests = data_digests(cfg.data, corpus)
    machine.require_same_on_ranks(digests | {name: split.digest() for name, split in validation.items()})
    sources = build_sources(cfg, kinds, corpus, tokenizer)
    eval_batches, probe_ids, adaptation = build_measurements(cfg, validation, tokenizer)

    # What is trained, and where it stands
    learner = build_learner(cfg, dtype).to(device)
    if cfg.init_from and not checkpoint.paths(out_dir):
        load_initial_model(cfg, learner)
    writer = machine.only_writer(out_dir / "lock", f"out_dir = {out_dir}")
    machine.on_first_rank(lambda: lock.enter_context(writer))
    optimizers, params = build_optimizers(cfg, learner), list(learner.parameters())
    restored, saved_cfg = resume(cfg, corpus, digests, learner, optimizers)
    progress, resumed_at = (restored or Progress()).to(device), restored.step if restored else None
    if restored:  # config.json keeps saying where the run once started from
        cfg = replace(cfg, init_from=saved_cfg.init_from)
    require_same_step(progress, world, out_dir)
    if rank == 0:
        open_run_folder(cfg, -1 if resumed_at is None else resumed_at)
    log = logs.RunLog(cfg, progress, rank, wandb_facts(device, dtype, world, learner))
    is_compiled = compile_layers(cfg, device, learner)
    model = wrap_for_ranks(learner, device, world)
    peak_flops = machine.peak_flops(device, dtype) * world
    if rank == 0:
        print_setup(cfg, is_compiled, schedule, corpus, validation, learner, adaptation, resumed_at,
                    saved_cfg)

    def due(interval, step):
        return interval > 0 and step != resumed_at and (step % interval == 0 or step == cfg.max_steps)

    def log_probes(through=-1):
        """Those that are done; waits for those of steps up to `through`."""
        for line in spectra.finished(through):
            last_probe.update(line)
            log.write("probes.jsonl", line)

    # A run that was killed after a checkpoint and before the line of the probe there measures that again.
    is_probe_lost = (rank == 0 and resumed_at is not None and cfg.probe_every > 0
                     and (resumed_at % cfg.probe_every == 0 or resumed_at == cfg.max_steps)
                     and resumed_at not in dict(logs.read_steps(out_dir / "probes.jsonl")))
    updates = read_ahead(schedule, sources, rank, device, progress.step)
    validation_metrics, last_probe = {}, {}
    failure, saved_at, look = None, resumed_at, True
    with closing(probes.Spectra(device)) as spectra, catch_signals() as signals:
        while True:
            # Between updates: probe, evaluate, checkpoint, stop? A resumed step has done all that.
            learner.eval()
            is_last = progress.step >= cfg.max_steps
            if rank == 0 and (due(cfg.probe_every, progress.step) or is_probe_lost):
                log_probes(progress.step - 1)  # at most one is unfinished, since its matrices take memory
                metrics = probes.measure(learner.decoder, probe_ids.to(device), probes.gram)
                spectra.add(progress.axes() | metrics | progress.gradient_grams)
                is_probe_lost = False
            if due(cfg.eval_every, progress.step):
                validation_metrics = evaluate(learner, eval_batches, device, rank, world)
                if rank == 0 and adaptation is not None:
                    validation_metrics |= adaptation.measure(learner.decoder, dtype, is_last)
                log.write("log.jsonl", progress.axes() | validation_metrics)
                log_probes()
                print0(logs.evaluation_line(progress.step, validation_metrics, last_probe), flush=True)
            log_probes()
            try:
                micro_steps, waited = next(updates, ([], 0.0))  # there are none after the last
            except UserError as error:
                failure = error
            failure = failure or log.failure
            # One rank may have a signal, or a file that fails, before the others: they stop together.
            stop = machine.any_rank(signals or failure)
            if progress.step != resumed_at and (due(cfg.checkpoint_every, progress.step) or stop or is_last):
                log_probes(progress.step - 1)  # a resume from here does not measure them again
                if is_sound(cfg, learner, progress, eval_batches, device, stop or is_last):
                    saved_at = progress.step
                    if rank == 0:
                        state = checkpoint_state(cfg, corpus, digests, learner, optimizers, progress)
                        checkpoint.save(out_dir, state, cfg.keep, cfg.keep_every)
            if stop or is_last:
                log_probes(progress.step)
                break

            # One update: forward, backward, clip, step
            learner.train()
            start, weights = time.perf_counter() - waited, loss_weights(cfg, progress.step)
            metrics = {}
            for micro, (kind, batch) in enumerate(micro_steps):
                batch = type(batch)(*(t.to(device, non_blocking=True) for t in batch))
                # DDP sums the gradients over ranks in the last backward pass alone.
                no_sync = world > 1 and micro < schedule.micro_steps - 1
                with model.no_sync() if no_sync else nullcontext():
                    losses, new_metrics = model(kind, batch)
                    loss = sum(loss * (weights[part] / schedule.micro_steps) for part, loss in losses.items())
                    loss.backward()
                for name, value in (new_metrics | {BAD_LOSSES: ~loss.detach().isfinite()}).items():
                    metrics.setdefault(name, []).append(value)
                lm_tokens = batch.lm_tokens if "lm" in losses else 0
                progress.count(kind, batch.tokens * world, lm_tokens * world,
                               learner.flops(kind, batch) * world)
            totals = sum_over_ranks(metrics, device, world)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)
            is_bad = (~torch.isfinite(grad_norm) | (totals.pop(BAD_LOSSES)[0] > 0)).float()
            progress.gradient_grams = {}
            if rank == 0 and cfg.probe_gradients and due(cfg.probe_every, progress.step + 1):
                paused = time.perf_counter()  # the rest of the probe follows the update; neither is training
                progress.gradient_grams = probes.gradient_ranks(learner.decoder, probes.gram)
                start += time.perf_counter() - paused
            optimizer_step(optimizers, lr_factor(cfg, progress.step), is_bad)
            progress.finish_update(totals, is_bad, waited)
            is_log_due = progress.step % cfg.log_every == 0 or progress.step == cfg.max_steps
            if is_log_due:
                machine.synchronize(device)
            progress.add_seconds(time.perf_counter() - start)

            if is_log_due:
                line = progress.interval_metrics(peak_flops)
                line |= {"lr": cfg.lr * lr_factor(cfg, progress.step - 1), "grad_norm": grad_norm.item()}
                log.write("log.jsonl", progress.axes() | line)
                print0(logs.training_line(progress, line), flush=True)
                if warning := stuck_warning(cfg, progress, line):
                    print0(warning, flush=True)
                progress.start_interval()
            look = require_finite(cfg, progress, look)

    updates.close()
    again = (f"resumes from step {saved_at}" if saved_at is not None else
             "starts again once log.jsonl is removed, since there is no checkpoint")
    if failure := failure or log.failure:  # the last lines too
        raise UserError(f"{failure}; mend that, and the same command {again}", failure.code)
    if not is_last:
        print0(f"stopped   at step {progress.step}; the same command {again}")
    elif rank == 0 and progress.step != resumed_at:
        print_results(cfg, corpus, learner, tokenizer, device, validation_metrics)
    saved = "no checkpoint" if saved_at is None else f"ckpt_{saved_at:06d}.pt (checkpoint)"
    print0(f"files     {out_dir}: {saved}, log.jsonl (losses), probes.jsonl (effective ranks, attention "
           "entropies)", flush=True)
    log.finish()
    return is_last and (progress.step != resumed_at or not (out_dir / "report.md").exists())


if __name__ == "__main__":
    config.run(main)
