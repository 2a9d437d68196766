"""What the representations look like: effective rank and attention entropy, measured while training without leaving a trace.

    python probes.py out/demo        # measures the checkpoints of a run anew: one JSON line each, as in its probes.jsonl

Effective rank: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
Metric names: rank/<v_proj|o_proj|down_proj|resid>/<layer>; entropy/<layer>/<head>, normalised; entropy_nats/<layer>/<head>; and with
train.py's probe_gradients, rank/grad_<v_proj|o_proj|down_proj>/<layer>. train.py writes them to out_dir/probes.jsonl.
"""
import json
import math
import sys

import numpy as np
import torch

import checkpoint
import data
from config import UserError


def effective_rank(x, proportional=False):
    """exp of the entropy of the singular values of x (m, n), normalised to sum 1: from 1 (rank one) to min(m, n) (all equal).

    proportional: divided by min(m, n). Zero for a matrix of zeros, nan where x is not finite. Through the Gram matrix, in float64.
    """
    x = (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()  # MPS has neither float64 nor eigenvalues
    if not x.isfinite().all():
        return math.nan
    x = x if x.shape[0] >= x.shape[1] else x.mT
    sigma = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0).sqrt()  # (min(m, n),)
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    rank = torch.special.entr(p).sum().exp().item() if sigma.sum() > 0 else 0.0
    return rank / len(sigma) if proportional else rank


