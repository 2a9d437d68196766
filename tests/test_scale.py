"""A start that does not grow with the corpus, a run made longer, a run from another's weights."""

import json
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import TOY, refuses, same

import checkpoint
import data
import schedule
import train

# ---- a corpus of ten billion tokens ----


def sparse_bins(folder, tokens):
    """nanoGPT's bins: random ids here and there, and zeros between that take no space on the disk."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", tokens), ("val", tokens // 10)):
        with open(folder / f"{name}.bin", "wb") as file:
            for start in np.linspace(0, n - 50_000, 20).astype(int):
                file.seek(2 * int(start))
                file.write(rng.integers(0, 3000, 50_000, dtype="<u2").tobytes())
            file.truncate(2 * n)
        if os.stat(folder / f"{name}.bin").st_blocks * 512 > 1e9:
            pytest.skip("this file system has no sparse files")
    return folder


def test_the_first_step_on_ten_billion_tokens_takes_what_it_takes_on_ten_million(tmp_path, toy):
    """The order of an epoch, the check of every id and the validation sequences grew with the corpus."""
    seconds, peaks = [], []
    for tokens in (10**7, 10**10):
        folder, out_dir = sparse_bins(tmp_path / str(tokens), tokens), tmp_path / f"run-{tokens}"
        flags = ["--meta_share=0", "--max_steps=1", "--context=8"]
        shutil.copy(toy / "tokenizer.json", folder)
        tracemalloc.start()
        start = time.perf_counter()
        train.main([*TOY, f"--data={folder}", f"--out_dir={out_dir}", *flags])
        seconds.append(time.perf_counter() - start)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert checkpoint.newest(out_dir)["step"] == 1
    assert peaks[1] < 1.2 * peaks[0] + 1e6 and seconds[1] < seconds[0] + 30, (peaks, seconds)


def test_batches_of_ten_billion_tokens_take_little_memory(tmp_path, toy):
    folder = sparse_bins(tmp_path / "bins", 10**10)
    corpus = data.open_corpus(folder)[0]
    tracemalloc.start()
    corpus.check(3000)
    sequences = data.Sequences(corpus, 8, 1)
    last = int(sequences.ends[-1]) - 1
    assert sequences[[0, last, 5 * last]].ids.shape == (3, 8)
    episodes = data.Episodes(corpus, data.load_tokenizer(toy), 4, 2, 1, 8, 1)
    assert episodes.read_pieces(np.random.default_rng(0), 512).shape == (512, data.PIECE)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    refuses(lambda: corpus.check(2000), "outside the vocabulary of 2000")


def test_data_that_no_run_can_read_is_refused_in_one_line(toy, tmp_path):
    refuses(lambda: run(toy, tmp_path, "--vocab_size=65537"), "vocab_size = 65537 is above 65536", "uint16")
    folder = sparse_bins(tmp_path / "characters", 10**6)
    (folder / "meta.pkl").write_bytes(b"")
    refuses(lambda: run(folder, tmp_path / "run", "--meta_share=0"), "character-level", "meta.pkl")


# ---- a run made longer ----


def run(toy, out_dir, *flags):
    train.main([*TOY, f"--data={toy}", f"--out_dir={out_dir}", "--eval_episodes=0", *flags])
    return checkpoint.newest(out_dir)


def test_a_bad_id_that_is_met_late_stops_the_run_with_a_checkpoint(toy, tmp_path):
    """It ended the run between two checkpoints, with advice that a resume refused, and met it again."""
    shutil.copytree(toy, folder := tmp_path / "data")
    whole = run(folder, tmp_path / "whole", "--max_steps=6")
    path = data.open_corpus(folder)[0].paths[0]
    original, micro_step = path.read_bytes(), schedule.Schedule.micro_step

    def damage_before_step_3(plan, number, *args):
        if number == 3 * plan.micro_steps:
            np.memmap(path, "<u2", "r+", 4 * data.HEADER)[:] = 65535
        return micro_step(plan, number, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule.Schedule, "micro_step", damage_before_step_3)
        refuses(lambda: run(folder, tmp_path / "run", "--max_steps=6"), f"{path}: token id 65535 at ",
                "mend that, and the same command resumes from step 3")
    assert checkpoint.newest(tmp_path / "run")["step"] == 3
    path.write_bytes(original)
    resumed = run(folder, tmp_path / "run", "--max_steps=6")
    assert all(same(resumed[key], whole[key]) for key in ("model", "learner", "optimizers", "tokens"))


def test_a_bin_cut_short_in_mid_run_is_named(toy, tmp_path):
    """Reading a memory map past the end of its file ends a process with a bus error, without a word."""
    shutil.copytree(toy, folder := tmp_path / "data")
    corpus = data.open_corpus(folder)[0]
    sequences = data.Sequences(corpus, 8, 1)
    os.truncate(corpus.paths[0], 4096)
    refuses(lambda: sequences[range(4)], f"{corpus.paths[0]} had ", "bytes, now it has 4,096")


def test_a_bin_removed_in_mid_run_stops_it_with_a_checkpoint(toy, tmp_path, monkeypatch):
    """The FileNotFoundError of a look at its size ended the run with a traceback and without a checkpoint."""
    shutil.copytree(toy, folder := tmp_path / "data")
    path, micro_step = data.open_corpus(folder)[0].paths[0], schedule.Schedule.micro_step

    def remove_before_step_3(plan, number, *args):
        if number == 3 * plan.micro_steps:
            path.unlink()
        return micro_step(plan, number, *args)

    monkeypatch.setattr(schedule.Schedule, "micro_step", remove_before_step_3)
    refuses(lambda: run(folder, tmp_path / "run", "--max_steps=6", "--meta_share=0"),
            f"cannot read {path}: No such file or directory", "the same command resumes from step 3")
    assert checkpoint.newest(tmp_path / "run")["step"] == 3


def learning_rates(out_dir):
    lines = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def test_a_finished_run_goes_on_to_a_larger_max_steps(toy, tmp_path, capsys):
    run(toy, tmp_path, "--max_steps=5")
    assert learning_rates(tmp_path)[5] == pytest.approx(1e-3 / 3)
    capsys.readouterr()
    state = run(toy, tmp_path, "--max_steps=8")
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("length")]
    assert note == ["length    max_steps = 8, 5 before: the learning rate goes on at 5.00e-04 and falls to 0 "
                    "at step 8"]
    assert state["step"] == 8 and state["config"]["max_steps"] == 8
    assert json.loads((tmp_path / "config.json").read_text())["max_steps"] == 8
    rates = learning_rates(tmp_path)
    assert list(rates) == list(range(1, 9))
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx([5e-4, 1e-3 / 3, 1e-3 / 6])
    run(toy, tmp_path, "--max_steps=8")
    assert "length" not in capsys.readouterr().out


def test_where_the_schedule_does_not_depend_on_it_a_longer_run_is_bit_identical(toy, tmp_path):
    """During warm-up the rate does not depend on the length: 3 + 3 more steps equal 6."""
    flags = ["--warmup_steps=9", "--checkpoint_every=3", "--eval_every=3", "--probe_every=3"]
    run(toy, tmp_path / "longer", "--max_steps=3", *flags)
    longer = run(toy, tmp_path / "longer", "--max_steps=6", *flags)
    whole = run(toy, tmp_path / "whole", "--max_steps=6", *flags)
    assert all(same(longer[key], whole[key]) for key in ("model", "learner", "optimizers", "tokens"))


def test_within_the_warm_up_the_note_says_that_the_rate_still_rises(toy, tmp_path, capsys):
    run(toy, tmp_path, "--max_steps=2", "--warmup_steps=4", "--meta_share=0")
    run(toy, tmp_path, "--max_steps=3", "--warmup_steps=4", "--meta_share=0")
    assert "max_steps = 3, 2 before: it ends within warmup_steps = 4\n" in capsys.readouterr().out
    run(toy, tmp_path, "--max_steps=8", "--warmup_steps=4", "--meta_share=0")
    assert ("goes on at 1.00e-03, rises to 1.00e-03 at step 4 and falls to 0 at step 8\n"
            in capsys.readouterr().out)


def test_a_length_that_would_change_what_was_read_is_refused(toy, tmp_path):
    """Episodes end at a share of the length: with another, sequences would have been numbered otherwise."""
    flags = ["--meta_decay=0.5", "--meta_share=0.5", "--meta_start=0", "--checkpoint_every=2", "--keep=9"]
    run(toy, tmp_path, "--max_steps=6", *flags)
    refuses(lambda: run(toy, tmp_path, "--max_steps=12", *flags), "meta_decay = 0.5",
            "max_steps = 12 in place of 6", "before step 6", f"--init_from={tmp_path}")
    for step in (4, 6):  # at step 2 of 6 they have not ended, whichever the length
        (tmp_path / f"ckpt_{step:06d}.pt").unlink()
    longer = run(toy, tmp_path, "--max_steps=12", *flags)
    assert longer["tokens"] == run(toy, tmp_path / "whole", "--max_steps=12", *flags)["tokens"]


def test_a_vanilla_run_is_made_longer_whatever_meta_decay_says(toy, tmp_path, capsys):
    """It was refused since its episodes would have ended elsewhere, and it has none."""
    flags = ["--meta_decay=0.5", "--meta_share=0", "--meta_start=0"]
    run(toy, tmp_path, "--max_steps=4", *flags)
    assert run(toy, tmp_path, "--max_steps=8", *flags)["step"] == 8
    assert "max_steps = 8, 4 before" in (said := capsys.readouterr().out) and "episodes decays" not in said


def test_a_run_of_another_order_of_sequences_is_not_resumed(toy, tmp_path):
    """An epoch's permutation was made another way: a resume would read some text twice, and some never."""
    run(toy, tmp_path, "--max_steps=2")
    state = torch.load(tmp_path / "ckpt_000002.pt", weights_only=True)
    del state["data_order"]
    torch.save(state, tmp_path / "ckpt_000002.pt")
    refuses(lambda: run(toy, tmp_path, "--max_steps=4"), "older version", "--init_from")


