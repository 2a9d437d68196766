"""adaptation.py: the instrument against a plain loop, and what it must and must not see."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, TOY_VOCAB, toy_config
from test_data import write_split
from test_model import sharp

import adaptation
import data
import train
from nanomaml import checkpoint
from nanomaml.words import word_tables

CFG = toy_config(eval_episodes=30)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """Validation text of two domains in which words repeat."""
    folder = tmp_path_factory.mktemp("val")
    for seed, name in enumerate(("train", "val_a", "val_b")):
        write_split(folder, data.load_tokenizer(toy), random_ids(256, 1500, 20_000, seed), [name])
    return folder


def random_ids(low, n, size=5000, seed=0):
    return low + np.random.default_rng(seed).integers(0, n, size)


def instrument(folder, **changes):
    validation, tokenizer = data.open_corpus(folder)[1], data.load_tokenizer(folder)
    return adaptation.AdaptationTest(replace(CFG, **changes), validation, tokenizer)


def test_the_windows_are_held_out_text_of_words_that_may_and_may_not_be_classes(folder):
    test, tables = instrument(folder), word_tables(data.load_tokenizer(folder))
    text = [np.concatenate(split.shards) for split in data.open_corpus(folder)[1].values()]
    contexts = np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, 8) for ids in text])
    assert list(test.pools) == ["", "new_"]
    for prefix, pool in test.pools.items():
        assert pool.shape == (16, 4, 8) and (pool[..., -1] == TOY_VOCAB - 1).all(), "windows end at the mask"
        assert not (pool[..., :-1] == TOY_VOCAB - 1).any(), "and hold no other"
        for of_word in pool[::3].numpy():
            words = [set(contexts[(contexts[:, :-1] == window[:-1]).all(1)][:, -1]) for window in of_word]
            [word] = set.intersection(*words)
            assert tables.held_out[word] == (prefix == "new_") and word not in of_word
    words, places = test.draw(16, 4, 30)
    assert words.shape == (30, 4) and all(len(set(row)) == 4 for row in words.tolist())
    assert (places // 4 == words[:, :, None]).all() and places.shape == (30, 4, 4)
    assert all(len(set(row)) == 16 for row in places.flatten(1).tolist()), "no window is support and query"
    test = instrument(folder, eval_ways=5000)  # fewer where the text has no more words
    assert all(2 <= len(pool) < 5000 for pool in test.pools.values()) and "16-way" not in test.describe()


def test_ways_and_words_are_those_that_were_used(folder):
    """A 7-way test was said to have the chance of a 16-way one."""
    test = instrument(folder, eval_ways=5000, eval_episodes=1)
    metrics = test.measure(sharp(CFG), torch.float32, is_last=True)
    for prefix, pool in test.pools.items():
        assert metrics[f"adapt/{prefix}ways"] == metrics[f"final/{prefix}ways"] == len(pool) != 16
        assert metrics[f"final/{prefix}words"] == len(pool)


@pytest.mark.parametrize("every_word", [False, True])
def test_accuracies_equal_a_plain_loop(folder, every_word):
    """An ordinary linear layer from zero, trained by an ordinary optimizer, episode by episode."""
    test, decoder = instrument(folder), sharp(CFG)
    results = test.episodes(decoder, torch.float32, every_word)
    target = torch.arange(4).repeat_interleave(2)
    for prefix, pool in test.pools.items():
        pool = pool if every_word else pool[:4]
        words, places = test.draw(len(pool), 4, 120 if every_word else 30)
        hidden = decoder.hidden(pool.flatten(0, 1)).detach()
        for read_out, x in (("mask", hidden[:, -1]), ("context", hidden[:, -2])):
            drawn, correct, losses = results[prefix, read_out, "adapted"]
            assert torch.equal(drawn, words)
            for i in range(0, len(words), 11):
                head = torch.nn.Linear(24, 4)
                torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
                sgd = torch.optim.SGD(head.parameters(), lr=CFG.inner_lr)
                support, query = (part.flatten() for part in places[i].split(2, dim=1))
                for _ in range(CFG.inner_steps):
                    sgd.zero_grad()
                    F.cross_entropy(head(x[support]), target).backward()
                    sgd.step()
                logits = head(x[query])
                assert torch.equal(correct[i], logits.argmax(-1) == target)
                expected = F.cross_entropy(logits, target, reduction="none")
                assert torch.allclose(losses[i], expected, rtol=1e-4, atol=1e-6)
            unadapted = results[prefix, read_out, "unadapted"][1].float().mean(1)
            assert unadapted.eq(0.25).all(), "chance"


def test_the_error_is_over_words(folder, monkeypatch):
    """Half the words always right, half never: the error of 16 coin flips, however many episodes."""
    test, drawn = instrument(folder), {}
    for prefix, pool in test.pools.items():
        words, _ = test.draw(len(pool), 4, 500)
        correct = (words % 2 == 0).repeat_interleave(2, dim=1)
        drawn[prefix, "mask", "adapted"] = words, correct, torch.zeros(correct.shape)
    monkeypatch.setattr(test, "episodes", lambda *args: drawn)
    metrics = test.final(sharp(CFG), torch.float32)
    assert metrics["final/mask_query_acc"] == pytest.approx(0.5, abs=0.03)
    assert metrics["final/mask_query_acc_error"] == pytest.approx(0.5 * (16 / 15) ** 0.5 / 16**0.5)


def test_it_is_the_same_for_every_seed_and_leaves_no_trace(folder):
    decoder = sharp(CFG).train()
    rng, weights = torch.get_rng_state(), [p.clone() for p in decoder.parameters()]
    metrics = instrument(folder).measure(decoder, torch.float32)
    assert metrics == instrument(folder, seed=7).measure(decoder, torch.float32)
    assert torch.equal(torch.get_rng_state(), rng) and decoder.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, decoder.parameters()))
    context = instrument(folder, read_out="context").measure(decoder, torch.float32)
    for prefix in ("", "new_"):
        assert metrics[f"adapt/{prefix}query_acc"] == metrics[f"adapt/mask_{prefix}query_acc"]
        assert context[f"adapt/{prefix}query_acc"] == metrics[f"adapt/context_{prefix}query_acc"]
        assert metrics[f"adapt/{prefix}query_acc_unadapted"] == 0.25


@pytest.mark.parametrize("ids, reason", [
    (np.arange(TOY_VOCAB + 1), "holds ids that the tokenizer lacks"),
    (np.arange(256, 1256), "too few of its words repeat"),
    (random_ids(97, 26), "no words between spaces"),
    (random_ids(256, 20), "of them too frequent, more than 4 times"),
])
def test_what_cannot_be_measured_names_its_reason(toy, tmp_path, ids, reason):
    test = instrument(write_split(tmp_path, data.load_tokenizer(toy), ids))
    assert test.pools == {} and reason in test.describe()
    assert test.measure(sharp(CFG), torch.float32, is_last=True) == {}
    if "frequent" in reason:
        assert list(instrument(tmp_path, max_word_share=0.1).pools) == [""]


def test_the_script_measures_finished_runs(toy, tmp_path, capsys):
    train.main([*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=1", "--meta_share=0"])
    capsys.readouterr()
    adaptation.main([str(tmp_path)])
    line = json.loads(capsys.readouterr().out)
    assert line["step"] == 1 and {"final/mask_query_acc", "final/context_query_acc_error"} <= line.keys()
    state = checkpoint.load(tmp_path)
    state["config"] |= {"data": str(tmp_path / "short")}  # it printed NaN, or nothing
    checkpoint.save(tmp_path, state, keep=1)
    (tmp_path / "short").mkdir()
    write_split(tmp_path / "short", data.load_tokenizer(toy), np.arange(256, 1256))
    adaptation.main([str(tmp_path)])
    line = json.loads(capsys.readouterr().out)
    assert line.keys() == {"run", "step", "not_measured"} and "too few of its words" in line["not_measured"]
    # Bugs: of a run without evaluation it said that there was no tokenizer; a checkpoint's file was refused.
    state["config"] |= {"eval_episodes": 0}
    checkpoint.save(tmp_path, state, keep=1)
    adaptation.main([str(tmp_path / "ckpt_000001.pt")])
    assert json.loads(capsys.readouterr().out)["not_measured"] == "eval_episodes = 0"
