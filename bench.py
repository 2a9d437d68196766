"""Speed, memory and MFU of each kind of step, and what data, probes, optimizer and logging cost.

    python bench.py configs/demo.py                                              # any config and key of train.py; needs no data
    python bench.py configs/11m.py --batch_size=8 --context=512 --json=True
    python bench.py configs/11m.py --batch_size=8 --context=512 --against=transformers     # needs requirements-dev.txt

Everything measured takes its turn in each round, and medians over the rounds are shown, so a drift of the machine meets all alike.
The text is synthetic: 10^9 tokens that are made up where they are read.
"""
import ctypes
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import config
import data
import probes
import train
from config import UserError


@dataclass(frozen=True)
class Config(train.Config):
    rounds: int = 5  # measurements of everything, after two for warming up
    against: str = ""  # naive: our model with whole float32 logits; transformers: LlamaForCausalLM as it comes; empty: neither
    json: bool = False  # one JSON object instead of tables

    def __post_init__(self):
        super().__post_init__()
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")
        if self.against not in ("", "naive", "transformers"):
            raise UserError(f"against must be empty, naive or transformers, got {self.against!r}")


class MadeUp:
    """A shard of n tokens that holds 2^22 of them, over and over."""

    def __init__(self, n, vocab_size):
        rng = np.random.default_rng(0)
        share = 1 / (np.arange(256, vocab_size) - 255.0)  # Zipf's law
        self.n, self.ids = n, rng.choice(np.arange(256, vocab_size, dtype=np.uint16), min(n, 2**22), p=share / share.sum())

    def __len__(self):
        return self.n

    def __getitem__(self, where):
        start = where.start % max(1, len(self.ids) - (where.stop - where.start))
        return self.ids[start:start + where.stop - where.start]


def made_up(vocab_size, tokens=10**9):
    """(Corpus, tokenizer) of words made of random letters."""
    letters, words = random.Random(0), set()
    while len(words) < vocab_size - 256 - len(data.SPECIAL):
        words.add(" " + "".join(letters.choices("abcdefghijklmnop", k=letters.randint(4, 8))))
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(sorted(words))}
    shard = MadeUp(tokens, len(ranks))
    return SimpleNamespace(shards=[shard], tokens=tokens, paths=[Path("made up")]), data.encoding("made-up", data.PATTERN, ranks)


def clock(device, call):
    """Seconds that `call` takes, the device's work included."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def resident(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def peak_memory(device, call):
    """Bytes that `call` takes at its height above what was taken before; None where the system does not tell (of a CPU only Linux does)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def update(loss_of, params, optimizer):
    """A whole training step of one micro-step."""
    def step():
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def rival(cfg, decoder, batch, dtype, compiled):
    """The LM step that ours is compared with, on the same weights, batch, dtype and optimizer: (step, its loss)."""
    device = batch.ids.device
    if cfg.against == "transformers":
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise UserError("--against=transformers needs the package: pip install -r requirements-dev.txt") from None
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_hidden, num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, max_position_embeddings=cfg.context,
            rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta, tie_word_embeddings=False)).to(device)
        if compiled:
            model.compile()
    else:
        model = train.Decoder(cfg).to(device)
        if compiled:
            model.compile()
    model.load_state_dict(decoder.state_dict(), strict=False)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if cfg.against == "transformers":
                return model(input_ids=batch.ids, labels=batch.targets, shift_labels=batch.targets, use_cache=False).loss
            return F.cross_entropy(model(batch.ids).float().flatten(0, 1), batch.targets.flatten())

    params = list(model.parameters())
    return update(loss, params, torch.optim.AdamW(params, lr=cfg.lr, fused=True)), loss


def parts_of(decoder, batch, learner):
    """{part: call of its forward and backward pass}: each part of an LM step on random features, times the layers where there are more."""
    layer, cfg = decoder.model.layers[0], decoder.cfg
    x = torch.randn(*batch.ids.shape, cfg.d_model, device=batch.ids.device, requires_grad=True)
    rope = decoder.model.positions(batch.ids.shape[1])

    def both(forward, times):
        def call():
            for _ in range(times):
                with learner.autocast():
                    y = forward()
                torch.autograd.backward(y, torch.ones_like(y))
        return call

    return {
        "embedding": both(lambda: decoder.model.embed_tokens(batch.ids), 1),
        "attention": both(lambda: layer.self_attn(x, *rope), cfg.n_layers),
        "MLP": both(lambda: layer.mlp(x), cfg.n_layers),
        "norms": both(lambda: layer.input_layernorm(x), 2 * cfg.n_layers + 1),
        "output layer and loss": both(lambda: decoder.loss(x, batch.targets), 1),
    }


