"""First-order MAML on Subset-Masked-LM episodes: the inner loop, the episode head, and the trained module.

MAML: Finn et al. 2017 (arXiv 1703.03400). Episodes: Bansal et al. 2020 (arXiv 2009.08445).
With parameters p, inner rate a, support loss S and query loss Q of an episode:

    fast_0 = p,   fast_{k+1} = fast_k - a dS/dfast (fast_k)    `adapt`, on copies: p itself never moves
    outer gradient of p = dQ/dfast (fast_last)                 first order: d fast_last / d p is the identity

    learner = Learner(decoder=decoder, head=Head(192, 1, 0, "zero", 16))
    losses, metrics = learner("episodes", batch)                     # losses["meta"].backward()

Shapes: E episodes, N ways, K shots, Q queries, T positions, D model width.
"""
import re
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomaml import machine
from nanomaml.config import require


def adapt(loss, params, steps, lr, first_order=True):
    """The inner loop: `steps` of SGD at rate `lr` on copies of `params`.

    loss: function of a dict like `params` (name -> tensor) that gives the scalar support loss. lr: a
    number, or {name: tensor} where each parameter has a rate of its own. Returns the adapted dict. First
    order: the result has no graph back to `params`; otherwise the whole loop stays in the graph.
    What a step computes is counted in `Learner.episodes_flops` and `head_flops`: change them together.
    """
    rates = lr if isinstance(lr, dict) else dict.fromkeys(params, lr)
    require(not first_order or not any(getattr(rate, "requires_grad", False) for rate in rates.values()),
            "a learned inner rate gets no gradient in first-order MAML, which cuts the graph of the inner "
            "loop: set first_order = False, or make the rate a constant")
    first_order = first_order or not torch.is_grad_enabled()  # without gradients the graph is not needed
    with torch.enable_grad():  # evaluation adapts too
        if first_order:
            fast = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        else:
            fast = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in params.items()}
        for _ in range(steps):
            grads = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=not first_order)
            fast = {name: p - rates[name] * g for (name, p), g in zip(fast.items(), grads)}
            if first_order:
                fast = {name: p.detach().requires_grad_() for name, p in fast.items()}
    return fast


def straight_through(params, fast):
    """The values of `fast` with the gradient of `params`, so backward() and DDP see the outer gradient."""
    return {name: p + (fast[name] - p).detach() for name, p in params.items()}


def labels(ways, x):
    """(E, n) labels of x (E, n, ...), whose rows come class by class."""
    labels_of_one = torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways)
    return labels_of_one.expand(x.shape[:2])


def query_loss(query, support, unadapted):
    """Logits (E, n, N), as `Learner.adapt_heads` returns them -> (query loss in nats, {metric: scalar})."""
    def accuracy(logits):
        return (logits.argmax(-1) == labels(logits.shape[2], logits)).float().mean()

    ways = query.shape[2]
    loss = F.cross_entropy(query.flatten(0, 1), labels(ways, query).flatten())
    return loss, {"meta/query_loss": loss.detach(), "meta/query_acc": accuracy(query),
                  "meta/query_acc_unadapted": accuracy(unadapted), "meta/support_acc": accuracy(support),
                  "meta/ways": torch.full_like(loss.detach(), ways)}


