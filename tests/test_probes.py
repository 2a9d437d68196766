"""probes.py against brute force, at sizes where it could be wrong."""

import json
import math
import shutil
import threading
from concurrent.futures import Future
from contextlib import closing

import pytest
import torch
from conftest import TOY, TOY_VOCAB, last_of_each, refuses

import checkpoint
import data
import probes
import train
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
                p = (q[b, h, t].double() @ k[b, h // 2, : t + 1].double().T / math.sqrt(C)).softmax(-1)
                entropy = -(p * p.log()).sum()
                nats[h] += entropy / (B * T)
                normalised[h] += entropy / math.log(t + 1) / (B * (T - 1)) if t else 0
    ours = probes.attention_entropy(q, k).double()
    assert torch.allclose(ours[0], nats, rtol=1e-5) and torch.allclose(ours[1], normalised, rtol=1e-5)
    assert nats.max() < 0.8 * math.log(T / 2)  # far from uniform, where everything is right


def test_attention_entropy_of_uniform_attention():
    entropy = probes.attention_entropy(torch.zeros(1, 2, 300, 4), torch.randn(1, 1, 300, 4))
    assert torch.allclose(entropy[1], torch.ones(2)) and entropy[0, 0].item() == pytest.approx(
        math.lgamma(301) / 300, rel=1e-5
    )
    assert torch.equal(
        probes.attention_entropy(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)), torch.zeros(2, 2)
    )


def test_measure_sees_what_the_model_computes_and_leaves_no_trace():
    decoder, ids = Decoder(CFG).train(), torch.randint(0, 211, (4, 64))
    decoder(ids, ids).backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in decoder.named_parameters()}
    rng, logits = torch.get_rng_state(), decoder(ids)
    metrics = probes.measure(decoder, ids)
    assert torch.equal(torch.get_rng_state(), rng) and decoder.training and torch.equal(decoder(ids), logits)
    for name, p in decoder.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1]) and p.requires_grad
    assert sorted(metrics) == sorted(
        [f"rank/{w}/{i:02d}" for w in ("v_proj", "o_proj", "down_proj", "resid") for i in range(2)]
        + [
            f"{kind}/{i:02d}/{h:02d}"
            for kind in ("entropy", "entropy_nats")
            for i in range(2)
            for h in range(6)
        ]
    )
    seen = []
    handle = decoder.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output.detach().flatten(0, 1))
    )
    decoder(ids)
    handle.remove()
    assert metrics["rank/resid/01"] == pytest.approx(
        probes.effective_rank(seen[0] - seen[0].mean(0)), rel=1e-5
    )


def test_measured_entropies_are_those_of_the_attention_that_the_model_computes():
    """Against the weights of a plain softmax in the second layer, sharp enough that a missing rotation or
    norm shows.
    """
    decoder, ids = Decoder(CFG), torch.randint(0, 211, (4, 64))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(12) if p.dim() == 2 else p.add_(torch.randn(p.shape))
    inputs, layer = [], decoder.model.layers[1]
    handle = layer.self_attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    decoder(ids)
    handle.remove()
    attention, x = layer.self_attn, inputs[0]
    cos, sin = decoder.model.positions(64)
    q, k = (proj(x).reshape(4, 64, -1, 8).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))

    def turned(x):  # as complex numbers, independently of model.rotate
        z = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos[:, :4], sin[:, :4])
        return torch.cat((z.real, z.imag), -1)

    scores = turned(q) @ turned(k).repeat_interleave(3, dim=1).mT / math.sqrt(8)
    p = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)[..., 1:] / torch.arange(2, 65).log()
    metrics = probes.measure(decoder, ids)
    ours = torch.tensor([metrics[f"entropy/01/{head:02d}"] for head in range(6)])
    assert torch.allclose(ours, entropy.mean((0, 2)), rtol=1e-4) and ours.max() < 0.9


