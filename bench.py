"""Speed, memory and MFU of each kind of step, and what data, probes, optimizer and logging cost.

    python bench.py configs/demo.py                        # any config and key of train.py; needs no data
    python bench.py configs/11m.py --batch_size=8 --context=512 --json
    python bench.py configs/11m.py --batch_size=8 --context=512 --against=transformers

Everything measured takes its turn in each round, and medians over the rounds are shown, so that a drift
of the machine affects all alike. The text is synthetic: 10^9 tokens, made up where they are read.
"""
import ctypes
import gc
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import config
import data
import logs
import machine
import prepare
import probes
import train
from config import UserError
from schedule import Schedule

NEW = 32  # tokens, after half a context, that generation is measured on


@dataclass(frozen=True)
class Config(train.Config):
    rounds: int = 5  # measurements of everything, after two for warming up
    against: str = ""  # naive: whole float32 logits; transformers: its LlamaForCausalLM; empty: neither
    json: bool = False  # one JSON object instead of tables

    def __post_init__(self):
        super().__post_init__()
        self.check_episodes()  # they are measured in a vanilla config too
        config.require(self.episodes_from == "windows", "bench.py measures episodes_from = windows alone")
        config.require_at_least(self, 1, "rounds")
        config.require_at_least(self, 256 + len(data.SPECIAL) + self.ways, "vocab_size")  # bytes, then words
        config.require_choice(self, "against", "", "naive", "transformers")


# ---- synthetic text ----


class MadeUp:
    """A shard of n tokens that holds 2^22 of them, over and over."""

    def __init__(self, n, vocab_size):
        rng = np.random.default_rng(0)
        ids = np.arange(256, vocab_size, dtype=np.uint16)
        share = 1 / (ids - 255.0)  # Zipf's law
        self.n, self.ids = n, rng.choice(ids, min(n, 2**22), p=share / share.sum())

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
    tokens_as_bytes = [bytes([i]) for i in range(256)] + [word.encode() for word in sorted(words)]
    ranks = {token: rank for rank, token in enumerate(tokens_as_bytes)}
    made_up = MadeUp(tokens, len(ranks))
    corpus = SimpleNamespace(shards=[made_up], tokens=tokens, paths=[Path("made up")],
                             read=lambda shard, start, length: made_up[start:start + length])
    return corpus, data.encoding("made-up", prepare.PATTERN, ranks)


# ---- measuring ----


def clock(device, call):
    """Seconds that `call` takes, the device's work included."""
    machine.synchronize(device)
    start = time.perf_counter()
    call()
    machine.synchronize(device)
    return time.perf_counter() - start


