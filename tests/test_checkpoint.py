import io
import math
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from model import Decoder, ModelConfig
from nanomaml import checkpoint
from nanomaml.config import UserError

CFG = ModelConfig(d_model=24, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=50, context=16)


def state(step):
    decoder = Decoder(CFG, torch.Generator().manual_seed(step))
    return {"step": step, "model": decoder.state_dict(), "config": vars(CFG) | {"lr": 1e-3}}


def test_the_newest_and_every_kth_are_kept_and_no_partial_file(tmp_path):
    for step in (0, 50, 100, 150, 200, 1_000_000):
        checkpoint.save(tmp_path, state(step), keep=2, keep_every=100)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [0, 100, 200, 1_000_000]
    assert all(path.name.startswith("ckpt_") and path.suffix == ".pt" for path in tmp_path.iterdir())


def test_load_model_takes_a_run_or_a_file(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), keep=5)
    for path, step in ((tmp_path, 2), (tmp_path / "ckpt_000001.pt", 1)):
        decoder = checkpoint.load_model(path)
        assert not decoder.training and decoder.cfg == CFG
        assert all(
            torch.equal(a, b) for a, b in zip(decoder.state_dict().values(), state(step)["model"].values())
        )
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_model(tmp_path / "..")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_model(tmp_path / "ckpt_000009.pt")


def test_a_save_never_deletes_itself_and_drops_the_steps_that_a_resume_gave_up(tmp_path):
    """Pruning once counted damaged files of later steps among the newest, and so deleted what it had just
    written.
    """
    for step in (1000, 1250, 1500):
        checkpoint.save(tmp_path, state(step), keep=5)
    (tmp_path / "ckpt_001500.pt").write_bytes(b"")
    checkpoint.save(tmp_path, state(1100), keep=1, keep_every=1000)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [1000, 1100]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path):
    """It once did, and emptied the logs."""
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), keep=5).write_bytes(b"PK")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.newest(tmp_path)


def test_a_good_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(tmp_path, monkeypatch):
    """It counted as damaged; the run then went on from an older one and deleted it."""
    checkpoint.save(tmp_path, state(1), keep=5)
    checkpoint.save(tmp_path, state(2), keep=5)

    def broken(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "open", broken, raising=False)
    with pytest.raises(UserError, match="cannot read checkpoint .*Input/output error"):
        checkpoint.newest(tmp_path)


def test_a_flipped_bit_anywhere_is_damage(tmp_path, capsys):
    """PyTorch loads flipped weights without a word; one flip in an entry's attributes made it load zeros."""
    for step in (1, 2):
        path = checkpoint.save(tmp_path, state(step), keep=5)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    ends = range(directory, len(content), 7), range(len(content) - 40, len(content))
    for i in (*range(0, directory, 397), *ends[0], *ends[1]):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1:])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.read(path)
    assert checkpoint.newest(tmp_path)["step"] == 1
    assert "ckpt_000002.pt is damaged" in capsys.readouterr().err
    for length in (0, 9, *range(len(content) - 16, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.read(path)
    path.write_bytes(content)
    assert checkpoint.newest(tmp_path)["step"] == 2


def test_torch_loads_a_checkpoint_as_it_is(tmp_path):
    path = checkpoint.save(tmp_path, state(3), keep=1)
    for options in ({}, {"mmap": True}):
        model = torch.load(path, weights_only=True, **options)["model"]
        assert all(torch.equal(model[name], p) for name, p in state(3)["model"].items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    """A good one was deleted for it."""
    for step in (1, 2):
        path = checkpoint.save(tmp_path, state(step), keep=5)
    path.write_bytes(b"PK")
    checkpoint.save(tmp_path, state(3), keep=2, keep_every=9)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [1, 3]


def test_checkpoints_are_not_read_again_when_one_is_saved(tmp_path, monkeypatch):
    """At 570M that would be 7 GB each time."""
    monkeypatch.setattr(checkpoint, "check", None)
    for step in range(4):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path)] == [2, 3]
    monkeypatch.undo()
    checkpoint.whole.clear()
    read = []
    real = checkpoint.check
    monkeypatch.setattr(checkpoint, "check", lambda path: read.append(path.name) or real(path))
    for step in (4, 5):
        checkpoint.save(tmp_path, state(step), keep=3, keep_every=1)
    assert read == ["ckpt_000003.pt", "ckpt_000002.pt"]


@pytest.mark.parametrize("change", [{"step": -1}, {"step": 6}, {"step": 3}, {"step": True}, {"step": 4.0},
                                    {"model": []}, {"config": None}, {"config": {"max_steps": 3}}])
def test_a_step_that_is_not_the_names_or_outside_the_run_is_damage(tmp_path, change):
    checkpoint.save(tmp_path, state(1), keep=5)
    content = state(4)
    content["config"]["max_steps"] = 5
    checkpoint.save(tmp_path, content, keep=5)
    assert checkpoint.newest(tmp_path)["step"] == 4
    file = io.BytesIO()
    torch.save(content | change, file)
    whole = file.getvalue() + checkpoint.TRAILER % zlib.crc32(file.getvalue())
    (tmp_path / "ckpt_000004.pt").write_bytes(whole)
    checkpoint.check(tmp_path / "ckpt_000004.pt")
    with pytest.raises(checkpoint.Damaged):
        checkpoint.read(tmp_path / "ckpt_000004.pt")
    assert checkpoint.newest(tmp_path)["step"] == 1


@pytest.mark.parametrize("settings", [{"context": 10**8}, {"vocab_size": 6 * 10**7}, {"vocab_size": 10**6},
                                      {"n_layers": 900}, {"d_model": 48}])
def test_a_model_of_other_sizes_than_its_weights_takes_no_memory(tmp_path, settings):
    """A small file could ask for all memory, or for hours."""
    state = {"step": 1, "config": vars(CFG) | settings, "model": Decoder(CFG).state_dict()}
    with pytest.raises(UserError, match="holds no model of train.py|must be in 1 to"):
        checkpoint.load_model(state)
    state["model"]["lm_head.weight"][0, 0] = math.nan
    checkpoint.save(tmp_path, state, keep=1)
    with pytest.raises(UserError, match="not finite: lm_head.weight"):
        checkpoint.load(tmp_path / "ckpt_000001.pt")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """PyTorch's internal text was printed in its place."""
    def full(path, mode):
        return open("/dev/full", "wb")

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(checkpoint, "open", full, raising=False)
    with pytest.raises(UserError, match="cannot write checkpoint .*ckpt_000001.pt: No space left on device$"):
        checkpoint.save(tmp_path, state(1), keep=5)
