"""What the representations look like during training: effective rank and attention entropy.

    python probes.py out/demo                       # measures a run's checkpoints again, one JSON line each
    python probes.py out/demo --data=/mnt/corpus    # if the data moved, or on other data

train.py measures both during a run, without side effects, and writes them to out_dir/probes.jsonl:
rank/<v_proj|o_proj|down_proj|resid>/<layer>; entropy/<layer>/<head>, normalised; entropy_nats/<layer>/<head>.
A new probe is a line in `measure`; if named <what>/<layer>, watch.py and report.py show it, with its phases.
"""
import json
import math
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from nanomaml import checkpoint, config
from nanomaml.config import require
from nanomaml.files import read_jsonl


@dataclass(frozen=True)
class Config(config.Settings):
    data: str = ""  # folder of the bins to measure on; empty: the one that the run was trained on


def gram(x):
    """x.T @ x or x @ x.T of x (m, n), whichever is smaller, in float64 on the CPU."""
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no float64
    x = x.double()
    x = x if x.shape[0] >= x.shape[1] else x.mT
    return (x.mT @ x).cpu()


def rank_of_gram(gram):
    """The effective rank of the matrix whose Gram matrix this is."""
    if not gram.isfinite().all():
        return math.nan
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # (min(m, n),)
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(p).sum().exp().item() if sigma.sum() > 0 else 0.0


def effective_rank(x, proportional=False):
    """exp of the entropy of the singular values of x (m, n), normalised to sum 1.

    From 1 (rank one) to min(m, n) (all equal); 0 for a matrix of zeros, nan where x is not finite.
    proportional: divided by min(m, n). Source: Roy & Vetterli 2007, "The effective rank: a measure of
    effective dimensionality" (EUSIPCO). The Gram matrix squares the spectrum, hence float64.
    """
    rank = rank_of_gram(gram(x))
    return rank / min(x.shape) if proportional else rank


