"""probes.py against brute force, at sizes where it could be wrong."""
import json
import math
import shutil
import threading
from concurrent.futures import Future, wait
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY, TOY_VOCAB, refuses, toy_config
from test_model import SMALL, sharp, slide

import data
import probes
import train
from model import Decoder, ModelConfig
from nanomaml import checkpoint, files
from nanomaml.bins import open_corpus
from nanomaml.resume import Progress


def svd_rank(x):
    sigma = torch.linalg.svdvals(x.double())
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


def test_effective_rank_of_known_matrices():
    x = torch.outer(torch.randn(50), torch.randn(20))
    assert probes.effective_rank(x) == pytest.approx(1, abs=1e-4)
    assert probes.effective_rank(torch.linalg.qr(torch.randn(50, 20)).Q) == pytest.approx(20, rel=1e-5)
    assert probes.effective_rank(torch.eye(7), proportional=True) == pytest.approx(1)
    assert probes.effective_rank(torch.zeros(3, 4)) == 0
    assert math.isnan(probes.effective_rank(torch.full((3, 3), math.inf))), "no error where a model blew up"


@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (128, 128)])
def test_effective_rank_equals_the_full_svd(shape):
    """A spectrum over 10 orders of magnitude: the Gram matrix squares it, which float32 would not survive."""
    x = torch.randn(shape) @ torch.diag(torch.logspace(0, -10, shape[1]))
    assert probes.effective_rank(x) == pytest.approx(svd_rank(x), rel=1e-3)


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
    assert torch.allclose(entropy[1], torch.ones(2))
    assert entropy[0, 0].item() == pytest.approx(math.lgamma(301) / 300, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("span", [None, 5, 1])
def test_measured_entropies_are_those_of_the_models_own_attention(span, monkeypatch):
    """Also in a fork that changes the mask, where the probe once reported another attention's, above 1.
    Values that are one-hot vectors of their positions make `attend` give its probabilities.
    """
    slide(monkeypatch, span)
    decoder, ids, calls = sharp(SMALL), torch.randint(0, 211, (4, 64)), []
    for layer in decoder.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, args: calls.append((module, *args[:4])))
    decoder(ids)
    metrics = probes.measure(decoder, ids)
    seen = torch.arange(1, 65).clamp(max=span or 64)  # keys that each position sees
    for i, (attention, x, cos, sin, mask) in enumerate(calls[:3]):
        q, k, _ = attention.qkv(x, cos, sin)
        p = attention.attend(q, k, torch.eye(64).expand(4, 2, 64, 64), mask)  # (B, H, T, T)
        assert torch.allclose(p.sum(-1), torch.ones(4, 6, 64)) and ((p > 0).sum(-1) <= seen).all()
        nats = torch.special.entr(p).sum(-1)  # (B, H, T)
        share = nats[..., seen > 1] / seen[seen > 1].log()
        for head in range(6):
            ours = metrics[f"entropy_nats/{i:02d}/{head:02d}"], metrics[f"entropy/{i:02d}/{head:02d}"]
            expected = nats[:, head].mean().item(), share[:, head].mean().item() if span != 1 else 0
            assert ours == pytest.approx(expected, abs=1e-5) and 0 <= ours[1] < 0.9


