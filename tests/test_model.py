"""model.py: against closed forms, plain attention and the models of transformers."""
import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from model import Backbone, Decoder, ModelConfig
from nanomaml import config

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ModelConfig(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=211, context=64)


def sharp(cfg):
    """A decoder with weights large enough that attention is far from uniform."""
    decoder = Decoder(cfg, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    return decoder


def sees(T, span):
    """(T, T) bool: a position sees itself and span - 1 before it; None: all before it."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (distance >= 0) & (distance < (span or T))


def slide(monkeypatch, span):
    """The fork that changes `Backbone.mask` and nothing else; with None, nothing."""
    if span:
        monkeypatch.setattr(Backbone, "mask", lambda self, T: sees(T, span))


@pytest.fixture(params=[None, 5], ids=["causal", "sliding window"])
def span(request, monkeypatch):
    slide(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("name, count", [
    ("11m", 11_282_784), ("65m", 64_595_328), ("181m", 181_095_168), ("570m", 569_808_384),
])
def test_parameter_counts(name, count):
    """The closed form, independent of the modules, and the paper's round figures."""
    cfg = config.load(train.Config, [str(CONFIGS / f"{name}.py")])
    with torch.device("meta"):
        decoder = Decoder(cfg)
    d, kv = cfg.d_model, cfg.d_model // 3
    assert count == 2 * 50304 * d + 12 * (2 * d * d + 2 * d * kv + 12 * d * d + 2 * d) + d
    assert sum(p.numel() for p in decoder.parameters()) == count and round(count / 1e6) == int(name[:-1])


def test_another_mask_changes_logits_and_flops(monkeypatch):
    decoder, ids = sharp(SMALL), torch.randint(0, 211, (2, 64))
    causal, (flops, in_output), last = decoder(ids), decoder.flops(64), decoder.flops(64, last=True)[0]
    slide(monkeypatch, 5)
    a, b = decoder(ids), causal
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and (a[:, 5:] - b[:, 5:]).abs().amax(-1).min() > 0.1
    fewer = 4 * 48 * (64 - 5)  # of one position in one layer
    assert decoder.flops(64) == (flops - 3 * 64 * fewer, in_output)
    assert decoder.flops(64, last=True)[0] == last - (2 * 64 + 1) * fewer


def test_loss_at_init_is_near_log_v_and_equals_the_plain_cross_entropy():
    """More positions than one chunk of the loss, so that chunks must add up; gradients too."""
    cfg = replace(SMALL, vocab_size=1000)
    ids, targets = torch.randint(0, 1000, (2, 40, 64))
    assert abs(Decoder(cfg)(ids, targets).item() - math.log(1000)) < 0.1
    decoder = sharp(cfg)
    loss = decoder(ids, targets)
    plain = F.cross_entropy(decoder(ids).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - plain.item()) < 1e-5 * plain.item()
    for a, b in zip(*(torch.autograd.grad(x, decoder.parameters()) for x in (loss, plain))):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("vocab_size, compiled", [
    (1000, False), (5000, False), pytest.param(1000, True, marks=pytest.mark.slow)])
def test_the_loss_in_bfloat16_is_that_of_bfloat16_logits_in_float32(vocab_size, compiled, monkeypatch):
    """F.linear_cross_entropy, chunked, stays in float32 under autocast; in bfloat16 its loss has 3 digits. Of
    5,000 rows the gradient is summed in three parts.
    """
    decoder = sharp(replace(SMALL, vocab_size=vocab_size))
    if compiled:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        decoder.compile()
    ids, targets = torch.randint(0, vocab_size, (2, 6, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(ids, targets)
        plain = F.cross_entropy(decoder(ids).float().flatten(0, 1), targets.flatten())
    assert loss.dtype == torch.float32 and abs(loss.item() - plain.item()) < 1e-5 * plain.item()
    exact = decoder(ids, targets)
    assert loss.item() != exact.item()
    for a, b, c in zip(*(torch.autograd.grad(x, decoder.parameters()) for x in (loss, plain, exact))):
        assert a.dtype == torch.float32
        assert torch.linalg.norm(a - c) < 1.2 * torch.linalg.norm(b - c) + 1e-4 * torch.linalg.norm(c)


@pytest.mark.parametrize("length, dtype", [(64, torch.float32), (300, torch.bfloat16)])
def test_short_attention_in_bfloat16_runs_the_float32_kernel_on_a_cpu(length, dtype, monkeypatch):
    """The demo spent a third of its time in the bfloat16 kernel's backward pass, slow on short sequences."""
    seen, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    decoder, ids = sharp(replace(SMALL, context=300)), torch.randint(0, 211, (2, length))
    exact = decoder(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(ids)
    assert set(seen[3:]) == {(dtype, dtype == torch.bfloat16)}  # autocast would cast the inputs back
    assert torch.linalg.norm(logits - exact) < 0.1 * torch.linalg.norm(exact)


@torch.no_grad()
def test_logits_equal_transformers_with_the_same_state_dict(span):
    """Its Llama and, for a sliding window, its Mistral."""
    transformers = pytest.importorskip("transformers", reason="comes with requirements-dev.txt")
    decoder = sharp(replace(SMALL, rope_theta=500.0, norm_eps=1e-5))
    name = "Mistral" if span else "Llama"
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        vocab_size=211, hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=500.0,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=False,
        attn_implementation="eager", **{"sliding_window": span} if span else {})).eval()
    theirs.load_state_dict(decoder.state_dict(), strict=True)
    ids = torch.randint(0, 211, (3, 64))
    expected = theirs(ids).logits
    assert expected.std() > 0.5 and (decoder(ids) - expected).abs().max() < 1e-4


# ---- generation ----


@torch.no_grad()
def uncached(decoder, ids, n, temperature, top_k, seed):
    """What `generate` should give: all logits of the last `context` tokens, anew for each token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        logits = decoder(ids[:, -decoder.cfg.context:])[:, -1]
        for row in logits:
            row[row < row.sort().values[-(top_k or len(row))]] = -math.inf
        if temperature == 0:
            new = logits.argmax(-1)[:, None]
        else:
            new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        ids = torch.cat((ids, new), 1)
    return ids


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
@pytest.mark.parametrize("T, n", [(1, 10), (56, 12), (90, 3)])
def test_generate_is_as_a_plain_loop(span, T, n, temperature, top_k):
    """From one token, past the context of 64, and from a longer prompt."""
    decoder, ids = sharp(SMALL).double(), torch.randint(0, 211, (3, T))
    made = decoder.generate(ids, n, temperature, top_k, torch.Generator().manual_seed(5))
    assert made.shape == (3, T + n) and torch.equal(made, uncached(decoder, ids, n, temperature, top_k, 5))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_position_alone_is_as_among_all(span, layers):
    """The features, and every gradient of a loss that reads nothing else."""
    decoder = sharp(replace(SMALL, n_layers=layers)).double()
    ids, params = torch.randint(0, 211, (5, 30)), list(decoder.model.parameters())
    alone, among = decoder.hidden(ids, last=True), decoder.hidden(ids)[:, -1:]
    assert alone.shape == (5, 1, 48) and torch.allclose(alone, among, atol=1e-12)
    way = torch.randn_like(alone)
    for a, b in zip(*(torch.autograd.grad((x * way).sum(), params) for x in (alone, among))):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_positions_that_cannot_be_read_are_refused():
    decoder, ids = Decoder(SMALL), torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="65 positions given, the model reads at most context = 64"):
        decoder(ids)
