"""A LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv 2302.13971).

Parameter names and the rotary layout are those of Hugging Face's LlamaForCausalLM, so a state dict goes over as it is.
Shapes: B batch, T positions, D model width, H heads, G key-value heads, C channels of a head, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import UserError

@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 96  # width of the residual stream
    n_layers: int = 12  # decoder layers
    n_heads: int = 12  # query heads; d_model / n_heads channels each
    n_kv_heads: int = 4  # key-value heads, each shared by n_heads / n_kv_heads query heads
    d_hidden: int = 0  # width of the MLP; 0: 4 x d_model
    vocab_size: int = 50304  # rows of the embedding and of the output layer; at least the tokenizer's
    context: int = 2048  # positions of a training sequence, and the most the model reads
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm

    def __post_init__(self):
        if self.d_hidden == 0:
            object.__setattr__(self, "d_hidden", 4 * self.d_model)
        for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_hidden", "vocab_size", "context"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.d_model % (2 * self.n_heads):
            raise UserError(f"d_model = {self.d_model} must be an even multiple of n_heads = {self.n_heads} (rotation pairs channels)")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise UserError(f"rope_theta = {self.rope_theta} and norm_eps = {self.norm_eps} must be positive")


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), channel c paired with c + C/2: x (B, heads, T, C), cos and sin (T, C)."""
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

    def forward(self, x, cos, sin, visible=None, last=False):
        q, k, v = self.qkv(x, cos, sin, last)
        causal = visible is None and not last  # the last position sees all
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=True)  # (B, H, T or 1, C)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # (B, T or 1, D)


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

    def forward(self, x, cos, sin, visible=None, last=False):
        x = (x[:, -1:] if last else x) + self.self_attn(self.input_layernorm(x), cos, sin, visible, last)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the output layer: ids (B, T) -> features (B, T, D), normalised."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.d_model, cfg.norm_eps)
        channels = cfg.d_model // cfg.n_heads
        frequency = cfg.rope_theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)  # (C / 2,)
        angle = torch.outer(torch.arange(cfg.context, dtype=torch.float64), frequency).repeat(1, 2)  # (context, C)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def positions(self, T):
        """cos and sin of the first T positions, each (T, C)."""
        if T > len(self.cos):
            raise ValueError(f"{T} positions given, the model reads at most context = {len(self.cos)}")
        return self.cos[:T], self.sin[:T]

    def forward(self, ids, visible=None, last=False):
        """visible (B, T) bool turns the causal mask off: every position then attends to all that are True (the rest is padding).

        last: only the last position's features, (B, 1, D). The top layer then leaves out what only the other positions would need.
        """
        rope = self.positions(ids.shape[1])
        x = self.embed_tokens(ids)  # (B, T, D)
        if visible is not None:
            rope = (*rope, visible[:, None, None])  # (B, 1, 1, T), for all heads and queries
        for layer in self.layers[:-1]:
            x = layer(x, *rope)
        return self.norm(self.layers[-1](x, *rope, last=last))


def softmax_loss(logits, target, dtype):
    """Logits (n, V) and targets (n,) -> (summed cross-entropy, its gradient by the logits: softmax minus one-hot).

    The gradient is in `dtype`, what lies between in float32 at least; the logits may be overwritten.
    """
    x = logits.to(torch.promote_types(dtype, torch.float32))
    right, top = x.gather(1, target[:, None]), x.amax(1, keepdim=True)  # (n, 1)
    p, right = x.sub_(top).exp_(), right - top
    norm = p.sum(1, keepdim=True)
    loss = (norm.log() - right).sum()
    return loss, p.div_(norm).to(dtype).scatter_(1, target[:, None], (right.exp() / norm - 1).to(dtype))