def test_a_run_is_not_made_shorter_than_it_is(toy, tmp_path, capsys):
    run(toy, tmp_path, "--max_steps=6", "--checkpoint_every=3")
    refuses(lambda: run(toy, tmp_path, "--max_steps=5"), "has done 6 steps, max_steps = 5", "--out_dir")
    (tmp_path / "ckpt_000006.pt").unlink()
    capsys.readouterr()
    assert run(toy, tmp_path, "--max_steps=4")["step"] == 4
    assert "max_steps = 4, 6 before: the learning rate goes on at 5.00e-04" in capsys.readouterr().out


# ---- a run from another's weights ----


@pytest.fixture(scope="module")
def first(toy, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("first")
    run(toy, out_dir, "--max_steps=2", "--meta_share=0")
    return out_dir


@pytest.mark.parametrize("name", ["", "ckpt_000002.pt"])
def test_a_new_run_starts_from_the_weights_of_another(toy, tmp_path, first, capsys, name):
    """With another rate, objective and context; not at all moved by an update of rate 0."""
    changes = ["--lr=1e-9", "--weight_decay=0", "--meta_share=0.5", "--context=16"]
    state = run(toy, tmp_path, "--max_steps=1", f"--init_from={first / name}", *changes)
    theirs = checkpoint.newest(first)["model"]
    assert all((state["model"][key] - theirs[key]).abs().max() < 1e-6 for key in theirs)
    assert state["config"]["init_from"] == str(first / name) and state["step"] == 1
    assert f"start     from the model of {first / name}" in capsys.readouterr().out
    # A resume takes its own weights, whatever the flag says, and keeps the record.
    again = run(toy, tmp_path, "--max_steps=2", "--init_from=nowhere", *changes)
    assert again["step"] == 2 and again["config"]["init_from"] == str(first / name)
    assert json.loads((tmp_path / "config.json").read_text())["init_from"] == str(first / name)


def test_weights_that_do_not_fit_are_refused_in_one_line(toy, tmp_path, first):
    def start(*flags, data=toy):
        return lambda: run(data, tmp_path / "new", "--max_steps=1", *flags)

    refuses(start(f"--init_from={tmp_path}/none"), "no checkpoint at")
    refuses(start(f"--init_from={tmp_path}"), "no checkpoint in")
    refuses(start(f"--init_from={first}", "--n_layers=3", "--n_heads=4"), "another model",
            "n_layers = 2 there, 3 here; n_heads = 2 there, 4 here")
    # These fit by shape, and were taken: the weights meant something else.
    refuses(start(f"--init_from={first}", "--rope_theta=500", "--norm_eps=0.1"), "another model",
            "rope_theta = 10000.0 there, 500.0 here; norm_eps = 1e-06 there, 0.1 here")
    # A checkpoint alone was taken to have GPT-2's tokenizer.
    alone = shutil.copy(first / "ckpt_000002.pt", tmp_path / "alone.pt")
    refuses(start(f"--init_from={alone}"), f"init_from = {alone}: no tokenizer.json beside it")
    other = tmp_path / "other"
    other.mkdir()
    for path in toy.glob("*.bin"):
        (other / path.name).symlink_to(path)
    spec = json.loads((toy / "tokenizer.json").read_text())
    spec["tokens"][300:302] = reversed(spec["tokens"][300:302])
    (other / "tokenizer.json").write_text(json.dumps(spec))
    refuses(start(f"--init_from={first}", data=other), "has the tokenizer toy", "another one named toy",
            f"--tokenizer={first}")
    assert not (tmp_path / "new").exists()
