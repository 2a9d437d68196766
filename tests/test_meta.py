"""Gradients against an independent reference: a deep copy, an SGD loop on it, and a backward pass, first-
order MAML by the textbook.
"""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import UserError
from data import EpisodeBatch, JointBatch, LMBatch
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
    return Learner(decoder, Head(24, layers, 16, start, N, generator), adapted, **options)


def batch(E=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randint(0, 50, (E, N, n, T), generator=generator) for n in (K, Q)]
    targets = torch.randint(0, 50, (E, N, Q, T), generator=generator)
    return EpisodeBatch(*windows, torch.zeros(E, N, dtype=torch.long), targets)


def outer_grads(module, data):
    module.zero_grad()
    losses, metrics = module("episodes", data)
    loss = sum(losses.values())
    loss.backward()
    return (
        loss.item(),
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None},
        metrics,
    )


class Net(nn.Module):
    """Decoder and head as an ordinary network, for the reference."""

    def __init__(self, module):
        super().__init__()
        self.model = copy.deepcopy(module.decoder.model)
        head, layers = module.head, []
        for layer in head.layers:
            layers += [copy.deepcopy(layer), nn.ReLU()]
        self.out = nn.Linear(head.features, N) if head.out is None else copy.deepcopy(head.out)
        if head.out is None:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)
        self.head = nn.Sequential(*layers, self.out)

    def forward(self, windows):
        return self.head(self.model(windows)[:, -1])


def reference(module, data, moves):
    """(mean query loss, {Learner's name: gradient}) of first-order MAML, episode by episode; moves(net):
    what the inner loop adapts.
    """
    losses, grads = [], {}
    for support, query in zip(data.support, data.query):
        net = Net(module).to(module.decoder.lm_head.weight.dtype)
        sgd = torch.optim.SGD(moves(net), lr=module.inner_lr)
        for _ in range(module.inner_steps):
            net.zero_grad()
            F.cross_entropy(net(support.flatten(0, 1)), torch.arange(N).repeat_interleave(K)).backward()
            sgd.step()
        net.zero_grad()
        loss = F.cross_entropy(net(query.flatten(0, 1)), torch.arange(N).repeat_interleave(Q))
        loss.backward()
        losses.append(loss.item())
        named = {f"decoder.model.{name}": p.grad for name, p in net.model.named_parameters()}
        for i, layer in enumerate(net.head[:-1:2]):
            named |= {f"head.layers.{i}.weight": layer.weight.grad, f"head.layers.{i}.bias": layer.bias.grad}
        if module.head.out is not None:
            named |= {"head.out.weight": net.out.weight.grad, "head.out.bias": net.out.bias.grad}
        for name, grad in named.items():
            grads[name] = grads.get(name, 0) + grad / len(data.support)
    return sum(losses) / len(losses), grads