def attention_entropy(q, k, rows=128):
    """Entropy of causal attention per head, averaged over sequences and query positions.

    q (B, H, T, C) and k (B, G, T, C) as they enter the dot product (rotated). Returns (2, H): in nats, over all positions; and
    divided by log(number of visible keys), over all but the first position, which sees one key. T = 1 gives zeros.
    Computed for `rows` query positions at a time: (B, H, rows, T) is the most held at once.
    """
    B, H, T, C = q.shape
    k = k.float().repeat_interleave(H // k.shape[1], dim=1)  # (B, H, T, C)
    total = q.new_zeros(2, H, dtype=torch.float32)
    for start in range(0, T, rows):
        visible = torch.arange(start, min(start + rows, T), device=q.device) + 1  # keys that each row sees
        scores = q[:, :, start:start + rows].float() @ k[:, :, :visible[-1]].mT / math.sqrt(C)  # (B, H, rows, keys)
        hidden = torch.arange(len(scores[0, 0, 0]), device=q.device) >= visible[:, None]
        entropy = torch.special.entr(scores.masked_fill(hidden, -math.inf).softmax(-1)).sum(-1)  # (B, H, rows)
        total[0] += entropy.sum((0, 2))
        total[1] += (entropy / visible.log().clamp(min=1e-9)).masked_fill(visible == 1, 0).sum((0, 2))
    return total / torch.tensor([[B * T], [B * max(T - 1, 1)]], device=q.device)


def fixed_batch(validation, d_model, context):
    """The ids (B, T) that a run is probed on, the same at every step: from the largest validation domain, 4 tokens for each of the
    D dimensions, since fewer than D would bound the rank."""
    largest = max(validation.values(), key=lambda corpus: corpus.tokens)
    return data.eval_sequences(largest, context, max(2, math.ceil(4 * d_model / context))).ids


def matrices(decoder):
    """(metric's "<what>/<layer>", weight) of the projections whose rank is followed."""
    for i, layer in enumerate(decoder.model.layers):
        for name, module in (("v_proj", layer.self_attn.v_proj), ("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
            yield f"{name}/{i:02d}", module.weight


def gradient_ranks(decoder):
    """{metric: effective rank} of the gradients that a backward pass left."""
    return {f"rank/grad_{name}": effective_rank(weight.grad) for name, weight in matrices(decoder)}


@torch.no_grad()
def measure(decoder, ids):
    """All probes of a Decoder on ids (B, T), but those of gradients: {metric: float}.

    Layers are called through `forward`, past what `compile()` installed, so compiled graphs stay as they are.
    """
    metrics = {f"rank/{name}": effective_rank(weight) for name, weight in matrices(decoder)}
    rope = decoder.model.positions(ids.shape[1])
    x = decoder.model.embed_tokens(ids)  # (B, T, D)
    for i, layer in enumerate(decoder.model.layers):
        q, k, _ = layer.self_attn.qkv(layer.input_layernorm(x), *rope)
        for kind, entropies in zip(("entropy_nats", "entropy"), attention_entropy(q, k).tolist()):
            metrics |= {f"{kind}/{i:02d}/{head:02d}": entropy for head, entropy in enumerate(entropies)}
        x = layer.forward(x, *rope)
        flat = x.flatten(0, 1).float()  # (B * T, D)
        metrics[f"rank/resid/{i:02d}"] = effective_rank(flat - flat.mean(0))
    return metrics


def heatmap(metrics):
    """A matplotlib figure of the normalised attention entropies, layers x heads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and wanted by wandb alone
    from matplotlib.figure import Figure

    names = sorted(name for name in metrics if name.startswith("entropy/"))
    values = np.array([metrics[name] for name in names]).reshape(len({name.split("/")[1] for name in names}), -1)  # (L, H)
    figure = Figure(figsize=(1.5 + 0.35 * values.shape[1], 1.2 + 0.35 * len(values)), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself: what draws without a window
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, vmin=0, vmax=1, cmap="viridis"), label="attention entropy")
    axes.set(xlabel="head", ylabel="layer", xticks=range(values.shape[1]), yticks=range(len(values)))
    return figure


def phase(steps, values):
    """How a curve rises and falls: {"verdict", "before", "start", "rise", "peak", "fall", "settled", "noise"}.

    verdict: "diversify-then-compress", "only rise", "only fall", "fall, then rise", "flat", or "too short" (fewer than 8 points). The rise
    goes from step "start" to step "peak"; the fall comes after it and 90% of it are made at step "settled"; "before" is the fall before
    the start, as from a random initialisation. All three are shares of the level that they start from. Of several rises the largest that
    is followed by a fall is told, or else the largest.

    Only what exceeds the noise counts: the range that white noise alone would have over so many points, of a size estimated from how far
    each point lies off its neighbours, or 1% of the curve's median where that is more. Single points that stick out are passed over.
    """
    t, y = np.asarray(steps, float), np.asarray(values, float)
    t, y = t[np.isfinite(y)], y[np.isfinite(y)]
    found = {"verdict": "too short", "before": 0.0, "start": None, "rise": 0.0, "peak": None, "fall": 0.0, "settled": None, "noise": 0.0}
    if len(y) < 8:
        return found
    share = (t[1:-1] - t[:-2]) / (t[2:] - t[:-2])
    off = (y[1:-1] - (1 - share) * y[:-2] - share * y[2:]) / np.sqrt(1 + share**2 + (1 - share) ** 2)
    sigma = 1.4826 * np.median(np.abs(off))  # the median, since curvature at some points is no noise
    y = np.median([y, np.r_[y[:1], y[:-1]], np.r_[y[1:], y[-1:]]], axis=0)  # of each point and its neighbours
    width = 1 + 2 * (len(y) // 40)  # of a moving average, shorter at the ends
    y = np.convolve(y, np.ones(width), mode="same") / np.convolve(np.ones_like(y), np.ones(width), mode="same")
    # The expected range of so many normal values; with few points sigma itself is uncertain.
    noise = 2 * sigma / math.sqrt(width) * math.sqrt(2 * math.log(len(y))) * (1 + 6 / len(y))
    noise = max(noise, 0.01 * np.median(np.abs(y)))

    # Turning points: the curve goes on from one to the next by more than the noise, and never back by as much in between.
    turns, low, high, way, last = [], 0, 0, 0, 0
    for i in range(len(y)):
        if way == 0:
            low, high = (i if y[i] < y[low] else low), (i if y[i] > y[high] else high)
            if y[high] - y[low] > noise:
                way, turns, last = (1, [low], high) if high > low else (-1, [high], low)
        elif way * (y[i] - y[last]) > 0:
            last = i
        elif way * (y[last] - y[i]) > noise:
            turns, last, way = [*turns, last], i, -way
    turns = [*turns, last] if way else []
    rises = [k for k in range(len(turns) - 1) if y[turns[k + 1]] > y[turns[k]]]
    k = max(rises, key=lambda k: (k + 2 < len(turns), y[turns[k + 1]] - y[turns[k]]), default=None)
    found |= {"verdict": "flat", "noise": float(noise / np.median(np.abs(y))) if y.any() else 0.0}

    def change(a, b):
        return float(abs(y[b] - y[a]) / abs(y[a])) if y[a] else math.inf

    if k is not None:
        start, peak = turns[k], turns[k + 1]
        found |= {"verdict": "only rise", "start": int(t[start]), "peak": int(t[peak]), "rise": change(start, peak)}
        if k > 0:
            found |= {"verdict": "fall, then rise", "before": change(turns[k - 1], start)}
    if turns and (k is None or k + 2 < len(turns)):
        peak, lowest = (turns[0], turns[1]) if k is None else (turns[k + 1], turns[k + 2])
        settled = peak + int(np.argmax(y[peak:] <= y[peak] - 0.9 * (y[peak] - y[lowest])))
        found |= {"verdict": "only fall" if k is None else "diversify-then-compress", "peak": int(t[peak]),
                  "fall": change(peak, lowest), "settled": int(t[settled])}
    return found


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit(__doc__.strip())
    paths = checkpoint.paths(argv[0])
    if not paths:
        raise UserError(f"no checkpoint in {argv[0]}: a run writes ckpt_*.pt there")
    for path in paths:
        state = checkpoint.read(path)
        cfg = state["config"]
        ids = fixed_batch(data.open_corpus(cfg["data"])[1], cfg["d_model"], cfg["context"])
        print(json.dumps({"step": state["step"], "tokens": state["tokens"]} | measure(checkpoint.load_model(state), ids)), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