class OutputLoss(torch.autograd.Function):
    """Mean cross-entropy of x W^T (x (n, D), W (V, D), targets (n,)), the logits of `rows` positions at a time: (n, V) is never held.

    The gradients are made in the forward pass, while the logits are there, so nothing is computed twice. Matrix products are in
    `dtype`; `softmax_loss` may be compiled. (F.linear_cross_entropy, chunked, is as fast; it stays in float32 under autocast.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows, with_grad, softmax_loss):
        w, total = weight.to(dtype), x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (x, weight)
        logits = w.new_empty(min(rows, len(x)), len(w))  # one for all parts: pages new to the process are slow on a CPU
        for part, target, grad in zip(x.to(dtype).split(rows), targets.split(rows), grad_x.split(rows)):
            loss, slope = softmax_loss(torch.mm(part, w.mT, out=logits[:len(part)]), target, dtype)  # (), (rows, V)
            total += loss
            if with_grad:
                grad.copy_(slope @ w)
                grad_w.addmm_(slope.mT, part) if dtype == grad_w.dtype else grad_w.add_(slope.mT @ part)
        ctx.save_for_backward(grad_x, grad_w)
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error, not silently wrong
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x * scale, grad_w * scale, *[None] * 5


class Decoder(nn.Module):
    """The language model. `generator` draws the initial weights (None: the global generator)."""

    def __init__(self, cfg, generator=None):
        super().__init__()
        self.cfg = cfg
        self.model = Backbone(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights(generator)
        self.softmax_loss = softmax_loss

    def compile(self):
        """torch.compile, in place, of what a step is made of: each layer (all share their graphs), and the softmax of the loss.

        A graph of its own has each shape, with gradient or without, of plain parameters or adapted ones, of the top layer or another:
        about ten for `adapt=all`, where by default the ninth and all after it would run uncompiled.
        """
        torch._dynamo.config.optimize_ddp = False  # would cut layers in two where DDP's buckets end; layers are the cuts here
        for layer in self.model.layers:
            layer.compile(dynamic=False, recompile_limit=64)
        self.softmax_loss = torch.compile(softmax_loss, dynamic=False, recompile_limit=64)

    def init_weights(self, generator=None):
        """Normal(0, 0.02), and 0.02 / sqrt(2 L) where a layer writes to the residual stream, as GPT-2; norms at 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.cfg.n_layers) if writes else 0.02, generator=generator)

    def hidden(self, ids, visible=None, last=False):
        """ids (B, T) -> features before the output layer (B, T, D), or (B, 1, D); visible and last as in `Backbone`."""
        return self.model(ids, visible, last)

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats instead."""
        x = self.hidden(ids)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """Features x (B, T, D) and targets (B, T) -> mean cross-entropy in nats."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = 4096 if kind == "cuda" else 512  # more: fewer passes over the weight's gradient; fewer: less memory
        softmax = softmax_loss if dtype == torch.float32 else self.softmax_loss  # compiled, it would copy float32 logits back and forth
        return OutputLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype, rows, torch.is_grad_enabled(), softmax)

    def flops(self, T, last=False):
        """Multiply-adds x 2 of the forward pass of T tokens: (below the output layer, in the output layer); last as in `Backbone`.

        Counted as is usual for MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the embedding is a look-up, and
        attention scores count in full though half of them are masked. A backward pass costs twice the forward.
        """
        layer = self.model.layers[0]
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        keys = layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel()
        scores = 4 * self.cfg.d_model * T  # of one position
        whole = T * (2 * matrices + scores)
        top = 2 * T * keys + 2 * (matrices - keys) + scores if last else whole  # keys and values of all positions, the rest of one
        return (self.cfg.n_layers - 1) * whole + top, 2 * T * self.lm_head.weight.numel()

    @torch.no_grad()
    def generate(self, ids, n, temperature=1.0, top_k=None, generator=None):
        """ids (B, T) and n sampled tokens after them (B, T + n). temperature 0 takes the likeliest."""
        for _ in range(n):
            logits = self.lm_head(self.hidden(ids[:, -self.cfg.context:], last=True)[:, 0]).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, new), dim=1)
        return ids
