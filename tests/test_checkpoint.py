import zipfile

import pytest
import torch

import checkpoint
from config import UserError
from model import Decoder, ModelConfig

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

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", broken)
    with pytest.raises(UserError, match="cannot read checkpoint .*Input/output error"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write checkpoint .*nowhere"):
        checkpoint.save(tmp_path / "nowhere", state(1), keep=1)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_is_told_and_the_one_before_is_used(tmp_path, capsys, damage):
    """PyTorch loads a file with a flipped bit in its weights without a word."""
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), keep=5)
    path = tmp_path / "ckpt_000002.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200] ^= 1
    path.write_bytes({"truncated": content[:-500], "flipped": content, "empty": b""}[damage])
    assert checkpoint.newest(tmp_path)["step"] == 1
    assert "ckpt_000002.pt is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_model(path)
