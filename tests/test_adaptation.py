"""adaptation.py: the instrument against a plain loop, and what it must and must not see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOY, TOY_VOCAB, write_bin

import adaptation
import config
import data
from adaptation import AdaptationTest
from model import Decoder
from train import Config

CFG = replace(config.load(Config, TOY), eval_episodes=30)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """Validation text of two domains in which words repeat, with the toy's tokenizer."""
    out = tmp_path_factory.mktemp("val")
    (out / "tokenizer.json").write_text((toy / "tokenizer.json").read_text())
    for seed, name in enumerate(("train", "val_a", "val_b")):
        ids = 256 + np.random.default_rng(seed).integers(0, 1500, 20_000)
        write_bin(out / f"{name}_000000.bin", ids)
    return out


def instrument(folder, **changes):
    return AdaptationTest(replace(CFG, **changes), data.open_corpus(folder)[1], data.load_tokenizer(folder))


def sharp():
    decoder = Decoder(CFG, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    return decoder


def test_the_windows_are_held_out_text_of_words_that_may_and_may_not_be_classes(folder):
    test, tables = instrument(folder), data.word_tables(data.load_tokenizer(folder))
    text = {name: np.concatenate(split.shards) for name, split in data.open_corpus(folder)[1].items()}
    contexts = np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, 8) for ids in text.values()])
    assert list(test.pools) == ["", "new_"]
    for prefix, (windows, places) in test.pools.items():
        assert windows.shape[1] == 8 and (windows[:, -1] == TOY_VOCAB - 1).all(), "windows end at the mask"
        for window in windows[::5].numpy():
            masked = window == TOY_VOCAB - 1
            same = contexts[((contexts == window) | masked).all(1)]
            assert {bool(tables.held_out[word]) for word in same[:, -1]} == {prefix == "new_"}
        assert places.shape == (30, 4, 4) and len(set(places[0].flatten().tolist())) == 16
        words = places // 4
        assert (words == words[:, :, :1]).all(), "the windows of a class are of one word"


def test_accuracies_equal_a_plain_loop(folder):
    """An ordinary linear layer from zero, trained by an ordinary optimizer, episode by episode."""
    test, decoder = instrument(folder), sharp()
    results = test.episodes(decoder, torch.float32)
    assert len(results) == 2 * 2 * 2
    for prefix, (windows, places) in test.pools.items():
        hidden = decoder.hidden(windows).detach()
        for read_out, x in (("mask", hidden[:, -1]), ("context", hidden[:, -2])):
            accuracies, losses = results[prefix, read_out, "adapted"]
            for i in range(0, 30, 7):
                head = torch.nn.Linear(24, 4)
                torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
                sgd = torch.optim.SGD(head.parameters(), lr=CFG.inner_lr)
                support, query = places[i, :, :2].flatten(), places[i, :, 2:].flatten()
                target = torch.arange(4).repeat_interleave(2)
                for _ in range(CFG.inner_steps):
                    sgd.zero_grad()
                    torch.nn.functional.cross_entropy(head(x[support]), target).backward()
                    sgd.step()
                logits = head(x[query])
                accuracy = (logits.argmax(-1) == target).float().mean()
                assert accuracies[i].item() == pytest.approx(accuracy.item())
                loss = torch.nn.functional.cross_entropy(logits, target)
                assert losses[i].item() == pytest.approx(loss.item(), rel=1e-4)
            assert results[prefix, read_out, "unadapted"][0].eq(0.25).all(), "chance"


def test_it_is_the_same_for_every_seed_and_leaves_no_trace(folder):
    decoder = sharp().train()
    rng, weights = torch.get_rng_state(), [p.clone() for p in decoder.parameters()]
    metrics = instrument(folder).measure(decoder, torch.float32)
    assert metrics == instrument(folder, seed=7).measure(decoder, torch.float32)
    assert torch.equal(torch.get_rng_state(), rng) and decoder.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, decoder.parameters()))
    context = instrument(folder, read_out="context").measure(decoder, torch.float32)
    for prefix in ("", "new_"):
        assert metrics[f"val/{prefix}query_acc"] == metrics[f"val/mask_{prefix}query_acc"]
        assert context[f"val/{prefix}query_acc"] == metrics[f"val/context_{prefix}query_acc"]
        assert metrics[f"val/{prefix}query_acc_unadapted"] == 0.25


def test_it_sees_features_that_tell_the_words_apart(folder):
    """A feature before the word that gives it away adapts to 1; one that says nothing stays at chance."""
    test = instrument(folder, inner_steps=50)

    def hidden(windows):
        x = torch.zeros(*windows.shape, 24)
        for row, window in enumerate(windows.tolist()):
            x[row, -2, known.index(window) // 4] = 5.0  # the number of the word
        return x

    test.pools.pop("new_")
    known, decoder = test.pools[""][0].tolist(), sharp()
    decoder.hidden = hidden
    metrics = test.measure(decoder, torch.float32)
    assert metrics["val/context_query_acc"] == 1.0 and metrics["val/mask_query_acc"] == 0.25


def test_text_with_too_few_words_gives_fewer_ways_or_none(folder, tmp_path):
    test = instrument(folder, ways=5000)
    assert all(2 <= places.shape[1] < 5000 for _, places in test.pools.values())
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    for name in ("train", "val"):
        write_bin(tmp_path / f"{name}_000000.bin", np.arange(256, 1256))
    test = instrument(tmp_path)
    assert test.pools == {} and "too few of its words repeat" in test.describe()
    assert test.measure(sharp(), torch.float32) == {}


def test_the_script_measures_finished_runs(toy, tmp_path, capsys):
    import json

    import train

    train.main([*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=1", "--meta_share=0"])
    capsys.readouterr()
    adaptation.main([str(tmp_path)])
    line = json.loads(capsys.readouterr().out)
    assert line["step"] == 1 and {"mask_query_acc", "context_query_acc_error"} <= line.keys()
