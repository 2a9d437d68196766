"""Speed, memory and MFU of each kind of step, and what data, probes, optimizer and logging cost.

    python bench.py configs/demo.py                        # any config and key of train.py; needs no data
    python bench.py configs/11m.py --batch_size=8 --context=512 --against=transformers --json
    python bench.py configs/570m.py --plan                 # what a run will need; nothing is computed

All measurements take turns in each round, and medians over the rounds are shown, so that a drift of the
machine affects all figures. The text is synthetic: 10^9 tokens, made up as they are read.
"""
import ctypes
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import export
import probes
import train
from nanomaml import config, files, machine
from nanomaml.config import Count, Positive, UserError, require
from nanomaml.tokenizer import SPECIAL, encoding
from schedule import block_kinds


@dataclass(frozen=True)
class Config(train.Config):
    rounds: Count = 5  # measurements of everything, after two to warm up
    against: Literal["", "transformers"] = ""  # also measure its LlamaForCausalLM; empty: ours only
    json: bool = False  # one JSON object instead of tables
    plan: bool = False  # the memory, time and GPU-hours that a run will need, at the config's shapes
    mfu: Positive = 0.4  # MFU that the plan assumes

    def __post_init__(self):
        super().__post_init__()  # episodes are measured for a vanilla config too
        require(self.window <= self.context, f"window = {self.window} is above context = {self.context}")
        least = 256 + len(SPECIAL) + self.ways  # bytes, then words
        require(self.vocab_size >= least, f"vocab_size must be at least {least}, got {self.vocab_size}")


def made_up(vocab_size, tokens=10**9):
    """(Corpus, tokenizer) of made-up words: 2^22 tokens by Zipf's law, over and over."""
    letters, n = str.maketrans("0123456789abcdef", "abcdefghijklmnop"), vocab_size - 256 - len(SPECIAL)
    words = [f" {i:05x}".translate(letters).encode() for i in range(n)]
    share = 1 / np.arange(1.0, n + 1)
    ids = np.random.default_rng(0).choice(n, 2**22, p=share / share.sum()).astype(np.uint16) + np.uint16(256)

    def read(shard, start, length):
        start %= len(ids) - length
        return ids[start:start + length]

    ranks = {token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + words)}
    corpus = SimpleNamespace(shards=[range(tokens)], tokens=tokens, paths=[Path("made up")], read=read)
    return corpus, encoding("made-up", r" ?\w+|\W", ranks)


def measure(device, calls, rounds):
    """{name: median milliseconds} of `calls`, the device's work included; they take turns."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            machine.synchronize(device)
            start = time.perf_counter()
            call()
            machine.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(spent[2:]) for name, spent in seconds.items()}


def peak_memory(device, call):
    """The most bytes that `call` takes above those in use before; None if unknown: on a CPU without Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back free memory, which would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        status = Path("/proc/self/status").read_text  # lines such as "VmRSS:   1234 kB"
        before = status().split("VmRSS:")[1].split()[0]
        call()
        return 1024 * (int(status().split("VmHWM:")[1].split()[0]) - int(before))
    except (OSError, AttributeError, TypeError):
        return None


def update(model, optimizers, loss=None):
    """A whole training step of one micro-step or, without a loss, only the optimizers' part."""
    if loss:
        loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        if loss:
            optimizer.zero_grad(set_to_none=True)


