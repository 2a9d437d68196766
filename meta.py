"""First-order MAML on Subset-Masked-LM episodes: the episode head, the inner loop `adapt`, and the module that is trained.

MAML: Finn et al. 2017 (arXiv 1703.03400). Episodes: Bansal et al. 2020 (arXiv 2009.08445).
With parameters p, inner rate a, support loss S and query loss Q of an episode:

    fast_0 = p,   fast_{k+1} = fast_k - a dS/dfast (fast_k)        `adapt`, on copies: p itself never moves
    outer gradient of p = dQ/dfast (fast_last)                     first order: d fast_last / d p is taken as the identity

Shapes: E episodes, N ways, K shots, Q queries, D model width.
"""
import re
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import UserError
from data import LMBatch


def adapt(loss, params, steps, lr, first_order=True):
    """The inner loop: `steps` of SGD at rate `lr` on copies of `params`.

    loss: function of a dict like `params` (name -> tensor) that gives the scalar support loss.
    Returns the adapted dict. First order: the copies carry no graph back to `params`; otherwise the whole loop stays in the graph.
    """
    with torch.enable_grad():  # evaluation adapts too
        if first_order:
            fast = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        else:
            fast = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in params.items()}
        for _ in range(steps):
            grads = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=not first_order)
            fast = {name: p - lr * g for (name, p), g in zip(fast.items(), grads)}
            if first_order:
                fast = {name: p.detach().requires_grad_() for name, p in fast.items()}
    return fast


def straight_through(params, fast):
    """The values of `fast` with the gradient going to `params`: first-order MAML's outer gradient, through autograd (and DDP's hooks)."""
    return {name: p + (fast[name] - p).detach() for name, p in params.items()}


class Head(nn.Module):
    """Classifies the feature at the mask: depth - 1 hidden layers of `width` with ReLU, then one output per way.

    start: the output layer at the start of every episode. "zero" treats all classes alike, so the order of the labels means nothing and
    any N goes. (One learned vector shared by all classes, Ye & Chao 2022, arXiv 2106.16245, is the same thing: it moves all logits alike,
    which the softmax does not see.) "random" is a learned layer of `ways` rows, as published.
    """

    def __init__(self, d_model, depth, width, start, ways, generator=None):
        super().__init__()
        sizes = [d_model] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.out = nn.Linear(sizes[-1], ways) if start == "random" else None
        self.features = sizes[-1]
        self.init_weights(generator)

    def init_weights(self, generator=None):
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:  # He et al. 2015 before a ReLU, unit variance for the output
                nn.init.normal_(parameter, std=((2 if name.startswith("layers") else 1) / parameter.shape[1]) ** 0.5, generator=generator)

    def start(self, ways, like):
        """{"head.*": tensor} at the start of an episode of N ways; the output layer is (N, features). `like` gives device and dtype."""
        params = {f"head.{name}": p for name, p in self.named_parameters()}
        if self.out is None:
            params |= {"head.out.weight": like.new_zeros(ways, self.features), "head.out.bias": like.new_zeros(ways)}
        elif self.out.out_features != ways:
            raise ValueError(f"a head with a random start has {self.out.out_features} outputs, the episode {ways} ways")
        return params

    def forward(self, x, params):
        """Features x (E, n, D) through E heads at once, `params` as of `start` but each with E in front -> logits (E, n, N)."""
        for i in range(len(self.layers)):
            x = torch.baddbmm(params[f"head.layers.{i}.bias"].unsqueeze(1), x, params[f"head.layers.{i}.weight"].mT).relu()  # (E, n, width)
        return torch.baddbmm(params["head.out.bias"].unsqueeze(1), x, params["head.out.weight"].mT)


