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
        assert all(torch.equal(a, b) for a, b in zip(decoder.state_dict().values(), state(step)["model"].values()))
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_model(tmp_path / "..")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_model(tmp_path / "ckpt_000009.pt")


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
