"""A LLaMA decoder (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary positions, grouped-query
attention, SwiGLU.

    decoder = Decoder(ModelConfig(d_model=96), torch.Generator().manual_seed(1))
    logits, loss = decoder(ids), decoder(ids, targets)        # ids (B, T) -> (B, T, V), or a scalar

Parameter names and the rotary layout match Hugging Face's LlamaForCausalLM, so a state dict loads there
unchanged. Change the architecture here: FLOPs are counted from the shapes of the matrices and from
`Backbone.mask`, which attention and its probe share. Shapes: B batch, T positions, D model width, H heads,
G key-value heads, C channels of a head, V vocabulary.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomaml.config import Count, Positive, Settings, require

Size = Annotated[int, "in 1 to 2**20", lambda n: 1 <= n <= 2**20]  # a foreign checkpoint may claim more


@dataclass(frozen=True)
class ModelConfig(Settings):
    d_model: Size = 96  # width of the residual stream
    n_layers: Annotated[int, "in 1 to 1000", lambda n: 1 <= n <= 1000] = 12  # decoder layers
    n_heads: Count = 12  # query heads; d_model / n_heads channels each
    n_kv_heads: Count = 4  # key-value heads, each shared by n_heads / n_kv_heads query heads
    d_hidden: Annotated[int, "in 0 to 2**22", lambda n: 0 <= n <= 2**22] = 0  # MLP width; 0: 4 x d_model
    vocab_size: Size = 50304  # rows of the embedding and of the output layer; at least the tokenizer's
    context: Size = 2048  # positions of a training sequence, and the most the model reads
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    norm_eps: Positive = 1e-6  # added to the mean square in RMSNorm

    def __post_init__(self):
        super().__post_init__()
        if self.d_hidden == 0:
            object.__setattr__(self, "d_hidden", 4 * self.d_model)
        require(self.d_model % (2 * self.n_heads) == 0,
                f"d_model = {self.d_model} must be an even multiple of n_heads = {self.n_heads} (rotation "
                "pairs channels)")
        require(self.n_heads % self.n_kv_heads == 0,
                f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of x (B, heads, T, C); cos and sin are (T, C).

    Channel c is paired with c + C / 2, as in Hugging Face's Llama; the paper pairs neighbours.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.d_model // cfg.n_heads
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * self.head_dim, cfg.d_model, bias=False)

    def qkv(self, x, cos, sin, last=False):
        """x (B, T, D) -> q (B, H, T, C; last: B, H, 1, C), k and v (B, G, T, C), with q and k rotated."""
        q, k, v = self.q_proj(x[:, -1:] if last else x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        return rotate(q, cos[-q.shape[2]:], sin[-q.shape[2]:]).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def attend(self, q, k, v, mask=None):
        """q (B, H, Tq, C), k and v (B, G, Tk, C) -> (B, H, Tq, C). mask: as `Backbone.mask`, for all k."""
        # PyTorch's CPU kernel is slow in bfloat16 on short sequences, especially backward (docs/speed.md).
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 256:
            kernel, dtype = torch.autocast("cpu", enabled=False), torch.float32
        else:
            kernel, dtype = nullcontext(), q.dtype
        if mask is not None:
            mask = mask[..., -q.shape[2]:, :]
        with kernel:  # a single query is the last position, and sees all
            return F.scaled_dot_product_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask,
                is_causal=mask is None and q.shape[2] > 1, enable_gqa=True).to(v.dtype)

    def forward(self, x, cos, sin, mask=None, last=False):
        q, k, v = self.qkv(x, cos, sin, last)
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # (B, H, T or 1, C) -> (B, T or 1, D)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_hidden, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_hidden, bias=False)
        self.down_proj = nn.Linear(cfg.d_hidden, cfg.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, mask=None, last=False):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, last)
        x = (x[:, -1:] if last else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the output layer: ids (B, T) -> features (B, T, D), normalised."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        channels = cfg.d_model // cfg.n_heads
        pairs = torch.arange(0, channels, 2, dtype=torch.float64)
        frequency = cfg.rope_theta ** -(pairs / channels)  # (C / 2,)
        positions = torch.arange(cfg.context, dtype=torch.float64)
        angle = torch.outer(positions, frequency).repeat(1, 2)  # (context, C)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def positions(self, T):
        """cos and sin of T positions, each (T, C)."""
        if T > len(self.cos):
            raise ValueError(f"{T} positions given, the model reads at most context = {len(self.cos)}")
        return self.cos[:T], self.sin[:T]

    def mask(self, T):
        """Which keys each of T positions sees: bool (T, T), or None if each sees all up to itself.

        The one place to change the mask, as to a sliding window: attention, its probe and FLOPs follow.
        """
        return None

    def forward(self, ids, last=False):
        """ids (B, T) -> (B, T, D); last: the last position's features alone, (B, 1, D)."""
        rope, mask = self.positions(ids.shape[1]), self.mask(ids.shape[1])
        x = self.embed_tokens(ids)  # (B, T, D)
        for layer in self.layers[:-1]:
            x = layer(x, *rope, mask)
        return self.norm(self.layers[-1](x, *rope, mask, last))


SOFTMAX_ROWS = 32  # rows of logits whose softmax is taken at once on a CPU