class Learner(nn.Module):
    """What is trained, and what DistributedDataParallel wraps: `forward` takes either kind of batch.

    adapted: "head", "all", or a regular expression searched in the names `model.*` (backbone) and `head.*`.
    """

    def __init__(self, decoder, head, adapted="head", inner_steps=10, inner_lr=0.1, first_order=True, dtype=torch.float32):
        super().__init__()
        self.decoder, self.head = decoder, head
        self.inner_steps, self.inner_lr, self.first_order, self.dtype = inner_steps, inner_lr, first_order, dtype
        pattern = re.compile({"head": r"^head\.", "all": ""}.get(adapted, adapted))
        names = ["model." + name for name, _ in decoder.model.named_parameters()]
        names += sorted({"head." + name for name, _ in head.named_parameters()} | {"head.out.weight", "head.out.bias"})
        self.adapted = {name for name in names if pattern.search(name)}
        if not self.adapted:
            raise UserError(f"adapt = {adapted!r} matches no parameter; names look like {names[1]} and {names[-1]}")
        if head.out is None and "head.out.weight" not in self.adapted:
            raise UserError(f"adapt = {adapted!r} leaves out head.out, which starts at zero: the logits would stay zero; add |head.out")
        self.head_only = all(name.startswith("head.") for name in self.adapted)

    def autocast(self):
        # Entered anew for each pass: one region around an inner loop would cache the low-precision copies of the first weights.
        return torch.autocast(self.decoder.lm_head.weight.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, batch):
        """LMBatch or EpisodeBatch -> (loss, {metric: detached scalar}); losses are means, in nats."""
        if isinstance(batch, LMBatch):
            with self.autocast():
                loss = self.decoder(batch.ids, batch.targets)
            return loss, {"train/loss": loss.detach()}
        E, N, K, _ = batch.support.shape
        support, query = batch.support.flatten(1, 2), batch.query.flatten(1, 2)  # (E, N * K, T), (E, N * Q, T)
        ways = torch.arange(N, device=support.device).expand(E, N)
        labels, query_labels = ways.repeat_interleave(K, dim=1), ways.repeat_interleave(batch.query.shape[2], dim=1)
        if self.head_only:
            logits = self.adapt_heads(support, labels, query, N)
        else:
            logits = map(torch.stack, zip(*(self.adapt_any(*episode, N) for episode in zip(support, labels, query))))
        query_logits, support_logits, unadapted_logits = logits
        loss = F.cross_entropy(query_logits.flatten(0, 1), query_labels.flatten())

        def accuracy(logits, labels):
            return (logits.argmax(-1) == labels).float().mean()

        return loss, {
            "meta/query_loss": loss.detach(),
            "meta/query_acc": accuracy(query_logits, query_labels),
            "meta/query_acc_unadapted": accuracy(unadapted_logits, query_labels),
            "meta/support_acc": accuracy(support_logits, labels),
        }

    def features(self, windows):
        """windows (E, n, T) that end at the mask -> the backbone's features there (E, n, D)."""
        with self.autocast():  # the residual stream, and so the feature, stays in the parameters' precision
            return self.decoder.hidden(windows.flatten(0, 1), last=True)[:, 0].unflatten(0, windows.shape[:2])

    def adapt_heads(self, support, labels, query, ways):
        """All episodes at once, each with a head of its own: support (E, N * K, T), labels (E, N * K), query (E, N * Q, T).

        The backbone stands still, so it sees the support windows just once. Returns logits on the query after adaptation,
        (E, N * Q, N), on the support after it, (E, N * K, N), and on the query before it.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.first_order):
            x = self.features(support)  # (E, N * K, D)
        x_query = self.features(query)  # (E, N * Q, D)
        start = {name: p.expand(len(x), *p.shape) for name, p in self.head.start(ways, x).items()}

        def support_loss(params):  # summed over episodes, so that each head's gradient is that of its own mean loss
            return F.cross_entropy(self.head(x, params).flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]

        fast, outer = self.adapt(support_loss, start)
        with torch.no_grad():
            before, after = self.head(x_query, start), self.head(x, fast)
        return self.head(x_query, outer), after, before

    def adapt_any(self, support, labels, query, ways):
        """As `adapt_heads`, for one episode (no E) and whatever parameters adapt: each inner step runs the backbone."""
        start = {"model." + name: p for name, p in self.decoder.model.named_parameters()}
        start |= self.head.start(ways, like=start["model.norm.weight"])
        buffers = dict(self.decoder.model.named_buffers())

        def logits(params, windows):
            backbone = {name.removeprefix("model."): p for name, p in params.items() if name.startswith("model.")}
            # The fused attention kernels have no second derivative.
            kernels = nullcontext() if self.first_order else sdpa_kernel(SDPBackend.MATH)
            with self.autocast(), kernels:
                x = functional_call(self.decoder.model, (backbone, buffers), (windows,), {"last": True}, strict=True)[:, 0]
            return self.head(x[None], {name: p[None] for name, p in params.items()})[0]

        fast, outer = self.adapt(lambda params: F.cross_entropy(logits(params, support), labels), start)
        with torch.no_grad():
            before, after = logits(start, query), logits(fast, support)
        return logits(outer, query), after, before

    def adapt(self, support_loss, start):
        """The inner loop on the parameters in `start` that adapt: (all after it, the same with the outer gradient's way back)."""
        learned = {name: p for name, p in start.items() if name in self.adapted}
        fast = adapt(lambda params: support_loss(start | params), learned, self.inner_steps, self.inner_lr, self.first_order)
        return start | fast, start | (straight_through(learned, fast) if self.first_order else fast)

    def flops(self, batch):
        """Multiply-adds x 2 of a training micro-step on this batch (shapes are enough); see `Decoder.flops` for what counts.

        Second order roughly doubles the inner steps' share again; that part is an estimate.
        """
        if isinstance(batch, LMBatch):
            return 3 * len(batch.ids) * sum(self.decoder.flops(batch.ids.shape[1]))
        E, N, K, T = batch.support.shape
        S, Q = E * N * K, E * N * batch.query.shape[2]  # windows
        window = self.decoder.flops(T, last=True)[0]  # the backbone's forward pass over one
        layers = [2 * layer.weight.numel() for layer in self.head.layers] + [2 * N * self.head.features]
        head = sum(layers)
        again = 1 if self.first_order else 2
        if self.head_only:  # the first layer's input needs no gradient; after the loop the support is classified once more
            inner = self.inner_steps * S * (3 * head - layers[0]) * again + S * head
            backbone = S * window * (1 if self.first_order else 3)
        else:
            inner = (3 * self.inner_steps * again + 1) * S * head
            backbone = (3 * self.inner_steps * again + 1) * S * window + Q * window  # Q: the query before adaptation
        return backbone + inner + 3 * Q * window + 4 * Q * head