def test_probes_compile_nothing():
    """The probe batch has a shape of its own; called through the compiled layers it would be compiled, and
    count against their limit.
    """
    decoder, ids = Decoder(CFG), torch.randint(0, 211, (4, 64))
    for layer in decoder.model.layers:
        layer.compile(backend="eager", dynamic=False)
    decoder(ids[:2])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    probes.measure(decoder, ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0
    decoder(ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled, "the counter counts"


def test_a_model_that_blew_up_gives_nan_and_no_error():
    assert math.isnan(probes.effective_rank(torch.full((3, 3), math.inf)))


def test_gradient_ranks_are_those_of_the_gradients():
    decoder, ids = Decoder(CFG), torch.randint(0, 211, (4, 64))
    decoder(ids, ids).backward()
    ranks = probes.gradient_ranks(decoder)
    assert sorted(ranks) == sorted(
        f"rank/grad_{name}/{i:02d}" for name in ("v_proj", "o_proj", "down_proj") for i in range(2)
    )
    sigma = torch.linalg.svdvals(decoder.model.layers[1].mlp.down_proj.weight.grad.double())
    p = sigma / sigma.sum()
    assert ranks["rank/grad_down_proj/01"] == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-3)


# ---- the command ----


def test_the_command_measures_where_the_data_moved(toy, tmp_path, capsys):
    model = ModelConfig(d_model=24, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=TOY_VOCAB, context=32)
    decoder = Decoder(model, torch.Generator().manual_seed(1))
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    config = vars(model) | {"data": str(tmp_path / "gone")}
    checkpoint.save(run, {"step": 3, "tokens": 96, "model": decoder.state_dict(), "config": config}, keep=1)
    refuses(lambda: probes.main([str(run)]), f"no data at {tmp_path}/gone, where", "--data=FOLDER")
    shutil.copytree(toy, moved)
    probes.main([str(run), f"--data={moved}"])
    ids = probes.fixed_batch(data.open_corpus(toy)[1], 24, 32)
    expected = {"step": 3, "tokens": 96} | probes.measure(decoder, ids)
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)

    moved.rename(tmp_path / "gone")  # and without the flag where it is as before
    probes.main([str(run)])
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)


def test_bad_input_of_the_command_ends_with_one_clear_line(toy, tmp_path):
    model = ModelConfig(d_model=24, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300, context=32)
    state = {"step": 3, "tokens": 96, "model": Decoder(model).state_dict(), "config": vars(model)}
    checkpoint.save(tmp_path, state, keep=1)
    run = str(tmp_path)
    refuses(lambda: probes.main([run, f"--data={toy}"]), f"{toy} holds token id", "has 300: name data")
    refuses(lambda: probes.main([run, f"--data={run}/no"]), f"no data at {run}/no")
    refuses(lambda: probes.main([]), "name one run's folder, for instance out/demo; got none")
    refuses(lambda: probes.main([run, run]), f"got {run}, {run}")
    refuses(lambda: probes.main([run, "--dat=x"]), "unknown key 'dat' in the flags; did you mean 'data'?")
    refuses(lambda: probes.main([f"{run}/no"]), f"no checkpoint in {run}/no")


# ---- behind the training loop ----


def flags_of(toy, out_dir, *flags):
    return [*TOY, f"--data={toy}", f"--out_dir={out_dir}", "--max_steps=6", "--probe_every=2",
            "--keep=9", "--eval_every=0", "--probe_gradients", *(flags or ["--checkpoint_every=2"])]


def lines_of(out_dir):
    lines = map(json.loads, (out_dir / "probes.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_ranks_of_gram_matrices_are_those_of_the_matrices_bit_for_bit():
    torch.set_num_threads(1)  # with more threads LAPACK sums in another order
    decoder, ids = Decoder(CFG), torch.randint(0, 211, (4, 64))
    decoder(ids, ids).backward()
    expected = probes.measure(decoder, ids) | probes.gradient_ranks(decoder)
    for layer in decoder.model.layers:  # as before there were Gram matrices
        x = layer.mlp.down_proj.weight.detach().double()
        sigma = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0).sqrt()
        assert torch.special.entr(sigma / sigma.sum()).sum().exp().item() in expected.values()
    grams = probes.measure(decoder, ids, probes.gram) | probes.gradient_ranks(decoder, probes.gram)
    with closing(probes.Spectra(torch.device("cpu"))) as spectra:
        spectra.add({"step": 7, "tokens": 9} | grams)
        decoder.zero_grad(set_to_none=True)
        with torch.no_grad():
            decoder.model.layers[0].mlp.down_proj.weight.zero_()  # training goes on
        assert list(spectra.finished(7)) == [{"step": 7, "tokens": 9} | expected]
        assert list(spectra.finished(99)) == []
        spectra.add({"step": 8} | grams)
        for value in spectra.pending[0].values():
            if isinstance(value, Future):
                value.result()
        assert [line["step"] for line in spectra.finished()] == [8], "what is done is not waited for"


def test_training_goes_on_while_spectra_are_computed(toy, tmp_path, monkeypatch):
    """At 570M seven GPUs waited 10 to 60 s for the eigenvalues of each probe. Those of step 0 are held back
    here until step 2 wants to be probed, so a loop that waited for them would never end.
    """
    rank_of_gram, is_needed, steps = probes.rank_of_gram, threading.Event(), []

    def held_back(gram):
        assert is_needed.wait(60), "the loop waits for the spectra"
        return rank_of_gram(gram)

    def spy(name, line, append=train.logs.append):
        if "lr" in line:
            steps.append(line["step"])
            if line["step"] == 2:
                is_needed.set()
        append(name, line)

    monkeypatch.setattr(probes, "rank_of_gram", held_back)
    monkeypatch.setattr(train.logs, "append", spy)
    train.main(flags_of(toy, tmp_path))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 2, 4, 6]


