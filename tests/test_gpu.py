"""What CUDA computes equals what the CPU does. Skipped where there is no GPU."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY, log, run, toy_config

import bench
import data
import train
from nanomaml import config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def step(toy, device, dtype, **changes):
    """{kind: (loss, gradients)} of a micro-step of each kind, at a width that fused kernels take."""
    cfg = toy_config(d_model=128, n_heads=4, n_kv_heads=2, d_hidden=256, inner_lr=0.2, **changes)
    torch.backends.cuda.matmul.allow_tf32 = False
    learner, found = train.build_learner(cfg, dtype).to(device), {}
    sources = train.build_sources(cfg, {"lm", "episodes"}, data.open_corpus(toy)[0], data.load_tokenizer(toy))
    for kind, source in sources.items():
        batch = source.batches[range(2)]
        losses, _ = learner(kind, type(batch)(*(t.to(device) for t in batch)))
        loss = sum(losses.values())
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in learner.named_parameters() if p.grad is not None}
        found[kind] = (loss.item(), grads)
        learner.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("changes", [{}, {"adapt": "all"}, {"adapt": "all", "first_order": False}])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_both_kinds_of_step_equal_those_on_the_cpu(toy, dtype, near, changes):
    """Losses and every gradient; bfloat16 against float32 on the CPU."""
    here, there = step(toy, "cpu", torch.float32, **changes), step(toy, "cuda", dtype, **changes)
    for kind, (loss, grads) in here.items():
        other, others = there[kind]
        assert other == pytest.approx(loss, rel=near) and others.keys() == grads.keys()
        a, b = (torch.cat([g.flatten() for g in some.values()]) for some in (grads, others))
        assert torch.linalg.norm(b - a) < near * torch.linalg.norm(a), kind


@pytest.mark.parametrize("flags", [[], ["--adapt=all", "--inner_lr=0.1"]], ids=["head", "all"])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-2), ("bfloat16", 5e-2)])
def test_a_compiled_run_equals_an_eager_one_and_is_resumed(toy, tmp_path, dtype, near, flags):
    flags = [*flags, "--device=cuda", f"--dtype={dtype}", "--seed=4", "--max_steps=6", "--checkpoint_every=3"]
    eager, lines = run(toy, tmp_path / "eager", *flags, "--compile=False")
    compiled, others = run(toy, tmp_path / "compiled", *flags)
    for x, y in zip(lines, others, strict=True):
        assert x.keys() == y.keys()
        assert all(x[key] == pytest.approx(y[key], rel=near) for key in x if key.endswith("loss"))
    (tmp_path / "compiled" / "ckpt_000006.pt").unlink()
    again, _ = run(toy, tmp_path / "compiled", *flags)
    for name, weight in eager["model"].items():
        for other in (compiled, again):
            assert torch.linalg.norm(other["model"][name] - weight) < near * torch.linalg.norm(weight), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no ranks")
def test_two_ranks_take_a_gpu_each(toy, tmp_path):
    """NCCL."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=4", "--device=cuda", "--seed=4"]
    result = subprocess.run([*torchrun, ROOT / "train.py", *TOY, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [line["step"] for line in log(tmp_path) if "train/loss" in line or "meta/query_loss" in line]
    assert steps == [1, 2, 3, 4]


def test_the_logits_are_never_whole_in_float32():
    """A loss and its gradients at the paper's vocabulary take less memory than half of them."""
    learner = train.build_learner(train.Config(n_layers=1), torch.bfloat16).to("cuda")
    ids = torch.randint(0, 50304, (32, 1024), device="cuda")
    x = torch.randn(*ids.shape, 96, device="cuda", requires_grad=True)

    def step():
        with learner.autocast():
            loss = learner.decoder.loss(x, ids)
        loss.backward()

    assert bench.peak_memory(ids.device, step) < 4 * ids.numel() * 50304 / 2


def test_a_bad_update_is_left_out_without_waiting():
    """Fused AdamW reads the flag on the device; it must leave parameters and state as they are."""
    p = torch.nn.Parameter(torch.randn(4, 3, device="cuda"))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    for grad, is_bad in ((1.0, 0.0), (float("nan"), 1.0)):
        before = p.detach().clone()
        p.grad = torch.full_like(p, grad)
        with torch.cuda.device(0):
            torch.cuda.set_sync_debug_mode("error" if is_bad else "default")
            train.optimizer_step([optimizer], 1.0, torch.full((), is_bad, device="cuda"))
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(p, before) == bool(is_bad)
    assert optimizer.state[p]["step"].item() == 1


def test_bench(capsys):
    bench.main([*TOY, "--device=auto", "--rounds=1", "--dtype=bfloat16", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] and result["steps"]["lm"]["peak_bytes"] > 0


def test_the_memory_of_a_step_is_what_the_plan_says():
    """But for the loss, which takes larger parts of the logits on a GPU."""
    cfg = config.load(bench.Config, ["configs/65m.py", "--batch_size=4", "--global_batch_size=8"])
    planned = bench.needs(cfg)[0]["peak, lm micro-step"]
    learner = train.build_learner(cfg, torch.bfloat16).cuda()
    optimizers = train.build_optimizers(cfg, learner)
    sources = train.build_sources(cfg, {"lm"}, *bench.made_up(cfg.vocab_size))
    batch = data.LMBatch(*(t.cuda() for t in sources["lm"].batches[range(4)]))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        bench.update(learner, optimizers, lambda: sum(learner("lm", batch)[0].values()))
    larger = (4096 - 512) * cfg.vocab_size * 2  # bytes
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned + larger, rel=0.1)