def table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    device, dtype = train.pick_device(cfg)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    micro_steps = train.accumulation(cfg, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    corpus, tokenizer = made_up(min(cfg.vocab_size, 2**16))
    sequences = data.Sequences(corpus, cfg.context, cfg.seed)
    episodes = data.Episodes(corpus, tokenizer, cfg.ways, cfg.shots, cfg.queries, cfg.window, cfg.seed)
    learner, optimizer = train.build_learner(cfg, device, dtype)
    decoder, params = learner.decoder, list(learner.parameters())
    compiled = compiled and (cfg.first_order or learner.head_only)  # as train.py does
    if compiled:
        decoder.compile()
    numbers = iter(range(10**9))

    def build(series, size):
        return series[[next(numbers) for _ in range(size)]]

    def move(batch):
        return type(batch)(*(t.to(device) for t in batch))

    lm, episode = move(build(sequences, cfg.batch_size)), move(build(episodes, cfg.episodes))
    probe_ids = torch.cat([lm.ids] * 2)[:1].expand(max(2, -(-4 * cfg.d_model // cfg.context)), -1)
    sums = torch.zeros(2, len(train.METRICS), device=device)
    log = tempfile.TemporaryFile("w")

    def write_log():
        log.write(json.dumps({"metrics": sums.tolist()}) + "\n")
        log.flush()

    def optimize():
        torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or 1.0)
        optimizer.step()

    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    calls = {
        "limit": lambda: a @ a,
        "LM": lambda: learner(lm)[0].backward(),
        "episodes": lambda: learner(episode)[0].backward(),
        "optimizer": optimize,
        "LM batch": lambda: build(sequences, cfg.batch_size),
        "episode batch": lambda: build(episodes, cfg.episodes),
        "probe": lambda: probes.measure(decoder, probe_ids),
        "log": write_log,
    }
    if learner.head_only:  # the inner loop and the heads, on features that are there already
        E, N, K, Q = cfg.episodes, cfg.ways, cfg.shots, cfg.queries
        features = {n: torch.randn(E, n, cfg.d_model, device=device) for n in (N * K, N * Q)}
        inner = train.Learner(decoder, learner.head, "head", cfg.inner_steps, cfg.inner_lr, cfg.first_order, dtype)
        inner.features = lambda windows: features[windows.shape[1]]
        labels = torch.arange(N, device=device).repeat_interleave(K).expand(E, -1)  # (E, N * K)
        windows = episode.support.flatten(1, 2), labels, episode.query.flatten(1, 2)
        calls["inner loop"] = lambda: inner.adapt_heads(*windows, N)
    parts = parts_of(decoder, lm, learner)
    calls |= parts
    memory = {}
    if cfg.against:
        other, loss = rival(cfg, decoder, lm, dtype, compiled)
        calls["our update"] = update(lambda: learner(lm)[0], params, optimizer)
        calls["their update"] = other
        with torch.no_grad():
            ours, theirs = learner(lm)[0].item(), loss().item()

    for name in ("LM", "episodes", *(["our update", "their update"] if cfg.against else [])):
        calls[name]()  # allocates the gradients, compiles
        memory[name] = peak_memory(device, calls[name])
    seconds = {name: [] for name in calls}
    for i in range(cfg.rounds + 2):
        optimizer.zero_grad(set_to_none=True)  # the LM step makes new gradients, the episodes add to them
        for name, call in calls.items():
            spent = clock(device, call)
            if i >= 2:
                seconds[name].append(spent)
    ms = {name: 1000 * statistics.median(spent) for name, spent in seconds.items()}

    limit = 2 * n**3 / ms["limit"] * 1000
    sheet = train.peak_flops(device, dtype) if device.type == "cuda" else None
    steps = {}
    for name, batch, tokens in (("LM", lm, lm.ids.numel()), ("episodes", episode, episode.support.numel() + episode.query.numel())):
        rate = learner.flops(batch) / ms[name] * 1000
        steps[name] = {"ms": ms[name], "tokens": tokens, "tok_per_s": tokens / ms[name] * 1000, "flop_per_s": rate,
                       "of_limit": rate / limit, "of_data_sheet": rate / sheet if sheet else None, "peak_bytes": memory[name]}
    share = cfg.meta_share
    whole = micro_steps * ((1 - share) * ms["LM"] + share * ms["episodes"]) + ms["optimizer"]
    shares = {
        "optimizer": ms["optimizer"] / whole,
        "probes": ms["probe"] / (cfg.probe_every or float("inf")) / whole,
        "logging": ms["log"] / cfg.log_every / whole,
        "data, in the background": micro_steps * ((1 - share) * ms["LM batch"] + share * ms["episode batch"]) / whole,
    }
    result = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."), "compiled": compiled, "rounds": cfg.rounds, "limit_flop_per_s": limit, "steps": steps,
        "episode_over_lm_at_equal_tokens": steps["LM"]["tok_per_s"] / steps["episodes"]["tok_per_s"],
        "episode_over_lm_by_flops": learner.flops(episode) / steps["episodes"]["tokens"] / (learner.flops(lm) / steps["LM"]["tokens"]),
        "update_ms": whole, "shares": shares,
        "batch_ms": {name: ms[name] for name in ("LM batch", "episode batch")}, "parts_ms": {name: ms[name] for name in parts},
    }
    if "inner loop" in ms:
        result["inner_loop_share_of_episode"] = ms["inner loop"] / ms["episodes"]
    if cfg.against:
        result["against"] = {"name": cfg.against, "our_loss": ours, "their_loss": theirs, "our_ms": ms["our update"],
                             "their_ms": ms["their update"], "times_as_fast": ms["their update"] / ms["our update"],
                             "our_peak_bytes": memory["our update"], "their_peak_bytes": memory["their update"]}
    if cfg.json:
        print(json.dumps(result | {"config": asdict(cfg)}))
        return

    def gib(size):
        return "" if size is None else f"{size / 2**30:.2f} GiB"

    print(f"machine   {result['machine']}, {result['dtype']}, {'compiled' if compiled else 'eager'}; medians of {cfg.rounds} rounds")
    print(f"limit     {limit / 1e9:,.0f} GFLOP/s, in a product of two {n} x {n} matrices")
    print("steps     forward and backward of a micro-step")
    rows = [["", "ms", "tokens", "tokens/s", "GFLOP/s", "of the limit", "of the data sheet", "peak memory"]]
    for name, step in steps.items():
        rows.append([name, f"{step['ms']:.1f}", f"{step['tokens']:,}", f"{step['tok_per_s']:,.0f}", f"{step['flop_per_s'] / 1e9:,.1f}",
                     f"{step['of_limit']:.0%}", f"{step['of_data_sheet']:.0%}" if sheet else "-", gib(step["peak_bytes"])])
    table(rows)
    print(f"          a token of an episode takes {result['episode_over_lm_at_equal_tokens']:.3f} of an LM token's time, "
          f"{result['episode_over_lm_by_flops']:.3f} by counted FLOPs")
    if "inner loop" in ms:
        print(f"          inner loop and heads take {result['inner_loop_share_of_episode']:.1%} of an episode step")
    print(f"update    {whole:,.0f} ms: {micro_steps} micro-steps, {share:.0%} of them episodes, and the optimizer; of that time:")
    table([[name, f"{part:.2%}"] for name, part in shares.items()])
    print("parts     of the LM step, each alone and eager")
    table([["", "ms", "of the step"]] + [[name, f"{ms[name]:.1f}", f"{ms[name] / ms['LM']:.0%}"] for name in parts])
    if cfg.against:
        it = result["against"]
        print(f"against   {cfg.against}: {it['their_ms']:,.0f} ms an update, ours {it['our_ms']:,.0f}: {it['times_as_fast']:.2f} times as "
              f"fast; peak memory {gib(it['their_peak_bytes'])}, ours {gib(it['our_peak_bytes'])}; losses {theirs:.4f} and {ours:.4f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
