"""meta.py against a reference, first-order MAML by the textbook: a deep copy, an SGD loop on it, backward."""
import copy
import itertools
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import refuses
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import EpisodeBatch, LMBatch
from meta import Head, Learner, adapt
from model import Decoder, ModelConfig

CFG = ModelConfig(d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, context=16)
N, K, Q, T = 5, 3, 2, 12


def learner(adapted="head", layers=2, start="zero", **options):
    generator = torch.Generator().manual_seed(1)
    decoder = Decoder(CFG, generator)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(4 if p.dim() == 2 else 1)  # features that differ
    options = {"inner_steps": 3, "inner_lr": 0.3} | options
    head = Head(24, layers, 16, start, N, generator)
    return Learner(decoder=decoder, head=head, adapted=adapted, **options)


def batch(E=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randint(0, 50, (E, N, n, T), generator=generator) for n in (K, Q)]
    return EpisodeBatch(*windows, torch.zeros(E, N, dtype=torch.long))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def outer_grads(module, data):
    """(query loss, {name: gradient}, metrics)."""
    module.zero_grad()
    losses, metrics = module("episodes", data)
    losses["meta"].backward()
    return losses["meta"].item(), gradients(module), metrics


def reference(module, data, moves):
    """(mean query loss, {name: gradient}) of first-order MAML, episode by episode. moves: a pattern of the
    names of parameters that the inner loop adapts.
    """
    losses, grads = [], dict.fromkeys((name for name, _ in module.named_parameters() if "lm" not in name), 0)
    for support, query in zip(data.support, data.query):
        net = copy.deepcopy(module)
        if net.head.out is None:
            net.head.out = nn.Linear(net.head.features, N, dtype=torch.float64)
            nn.init.zeros_(net.head.out.weight), nn.init.zeros_(net.head.out.bias)

        def loss(windows, net=net):
            x = net.decoder.model(windows.flatten(0, 1))[:, -1]
            for layer in net.head.layers:
                x = layer(x).relu()
            return F.cross_entropy(net.head.out(x), torch.arange(N).repeat_interleave(windows.shape[1]))

        sgd = torch.optim.SGD([p for name, p in net.named_parameters() if re.search(moves, name)],
                              lr=module.inner_lr)
        for _ in range(module.inner_steps):
            net.zero_grad()
            loss(support).backward()
            sgd.step()
        net.zero_grad()
        losses.append(loss(query))
        losses[-1].backward()
        for name in grads:
            grads[name] += net.get_parameter(name).grad / len(data.support)
    return sum(losses).item() / len(losses), grads


@pytest.mark.parametrize("adapted, moves", [
    ("head", "^head"), ("all", ""), (r"layers\.1\.mlp|head", r"layers\.1\.mlp|^head"),
])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_outer_gradients_equal_the_reference(adapted, moves, steps, start):
    """To 1e-6 of the largest gradient; two episodes, whose gradients must average."""
    module, data = learner(adapted, start=start, inner_steps=steps).double(), batch(2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    loss, grads, metrics = outer_grads(module, data)
    expected, named = reference(module, data, moves)
    assert loss == pytest.approx(expected, abs=1e-9) and metrics["meta/ways"] == N
    assert grads.keys() == named.keys()
    scale = max(grad.abs().max() for grad in named.values())
    for name, grad in named.items():  # without steps, a symmetric start has no gradient
        assert (grads[name] - grad).abs().max() <= 1e-6 * scale + 1e-14, name
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), f"the inner loop moved {name}"


@pytest.mark.parametrize("adapted, start", [
    ("head", "random"), ("head", "zero"), ("all", "zero"), (r"o_proj|head", "random"),
])
def test_second_order_passes_gradcheck(adapted, start):
    """The gradient of the query loss through two inner steps, against finite differences in float64."""
    module, data = learner(adapted, 2, start, inner_steps=2, first_order=False).double(), batch()
    names = [name for name, _ in module.named_parameters()
             if name.startswith("head") or "layers.1.self_attn.o_proj" in name or "norm" in name]
    params = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def loss(*params):
        return torch.func.functional_call(module, dict(zip(names, params)), ("episodes", data))[0]["meta"]

    assert torch.autograd.gradcheck(loss, params, fast_mode=True)
    first = learner(adapted, 2, start, inner_steps=2).double()
    a, b = (outer_grads(m, data)[1]["decoder.model.norm.weight"] for m in (module, first))
    assert (a - b).abs().max() > 1e-3 * b.abs().max(), "second order must differ from first"


def test_gradients_accumulate_and_the_support_leaves_none_behind():
    """Public code let an inner zero_grad wipe accumulated gradients, and support gradients stay in .grad."""
    module = learner("all")
    a, b = (outer_grads(module, batch(seed=seed))[1] for seed in (1, 2))
    module.zero_grad()
    for seed in (1, 2):
        module("episodes", batch(seed=seed))[0]["meta"].backward()
    both = gradients(module)
    for name in a:
        assert torch.allclose(both[name], a[name] + b[name], rtol=1e-4, atol=1e-6), name
    module.zero_grad()
    module("episodes", batch())
    assert not gradients(module)