def resident(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def peak_memory(device, call):
    """The most bytes that `call` takes above what was taken before; None where it cannot be known.

    For a CPU only Linux says.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back free memory, which would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def update(loss_of, params, optimizers):
    """A whole training step of one micro-step."""
    def step():
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step


def rival(cfg, decoder, batch, dtype, is_compiled):
    """(step, its loss, its model) of the update that ours is compared with.

    Weights, batch, dtype and optimizer are the same.
    """
    device = batch.ids.device
    if cfg.against == "transformers":
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise UserError("--against=transformers needs the package: pip install -r requirements-dev.txt"
                            ) from None
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_hidden,
            num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads, max_position_embeddings=cfg.context,
            rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
            tie_word_embeddings=False)).to(device)
    else:
        model = train.Decoder(cfg).to(device)
    if is_compiled:
        model.compile()
    model.load_state_dict(decoder.state_dict(), strict=False)

    def loss():
        with machine.autocast(device, dtype):
            if cfg.against == "transformers":
                return model(input_ids=batch.ids, labels=batch.targets, shift_labels=batch.targets,
                             use_cache=False).loss
            return F.cross_entropy(model(batch.ids).float().flatten(0, 1), batch.targets.flatten())

    params = list(model.parameters())
    optimizers = [torch.optim.AdamW(params, lr=cfg.lr, fused=True)]
    return update(loss, params, optimizers), loss, model


def generation(cfg, decoder, other, device, dtype):
    """({name: a call}, tokens of the prompt, new tokens): one token after half a context, and NEW more.

    Greedy, uncompiled. other: transformers' model with the same weights, or None.
    """
    prompt = torch.arange(cfg.context // 2, device=device)[None] % cfg.vocab_size
    new = min(NEW, cfg.context - prompt.shape[1])

    def ours(n):
        with machine.autocast(device, dtype), decoder.eager():
            return decoder.generate(prompt, n, temperature=0)

    def theirs(n):
        with machine.autocast(device, dtype), decoder.eager():
            return other.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)

    sides = {"our": ours, "their": theirs} if other is not None else {"our": ours}
    calls = {f"{side} {what}": partial(call, n) for side, call in sides.items()
             for what, n in (("prefill", 1), ("generation", 1 + new))}
    return calls, prompt.shape[1], new


def parts_of(decoder, batch, learner):
    """{part: a call of its forward and backward pass}, for all layers, of an LM step on random features."""
    layer, cfg = decoder.model.layers[0], decoder.cfg
    x = torch.randn(*batch.ids.shape, cfg.d_model, device=batch.ids.device, requires_grad=True)
    rope = decoder.model.positions(batch.ids.shape[1])

    def forward_and_backward(forward, times):
        def call():
            for _ in range(times):
                with learner.autocast():
                    y = forward()
                torch.autograd.backward(y, torch.ones_like(y))
        return call

    return {
        "embedding": forward_and_backward(lambda: decoder.model.embed_tokens(batch.ids), 1),
        "attention": forward_and_backward(lambda: layer.self_attn(x, *rope), cfg.n_layers),
        "MLP": forward_and_backward(lambda: layer.mlp(x), cfg.n_layers),
        "norms": forward_and_backward(lambda: layer.input_layernorm(x), 2 * cfg.n_layers + 1),
        "output layer and loss": forward_and_backward(lambda: decoder.loss(x, batch.targets), 1),
    }


def inner_loop_of(learner, batch):
    """A call of the inner loop and the heads alone, on random features."""
    (E, N), K, Q = batch.words.shape, batch.support.shape[2], batch.query.shape[2]
    D, device = learner.decoder.cfg.d_model, batch.words.device
    x, x_query = (torch.randn(E, N * n, D, device=device) for n in (K, Q))
    return lambda: learner.adapt_heads(x, x_query, N)


def measure(device, calls, rounds, before_round):
    """{name: median milliseconds} of `calls`, which take turns."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 2):
        before_round()
        for name, call in calls.items():
            spent = clock(device, call)
            if i >= 2:
                seconds[name].append(spent)
    return {name: 1000 * statistics.median(spent) for name, spent in seconds.items()}


def bench(cfg):
    """All figures of a config, as a dict."""
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    micro_steps = Schedule(cfg, 1).micro_steps
    corpus, tokenizer = made_up(min(cfg.vocab_size, 2**16))
    learner = train.build_learner(cfg, dtype).to(device)
    optimizers, params = train.build_optimizers(cfg, learner), list(learner.parameters())
    decoder, is_compiled = learner.decoder, train.compile_layers(cfg, device, learner)
    episodes = data.Episodes(corpus, tokenizer, cfg.ways, cfg.shots, cfg.queries, cfg.window, cfg.seed,
                             cfg.read_out)
    series = {"lm": (data.Sequences(corpus, cfg.context, cfg.seed), cfg.batch_size),
              "episodes": (episodes, cfg.episodes)}
    numbers = iter(range(10**9))

    def new_batch(kind):
        batches, size = series[kind]
        return batches[[next(numbers) for _ in range(size)]]

    batch = {kind: type(made)(*(t.to(device) for t in made)) for kind in series for made in [new_batch(kind)]}
    probe_ids = batch["lm"].ids[:1].expand(max(2, -(-4 * cfg.d_model // cfg.context)), -1)
    sums, log = torch.zeros(2, 8, device=device), tempfile.NamedTemporaryFile()

    def optimize():
        torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or 1.0)
        for optimizer in optimizers:
            optimizer.step()

    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    parts = parts_of(decoder, batch["lm"], learner)
    calls = {
        "limit": lambda: a @ a,
        "lm": lambda: learner("lm", batch["lm"])[0]["lm"].backward(),
        "episodes": lambda: sum(learner("episodes", batch["episodes"])[0].values()).backward(),
        "optimizer": optimize,
        "lm batch": lambda: new_batch("lm"),
        "episodes batch": lambda: new_batch("episodes"),
        "probe": lambda: probes.measure(decoder, probe_ids, probes.gram),  # what training waits for
        "log": lambda: logs.append(log.name, {"metrics": sums.tolist()}),
    }
    if learner.head_only:
        calls["inner loop"] = inner_loop_of(learner, batch["episodes"])
    calls |= parts
    with_memory = ["lm", "episodes"]
    model = None
    if cfg.against:
        other, loss, model = rival(cfg, decoder, batch["lm"], dtype, is_compiled)
        calls["our update"] = update(lambda: learner("lm", batch["lm"])[0]["lm"], params, optimizers)
        calls["their update"] = other
        with_memory += ["our update", "their update"]
        with torch.no_grad():
            our_loss, their_loss = learner("lm", batch["lm"])[0]["lm"].item(), loss().item()

    theirs = model if cfg.against == "transformers" else None
    generate, prompt_tokens, new_tokens = generation(cfg, decoder, theirs, device, dtype)
    calls |= generate

    memory = {}
    for name in with_memory:
        calls[name]()  # allocates the gradients, compiles
        memory[name] = peak_memory(device, calls[name])
    # The LM step makes new gradients, the episodes add to them, as in training.
    ms = measure(device, calls, cfg.rounds, lambda: learner.zero_grad(set_to_none=True))

    limit = 2 * n**3 / ms["limit"] * 1000
    data_sheet = machine.peak_flops(device, dtype) if device.type == "cuda" else None
    steps = {}
    for kind in series:
        rate, tokens = learner.flops(kind, batch[kind]) / ms[kind] * 1000, batch[kind].tokens
        steps[kind] = {"ms": ms[kind], "tokens": tokens, "tok_per_s": tokens / ms[kind] * 1000,
                       "flop_per_s": rate, "of_limit": rate / limit,
                       "of_data_sheet": rate / data_sheet if data_sheet else None, "peak_bytes": memory[kind]}
    share = {"lm": 1 - cfg.meta_share, "episodes": cfg.meta_share}
    whole = micro_steps * sum(share[kind] * ms[kind] for kind in series) + ms["optimizer"]
    batches = micro_steps * sum(share[kind] * ms[f"{kind} batch"] for kind in series)
    flops_a_token = {kind: learner.flops(kind, batch[kind]) / steps[kind]["tokens"] for kind in series}
    result = {
        "machine": machine.describe(device, dtype), "dtype": str(dtype).removeprefix("torch."),
        "compiled": is_compiled, "rounds": cfg.rounds, "limit_flop_per_s": limit, "steps": steps,
        "episode_over_lm_at_equal_tokens": steps["lm"]["tok_per_s"] / steps["episodes"]["tok_per_s"],
        "episode_over_lm_by_flops": flops_a_token["episodes"] / flops_a_token["lm"],
        "update_ms": whole,
        "shares": {
            "optimizer": ms["optimizer"] / whole,
            "probes": ms["probe"] / (cfg.probe_every or float("inf")) / whole,
            "logging": ms["log"] / cfg.log_every / whole,
            "data, in the background": batches / whole,
        },
        "batch_ms": {kind: ms[f"{kind} batch"] for kind in series},
        "parts_ms": {name: ms[name] for name in parts},
        "generation": {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
    }
    for side in ("our", "their") if theirs is not None else ("our",):
        decode_ms = ms[f"{side} generation"] - ms[f"{side} prefill"]
        result["generation"][side] = {"prefill_tok_per_s": prompt_tokens / ms[f"{side} prefill"] * 1000,
                                      "decode_tok_per_s": new_tokens / decode_ms * 1000}
    if "inner loop" in ms:
        result["inner_loop_share_of_episode"] = ms["inner loop"] / ms["episodes"]
    if cfg.against:
        result["against"] = {
            "name": cfg.against, "our_loss": our_loss, "their_loss": their_loss,
            "our_ms": ms["our update"], "their_ms": ms["their update"],
            "times_as_fast": ms["their update"] / ms["our update"],
            "our_peak_bytes": memory["our update"], "their_peak_bytes": memory["their update"],
        }
    return result | {"matrix": n, "micro_steps": micro_steps, "config": asdict(cfg)}


# ---- tables ----


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        print("  " + "  ".join(cells))


def gib(size):
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def print_result(result):
    limit, n = result["limit_flop_per_s"], result["matrix"]
    mode = "compiled" if result["compiled"] else "eager"
    print(f"machine   {result['machine']}, {mode}; medians of {result['rounds']} rounds")
    print(f"limit     {limit / 1e9:,.0f} GFLOP/s, in a product of two {n} x {n} matrices")
    print("steps     forward and backward of a micro-step")
    rows = [["", "ms", "tokens", "tokens/s", "GFLOP/s", "of the limit", "of the data sheet", "peak memory"]]
    for kind, step in result["steps"].items():
        of_data_sheet = f"{step['of_data_sheet']:.0%}" if step["of_data_sheet"] else "-"
        rows.append([kind, f"{step['ms']:.1f}", f"{step['tokens']:,}", f"{step['tok_per_s']:,.0f}",
                     f"{step['flop_per_s'] / 1e9:,.1f}", f"{step['of_limit']:.0%}", of_data_sheet,
                     gib(step["peak_bytes"])])
    print_table(rows)
    print(f"          a token of an episode takes {result['episode_over_lm_at_equal_tokens']:.3f} of an LM "
          f"token's time, {result['episode_over_lm_by_flops']:.3f} by counted FLOPs")
    if "inner_loop_share_of_episode" in result:
        inner_loop = result["inner_loop_share_of_episode"]
        print(f"          inner loop and heads take {inner_loop:.1%} of an episode step")
    print(f"update    {result['update_ms']:,.0f} ms: {result['micro_steps']} micro-steps, "
          f"{result['config']['meta_share']:.0%} of them episodes, and the optimizer; of that time:")
    print_table([[name, f"{part:.2%}"] for name, part in result["shares"].items()])
    print("parts     of the LM step, each alone and eager")
    lm_ms = result["steps"]["lm"]["ms"]
    print_table([["", "ms", "of the step"]]
                + [[name, f"{ms:.1f}", f"{ms / lm_ms:.0%}"] for name, ms in result["parts_ms"].items()])
    print("generate  tokens/s of one sequence, greedy and uncompiled")
    it = result["generation"]
    rows = [["", f"prefill of {it['prompt_tokens']}", f"decode of {it['new_tokens']}"]]
    for side in ("our", "their"):
        if side in it:
            prefill, decode = it[side]["prefill_tok_per_s"], it[side]["decode_tok_per_s"]
            rows.append([f"{side}s", f"{prefill:,.0f}", f"{decode:,.1f}"])
    print_table(rows)
    if "against" in result:
        it = result["against"]
        print(f"against   {it['name']}: {it['their_ms']:,.0f} ms an update, ours {it['our_ms']:,.0f}: "
              f"{it['times_as_fast']:.2f} times as fast; peak memory {gib(it['their_peak_bytes'])}, ours "
              f"{gib(it['our_peak_bytes'])}; losses {it['their_loss']:.4f} and {it['our_loss']:.4f}")


def main(argv):
    cfg = config.load(Config, argv, __doc__)
    result = bench(cfg)
    if cfg.json:
        print(json.dumps(result))
    else:
        print_result(result)


if __name__ == "__main__":
    config.run(main)