@pytest.mark.parametrize(
    "adapted, moves",
    [
        ("head", lambda net: net.head.parameters()),
        ("all", lambda net: net.parameters()),
        (r"layers\.1\.mlp|head", lambda net: [*net.model.layers[1].mlp.parameters(), *net.head.parameters()]),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_outer_gradients_equal_the_reference(adapted, moves, steps, start):
    """To 1e-6 of the largest gradient; two episodes, whose gradients must average."""
    module, data = learner(adapted, start=start, inner_steps=steps).double(), batch(2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    loss, grads, _ = outer_grads(module, data)
    expected, named = reference(module, data, moves)
    assert loss == pytest.approx(expected, abs=1e-9)
    assert grads.keys() == named.keys() and not any("lm_head" in name for name in grads)
    scale = max(grad.abs().max() for grad in named.values())
    for name, grad in named.items():
        assert (grads[name] - grad).abs().max() <= 1e-6 * scale + 1e-14, (
            name
        )  # without steps, a symmetric start has no gradient
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters()), (
        "the inner loop moved the meta-parameters"
    )


@pytest.mark.parametrize("adapted", ["head", "all"])
def test_outer_gradients_in_float32(adapted):
    module, data = learner(adapted), batch(2)
    _, grads, _ = outer_grads(module, data)
    _, named = reference(
        module, data, lambda net: net.head.parameters() if adapted == "head" else net.parameters()
    )
    scale = max(grad.abs().max() for grad in named.values())
    assert max((grads[name] - named[name]).abs().max() for name in named) < 1e-5 * scale


@pytest.mark.parametrize(
    "adapted, start", [("head", "random"), ("head", "zero"), ("all", "zero"), (r"o_proj|head", "random")]
)
def test_second_order_passes_gradcheck(adapted, start):
    """The gradient of the query loss through two inner steps, against finite differences in float64."""
    module, data = learner(adapted, 2, start, inner_steps=2, first_order=False).double(), batch()
    names = [
        name
        for name, _ in module.named_parameters()
        if name.startswith("head") or "layers.1.self_attn.o_proj" in name or "norm" in name
    ]
    params = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *p: torch.func.functional_call(module, dict(zip(names, p)), ("episodes", data))[0]["meta"],
        params,
        fast_mode=True,
    )
    first = learner(adapted, 2, start, inner_steps=2).double()
    a, b = (outer_grads(m, data)[1]["decoder.model.norm.weight"] for m in (module, first))
    assert (a - b).abs().max() > 1e-3 * b.abs().max(), "second order must differ from first"


def test_gradients_accumulate_and_the_support_leaves_none_behind():
    """Public code let an inner zero_grad wipe accumulated gradients, and support gradients stay in .grad."""
    module = learner("all")
    (_, a, _), (_, b, _) = outer_grads(module, batch(seed=1)), outer_grads(module, batch(seed=2))
    module.zero_grad()
    for seed in (1, 2):
        module("episodes", batch(seed=seed))[0]["meta"].backward()
    for name in a:
        assert torch.allclose(module.get_parameter(name).grad, a[name] + b[name], rtol=1e-4, atol=1e-6), name
    module.zero_grad()
    module("episodes", batch())
    assert all(p.grad is None for p in module.parameters())


def test_a_class_symmetric_start_does_not_care_for_the_order_of_the_labels():
    data, order = batch(2), torch.tensor([3, 0, 4, 1, 2])
    for start, same in (("zero", True), ("random", False)):
        module = learner(start=start)
        other = EpisodeBatch(data.support[:, order], data.query[:, order], data.words, data.targets)
        a, b = module("episodes", data)[0]["meta"], module("episodes", other)[0]["meta"]
        assert torch.allclose(a, b, atol=1e-5) == same, start


def test_a_class_symmetric_start_takes_any_number_of_ways():
    data = EpisodeBatch(*(windows[:, :3] for windows in batch(2)))
    assert learner(start="zero")("episodes", data)[0]["meta"].isfinite()
    with pytest.raises(ValueError, match="has 5 outputs, the episode 3 ways"):
        learner(start="random")("episodes", data)


def test_adaptation_shows_in_the_metrics():
    """Windows whose token before the mask tells the class: learned from the support, unknown before."""
    data = batch(4)
    for windows in (data.support, data.query):
        windows[..., -1] = torch.arange(N)[:, None]
    loss, _, metrics = outer_grads(learner(layers=1, start="zero", inner_steps=20, inner_lr=1.0), data)
    assert metrics["meta/support_acc"] > 0.9 and metrics["meta/query_acc"] > 0.9 and loss < 1
    assert metrics["meta/query_acc_unadapted"].item() == pytest.approx(1 / N), (
        "zero outputs: every class alike"
    )
    assert metrics["meta/query_loss"].item() == pytest.approx(loss)


def test_adapt_is_plain_sgd():
    """A quadratic: x_k = c + (1 - a)^k (x_0 - c)."""
    x, c = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0, 5.0])
    with torch.no_grad():  # an evaluation adapts as well
        fast = adapt(lambda params: 0.5 * ((params["x"] - c) ** 2).sum(), {"x": x}, steps=4, lr=0.1)
    assert torch.allclose(fast["x"], c + 0.9**4 * (x - c)) and x.tolist() == [1, -2] and x.grad is None
    second = adapt(
        lambda params: 0.5 * ((params["x"] - c) ** 2).sum(), {"x": x}, steps=4, lr=0.1, first_order=False
    )
    assert torch.allclose(torch.autograd.grad(second["x"].sum(), x)[0], torch.full((2,), 0.9**4))


