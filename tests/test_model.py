import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import config
import train
from model import Decoder, KeyValueCache, ModelConfig, rotate

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ModelConfig(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=211, context=64)


def sharp(cfg):
    """A decoder with weights large enough that attention is far from uniform."""
    decoder = Decoder(cfg, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    return decoder


@pytest.mark.parametrize(
    "name, count", [("11m", 11_282_784), ("65m", 64_595_328), ("181m", 181_095_168), ("570m", 569_808_384)]
)
def test_parameter_counts(name, count):
    """The closed form, independent of the modules, and the paper's round figures."""
    cfg = config.load(train.Config, [str(CONFIGS / f"{name}.py")])
    with torch.device("meta"):
        decoder = Decoder(cfg)
    d, kv = cfg.d_model, cfg.d_model // 3
    assert (
        sum(p.numel() for p in decoder.parameters())
        == count
        == 2 * 50304 * d + 12 * (2 * d * d + 2 * d * kv + 12 * d * d + 2 * d) + d
    )
    assert round(count / 1e6) == int(name[:-1])


def test_causality():
    decoder, ids = sharp(SMALL), torch.randint(0, 211, (2, 40))
    other = ids.clone()
    other[:, 25:] = torch.randint(0, 211, (2, 15))
    a, b = decoder(ids), decoder(other)
    assert torch.equal(a[:, :25], b[:, :25]) and not torch.allclose(a[:, 25:], b[:, 25:])


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = Decoder(SMALL).double().model.positions(64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 64, 8)
    scores = rotate(q, cos, sin)[0, 0] @ rotate(k, cos, sin)[0, 0].mT  # (64, 64)
    for distance in (0, 1, 7, 40):
        line = scores.diagonal(-distance)
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-5)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1e-2


def test_attention_equals_the_naive_one_with_repeated_keys_and_values():
    attention, T = sharp(SMALL).model.layers[0].self_attn, 33
    cos, sin = Decoder(SMALL).model.positions(T)
    x = torch.randn(2, T, 48)
    q, k, v = attention.qkv(x, cos, sin)
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    naive = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, 48))
    assert (attention(x, cos, sin) - naive).abs().max() < 1e-4 * naive.abs().max()


def test_grouped_query_equals_a_model_whose_keys_and_values_are_repeated():
    decoder, full = sharp(SMALL), Decoder(replace(SMALL, n_kv_heads=6))
    state = decoder.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = torch.randint(0, 211, (2, 20))
    assert torch.allclose(decoder(ids), full(ids), atol=1e-4)