class Head(nn.Module):
    """Classifies a feature (D,): depth - 1 hidden layers of `width` with ReLU, then one output for each way.

    start: the output layer at the start of every episode. "zero" treats all classes the same, so the order
    of the labels means nothing and any N works. (One learned vector shared by all classes, Ye & Chao
    2022, arXiv 2106.16245, is the same thing: it moves all logits equally, which the softmax does not see.)
    "random" is a learned layer of `ways` rows, as published.
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
                gain = 2 if name.startswith("layers") else 1
                nn.init.normal_(parameter, std=(gain / parameter.shape[1]) ** 0.5, generator=generator)

    def start(self, ways, like):
        """{"head.*": tensor} at the start of an episode; its output layer is (N, features), like `like`."""
        params = {f"head.{name}": p for name, p in self.named_parameters()}
        if self.out is None:
            params["head.out.weight"] = like.new_zeros(ways, self.features)
            params["head.out.bias"] = like.new_zeros(ways)
        elif self.out.out_features != ways:
            raise ValueError(f"a head with a random start has {self.out.out_features} outputs, "
                             f"the episode {ways} ways")
        return params

    def forward(self, x, params):
        """Features x (E, n, D) through E heads at once -> logits (E, n, N); params: as `start`, E first."""
        for i in range(len(self.layers)):
            weight, bias = params[f"head.layers.{i}.weight"], params[f"head.layers.{i}.bias"]
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT).relu()  # (E, n, width)
        return torch.baddbmm(params["head.out.bias"].unsqueeze(1), x, params["head.out.weight"].mT)


class Learner(nn.Module):
    """Everything that is trained; DistributedDataParallel wraps it.

    A kind of micro-step named "x" is two methods: `x_loss(batch)` and `x_flops(batch)`.

    adapted: what the inner loop adapts: "head", "all", or a regular expression searched in the names
    `model.*` (backbone) and `head.*`. The decoder is initialised already, so a fork may copy its weights.
    """

    def __init__(self, *, decoder, head, adapted="head", inner_steps=10, inner_lr=0.1, first_order=True,
                 dtype=torch.float32):
        super().__init__()
        self.decoder, self.head = decoder, head
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.first_order, self.dtype = first_order, dtype
        pattern = re.compile({"head": r"^head\.", "all": ""}.get(adapted, adapted))
        names = ["model." + name for name, _ in decoder.model.named_parameters()]
        head_names = {"head." + name for name, _ in head.named_parameters()}
        names += sorted(head_names | {"head.out.weight", "head.out.bias"})
        self.adapted = {name for name in names if pattern.search(name)}
        require(self.adapted, f"adapt = {adapted!r} matches no parameter; names look like {names[1]} and "
                              f"{names[-1]}")
        require(head.out is not None or "head.out.weight" in self.adapted, f"adapt = {adapted!r} leaves out "
                "head.out, which starts at zero: the logits would stay zero; add |head.out")
        self.head_only = all(name.startswith("head.") for name in self.adapted)

    def forward(self, kind, batch):
        """({part: loss}, {metric: detached scalar}) of a batch of this kind: "lm" or "episodes".

        Losses are means, in nats; train.py weights the parts "lm" and "meta". All batches of a kind have the
        same metrics, since ranks add them up; a kind of episode reports its number of classes as meta/ways.
        """
        return getattr(self, f"{kind}_loss")(batch)

    def flops(self, kind, batch):
        """Multiply-adds x 2 of a training micro-step on this batch, forward and backward."""
        return getattr(self, f"{kind}_flops")(batch)

    def autocast(self):
        # Entered again for each pass: one region around an inner loop would cache the bfloat16 copies of the
        # first weights and use them in every step.
        return machine.autocast(self.decoder.lm_head.weight.device, self.dtype)

    # ---- next-token prediction ----

    def lm_loss(self, batch):
        with self.autocast():
            loss = self.decoder(batch.ids, batch.targets)
        return {"lm": loss}, {"train/loss": loss.detach()}

    def lm_flops(self, batch):
        return 3 * len(batch.ids) * sum(self.decoder.flops(batch.ids.shape[1]))

    # ---- episodes ----

    def episodes_loss(self, batch):
        support, query = batch.support.flatten(1, 2), batch.query.flatten(1, 2)  # (E, N * K or N * Q, T)
        ways = batch.words.shape[1]
        if self.head_only:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.first_order):
                x = self.features(support)
            logits = self.adapt_heads(x, self.features(query), ways)
        else:
            episodes = [self.adapt_any(*episode, ways) for episode in zip(support, query)]
            logits = map(torch.stack, zip(*episodes))
        loss, metrics = query_loss(*logits)
        return {"meta": loss}, metrics

    def features(self, windows):
        """windows (E, n, T) -> the backbone's features at their last position (E, n, D)."""
        with self.autocast():  # the residual stream, and so the feature, stays in the parameters' precision
            return self.decoder.hidden(windows.flatten(0, 1), last=True)[:, 0].unflatten(0, windows.shape[:2])

    def adapt_heads(self, x, x_query, ways):
        """Adapts all episodes at once, each with a head of its own, on fixed features.

        Features of the support x (E, N * K, D) and of the query (E, N * Q, D), class by class -> logits on
        the query after adaptation (E, N * Q, N), on the support after it (E, N * K, N), and on the query
        before it.
        """
        start = {name: p.expand(len(x), *p.shape) for name, p in self.head.start(ways, x).items()}
        target = labels(ways, x)

        def support_loss(params):  # summed over episodes: each head gets the gradient of its mean loss
            logits = self.head(x, params).flatten(0, 1)
            return F.cross_entropy(logits, target.flatten(), reduction="sum") / target.shape[1]

        fast, outer = self.inner_loop(support_loss, start)
        with torch.no_grad():
            before, after = self.head(x_query, start), self.head(x, fast)
        return self.head(x_query, outer), after, before

    def adapt_any(self, support, query, ways):
        """As `adapt_heads`, for one episode's windows (n, T): each inner step runs the backbone."""
        start = {"model." + name: p for name, p in self.decoder.model.named_parameters()}
        start |= self.head.start(ways, like=start["model.norm.weight"])
        buffers = dict(self.decoder.model.named_buffers())

        def logits(params, windows):
            backbone = {name[len("model."):]: p for name, p in params.items() if name.startswith("model.")}
            # The fused attention kernels have no second derivative.
            kernels = nullcontext() if self.first_order else sdpa_kernel(SDPBackend.MATH)
            with self.autocast(), kernels:
                x = functional_call(self.decoder.model, (backbone, buffers), (windows,), {"last": True},
                                    strict=True)
            return self.head(x[None, :, 0], {name: p[None] for name, p in params.items()})[0]

        target = labels(ways, support[None])[0]
        fast, outer = self.inner_loop(lambda params: F.cross_entropy(logits(params, support), target), start)
        with torch.no_grad():
            before, after = logits(start, query), logits(fast, support)
        return logits(outer, query), after, before

    def inner_loop(self, support_loss, start):
        """Adapts what adapts of `start`: (all parameters afterwards, the same with the outer graph)."""
        learned = {name: p for name, p in start.items() if name in self.adapted}

        def loss(params):
            return support_loss(start | params)

        fast = adapt(loss, learned, self.inner_steps, self.inner_lr, self.first_order)
        return start | fast, start | (straight_through(learned, fast) if self.first_order else fast)

    def episodes_flops(self, batch):
        """Second order counts the inner steps twice: an estimate."""
        E, N, K, T = batch.support.shape
        supports, queries = E * N * K, E * N * batch.query.shape[2]  # windows
        window = self.decoder.flops(T, last=True)[0]  # the backbone's forward pass over one
        heads = self.head_flops(N, supports, queries)
        if self.head_only:
            support_passes = supports * window * (1 if self.first_order else 3)
            return heads + support_passes + 3 * queries * window
        order = 1 if self.first_order else 2
        support_passes = (3 * self.inner_steps * order + 1) * supports * window
        return heads + support_passes + 4 * queries * window  # the query is also read before adaptation

    def head_flops(self, ways, supports, queries):
        """FLOPs of the head: the inner loop, the support after it, and the query before and after it."""
        layers = [2 * layer.weight.numel() for layer in self.head.layers] + [2 * ways * self.head.features]
        head, order = sum(layers), 1 if self.first_order else 2
        # Where only the head adapts, its first layer's input needs no gradient.
        step = 3 * head - (layers[0] if self.head_only else 0)
        return self.inner_steps * supports * step * order + supports * head + 4 * queries * head