def test_a_class_symmetric_start_takes_labels_in_any_order_and_any_number_of_ways():
    data, order = batch(2), torch.tensor([3, 0, 4, 1, 2])
    other, fewer = (EpisodeBatch(*(part[:, chosen] for part in data)) for chosen in (order, order[:3]))
    for start in ("zero", "random"):
        module = learner(start=start)
        a, b = module("episodes", data)[0]["meta"], module("episodes", other)[0]["meta"]
        assert torch.allclose(a, b, atol=1e-5) == (start == "zero")
    with pytest.raises(ValueError, match="has 5 outputs, the episode 3 ways"):
        module("episodes", fewer)
    losses, metrics = learner(start="zero")("episodes", fewer)
    assert losses["meta"].isfinite() and metrics["meta/ways"] == 3


def test_adaptation_shows_in_the_metrics():
    """Windows whose token before the mask tells the class: learned from the support, unknown before."""
    data = batch(4)
    for windows in (data.support, data.query):
        windows[..., -1] = torch.arange(N)[:, None]
    loss, _, metrics = outer_grads(learner(layers=1, start="zero", inner_steps=20, inner_lr=1.0), data)
    assert metrics["meta/support_acc"] > 0.9 and metrics["meta/query_acc"] > 0.9 and loss < 1
    chance = metrics["meta/query_acc_unadapted"].item()
    assert chance == pytest.approx(1 / N), "zero outputs: every class alike"
    assert metrics["meta/query_loss"].item() == pytest.approx(loss)
    assert not any(value.requires_grad for value in metrics.values())


def quadratic(params):
    """Gradient descent at rate a gives x_k = 3 + (1 - a)^k (x_0 - 3)."""
    return 0.5 * ((params["x"] - 3) ** 2).sum()


def test_adapt_is_plain_sgd():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    with torch.no_grad():  # an evaluation adapts as well
        fast = adapt(quadratic, {"x": x}, steps=4, lr=0.1)["x"]
    assert torch.allclose(fast, 3 + 0.9**4 * (x - 3)) and x.tolist() == [1, -2] and x.grad is None
    second = adapt(quadratic, {"x": x}, steps=4, lr=0.1, first_order=False)["x"]
    assert torch.allclose(torch.autograd.grad(second.sum(), x)[0], torch.full((2,), 0.9**4))
    fast = adapt(quadratic, {"x": x}, 1, {"x": torch.tensor([0.1, 0.5])})["x"]
    assert torch.allclose(fast, torch.tensor([1.2, 0.5])), "a rate for each number"


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_adapt_adapts_wherever_it_is_called(first_order, start):
    """Second order under no_grad failed for a head with parameters of its own."""
    torch.manual_seed(1)
    decoder, head = Decoder(CFG), Head(CFG.d_model, 2, 8, start, 3)
    learner = Learner(decoder=decoder, head=head, inner_steps=3, first_order=first_order)
    x, query = torch.randn(2, 6, CFG.d_model), torch.randn(2, 3, CFG.d_model)
    with torch.no_grad():
        without = learner.adapt_heads(x, query, 3)
    for a, b in zip(without, learner.adapt_heads(x, query, 3)):
        assert torch.equal(a, b) and not a.requires_grad


def test_a_learned_inner_rate_has_a_gradient_or_says_that_it_has_none():
    """In first order the inner loop's graph is cut: a learned rate stayed as it was, without a word."""
    x, rate = torch.tensor([1.0, -2.0]), torch.tensor(0.1, requires_grad=True)
    for lr in (rate, {"x": rate}):
        refuses(lambda: adapt(quadratic, {"x": x}, 2, lr), "no gradient in first-order MAML")  # noqa: B023
        fast = adapt(quadratic, {"x": x}, 2, lr, first_order=False)["x"]
        slope = torch.autograd.grad(fast.sum(), rate)[0].item()
        assert slope == pytest.approx(-2 * 0.9 * (x - 3).sum().item())


def test_bfloat16_autocast_reads_the_fast_weights():
    """One autocast region around the inner loop reads the stale bfloat16 copies of the first weights; then
    more steps change nothing.
    """
    def loss_after(steps, dtype):
        module = learner("all", inner_steps=steps, inner_lr=1.0, dtype=dtype)
        return module("episodes", batch())[0]["meta"].item()

    losses, exact = ([loss_after(n, dtype) for n in (0, 1, 3)] for dtype in (torch.bfloat16, torch.float32))
    assert losses == pytest.approx(exact, rel=0.1)
    assert min(abs(a - b) for a, b in itertools.combinations(exact, 2)) > 0.1


def test_a_pattern_that_adapts_nothing_is_refused():
    """Where head.out, which starts at zero, does not adapt, the logits stay zero."""
    refuses(lambda: learner("hed"), "adapt = 'hed' matches no parameter; names look like model.layers")
    refuses(lambda: learner(r"layers\.1"), "leaves out head.out, which starts at zero")
    learner(r"layers\.1", start="random")


def counted(run):
    """FLOPs by PyTorch's counter, without its record per module, which an inner autograd.grad breaks."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = type("NoTracker", (), {
        "parents": {"Global"}, "__enter__": lambda self: self, "__exit__": lambda self, *args: None})()
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not in its table
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("adapted, layers", [("head", 1), ("head", 3), ("all", 2)])
def test_flops_equal_those_of_the_flop_counter(adapted, layers):
    module, data = learner(adapted, layers, "random", inner_steps=4), batch(2)
    assert module.flops("episodes", data) == counted(lambda: module("episodes", data)[0]["meta"].backward())
    ids = torch.randint(0, 50, (3, 16))
    expected = counted(lambda: F.cross_entropy(module.decoder(ids).flatten(0, 1), ids.flatten()).backward())
    assert module.flops("lm", LMBatch(ids, ids)) == expected
