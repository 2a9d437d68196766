"""Each recipe applies to a copy of the repository, trains, resumes, and has the effect that it promises."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOY

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.patch"))

# Runs in the patched copy. `state` and `log` are of six updates that were stopped after three and resumed.
PRELUDE = """
import copy, json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
import data, export, meta, probes, report, schedule, train
from nanomaml import checkpoint, config, drawing, runs
from nanomaml.config import UserError
sys.path.append(tests)
from conftest import same

def lines(name):
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]

base = [*sys.argv[1:], "--out_dir=run", "--max_steps=6", "--checkpoint_every=3", "--seed=5"]
cfg = config.load(train.Config, base + flags)
train.main(base + flags)
straight = checkpoint.newest("run")
Path("run", "ckpt_000006.pt").unlink()
train.main(base + flags)
state, log = checkpoint.newest("run"), lines("log.jsonl")
assert all(same(state[key], straight[key]) for key in ("model", "learner", "optimizers"))
kinds = {key for line in log for key in line if key.endswith("loss")}
assert {"train/loss", "meta/query_loss", "val/loss"} <= kinds, kinds
"""

FLAGS = {
    "meta-sgd": ["--first_order=False", "--head_layers=2", "--inner_lr=0.1"],
    "muon": ["--head_layers=2", "--inner_lr=0.1"],
    "ahead-objective": ["--meta_share=0.3", "--ahead_share=0.4"],
    "sliding-window": ["--span=5"],
    "gradient-rank": ["--probe_gradients", "--probe_every=1"],
    "meta-decay": ["--meta_decay=0.5", "--meta_share=1"],
    "masked-word": ["--masked_word=all"],
    "backbone-rate": ["--adapt=all", "--inner_steps=2", "--inner_lr=0.5", "--backbone_lr=0.03"],
    "published-episodes": ["--published_episodes=6", "--head_start=random", "--head_layers=2",
                           "--inner_lr=0.1"],
    "query-lm": ["--query_lm", "--read_out=context"],
    "batch-episodes": ["--episodes_from=batch", "--read_out=context", "--meta_share=1", "--shots=1",
                       "--queries=1"],
}

CHECKS = {
    "bidirectional-ner": """
        import eval_ner
        decoder = checkpoint.load_model("run")
        windows = [eval_ner.Window(list(range(300, 300 + n)), [0, n - 1], [0, 1]) for n in (5, 9, 17)]
        together = eval_ner.read_words(decoder, windows, True, torch.float32)
        for window, read in zip(windows, together.split(2)):  # padding is not seen, what follows is
            ids = torch.tensor([window.ids])
            alone = decoder.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, window.positions]
            torch.testing.assert_close(read, alone, rtol=1e-4, atol=1e-5)
            assert (read[0] - decoder.hidden(ids)[0, 0]).abs().max() > 1e-3
        assert eval_ner.Config(bidirectional=True).bidirectional and "bidirectional" in eval_ner.SETTINGS
        """,
    "gradient-rank": """
        probed = lines("probes.jsonl")
        grads = [{key: x for key, x in line.items() if key.startswith("rank/grad_")} for line in probed]
        assert not grads[0] and len(grads[1]) == 3 * cfg.n_layers and grads[1] != grads[-1]
        assert all(0 < value <= cfg.d_model for line in grads for value in line.values())
        assert "effective rank, gradient of v_proj" in report.write(["run"], "report")[0]
        learner = train.build_learner(cfg, torch.float32)
        learner("lm", data.LMBatch(*[torch.randint(0, cfg.vocab_size, (2, 32))] * 2))[0]["lm"].backward()
        weight = learner.decoder.model.layers[1].mlp.down_proj.weight
        spectrum = torch.linalg.svdvals(weight.grad.double())
        p = spectrum / spectrum.sum()
        rank = probes.gradient_ranks(learner.decoder)["rank/grad_down_proj/01"]
        assert rank == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)
        """,
    "inner-adam": """
        start, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.1, 0.5001])
        def loss(x):
            return (torch.tensor([1.0, 10.0, 0.1]) * (x - target) ** 2).sum()
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=0.05)
        for _ in range(7):
            adam.zero_grad()
            loss(x).backward()
            adam.step()
        fast = meta.adapt(lambda params: loss(params["x"]), {"x": start}, 7, 0.05)["x"]
        assert torch.allclose(fast, x, atol=1e-6) and not torch.allclose(fast, start, atol=0.1)
        """,
    "meta-sgd": """
        rates = {name: rate for name, rate in state["learner"].items() if name.startswith("rates.")}
        assert {"rates.head/out/weight", "rates.head/layers/0/weight"} <= rates.keys(), rates.keys()
        learned = [name for name, rate in rates.items() if (rate - 0.1).abs().max() > 5e-4]
        assert sorted(learned) == sorted(rates), "every rate has a gradient"
        assert rates["rates.head/out/weight"].shape == (cfg.head_width,), "alike for all ways"
        with pytest.raises(UserError, match="a learned inner rate gets no gradient in first-order MAML"):
            train.main([*sys.argv[1:], "--out_dir=first", "--inner_lr=0.1"])
        """,
    "masked-word": """
        source = train.build_sources(cfg, {"episodes"}, *train.load_data(cfg, True)[::2])["episodes"]
        batch, decoder = source.batches[[0, 1]], checkpoint.load_model(state)
        for kind, n in (("query", cfg.queries), ("all", cfg.shots + cfg.queries)):
            learner = train.build_learner(replace(cfg, masked_word=kind), torch.float32, state["model"])
            loss = learner("episodes", batch)[0]["meta"]
            windows = torch.cat((batch.support, batch.query), dim=2)[:, :, -n:]
            assert (windows[..., -1] == windows[0, 0, 0, -1]).all(), "they end at the mask"
            logits = decoder(windows.flatten(0, 2))[:, -1]
            words = batch.words.flatten().repeat_interleave(n)
            assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, words).item(), 1e-5)
            passes = 3 * 2 * cfg.ways * n * (decoder.flops(cfg.window, True)[0] + decoder.flops(1)[1])
            assert learner.flops("episodes", batch) == passes
        """,
    "backbone-rate": """
        source = train.build_sources(cfg, {"episodes"}, *train.load_data(cfg, True)[::2])["episodes"]
        batch = source.batches[[0]]
        support, query = (x[0].flatten(0, 1) for x in (batch.support, batch.query))
        learner = train.build_learner(cfg, torch.float32, state["model"])
        twin = copy.deepcopy(learner.decoder)
        head = torch.nn.Linear(cfg.d_model, cfg.ways)
        for p in head.parameters():
            torch.nn.init.zeros_(p)
        sgd = torch.optim.SGD([{"params": head.parameters(), "lr": 0.5}, {"params": twin.model.parameters()}],
                              lr=0.03)
        for _ in range(2):
            sgd.zero_grad()
            logits = head(twin.hidden(support)[:, -1])
            target = torch.arange(cfg.ways).repeat_interleave(cfg.shots)
            torch.nn.functional.cross_entropy(logits, target).backward()
            sgd.step()
        after, _, _ = learner.adapt_any(support, query, cfg.ways)
        torch.testing.assert_close(after, head(twin.hidden(query)[:, -1]), rtol=1e-3, atol=1e-5)
        moved = (twin.model.norm.weight - learner.decoder.model.norm.weight).abs().max()
        assert moved > 1e-5, "the backbone adapts"
        """,
    "published-episodes": """
        source = train.build_sources(cfg, {"episodes"}, *train.load_data(cfg, True)[::2])["episodes"]
        assert source.size == 6
        batch, ids = source.batches[range(99)], source.batches.sequences[range(99)].ids
        *shots, asked = batch.places.tolist()
        for masked, places in ((batch.support, shots), (batch.query, [asked])):
            assert torch.equal(masked, ids.index_fill(1, torch.tensor(places), source.batches.mask_id))
        tokens, classes = ids[:, batch.places].tolist(), batch.classes.tolist()
        assert len(classes) == cfg.ways and set(classes) <= {token for row in tokens for token in row[:-1]}
        assert batch.labels.tolist() == [[classes.index(token) if token in classes else 0 for token in row]
                                         for row in tokens]

        few = data.PublishedEpisodes(source.batches.sequences, 0, ways=9, shots=2, seed=1)
        few.mask_id = source.batches.mask_id
        few = few[range(1)]  # of one sequence: classes are padded
        assert few.classes[few.labels[0, :2]].tolist() == source.batches.sequences[range(1)].ids[
            0, few.places[:2]].tolist() and len(few.classes) == 9

        # Against SGD in place, on a head with an output for each token, of which the classes' are cut out
        learner = train.build_learner(cfg, torch.float32, state["model"])
        bound = (6 / sum(learner.head.out.weight.shape)) ** 0.5  # Glorot and Bengio 2010
        assert 0.95 * bound < learner.head.out.weight.abs().max() <= bound
        twin = copy.deepcopy(learner)
        losses, metrics = learner("episodes", batch)
        losses["meta"].backward()
        def loss(ids, places, labels):
            x = twin.decoder.hidden(ids)[:, places].flatten(0, 1)
            for layer in twin.head.layers:
                x = layer(x).relu()
            return torch.nn.functional.cross_entropy(twin.head.out(x)[:, batch.classes], labels.flatten())
        sgd = torch.optim.SGD(twin.head.parameters(), cfg.inner_lr)
        for _ in range(cfg.inner_steps):
            sgd.zero_grad()
            loss(batch.support, shots, batch.labels[:, :-1]).backward()
            sgd.step()
        twin.zero_grad()
        after = loss(batch.query, [asked], batch.labels[:, -1])
        after.backward()
        assert losses["meta"].item() == pytest.approx(after.item(), abs=1e-5)
        assert 0 < metrics["meta/others"] == (batch.labels[:, -1] != 0).float().mean() < 1
        windows = batch.query.numel() // cfg.context
        heads = learner.head_flops(cfg.ways, windows * cfg.shots, windows)
        assert learner.flops("episodes", batch) == heads + 4 * windows * learner.decoder.flops(cfg.context)[0]
        for (name, p), q in zip(learner.named_parameters(), twin.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
        """,
    "qk-norm": """
        norms = [p for name, p in state["model"].items() if "q_norm" in name or "k_norm" in name]
        assert len(norms) == 2 * cfg.n_layers and all((p - 1).abs().max() > 0 for p in norms), "trained"
        decoder, ids = checkpoint.load_model(state), torch.arange(300, 330)[None]
        before = decoder(ids)
        for layer in decoder.model.layers:
            layer.self_attn.q_proj.weight.data *= 1000
        assert torch.allclose(decoder(ids), before, atol=1e-3), "the scale of the queries does not matter"
        """,
    "muon": """
        learner = train.build_learner(cfg, torch.float32)
        adamw, muon = train.build_optimizers(cfg, learner)
        names = {p: name for name, p in learner.named_parameters()}
        by_muon, by_adamw = ({names[p] for group in optimizer.param_groups for p in group["params"]}
                             for optimizer in (muon, adamw))
        assert by_muon == {name for name in names.values() if "proj.weight" in name}
        assert by_adamw == set(names.values()) - by_muon
        assert all("momentum_buffer" in s for s in state["optimizers"][1]["state"].values())
        # A bad update is left out by both.
        for p in learner.parameters():
            p.grad = torch.full_like(p, float("nan"))
        train.optimizer_step([adamw, muon], 1.0, torch.tensor(1.0))
        assert all(torch.isfinite(p).all() for p in learner.parameters()) and not muon.state
        """,
    "warmup-stable-decay": """
        long = replace(cfg, max_steps=100, warmup_steps=10)
        factors = [train.lr_factor(long, step) for step in range(100)]
        assert factors[4] == 0.5 and factors[9:80] == [1.0] * 71 and factors[90] == 0.5
        assert factors[80:] == sorted(factors[80:], reverse=True)
        rates = [line["lr"] for line in log if "lr" in line]
        assert rates[1:5] == [cfg.lr] * 4 and rates[5] < cfg.lr
        """,
    "tied-embeddings": """
        decoder = checkpoint.load_model(state)
        assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
        assert torch.equal(state["model"]["lm_head.weight"], state["model"]["model.embed_tokens.weight"])
        matrix = cfg.vocab_size * cfg.d_model
        layers = sum(p.numel() for p in decoder.model.layers.parameters())
        assert sum(p.numel() for p in decoder.parameters()) == matrix + layers + cfg.d_model
        """,
    "anisotropy-probe": """
        ids, decoder = torch.randint(0, 3000, (4, 32)), checkpoint.load_model(state)
        outputs = []
        for layer in decoder.model.layers:
            layer.register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, 1)))
        decoder(ids)
        metrics = probes.measure(decoder, ids)
        x = torch.nn.functional.normalize(outputs[1], dim=1)
        assert metrics["anisotropy/resid/01"] == pytest.approx((x @ x.T).mean().item(), abs=1e-5)
        assert all("anisotropy/resid/00" in line for line in lines("probes.jsonl"))
        assert "anisotropy/resid" in report.write(["run"], "report")[0]
        fig = drawing.figure(runs.read_groups([["run"]]), ["run"])
        titles = [ax.get_title() for part in fig.subfigs for ax in part.get_axes()]
        assert any("anisotropy/resid" in title for title in titles), titles
        """,
    "ahead-objective": """
        losses = [line["ahead/loss"] for line in log if "ahead/loss" in line]
        assert losses and all(5 < loss < 9 for loss in losses), losses
        weight = state["learner"]["ahead.weight"]
        assert weight.shape == (cfg.d_model,) * 2 and (weight - torch.eye(cfg.d_model)).abs().max() > 0
        kinds = schedule.block_kinds(replace(cfg, max_steps=1000))
        assert (kinds == "ahead").mean() == pytest.approx(0.4, abs=0.04)
        learner = train.build_learner(cfg, torch.float32)
        batch = train.data.LMBatch(*torch.randint(0, 99, (2, 2, 9)))
        plain = torch.nn.functional.cross_entropy(learner.decoder(batch.ids)[:, :-1].flatten(0, 1),
                                                  batch.targets[:, 1:].flatten())
        loss = learner("ahead", batch)[0]["ahead"]  # its map starts as the identity
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
        """,
    "sliding-window": """
        decoder, ids = checkpoint.load_model(state), torch.randint(0, 3000, (2, 32))
        other = ids.clone()
        other[:, 0] = 7  # two layers look back 4 positions each
        assert torch.equal(decoder(ids)[:, 9:], decoder(other)[:, 9:])
        assert not torch.equal(decoder(ids)[:, 8], decoder(other)[:, 8])
        metrics = probes.measure(decoder, ids)
        entropies = [value for key, value in metrics.items() if key.startswith("entropy_nats/")]
        assert 0 < max(entropies) <= np.log(5) + 1e-6, entropies
        with pytest.raises(UserError, match="span"):
            export.main(["run", "--to=exported"])
        """,
    "meta-decay": """
        losses = [line["step"] for line in log if "meta/query_loss" in line]
        assert losses == [1, 2, 3], losses  # full weight, two thirds, a third
        longer = [flag for flag in base if "max_steps" not in flag]
        with pytest.raises(UserError, match="another length"):
            train.main([*longer, *flags, "--max_steps=12"])
        """,
    "query-lm": """
        assert any("train/query_lm_loss" in line for line in log)
        corpus, tokenizer = data.open_corpus(cfg.data)[0], data.load_tokenizer(cfg.data)
        batch = train.build_sources(cfg, {"episodes"}, corpus, tokenizer)["episodes"].batches[range(2)]
        assert torch.equal(batch.targets[..., :-1], batch.query[..., 1:])
        assert torch.equal(batch.targets[:, :, 0, -1], batch.words), "the word itself is predicted"
        learner = train.build_learner(cfg, torch.float32)
        losses, metrics = learner("episodes", batch)
        plain = learner("lm", data.LMBatch(batch.query.flatten(0, 2), batch.targets.flatten(0, 2)))[0]["lm"]
        assert losses["lm"].item() == pytest.approx(plain.item(), abs=1e-5)
        assert learner.flops("episodes", batch) > 0 and batch.lm_tokens == batch.query.numel()
        """,
    "batch-episodes": """
        assert all("train/loss" in line for line in log if "lr" in line)
        sources = train.build_sources(cfg, {"joint"}, data.open_corpus(cfg.data)[0],
                                      data.load_tokenizer(cfg.data))
        batch, plain = (sources[kind].batches[range(64)] for kind in ("joint", "lm"))
        assert torch.equal(batch.ids, plain.ids), "the text is that of next-token prediction"
        places, T = torch.cat((batch.support, batch.query), dim=2), cfg.context
        assert batch.words.shape[1] >= 2
        spelling = torch.from_numpy(sources["joint"].batches.tables.spelling)
        words = spelling[batch.targets.flatten()[places]]  # (E, N, K + Q)
        assert (words == words[:, :, :1]).all()
        assert all(len(set(row.tolist())) == len(row) for row in words[..., 0])
        for row, of_word in zip(places.flatten(0, 1), words.flatten(0, 1)):
            assert len(set((row // T).tolist())) == len(row), "one place in a sequence"
            for place, word in zip(row.tolist(), of_word):
                assert word not in spelling[batch.ids[place // T, :place % T + 1]], "the word's first place"
        learner = train.build_learner(cfg, torch.float32)
        losses = learner("joint", batch)[0]
        assert losses["lm"].item() == learner("lm", plain)[0]["lm"].item()
        assert learner.flops("joint", batch) > learner.flops("lm", plain)
        """,
    "induction-task": """
        import eval_induction
        class Copies:  # predicts the token that came half a context before the next one
            cfg = cfg
            def __call__(self, ids):
                return torch.nn.functional.one_hot(ids.roll(cfg.context // 2 - 1, 1), cfg.vocab_size)
        assert eval_induction.accuracy(Copies()) == 1.0
        eval_induction.main(["run"])
        [line] = lines("induction.jsonl")
        score = eval_induction.accuracy(checkpoint.load_model(state))
        assert line["step"] == 6 and line["score"] == score < 0.1
        text = report.write(["run"], "report")[0]
        assert "## Induction" in text and "accuracy on the second copy" in text
        """,
}


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches")
def test_every_recipe_applies(tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("nanomaml/*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for name in RECIPES:
        patch = ROOT / "recipes" / f"{name}.patch"
        subprocess.run(["git", "apply", "--check", str(patch)], cwd=tmp_path, env=environment, check=True)


def test_every_recipe_is_checked_and_listed_with_its_size():
    assert RECIPES == sorted(CHECKS) and len(RECIPES) >= 9
    row = r"\| \[([\w-]+)\]\(\1\.patch\).*? \| (\d+), (\d+) \| (.*) \|"
    listed = re.findall(row, (ROOT / "recipes" / "README.md").read_text())
    assert sorted(name for name, *_ in listed) == RECIPES
    for name, added, removed, files in listed:
        lines = (ROOT / "recipes" / f"{name}.patch").read_text().splitlines()
        assert [line.split(":")[0] for line in lines[:3]] == ["What", "Why", "Expect"] and lines[3] == ""
        assert int(added) == sum(line.startswith("+") and not line.startswith("+++") for line in lines)
        assert int(removed) == sum(line.startswith("-") and not line.startswith("---") for line in lines)
        assert files.split(", ") == [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ ")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(toy, tmp_path, name):
    for path in (*ROOT.glob("*.py"), ROOT / "nanomaml"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    patch = ROOT / "recipes" / f"{name}.patch"
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    applied = subprocess.run(["git", "apply", str(patch)], **options)
    assert applied.returncode == 0, applied.stderr
    check = re.sub(r"^        ", "", CHECKS[name], flags=re.M)
    given = f"flags, tests = {FLAGS.get(name, [])}, {str(ROOT / 'tests')!r}\n"
    (tmp_path / "check.py").write_text(given + PRELUDE + check)
    flags = [*TOY, f"--data={toy}"]
    result = subprocess.run([sys.executable, "check.py", *flags], **options)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