def test_loss_at_init_is_near_log_v_and_equals_the_plain_cross_entropy():
    """More positions than one chunk of the loss, so that chunks must add up; gradients too."""
    cfg = replace(SMALL, vocab_size=1000)
    ids, targets = torch.randint(0, 1000, (2, 40, 64))
    assert abs(Decoder(cfg)(ids, targets).item() - math.log(1000)) < 0.1
    decoder = sharp(cfg)
    loss = decoder(ids, targets)
    plain = F.cross_entropy(decoder(ids).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - plain.item()) < 1e-5 * plain.item()
    for a, b in zip(
        torch.autograd.grad(loss, decoder.parameters()), torch.autograd.grad(plain, decoder.parameters())
    ):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_in_bfloat16_is_that_of_bfloat16_logits_in_float32(compiled, monkeypatch):
    """F.linear_cross_entropy in chunks stays in float32 under autocast; in bfloat16 it gives a loss of 3
    digits.
    """
    decoder = sharp(replace(SMALL, vocab_size=1000))
    if compiled:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        decoder.compile()
    ids, targets = torch.randint(0, 1000, (2, 6, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(ids, targets)
        plain = F.cross_entropy(decoder(ids).float().flatten(0, 1), targets.flatten())
    assert loss.dtype == torch.float32 and abs(loss.item() - plain.item()) < 1e-5 * plain.item()
    exact = decoder(ids, targets)
    assert loss.item() != exact.item()
    for a, b, c in zip(*(torch.autograd.grad(x, decoder.parameters()) for x in (loss, plain, exact))):
        assert a.dtype == torch.float32 and torch.linalg.norm(a - c) < 1.2 * torch.linalg.norm(
            b - c
        ) + 1e-4 * torch.linalg.norm(c)


@pytest.mark.parametrize("length, dtype", [(64, torch.float32), (300, torch.bfloat16)])
def test_short_attention_in_bfloat16_runs_the_float32_kernel_on_a_cpu(length, dtype, monkeypatch):
    """The demo spent a third of its time in the bfloat16 kernel's backward pass, slow on short sequences."""
    seen, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    decoder, ids = sharp(replace(SMALL, context=300)), torch.randint(0, 211, (2, length))
    exact = torch.autograd.grad(decoder(ids, ids), decoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(ids, ids)
    assert set(seen[3:]) == {(dtype, dtype == torch.bfloat16)}  # autocast would cast the inputs back
    for a, b in zip(torch.autograd.grad(loss, decoder.parameters()), exact):
        assert a.dtype == torch.float32 and torch.linalg.norm(a - b) < 0.1 * torch.linalg.norm(b)


def test_logits_equal_transformers_with_the_same_state_dict():
    transformers = pytest.importorskip("transformers", reason="comes with requirements-dev.txt")
    decoder = sharp(replace(SMALL, rope_theta=500.0, norm_eps=1e-5))
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=211,
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    hf.load_state_dict(decoder.state_dict(), strict=True)
    ids = torch.randint(0, 211, (3, 64))
    with torch.no_grad():
        ours, theirs = decoder(ids), hf(ids).logits
    assert theirs.std() > 0.5 and (ours - theirs).abs().max() < 1e-4


def test_generate():
    decoder, ids = sharp(SMALL), torch.randint(0, 211, (2, 60))
    greedy = decoder.generate(ids, 10, temperature=0)  # runs past context = 64
    assert greedy.shape == (2, 70) and torch.equal(greedy[:, :60], ids)
    assert torch.equal(greedy[:, 60], decoder(ids)[:, -1].argmax(-1)) and torch.equal(
        greedy, decoder.generate(ids, 10, top_k=1)
    )
    a, b = (decoder.generate(ids, 10, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def uncached(decoder, ids, n, temperature, top_k, seed):
    """What `generate` should give: all logits of the last `context` tokens, anew for each token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        logits = decoder(ids[:, -decoder.cfg.context :])[:, -1]
        if temperature == 0:
            new = logits.argmax(-1)[:, None]
        else:
            for row in logits if top_k else []:
                row[row < row.sort().values[-top_k]] = -math.inf
            new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        ids = torch.cat((ids, new), 1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
@pytest.mark.parametrize("T, n", [(1, 40), (20, 60), (64, 3), (90, 5)])
def test_generate_with_cached_keys_and_values_is_as_without(T, n, temperature, top_k):
    """From one token, up to the context of 64, past it, and from a longer prompt."""
    decoder, ids = sharp(SMALL).double(), torch.randint(0, 211, (3, T))
    made = decoder.generate(ids, n, temperature, top_k, torch.Generator().manual_seed(5))
    assert torch.equal(made, uncached(decoder, ids, n, temperature, top_k, 5))


def test_within_the_context_each_token_is_read_once():
    decoder, read = sharp(SMALL), []
    hook = decoder.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    decoder.generate(torch.zeros(2, 50, dtype=torch.long), 18)
    hook.remove()
    assert read == [50, *[1] * 14, 64, 64, 64]


@torch.no_grad()
def test_cached_features_are_those_of_the_whole_sequence():
    decoder, ids = sharp(SMALL).double(), torch.randint(0, 211, (2, 30))
    caches = [KeyValueCache(30) for _ in decoder.model.layers]
    parts = [decoder.hidden(ids[:, :20], caches=caches)]
    parts += [decoder.hidden(ids[:, i : i + 1], caches=caches) for i in range(20, 30)]
    assert torch.allclose(torch.cat(parts, 1), decoder.hidden(ids), atol=1e-10)
    with pytest.raises(ValueError, match="2 positions given after 30 in the cache"):
        decoder.hidden(ids[:, :2], caches=caches)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_position_alone_is_as_among_all(layers):
    """The features, and every gradient of a loss that reads nothing else."""
    decoder = sharp(replace(SMALL, n_layers=layers)).double()
    ids, params = torch.randint(0, 211, (5, 30)), list(decoder.model.parameters())
    alone, among = decoder.hidden(ids, last=True), decoder.hidden(ids)[:, -1:]
    assert alone.shape == (5, 1, 48) and torch.allclose(alone, among, atol=1e-12)
    way = torch.randn_like(alone)
    for a, b in zip(
        torch.autograd.grad((alone * way).sum(), params), torch.autograd.grad((among * way).sum(), params)
    ):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_more_positions_than_context_are_refused():
    with pytest.raises(ValueError, match="65 positions given, the model reads at most context = 64"):
        Decoder(SMALL)(torch.zeros(1, 65, dtype=torch.long))