def softmax_loss(logits, target, dtype):
    """Logits (n, V), targets (n,) -> (summed cross-entropy, its gradient: softmax - one-hot).

    The gradient is in `dtype`, everything in between in float32 at least; the logits may be overwritten.
    """
    if logits.device.type == "cpu" and len(logits) > SOFTMAX_ROWS and dtype != torch.float32:
        losses = []  # float32 that stays in the processor's cache need not go through memory
        for piece, labels in zip(logits.split(SOFTMAX_ROWS), target.split(SOFTMAX_ROWS)):
            loss, grad = softmax_loss(piece, labels, dtype)
            losses.append(loss)
            piece.copy_(grad)
        return torch.stack(losses).sum(), logits
    x = logits.to(torch.promote_types(dtype, torch.float32))
    target_logit, largest = x.gather(1, target[:, None]), x.amax(1, keepdim=True)  # (n, 1)
    p, target_logit = x.sub_(largest).exp_(), target_logit - largest
    norm = p.sum(1, keepdim=True)
    loss = (norm.log() - target_logit).sum()
    grad = p.div_(norm).to(dtype)
    return loss, grad.scatter_(1, target[:, None], (target_logit.exp() / norm - 1).to(dtype))


class OutputLoss(torch.autograd.Function):
    """Mean cross-entropy of x W^T, x (n, D), W (V, D), targets (n,), without holding the logits (n, V).

    Logits and gradients are computed for `rows` positions at a time, by products in `dtype`;
    `softmax_loss` may be compiled. (F.linear_cross_entropy stays in float32 under autocast.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows, with_grad, softmax_loss):
        w = weight.to(dtype)
        total = x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (x, weight)
        # One buffer for the logits of all parts: on a CPU, pages that are new to the process are slow.
        logits = w.new_empty(min(rows, len(x)), len(w))
        columns = 2048 if x.device.type == "cpu" else len(w)  # on a CPU, what its cache holds
        for part, target, grad in zip(x.to(dtype).split(rows), targets.split(rows), grad_x.split(rows)):
            torch.mm(part, w.mT, out=logits[:len(part)])
            loss, grad_logits = softmax_loss(logits[:len(part)], target, dtype)  # (), (rows, V)
            total += loss
            if with_grad:
                grad.copy_(grad_logits @ w)
                if dtype == grad_w.dtype:
                    grad_w.addmm_(grad_logits.mT, part)
                else:
                    for of_w, of_logits in zip(grad_w.split(columns), grad_logits.split(columns, dim=1)):
                        of_w.add_(of_logits.mT @ part)
        ctx.save_for_backward(grad_x, grad_w)
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error, not silently wrong
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x * scale, grad_w * scale, *[None] * 5


class Decoder(nn.Module):
    """Backbone and output layer. `generator` draws the initial weights (None: the global one)."""

    def __init__(self, cfg, generator=None):
        super().__init__()
        self.cfg = cfg
        self.model = Backbone(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights(generator)
        self.softmax_loss, self.is_compiled = softmax_loss, False

    def compile(self):
        """torch.compile, in place: each layer (all share their graphs), and the softmax of the loss.

        There is a graph for each shape, with gradient or without, for plain or adapted parameters, for the
        top layer or another: about ten with `adapt=all`, while dynamo's default limit is eight.
        """
        torch._dynamo.config.optimize_ddp = False  # it would split layers where DDP's gradient buckets end
        for layer in self.model.layers:
            layer.compile(dynamic=False, recompile_limit=64)
        self.softmax_loss = torch.compile(softmax_loss, dynamic=False, recompile_limit=64)
        self.is_compiled = True

    def eager(self):
        """The context in which nothing is compiled: for shapes seen once or rarely."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def init_weights(self, generator=None):
        """As GPT-2: normal(0, 0.02), 0.02 / sqrt(2 L) for what writes to the residual stream; norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.cfg.n_layers) if writes else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def hidden(self, ids, last=False):
        """ids (B, T) -> features before the output layer (B, T, D); the rest as in `Backbone`."""
        return self.model(ids, last)

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats instead."""
        x = self.hidden(ids)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """Features x (B, T, D) and targets (B, T) -> mean cross-entropy in nats."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # More rows: fewer passes over the weight's gradient. Fewer: less memory.
        rows = 4096 if kind == "cuda" else 512
        # Compiled it is faster only on a GPU; elsewhere it would copy float32 logits back and forth.
        softmax = self.softmax_loss if kind == "cuda" else softmax_loss
        return OutputLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype, rows,
                                torch.is_grad_enabled(), softmax)

    def flops(self, T, last=False):
        """FLOPs of the forward pass of T tokens: (below the output layer, in it); last as in `Backbone`.

        As is usual for MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), the embedding, a look-up,
        counts as 0, and attention scores in full though half are masked. Backward costs twice forward.
        """
        layer = self.model.layers[0]
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        keys = layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel()
        mask = self.model.mask(T)
        scores = 4 * self.cfg.d_model * (T if mask is None else int(mask.sum(1).max()))  # of one position
        layer_flops = T * (2 * matrices + scores)
        # last: the top layer computes keys and values at all positions, everything else at one.
        top_flops = 2 * T * keys + 2 * (matrices - keys) + scores if last else layer_flops
        return (self.cfg.n_layers - 1) * layer_flops + top_flops, 2 * T * self.lm_head.weight.numel()

    def generate(self, ids, n, temperature=1.0, top_k=None, generator=None):
        """ids (B, T) followed by n sampled tokens, (B, T + n); options as in `sample`."""
        return torch.cat((ids, *self.sample(ids, n, temperature, top_k, generator)), dim=1)

    @torch.no_grad()
    def sample(self, ids, n, temperature=1.0, top_k=None, generator=None):
        """Yields n tokens (B, 1) that follow ids (B, T), one by one.

        temperature 0: always the likeliest token. top_k: one of the likeliest k. Each token is drawn after
        the `context` tokens before it, which are all read again; an export generates faster.
        """
        for _ in range(n):
            x = self.hidden(ids[:, -self.cfg.context:], last=True)
            logits = self.lm_head(x[:, 0]).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            yield new
            ids = torch.cat((ids, new), dim=1)
