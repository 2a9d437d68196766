"""A corpus of any size, bins that change in mid-run, a run made longer, a run from another's weights."""
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from conftest import refuses, run, same

import data
import schedule
from nanomaml import bins, checkpoint

VANILLA = ["--meta_share=0", "--eval_episodes=0", "--eval_every=0", "--probe_every=0"]
STATE = ("model", "learner", "optimizers", "tokens")


def test_what_a_run_reads_at_its_start_does_not_grow_with_the_corpus(tmp_path, toy):
    """The order of an epoch, the check of every id and the validation sequences did. nanoGPT's bins of ten
    billion tokens: random ids here and there, and zeros between that take no space on the disk.
    """
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        with open(tmp_path / f"{name}.bin", "wb") as file:
            for start in range(0, 10**10, 5 * 10**8):
                file.seek(2 * start)
                file.write(rng.integers(0, 3000, 50_000, dtype="<u2").tobytes())
            file.truncate(2 * 10**10)
        if os.stat(tmp_path / f"{name}.bin").st_blocks * 512 > 1e9:
            pytest.skip("this file system has no sparse files")
    tracemalloc.start()
    corpus, validation = data.open_corpus(tmp_path)
    for split in (corpus, validation["val"]):
        split.check(3000)
        assert len(split.digest) == 16 and 0 < split.unigram_entropy() < 8
    sequences = data.Sequences(corpus, 8, 1)
    last = int(sequences.ends[-1]) - 1
    assert sequences[[0, last, 5 * last]].ids.shape == (3, 8)
    assert data.eval_sequences(validation["val"], 8, 64).ids.shape == (64, 8)
    episodes = data.Episodes(corpus, data.load_tokenizer(toy), ways=4, shots=2, queries=1, window=8, seed=1)
    assert episodes.read_chunks(np.random.default_rng(0), 512).shape == (512, data.CHUNK)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    refuses(lambda: corpus.check(2000), "outside the vocabulary of 2000")


@pytest.fixture(scope="module")
def four(toy, tmp_path_factory):
    return run(toy, tmp_path_factory.mktemp("four"), "--max_steps=4", *VANILLA)[0]


@pytest.mark.parametrize("damage, says", [
    (lambda path: np.memmap(path, "<u2", "r+", 4 * bins.HEADER).fill(65535), "{path}: token id 65535 at "),
    (lambda path: os.truncate(path, 4096), "{path} had 201,024 bytes, now it has 4,096"),
    (lambda path: path.unlink(), "cannot read {path}: No such file or directory"),
])
def test_a_bin_that_changes_stops_the_run_with_a_checkpoint(toy, tmp_path, monkeypatch, four, damage, says):
    """A bad id ended the run between two checkpoints, with advice that a resume refused; a map read past the
    end of its file ends a process with a bus error, without a word; a file that was gone gave a traceback.
    """
    shutil.copytree(toy, folder := tmp_path / "data")
    path, micro_step = data.open_corpus(folder)[0].paths[0], schedule.Schedule.micro_step
    original = path.read_bytes()

    def damage_before_step_2(plan, number, *args):
        if number == 2 * plan.micro_steps:
            damage(path)
        return micro_step(plan, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(schedule.Schedule, "micro_step", damage_before_step_2)
        refuses(lambda: run(folder, tmp_path / "run", "--max_steps=4", *VANILLA),
                says.format(path=path), "resumes from step 2")
    path.write_bytes(original)
    resumed, _ = run(folder, tmp_path / "run", "--max_steps=4", *VANILLA)
    assert all(same(resumed[key], four[key]) for key in STATE)


def test_a_finished_run_goes_on_to_a_larger_max_steps(toy, tmp_path):
    """Bit-identical within the warm-up, whose rate does not depend on it. To a smaller one from earlier."""
    flags = [*VANILLA, "--warmup_steps=6"]
    run(toy, tmp_path / "run", "--max_steps=3", *flags)
    six, whole = (run(toy, tmp_path / name, "--max_steps=6", *flags)[0] for name in ("run", "whole"))
    assert all(same(six[key], whole[key]) for key in STATE)
    state, lines = run(toy, tmp_path / "run", "--max_steps=9", *flags)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lengths"] == [3, 6]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == state["step"] == 9
    rates = [line["lr"] * 1000 for line in lines if "lr" in line]
    assert rates == pytest.approx([1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1, 1, 2 / 3, 1 / 3])
    run(toy, tmp_path / "run", "--max_steps=9", *flags)
    refuses(lambda: run(toy, tmp_path / "run", "--max_steps=7", *flags), "has done 9 steps, max_steps = 7")
    (tmp_path / "run" / "ckpt_000009.pt").unlink()
    assert run(toy, tmp_path / "run", "--max_steps=7", *flags)[0]["step"] == 7


@pytest.mark.parametrize("name", ["", "ckpt_000010.pt"])
def test_a_new_run_starts_from_the_weights_of_another(toy, tmp_path, whole, name):
    """With another rate, objective and context. A resume takes its own weights, and keeps the record."""
    changes = ["--lr=1e-9", "--weight_decay=0", "--context=16", *VANILLA]
    state, _ = run(toy, tmp_path, "--max_steps=1", f"--init_from={whole / name}", *changes)
    theirs = checkpoint.newest(whole)["model"]
    assert all((state["model"][key] - theirs[key]).abs().max() < 1e-6 for key in theirs)
    again, _ = run(toy, tmp_path, "--max_steps=2", "--init_from=nowhere", *changes)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [state["step"], again["step"], saved["max_steps"]] == [1, 2, 2]
    assert {cfg["init_from"] for cfg in (state["config"], again["config"], saved)} == {str(whole / name)}


def test_weights_that_do_not_fit_are_refused_in_one_line(toy, tmp_path, whole):
    """Another rope_theta fits by shape, and was taken, as was a checkpoint alone, to have GPT-2's tokens."""
    alone, other = shutil.copy(whole / "ckpt_000010.pt", tmp_path / "alone.pt"), tmp_path / "other"
    shutil.copytree(toy, other)
    spec = json.loads((toy / "tokenizer.json").read_text())
    spec["tokens"][300:302] = reversed(spec["tokens"][300:302])
    (other / "tokenizer.json").write_text(json.dumps(spec))
    for source, folder, flags, *says in (
        (tmp_path, toy, [], "no checkpoint in"),
        (whole, toy, ["--n_layers=3", "--n_heads=4"], "n_layers = 2 there, 3 here; n_heads = 2 there, 4"),
        (whole, toy, ["--rope_theta=500"], "another model", "rope_theta = 10000.0 there, 500.0 here"),
        (alone, toy, [], f"init_from = {alone}: no tokenizer.json beside it"),
        (whole, other, [], "has the tokenizer toy", f"--tokenizer={whole}"),
    ):
        argv = folder, tmp_path / "new", f"--init_from={source}", *flags
        refuses(lambda argv=argv: run(*argv), *says)
    assert not (tmp_path / "new").exists()