def rival(cfg, decoder, batch, dtype):
    """(model, function for its loss): transformers' Llama with the same weights, on the same batch."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError("--against=transformers needs a package: pip install transformers") from None
    model = LlamaForCausalLM(LlamaConfig.from_dict(export.model_config(cfg, {}))).to(batch.ids.device)
    if decoder.is_compiled:
        model.compile()
    model.load_state_dict(decoder.state_dict())

    def loss():
        with machine.autocast(batch.ids.device, dtype):
            return model(input_ids=batch.ids, labels=batch.targets, shift_labels=batch.targets,
                         use_cache=False).loss

    return model, loss


def parts_of(learner, batch):
    """{part: a call of its forward and backward pass}, for all layers, of an LM step on random features."""
    decoder, T = learner.decoder, batch.ids.shape[1]
    layer, cfg = decoder.model.layers[0], decoder.cfg
    x = torch.randn(*batch.ids.shape, cfg.d_model, device=batch.ids.device, requires_grad=True)
    places = (*decoder.model.positions(T), decoder.model.mask(T))

    def call(forward, times):
        for _ in range(times):
            with learner.autocast():
                y = forward()
            torch.autograd.backward(y, torch.ones_like(y))

    return {
        "embedding": partial(call, lambda: decoder.model.embed_tokens(batch.ids), 1),
        "attention": partial(call, lambda: layer.self_attn(x, *places), cfg.n_layers),
        "MLP": partial(call, lambda: layer.mlp(x), cfg.n_layers),
        "norms": partial(call, lambda: layer.input_layernorm(x), 2 * cfg.n_layers + 1),
        "output layer and loss": partial(call, lambda: decoder.loss(x, batch.targets), 1),
    }


def bench(cfg):
    """All figures of a config, as a dict."""
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    learner = train.build_learner(cfg, dtype).to(device)
    train.compile_layers(cfg, device, learner)
    decoder, optimizers = learner.decoder, train.build_optimizers(cfg, learner)
    sources = train.build_sources(cfg, {"lm", "episodes"}, *made_up(cfg.vocab_size))
    numbers, batch = itertools.count(), {}

    def new_batch(kind):
        return sources[kind].batches[list(itertools.islice(numbers, sources[kind].size))]

    def loss(kind):
        return sum(learner(kind, batch[kind])[0].values())

    for kind in sources:
        made = new_batch(kind)
        batch[kind] = type(made)(*(t.to(device) for t in made))
    probe_ids = batch["lm"].ids[:1].expand(max(2, -(-4 * cfg.d_model // cfg.context)), -1)
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    sums, log = torch.zeros(2, 8, device=device), tempfile.NamedTemporaryFile()
    parts = parts_of(learner, batch["lm"])
    calls = {
        "limit": lambda: a @ a,
        # The LM step makes new gradients, the episodes add to them, as in training.
        "no gradients": lambda: learner.zero_grad(set_to_none=True),
        "lm": lambda: loss("lm").backward(),
        "episodes": lambda: loss("episodes").backward(),
        "optimizer": partial(update, learner, optimizers),
        "lm batch": lambda: new_batch("lm"),
        "episodes batch": lambda: new_batch("episodes"),
        "probe": lambda: probes.measure(decoder, probe_ids, probes.gram),  # what training waits for
        "log": lambda: files.append(log.name, {"metrics": sums.tolist()}),
    }
    if learner.head_only:  # on random features: (E, N * K, D) and (E, N * Q, D)
        support, query = (torch.randn(*windows.flatten(1, 2).shape[:2], cfg.d_model, device=device)
                          for windows in (batch["episodes"].support, batch["episodes"].query))
        calls["inner loop"] = lambda: learner.adapt_heads(support, query, cfg.ways)
    calls |= parts
    if cfg.against:
        other, other_loss = rival(cfg, decoder, batch["lm"], dtype)
        adamw = torch.optim.AdamW(other.parameters(), lr=cfg.lr, fused=True)
        calls["our update"] = partial(update, learner, optimizers, partial(loss, "lm"))
        calls["their update"] = partial(update, other, [adamw], other_loss)
        with torch.no_grad():
            our_loss, their_loss = loss("lm").item(), other_loss().item()

    memory = {}
    for name in ("lm", "episodes", "our update", "their update"):
        if name in calls:
            calls[name]()  # allocates the gradients, compiles
            memory[name] = peak_memory(device, calls[name])
    ms = measure(device, calls, cfg.rounds)
    limit, steps = 2 * n**3 / ms["limit"] * 1000, {}
    data_sheet = machine.peak_flops(device, dtype) if device.type == "cuda" else None
    flops = {kind: learner.flops(kind, batch[kind]) for kind in sources}
    for kind in sources:
        rate, tokens = flops[kind] / ms[kind] * 1000, batch[kind].tokens
        steps[kind] = {"ms": ms[kind], "tokens": tokens, "tok_per_s": tokens / ms[kind] * 1000,
                       "flop_per_s": rate, "of_limit": rate / limit,
                       "of_data_sheet": rate / data_sheet if data_sheet else None, "peak_bytes": memory[kind]}
    micro_steps = cfg.global_batch_size // cfg.batch_size
    share = {"lm": 1 - cfg.meta_share, "episodes": cfg.meta_share}
    whole = micro_steps * sum(share[kind] * ms[kind] for kind in sources) + ms["optimizer"]
    batches = micro_steps * sum(share[kind] * ms[f"{kind} batch"] for kind in sources)
    result = {
        "machine": machine.describe(device, dtype), "dtype": str(dtype).removeprefix("torch."),
        "compiled": decoder.is_compiled, "rounds": cfg.rounds, "limit_flop_per_s": limit, "steps": steps,
        "episode_over_lm_at_equal_tokens": steps["lm"]["tok_per_s"] / steps["episodes"]["tok_per_s"],
        "episode_over_lm_by_flops": (flops["episodes"] / batch["episodes"].tokens
                                     / (flops["lm"] / batch["lm"].tokens)),
        "update_ms": whole,
        "shares": {
            "optimizer": ms["optimizer"] / whole,
            "probes": ms["probe"] / (cfg.probe_every or float("inf")) / whole,
            "logging": ms["log"] / cfg.log_every / whole,
            "data, in the background": batches / whole,
        },
        "batch_ms": {kind: ms[f"{kind} batch"] for kind in sources},
        "parts_ms": {name: ms[name] for name in parts},
    }
    if learner.head_only:
        result["inner_loop_share_of_episode"] = ms["inner loop"] / ms["episodes"]
    if cfg.against:
        result["against"] = {
            "name": cfg.against, "our_loss": our_loss, "their_loss": their_loss,
            "our_ms": ms["our update"], "their_ms": ms["their update"],
            "times_as_fast": ms["their update"] / ms["our update"],
            "our_peak_bytes": memory["our update"], "their_peak_bytes": memory["their update"],
        }
    return result | {"matrix": n, "micro_steps": micro_steps, "config": asdict(cfg)}


class Alive(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive: `now`, and the most since `peak` was last set."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda x: self.count(x.untyped_storage()), made)
        return made

    def count(self, storage):
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.add(size)
            weakref.finalize(storage, self.add, -size)

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def needs(cfg):
    """({what: bytes} on one rank, {kind: FLOPs of a micro-step}), of real micro-steps under fake tensors."""
    sources = train.build_sources(cfg, {"lm", "episodes"}, *made_up(cfg.vocab_size))
    made = {kind: batches[range(size)] for kind, (batches, size) in sources.items()}
    entropy = probes.attention_entropy

    def no_numbers(*args):  # fake tensors have none
        entropy(*args)
        return np.zeros((2, cfg.n_heads))

    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        learner = train.build_learner(cfg, torch.bfloat16)
        memory, optimizers = {"parameters": alive.now}, train.build_optimizers(cfg, learner)
        batch = {kind: type(b)(*(torch.empty(x.shape, dtype=x.dtype) for x in b)) for kind, b in made.items()}
        update(learner, optimizers, lambda: sum(learner("lm", batch["lm"])[0].values()))
        memory["parameters and optimizer"] = alive.now
        for kind in batch:  # the first makes the gradients, which the second adds to
            alive.peak = alive.now
            sum(learner(kind, batch[kind])[0].values()).backward()
            memory[f"peak, {kind} micro-step"] = alive.peak
        alive.peak = alive.now
        ids = torch.empty(max(2, -(-4 * cfg.d_model // cfg.context)), cfg.context, dtype=torch.long)
        with torch.no_grad(), mock.patch.object(probes, "attention_entropy", no_numbers):
            probes.measure(learner.decoder, ids, probes.gram)
        memory["peak, probe"] = alive.peak
        return memory, {kind: learner.flops(kind, batch[kind]) for kind in batch}


def print_plan(cfg):
    """What a run will need: the memory of a rank and, by the counted FLOPs, its time on some GPUs."""
    memory, flops = needs(cfg)
    twice, _ = needs(replace(cfg, batch_size=2 * cfg.batch_size, global_batch_size=2 * cfg.global_batch_size))
    print(f"memory    of a rank, eager, in bfloat16; micro-batch {cfg.batch_size}, {cfg.episodes} episodes")
    print_table([[what, gib(size)] for what, size in memory.items()])
    of_lm, *others = list(memory.values())[2:]
    each = (list(twice.values())[2] - of_lm) / cfg.batch_size  # bytes of a sequence
    fits = {room: (0.95e9 * room - of_lm) / each + cfg.batch_size if max(others) < 0.95e9 * room else 0
            for room in (24, 40, 48, 80)}  # a twentieth is left for what the allocator and CUDA take
    print("          batch_size that fits: " + ", ".join(
        f"{room} GB {2 ** int(math.log2(x)) if x >= 1 else 'none'}" for room, x in fits.items()))
    print(f"time      of an update, and GPU-hours of {cfg.max_steps:,} updates, at {cfg.mfu:.0%} MFU")
    rows = [["", "LM tokens", "FLOPs", *machine.PEAK_FLOPS]]
    micro_steps = cfg.global_batch_size // cfg.batch_size  # over all ranks
    for share in dict.fromkeys((cfg.meta_share, 0.0)):
        own = replace(cfg, meta_share=share)
        of_kind = {kind: (block_kinds(own) == kind).mean() for kind in flops}
        of_update = micro_steps * sum(of_kind[kind] * flops[kind] for kind in flops)
        tokens = of_kind["lm"] * cfg.global_batch_size * cfg.context * cfg.max_steps
        seconds = [of_update / peak / cfg.mfu for peak in machine.PEAK_FLOPS.values()]
        rows.append([f"meta_share {share:g}", f"{tokens / 1e9:.2f} G", f"{of_update * cfg.max_steps:.2e}",
                     *(f"{x:,.2f} s, {x * cfg.max_steps / 3600:,.1f} h" for x in seconds)])
    print_table(rows)


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def gib(size):
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def print_result(result):
    n, mode = result["matrix"], "compiled" if result["compiled"] else "eager"
    print(f"machine   {result['machine']}, {mode}; medians of {result['rounds']} rounds")
    limit = result["limit_flop_per_s"] / 1e9
    print(f"limit     {limit:,.0f} GFLOP/s, in a product of two {n} x {n} matrices")
    print("steps     forward and backward of a micro-step")
    rows = [["", "ms", "tokens", "tokens/s", "GFLOP/s", "of the limit", "of the data sheet", "peak memory"]]
    for kind, it in result["steps"].items():
        rows.append([kind, f"{it['ms']:.1f}", f"{it['tokens']:,}", f"{it['tok_per_s']:,.0f}",
                     f"{it['flop_per_s'] / 1e9:,.1f}", f"{it['of_limit']:.0%}",
                     f"{it['of_data_sheet']:.0%}" if it["of_data_sheet"] else "-", gib(it["peak_bytes"])])
    print_table(rows)
    print(f"          a token of an episode takes {result['episode_over_lm_at_equal_tokens']:.3f} of an LM "
          f"token's time, {result['episode_over_lm_by_flops']:.3f} by counted FLOPs")
    if share := result.get("inner_loop_share_of_episode"):
        print(f"          inner loop and heads take {share:.1%} of an episode step")
    print(f"update    {result['update_ms']:,.0f} ms: {result['micro_steps']} micro-steps, "
          f"{result['config']['meta_share']:.0%} of them episodes, and the optimizer; of that time:")
    print_table([[name, f"{part:.2%}"] for name, part in result["shares"].items()])
    print("parts     of the LM step, each by itself and eager")
    print_table([["", "ms", "of the step"],
                 *([name, f"{ms:.1f}", f"{ms / result['steps']['lm']['ms']:.0%}"]
                   for name, ms in result["parts_ms"].items())])
    if it := result.get("against"):
        print(f"against   {it['name']}: {it['their_ms']:,.0f} ms an update, ours {it['our_ms']:,.0f}: "
              f"{it['times_as_fast']:.2f} times as fast; peak memory {gib(it['their_peak_bytes'])}, ours "
              f"{gib(it['our_peak_bytes'])}; losses {it['their_loss']:.4f} and {it['our_loss']:.4f}")


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    if cfg.plan:
        return print_plan(cfg)
    with redirect_stdout(sys.stderr):  # a note of train.py is not JSON
        result = bench(cfg)
    print(json.dumps(result)) if cfg.json else print_result(result)


if __name__ == "__main__":
    config.run(main)