def attention_entropy(q, k, mask=None, rows=128):
    """Entropy of attention per head, averaged over sequences and query positions.

    q (B, H, T, C) and k (B, G, T, C) as they enter the dot product (rotated); mask (T, T) bool: the keys that
    each position sees, None: all up to itself (`Backbone.mask`). Returns (2, H): in nats, over all positions;
    and divided by log(number of visible keys), over all positions that see more than one key (zeros where
    there is none). `rows` query positions are computed at a time: memory holds (B, H, rows, T) at most.
    """
    B, H, T, C = q.shape
    k = k.float().repeat_interleave(H // k.shape[1], dim=1)  # (B, H, T, C)
    total, positions = q.new_zeros(2, H, dtype=torch.float32), torch.arange(T, device=q.device)
    seen = positions + 1 if mask is None else mask.sum(1)  # (T,), keys that each position sees
    for start in range(0, T, rows):
        end = min(start + rows, T)
        visible = positions[:end] <= positions[start:end, None] if mask is None else mask[start:end]
        scores = q[:, :, start:end].float() @ k[:, :, :visible.shape[1]].mT / math.sqrt(C)
        p, n = scores.masked_fill(~visible, -math.inf).softmax(-1), seen[start:end]  # p (B, H, rows, keys)
        entropy = torch.special.entr(p).sum(-1)  # (B, H, rows)
        total[0] += entropy.sum((0, 2))
        total[1] += (entropy / n.log().clamp(min=1e-9)).masked_fill(n == 1, 0).sum((0, 2))
    several = (seen > 1).sum().clamp(min=1)
    return total / (B * torch.stack((several.new_tensor(T), several)))[:, None]


def fixed_batch(validation, d_model, context):
    """The ids (B, T) of every probe: 4 D tokens of the largest domain, since fewer would bound the rank."""
    largest = max(validation.values(), key=lambda corpus: corpus.tokens)
    return data.eval_sequences(largest, context, max(2, math.ceil(4 * d_model / context))).ids


def matrices(decoder):
    """(metric's "<what>/<layer>", weight) of the projections whose rank is tracked."""
    for i, layer in enumerate(decoder.model.layers):
        yield f"v_proj/{i:02d}", layer.self_attn.v_proj.weight
        yield f"o_proj/{i:02d}", layer.self_attn.o_proj.weight
        yield f"down_proj/{i:02d}", layer.mlp.down_proj.weight


@torch.no_grad()
def measure(decoder, ids, rank=effective_rank):
    """All probes of a Decoder on ids (B, T): {metric: float}.

    Layers are called through `forward`, which bypasses what `compile()` installed. With rank = gram
    a matrix takes the place of each rank, for `Live`.
    """
    metrics = {f"rank/{name}": rank(weight) for name, weight in matrices(decoder)}
    rope, mask = decoder.model.positions(ids.shape[1]), decoder.model.mask(ids.shape[1])
    x = decoder.model.embed_tokens(ids)  # (B, T, D)
    for i, layer in enumerate(decoder.model.layers):
        q, k, _ = layer.self_attn.qkv(layer.input_layernorm(x), *rope)
        for kind, entropies in zip(("entropy_nats", "entropy"), attention_entropy(q, k, mask).tolist()):
            metrics |= {f"{kind}/{i:02d}/{head:02d}": entropy for head, entropy in enumerate(entropies)}
        x = layer.forward(x, *rope, mask)
        resid = x.flatten(0, 1).float()  # (B * T, D)
        metrics[f"rank/resid/{i:02d}"] = rank(resid - resid.mean(0))
    return metrics


class Live:
    """The probes of a run while it trains, written to its log; only on the first rank.

        with Live(cfg, validation, log, progress, device) as live:     # log: logs.RunLog
            live.measure_if_due(decoder)                               # between updates
            live.write()                                               # the probes that are done

    Training waits for forward passes and Gram matrices; threads compute the ranks in the background, each on
    one core: one thread if training is on the CPU, four on a GPU, since at d_model 1536 a single one takes
    longer than 100 updates of eight H100. A run killed after a checkpoint but before that step's probe was
    written measures the probe again.
    """

    def __init__(self, cfg, validation, log, progress, device):
        self.cfg, self.log, self.progress = cfg, log, progress
        self.ids = fixed_batch(validation, cfg.d_model, cfg.context).to(device)
        threads = 1 if device.type == "cpu" else 4
        self.pool = ThreadPoolExecutor(threads, "spectra", torch.set_num_threads, (1,))
        self.pending, self.last = deque(), {}  # lines with a Future for each rank, oldest first; newest line
        self.is_lost = self.is_due(progress.resumed_at) and progress.resumed_at not in {
            line["step"] for line in read_jsonl(Path(cfg.out_dir, "probes.jsonl"), "step")}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def is_due(self, step):
        every = self.cfg.probe_every * self.log.is_first
        return every > 0 and step is not None and (step % every == 0 or step == self.cfg.max_steps)

    def measure_if_due(self, decoder):
        step = self.progress.step
        if self.is_lost or step != self.progress.resumed_at and self.is_due(step):
            self.write(step - 1)  # at most one is unfinished, since its matrices take memory
            self.add(self.progress.axes() | measure(decoder, self.ids, gram))
            self.is_lost = False

    def add(self, line):
        """line: a dict with "step" whose matrices are Gram matrices; it comes back from `finished`."""
        self.pending.append({key: self.pool.submit(rank_of_gram, value) if torch.is_tensor(value) else value
                             for key, value in line.items()})

    def finished(self, through):
        """Yields each finished line, in the order of steps; waits for lines up to step `through`."""
        while self.pending and (self.pending[0]["step"] <= through or all(
                value.done() for value in self.pending[0].values() if isinstance(value, Future))):
            yield {key: value.result() if isinstance(value, Future) else value
                   for key, value in self.pending.popleft().items()}

    def write(self, through=-1):
        """Writes finished probe lines; blocks for steps up to `through`."""
        for line in self.finished(through):
            self.last |= line
            self.log.write("probes.jsonl", line)


def main(argv):
    given, flags = config.one_operand(Config, argv, "one run's folder, for instance out/demo")
    folder = config.load(Config, flags, __doc__).data
    paths = checkpoint.paths(given)
    require(paths, f"no checkpoint in {given}: a run writes ckpt_*.pt there")
    damaged = []
    for path in paths:
        try:
            state = checkpoint.read(path)
        except checkpoint.Damaged as error:
            damaged.append(error)
            print(f"warning: {error}; passed over", file=sys.stderr, flush=True)
            continue
        cfg = state["config"]
        source = folder or cfg["data"]
        require(folder or Path(source).is_dir(), f"no data at {source}, which {path} was trained on: "
                                                 "name the folder that holds it now, --data=FOLDER")
        ids = fixed_batch(data.open_corpus(source)[1], cfg["d_model"], cfg["context"])
        require(ids.max() < cfg["vocab_size"], f"{source} holds token id {ids.max()}, {path} has "
                f"{cfg['vocab_size']}: name data prepared with the run's tokenizer, --data=FOLDER")
        metrics = measure(checkpoint.load_model(state), ids)
        print(json.dumps({"step": state["step"], "tokens": state["tokens"]} | metrics), flush=True)
    if len(damaged) == len(paths):
        raise damaged[-1]


if __name__ == "__main__":
    config.run(main)
