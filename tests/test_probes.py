import math

import pytest
import torch

import probes
from model import Decoder, ModelConfig

CFG = ModelConfig(d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=211, context=64)


def test_effective_rank_of_known_matrices():
    x = torch.outer(torch.randn(50), torch.randn(20))
    assert probes.effective_rank(x) == pytest.approx(1, abs=1e-4)
    assert probes.effective_rank(torch.linalg.qr(torch.randn(50, 20)).Q) == pytest.approx(20, rel=1e-5)
    assert probes.effective_rank(torch.eye(7), proportional=True) == pytest.approx(1)
    assert probes.effective_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (128, 128)])
def test_effective_rank_equals_the_full_svd(shape):
    """A spectrum over 10 orders of magnitude: the Gram matrix squares it, which float32 would not survive."""
    x = torch.randn(shape) @ torch.diag(torch.logspace(0, -10, shape[1]))
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum()
    assert probes.effective_rank(x) == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-3)


def test_attention_entropy_equals_brute_force_at_512():
    """An earlier implementation elsewhere was right at T = 4 and wrong from T = 256 on."""
    B, H, G, T, C = 2, 4, 2, 512, 8
    q, k = 2 * torch.randn(B, H, T, C), 2 * torch.randn(B, G, T, C)
    nats, normalised = torch.zeros(2, H, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                p = (q[b, h, t].double() @ k[b, h // 2, :t + 1].double().T / math.sqrt(C)).softmax(-1)
                entropy = -(p * p.log()).sum()
                nats[h] += entropy / (B * T)
                normalised[h] += entropy / math.log(t + 1) / (B * (T - 1)) if t else 0
    ours = probes.attention_entropy(q, k).double()
    assert torch.allclose(ours[0], nats, rtol=1e-5) and torch.allclose(ours[1], normalised, rtol=1e-5)
    assert nats.max() < 0.8 * math.log(T / 2)  # far from uniform, where everything is right


def test_attention_entropy_of_uniform_attention():
    entropy = probes.attention_entropy(torch.zeros(1, 2, 300, 4), torch.randn(1, 1, 300, 4))
    assert torch.allclose(entropy[1], torch.ones(2)) and entropy[0, 0].item() == pytest.approx(math.lgamma(301) / 300, rel=1e-5)
    assert torch.equal(probes.attention_entropy(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)), torch.zeros(2, 2))


def test_measure_sees_what_the_model_computes_and_leaves_no_trace():
    decoder, ids = Decoder(CFG).train(), torch.randint(0, 211, (4, 64))
    decoder(ids, ids).backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in decoder.named_parameters()}
    rng, logits = torch.get_rng_state(), decoder(ids)
    metrics = probes.measure(decoder, ids)
    assert torch.equal(torch.get_rng_state(), rng) and decoder.training and torch.equal(decoder(ids), logits)
    for name, p in decoder.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1]) and p.requires_grad
    assert sorted(metrics) == sorted([f"rank/{w}/{i:02d}" for w in ("v_proj", "o_proj", "down_proj", "resid") for i in range(2)] + [f"entropy/{i:02d}/{h:02d}" for i in range(2) for h in range(6)])
    seen = []
    handle = decoder.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().flatten(0, 1)))
    decoder(ids)
    handle.remove()
    assert metrics["rank/resid/01"] == pytest.approx(probes.effective_rank(seen[0] - seen[0].mean(0)), rel=1e-5)
    assert 0.9 < metrics["entropy/00/00"] <= 1  # near uniform at the start