def test_a_probe_lost_between_its_checkpoint_and_its_line_is_measured_again(toy, tmp_path):
    """Killed right after the checkpoint of step 4, whose probe is not on disk yet: the same lines, ranks of
    gradients too, none twice.
    """
    train.main(flags_of(toy, tmp_path))
    whole = lines_of(tmp_path)
    assert "rank/grad_o_proj/01" in whole[2] and "rank/grad_o_proj/01" not in whole[0]
    for lost in (2, 3):  # the line of step 4 is missing, or there already
        (tmp_path / "ckpt_000006.pt").unlink()
        kept = [json.dumps(line) + "\n" for line in whole[:lost]]
        (tmp_path / "probes.jsonl").write_text("".join(kept))
        train.main(flags_of(toy, tmp_path))
        assert lines_of(tmp_path) == whole
    train.main(flags_of(toy, tmp_path))  # finished
    assert lines_of(tmp_path) == whole


def test_the_last_probe_and_the_report_outlive_a_kill_after_the_last_checkpoint(toy, tmp_path):
    """They were lost for good where probe_every does not divide max_steps: the run counted as finished."""
    flags = last_of_each(*flags_of(toy, tmp_path), "--max_steps=5", "--report=True", "--eval_every=5")
    train.main(flags)
    whole = lines_of(tmp_path)
    assert [line["step"] for line in whole] == [0, 2, 4, 5]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]))
    (tmp_path / "report.md").unlink()
    train.main(flags)
    assert lines_of(tmp_path) == whole and (tmp_path / "report.md").exists()


def test_no_checkpoint_goes_past_a_probe_that_is_not_on_disk(toy, tmp_path, monkeypatch):
    """Else a kill after it would lose the line for good. Spectra are held back until the loop waits."""
    save, seen, is_waiting = checkpoint.save, [], threading.Event()
    rank_of_gram, finished = probes.rank_of_gram, probes.Spectra.finished

    def held_back(gram):
        assert is_waiting.wait(60)
        return rank_of_gram(gram)

    def waits(self, through=-1):
        if through >= 0:
            is_waiting.set()
        yield from finished(self, through)
        is_waiting.clear()

    def spy(out_dir, state, *args):
        lines = lines_of(tmp_path) if (tmp_path / "probes.jsonl").exists() else []
        seen.append((state["step"], [line["step"] for line in lines]))
        return save(out_dir, state, *args)

    monkeypatch.setattr(probes, "rank_of_gram", held_back)
    monkeypatch.setattr(probes.Spectra, "finished", waits)
    monkeypatch.setattr(checkpoint, "save", spy)
    train.main(flags_of(toy, tmp_path, "--checkpoint_every=3"))
    assert [step for step, _ in seen] == [0, 3, 6]
    for step, probed in seen:
        assert probed == list(range(0, step, 2))


def test_an_error_in_a_thread_ends_the_run(toy, tmp_path, monkeypatch):
    def broken(gram):
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(probes, "rank_of_gram", broken)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        train.main(flags_of(toy, tmp_path))
    assert not any(thread.name.startswith("spectra") for thread in threading.enumerate())