def test_bfloat16_autocast_reads_the_fast_weights():
    """One autocast region around the inner loop reads the stale bfloat16 copies of the first weights; then
    more steps change nothing.
    """

    def loss_after(steps, dtype):
        module = learner("all", inner_steps=steps, inner_lr=1.0, dtype=dtype)
        return module("episodes", batch())[0]["meta"].item()

    losses, exact = ([loss_after(n, dtype) for n in (0, 1, 3)] for dtype in (torch.bfloat16, torch.float32))
    assert (
        losses == pytest.approx(exact, rel=0.1)
        and min(abs(a - b) for a, b in itertools.combinations(exact, 2)) > 0.1
    )


def test_a_pattern_that_leaves_out_an_output_layer_of_zeros_is_refused():
    """Its logits stay zero: nothing would be learned, in silence."""
    with pytest.raises(UserError, match=r"leaves out head.out, which starts at zero"):
        learner(r"layers\.1")
    learner(r"layers\.1", start="random")


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="adapt = 'hed' matches no parameter; names look like model.layers"):
        learner("hed")


def counted(run):
    """FLOPs of run() by PyTorch's counter, without its record per module, which cannot stand an inner
    autograd.grad.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = type(
        "NoTracker",
        (),
        {"parents": {"Global"}, "__enter__": lambda self: self, "__exit__": lambda self, *args: None},
    )()
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not in its table
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("adapted, layers", [("head", 1), ("head", 3), ("all", 2)])
def test_counted_flops_equal_those_of_the_flop_counter(adapted, layers):
    module, data = learner(adapted, layers, inner_steps=4), batch(2)
    assert module.flops("episodes", data) == pytest.approx(
        counted(lambda: module("episodes", data)[0]["meta"].backward()), rel=0.02
    )
    ids = torch.randint(0, 50, (3, 16))
    assert module.flops("lm", LMBatch(ids, ids)) == pytest.approx(
        counted(lambda: F.cross_entropy(module.decoder(ids).flatten(0, 1), ids.flatten()).backward()),
        rel=0.02,
    )


def test_a_learned_inner_rate_has_a_gradient_or_says_that_it_has_none():
    """In first order the inner loop's graph is cut: a learned rate stayed as it was, without a word."""
    x, rate = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor(0.1, requires_grad=True)

    def quadratic(params):
        return 0.5 * (params["x"] ** 2).sum()

    for lr in (rate, {"x": rate}):
        with pytest.raises(UserError, match="a learned inner rate gets no gradient in first-order MAML"):
            adapt(quadratic, {"x": x}, 2, lr)
        fast = adapt(quadratic, {"x": x}, 2, lr, first_order=False)["x"]  # (1 - rate)^2 x
        slope = torch.autograd.grad(fast.sum(), rate)[0]
        assert slope.item() == pytest.approx(-2 * 0.9 * x.sum().item())
    rates = {"x": torch.tensor([0.1, 0.5])}
    assert torch.allclose(adapt(quadratic, {"x": x}, 1, rates)["x"], torch.tensor([0.9, -1.0]))


# ---- episodes at positions of an LM batch; the LM loss of query windows ----


