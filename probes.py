"""What the representations look like while they train: effective rank and attention entropy.

    python probes.py out/demo                       # measures a run's checkpoints again, one JSON line each
    python probes.py out/demo --data=/mnt/corpus    # on data that moved since, or on other data

train.py measures them during a run, without leaving a trace, and writes them to out_dir/probes.jsonl:
rank/<v_proj|o_proj|down_proj|resid>/<layer>; entropy/<layer>/<head>, normalised;
entropy_nats/<layer>/<head>; and with probe_gradients, rank/grad_<v_proj|o_proj|down_proj>/<layer>. A new
probe is a line in `measure`; named <what>/<layer>, it gets a panel and its phases in report.py too.

Training waits for forward passes and Gram matrices alone: `Spectra` computes eigenvalues behind it.
"""
import json
import math
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import config
import data
from config import UserError, require


@dataclass(frozen=True)
class Config:
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


def attention_entropy(q, k, rows=128):
    """Entropy of causal attention per head, averaged over sequences and query positions.

    q (B, H, T, C) and k (B, G, T, C) as they enter the dot product (rotated). Returns (2, H): in nats,
    over all positions; and divided by log(number of visible keys), over all but the first position, which
    sees one key. T = 1 gives zeros. `rows` query positions are computed at a time: memory holds (B, H,
    rows, T) at most.
    """
    B, H, T, C = q.shape
    k = k.float().repeat_interleave(H // k.shape[1], dim=1)  # (B, H, T, C)
    total = q.new_zeros(2, H, dtype=torch.float32)
    for start in range(0, T, rows):
        visible = torch.arange(start, min(start + rows, T), device=q.device) + 1  # keys that each row sees
        scores = q[:, :, start:start + rows].float() @ k[:, :, :visible[-1]].mT / math.sqrt(C)
        hidden = torch.arange(scores.shape[-1], device=q.device) >= visible[:, None]  # (rows, keys)
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        entropy = torch.special.entr(p).sum(-1)  # (B, H, rows)
        total[0] += entropy.sum((0, 2))
        total[1] += (entropy / visible.log().clamp(min=1e-9)).masked_fill(visible == 1, 0).sum((0, 2))
    return total / torch.tensor([[B * T], [B * max(T - 1, 1)]], device=q.device)


def fixed_batch(validation, d_model, context):
    """The ids (B, T) that a run is probed on at every step: 4 D tokens of the largest validation domain.

    Fewer than D tokens would bound the rank of the residual stream.
    """
    largest = max(validation.values(), key=lambda corpus: corpus.tokens)
    return data.eval_sequences(largest, context, max(2, math.ceil(4 * d_model / context))).ids


def matrices(decoder):
    """(metric's "<what>/<layer>", weight) of the projections whose rank is followed."""
    for i, layer in enumerate(decoder.model.layers):
        yield f"v_proj/{i:02d}", layer.self_attn.v_proj.weight
        yield f"o_proj/{i:02d}", layer.self_attn.o_proj.weight
        yield f"down_proj/{i:02d}", layer.mlp.down_proj.weight


def gradient_ranks(decoder, rank=effective_rank):
    """{metric: rank} of the gradients that a backward pass left; `rank`: as in `measure`."""
    return {f"rank/grad_{name}": rank(weight.grad) for name, weight in matrices(decoder)}


@torch.no_grad()
def measure(decoder, ids, rank=effective_rank):
    """All probes of a Decoder on ids (B, T) except those of gradients: {metric: float}.

    Layers are called through `forward`, which bypasses what `compile()` installed: compiled graphs stay
    as they are. rank = gram leaves a matrix in the place of each rank, for `Spectra`.
    """
    metrics = {f"rank/{name}": rank(weight) for name, weight in matrices(decoder)}
    rope = decoder.model.positions(ids.shape[1])
    x = decoder.model.embed_tokens(ids)  # (B, T, D)
    for i, layer in enumerate(decoder.model.layers):
        q, k, _ = layer.self_attn.qkv(layer.input_layernorm(x), *rope)
        for kind, entropies in zip(("entropy_nats", "entropy"), attention_entropy(q, k).tolist()):
            metrics |= {f"{kind}/{i:02d}/{head:02d}": entropy for head, entropy in enumerate(entropies)}
        x = layer.forward(x, *rope)
        resid = x.flatten(0, 1).float()  # (B * T, D)
        metrics[f"rank/resid/{i:02d}"] = rank(resid - resid.mean(0))
    return metrics


class Spectra:
    """Turns the Gram matrices of probes into ranks, in threads of the host while training goes on.

        spectra.add({"step": 100} | measure(decoder, ids, gram))
        for line in spectra.finished(): ...                      # {"step": 100, "rank/resid/00": 45.2, ...}

    Each thread computes on one core, so that training on a CPU loses one at most. On a GPU there are four:
    at d_model 1536 one alone takes longer than 100 updates of eight H100.
    """

    def __init__(self, device):
        threads = 1 if device.type == "cpu" else 4
        self.pool = ThreadPoolExecutor(threads, "spectra", torch.set_num_threads, (1,))
        self.pending = deque()  # lines, oldest first, with a Future for each matrix

    def add(self, line):
        """line: a dict with "step" whose matrices are Gram matrices; it comes back from `finished`."""
        self.pending.append({key: self.pool.submit(rank_of_gram, value) if torch.is_tensor(value) else value
                             for key, value in line.items()})

    def finished(self, through=-1):
        """Yields each line that is done, once, in order of their steps; waits for those up to step `through`.

        An error in a thread is raised here.
        """
        while self.pending:
            line = self.pending[0]
            is_done = all(value.done() for value in line.values() if isinstance(value, Future))
            if not is_done and line["step"] > through:
                return
            self.pending.popleft()
            yield {key: value.result() if isinstance(value, Future) else value for key, value in line.items()}

    def close(self):
        """Gives up what is not finished."""
        self.pool.shutdown(cancel_futures=True)


def main(argv):
    given, flags = config.operands(argv)
    folder = config.load(Config, flags, __doc__).data
    require(len(given) == 1, "name one run's folder, for instance out/demo; got "
                             f"{', '.join(given) or 'none'}")
    paths = checkpoint.paths(given[0])
    if not paths:
        raise UserError(f"no checkpoint in {given[0]}: a run writes ckpt_*.pt there")
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
        require(folder or Path(source).is_dir(), f"no data at {source}, where {path} was trained: "
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