def test_measure_sees_what_the_model_computes_and_leaves_no_trace():
    decoder, ids, seen = Decoder(SMALL).train(), torch.randint(0, 211, (4, 64)), []
    decoder(ids, ids).backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in decoder.named_parameters()}
    rng, logits = torch.get_rng_state(), decoder(ids)
    metrics = probes.measure(decoder, ids)
    assert torch.equal(torch.get_rng_state(), rng) and decoder.training and torch.equal(decoder(ids), logits)
    for name, p in decoder.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1]) and p.requires_grad
    decoder.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    decoder(ids)
    resid = seen[0].flatten(0, 1)
    weights = decoder.state_dict()
    expected = {"rank/resid/01": svd_rank(resid - resid.mean(0))}
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        weight = weights[f"model.layers.2.{name}.weight"]
        expected[f"rank/{name.split('.')[1]}/02"] = svd_rank(weight)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_probes_compile_nothing():
    """The probe batch has a shape of its own; called through the compiled layers it would be compiled, and
    count against their limit.
    """
    decoder, ids = Decoder(SMALL), torch.randint(0, 211, (4, 64))
    for layer in decoder.model.layers:
        layer.compile(backend="eager", dynamic=False)
    decoder(ids[:2])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    probes.measure(decoder, ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0
    decoder(ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled, "the counter counts"


# ---- the command ----


def test_the_command_measures_where_the_data_moved(toy, tmp_path, capsys):
    cfg = ModelConfig(d_model=24, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=TOY_VOCAB, context=32)
    run, moved, decoder = tmp_path / "run", tmp_path / "moved", Decoder(cfg)
    state = {"step": 3, "tokens": 96, "model": decoder.state_dict()}
    run.mkdir()
    for vocab_size in (TOY_VOCAB - 9, TOY_VOCAB):
        config = vars(cfg) | {"data": str(tmp_path / "gone"), "vocab_size": vocab_size}
        checkpoint.save(run, state | {"config": config}, keep=1)
        if vocab_size < TOY_VOCAB:
            refuses(lambda: probes.main([str(run), f"--data={toy}"]), f"{toy} holds token id", "name data")
    refuses(lambda: probes.main([str(run)]), f"no data at {tmp_path}/gone, which", "--data=FOLDER")
    shutil.copytree(toy, moved)
    ids = probes.fixed_batch(data.open_corpus(toy)[1], 24, 32)
    expected = {"step": 3, "tokens": 96} | probes.measure(decoder, ids)
    probes.main([str(run), f"--data={moved}"])
    moved.rename(tmp_path / "gone")  # and without the flag where it is as before
    probes.main([str(run)])
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line) == pytest.approx(expected)


# ---- behind the training loop ----


def flags_of(toy, out_dir, *flags):
    return [*TOY, f"--data={toy}", f"--out_dir={out_dir}", "--probe_every=2", "--keep=9", "--eval_every=0",
            *flags]


def lines_of(out_dir):
    return [{key: value for key, value in line.items() if key != "seconds"}
            for line in files.read_jsonl(out_dir / "probes.jsonl", "step")]


def test_ranks_of_gram_matrices_are_those_of_the_matrices_bit_for_bit(toy):
    torch.set_num_threads(1)  # with more threads LAPACK sums in another order
    decoder, ids = Decoder(SMALL), torch.randint(0, 211, (4, 64))
    decoder(ids, ids).backward()
    expected = probes.measure(decoder, ids)
    grams = probes.measure(decoder, ids, probes.gram)
    nobody = SimpleNamespace(is_first=False)
    with probes.Live(toy_config(), open_corpus(toy)[1], nobody, Progress(), torch.device("cpu")) as live:
        live.add({"step": 7, "tokens": 9} | grams)
        decoder.zero_grad(set_to_none=True)
        with torch.no_grad():
            decoder.model.layers[0].mlp.down_proj.weight.zero_()  # training goes on
        assert list(live.finished(7)) == [{"step": 7, "tokens": 9} | expected]
        assert list(live.finished(99)) == []
        live.add({"step": 8} | grams)
        wait([value for value in live.pending[0].values() if isinstance(value, Future)])
        assert [line["step"] for line in live.finished(-1)] == [8], "what is done is not waited for"


def test_a_probe_or_report_lost_after_its_checkpoint_is_made_again(toy, tmp_path, monkeypatch):
    """Killed right after a checkpoint whose probe is not on disk yet: the same lines, none
    twice. Where probe_every does not divide max_steps, the last one and the report were lost for good:
    the run counted as finished.
    """
    monkeypatch.setattr(train, "write_report", lambda out_dir: (out_dir / "report.md").touch())
    flags = flags_of(toy, tmp_path, "--max_steps=5", "--checkpoint_every=2", "--report")
    train.main(flags)
    whole = lines_of(tmp_path)
    assert [line["step"] for line in whole] == [0, 2, 4, 5]
    for newest, lines in ((4, 2), (4, 3), (5, 3), (5, 4)):  # the line of that step is missing, or there
        for step in range(newest + 1, 6):
            (tmp_path / f"ckpt_{step:06d}.pt").unlink()
        (tmp_path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:lines]))
        (tmp_path / "report.md").unlink()
        train.main(flags)
        assert lines_of(tmp_path) == whole and (tmp_path / "report.md").exists()


def test_training_goes_on_while_spectra_are_computed_but_no_checkpoint_goes_past_a_lost_line(
        toy, tmp_path, monkeypatch):
    """At 570M seven GPUs waited 10 to 60 s for the eigenvalues of each probe; and a kill after a checkpoint
    would lose an older line for good. Spectra are held back until the loop waits for a line.
    """
    save, seen, is_waiting = checkpoint.save, [], threading.Event()
    rank_of_gram, finished = probes.rank_of_gram, probes.Live.finished

    def held_back(gram):
        assert is_waiting.wait(60), "nothing but a checkpoint and the next probe may wait for it"
        return rank_of_gram(gram)

    def waits(self, through=-1):
        if through >= 0:
            is_waiting.set()
        yield from finished(self, through)
        is_waiting.clear()

    def spy(out_dir, state, *args):
        seen.append((state["step"], [line["step"] for line in lines_of(tmp_path)]))
        return save(out_dir, state, *args)

    monkeypatch.setattr(probes, "rank_of_gram", held_back)
    monkeypatch.setattr(probes.Live, "finished", waits)
    monkeypatch.setattr(checkpoint, "save", spy)
    train.main(flags_of(toy, tmp_path, "--max_steps=6", "--checkpoint_every=3"))
    assert seen == [(0, []), (3, [0, 2]), (6, [0, 2, 4])]


def test_an_error_in_a_thread_ends_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "rank_of_gram", lambda gram: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(flags_of(toy, tmp_path, "--max_steps=6"))
    assert not any(thread.name.startswith("spectra") for thread in threading.enumerate())