def joint_batch(E=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(0, 50, (2, 6, 16), generator=generator)
    places = [torch.randperm(96, generator=generator)[: N * (K + Q)] for _ in range(E)]
    places = torch.stack(places).view(E, N, K + Q)
    return JointBatch(ids, targets, places[:, :, :K], places[:, :, K:], torch.zeros(E, N, dtype=torch.long))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_joint_gradients_equal_the_reference(layers, steps):
    """LM loss + 0.3 x query loss; a copy of the backbone reads the support: nothing goes back through it."""
    module, data = learner(layers=layers, inner_steps=steps).double(), joint_batch()
    losses, metrics = module("joint", data)
    (losses["lm"] + 0.3 * losses["meta"]).backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    expected = {}
    for support, query in zip(data.support, data.query):
        net = Net(module).double()
        x = copy.deepcopy(net.model)(data.ids).flatten(0, 1).detach()
        sgd = torch.optim.SGD(net.head.parameters(), lr=module.inner_lr)
        for _ in range(steps):
            net.zero_grad()
            F.cross_entropy(net.head(x[support.flatten()]), torch.arange(N).repeat_interleave(K)).backward()
            sgd.step()
        net.zero_grad()
        hidden = net.model(data.ids)
        logits = hidden @ module.decoder.lm_head.weight.detach().mT
        lm = F.cross_entropy(logits.flatten(0, 1), data.targets.flatten())
        query_features = hidden.flatten(0, 1)[query.flatten()]
        meta = F.cross_entropy(net.head(query_features), torch.arange(N).repeat_interleave(Q))
        ((lm + 0.3 * meta) / len(data.support)).backward()
        named = {f"decoder.model.{name}": p.grad for name, p in net.model.named_parameters()}
        for i, layer in enumerate(net.head[:-1:2]):
            named |= {f"head.layers.{i}.weight": layer.weight.grad, f"head.layers.{i}.bias": layer.bias.grad}
        for name, grad in named.items():
            expected[name] = expected.get(name, 0) + grad
    scale = max(grad.abs().max() for grad in expected.values())
    assert ours.keys() - expected.keys() == {"decoder.lm_head.weight"}
    for name, grad in expected.items():
        assert (ours[name] - grad).abs().max() <= 1e-6 * scale, name
    assert metrics["train/loss"] == losses["lm"] and metrics["meta/ways"] == N


@pytest.mark.parametrize("layers", [1, 2])
def test_joint_episodes_in_second_order_pass_gradcheck(layers):
    """The support lies in the pass that has a gradient anyway; through two inner steps, in float64."""
    module = learner(layers=layers, inner_steps=2, first_order=False).double()
    data, names = joint_batch(), ["decoder.model.norm.weight", "decoder.model.layers.0.mlp.up_proj.weight"]
    params = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *p: torch.func.functional_call(module, dict(zip(names, p)), ("joint", data))[0]["meta"],
        params,
        fast_mode=True,
    )


def test_the_lm_loss_of_query_windows_adds_to_what_the_episodes_give():
    """The query loss and its gradient as without it, plus those of a plain LM loss on the query windows."""
    with_lm, plain, data = learner(query_lm=True).double(), learner().double(), batch(2)
    losses, metrics = with_lm("episodes", data)
    assert losses["meta"].item() == pytest.approx(plain("episodes", data)[0]["meta"].item(), abs=1e-9)
    ids, targets = data.query.flatten(0, 2), data.targets.flatten(0, 2)
    lm = F.cross_entropy(plain.decoder(ids).flatten(0, 1), targets.flatten())
    assert losses["lm"].item() == pytest.approx(lm.item(), abs=1e-9) == metrics["train/query_lm_loss"].item()
    _, ours, _ = outer_grads(with_lm, data)
    plain.zero_grad()
    lm = F.cross_entropy(plain.decoder(ids).flatten(0, 1), targets.flatten())
    (plain("episodes", data)[0]["meta"] + lm).backward()
    for name, p in plain.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-9), name


def test_counted_flops_of_the_variants_equal_those_of_the_flop_counter():
    module, data = learner(inner_steps=4), joint_batch()
    more = counted(lambda: sum(module("joint", data)[0].values()).backward())
    more -= counted(lambda: module("lm", data)[0]["lm"].backward())
    assert module.flops("joint", data) - module.flops("lm", data) == pytest.approx(more, rel=0.02)
    module, data = learner(inner_steps=4, query_lm=True), batch(2)
    assert module.flops("episodes", data) == pytest.approx(
        counted(lambda: sum(module("episodes", data)[0].values()).backward()), rel=0.03
    )
