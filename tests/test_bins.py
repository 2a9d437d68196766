"""nanomaml/bins.py: which files are bins, and what is refused in one line."""
import numpy as np
import pytest
from conftest import refuses, write_bin

from nanomaml import bins
from nanomaml.bins import STRETCH, Corpus, open_bin, open_corpus


def test_bins_of_llm_c_and_of_nanogpt_are_read(tmp_path):
    for folder in ("llmc", "nanogpt"):
        (tmp_path / folder).mkdir()
    write_bin(tmp_path / "llmc" / "fineweb_train_000001.bin", [1, 2, 3])
    write_bin(tmp_path / "llmc" / "fineweb_val_000000.bin", [4, 5])
    np.array([1, 2, 3], "<u2").tofile(tmp_path / "nanogpt" / "train.bin")
    np.array([4, 5], "<u2").tofile(tmp_path / "nanogpt" / "val.bin")
    for folder in ("llmc", "nanogpt"):
        train, val = open_corpus(tmp_path / folder)
        assert train.shards[0].tolist() == [1, 2, 3] and train.tokens == 3
        assert list(val) == ["val"] and val["val"].shards[0].tolist() == [4, 5]
    for name in ("val_news-2_000000", "val_news-2_000001", "val_blogs_000000"):
        write_bin(tmp_path / "llmc" / f"{name}.bin", [1, 2])
    counts = {name: len(split.paths) for name, split in open_corpus(tmp_path / "llmc")[1].items()}
    assert counts == {"news-2": 2, "blogs": 1, "val": 1}, "by domain"


WHOLE = np.array([20240520, 1, 100, *[0] * 253], "<i4").tobytes() + np.arange(100, dtype="<u2").tobytes()


@pytest.mark.parametrize("name, content, says", [
    ("a_train", WHOLE[:-2], "the header says 100 tokens, the file holds 99"),
    ("a_train", WHOLE + b"ab", "holds 101"),
    ("a_train", WHOLE + WHOLE[1024:], "holds 200 of uint16"),
    ("a_train", WHOLE[:1000], "holds -12"),
    ("a_train", b"\1" + WHOLE[1:], "not with 20240520 as a token bin"),
    ("a_train", WHOLE[:4] + b"\2" + WHOLE[5:], "version 2, only 1"),
    ("a_train", b"", "starts with nothing"),
    ("val", b"abc", "3 bytes are not a positive number of uint16 tokens"),
    ("train", np.array([20240801, 7], "<i4").tobytes() + WHOLE[8:], "llm.c writes for Llama 3"),
    ("train", b"\x93NUMPY\1\0" + WHOLE[8:], "a NumPy array; a bin holds uint16: write ids"),
    ("train", b"PK\3\4" + WHOLE[4:], "a zip archive"),
])
def test_what_is_no_bin_or_not_whole_is_refused(tmp_path, name, content, says):
    path = tmp_path / f"{name}.bin"
    path.write_bytes(content)
    refuses(lambda: open_bin(path), str(path), says)


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8"])
def test_headerless_bins_of_wider_integers_are_refused(tmp_path, dtype):
    """Their halves were read as tokens, every second one 0. Ids above 65,535 are not all 0 there."""
    path, rng = tmp_path / "train.bin", np.random.default_rng(0)
    for vocab_size in (65, 50257, 128256):
        rng.integers(0, vocab_size, 5000).astype(dtype).tofile(path)
        refuses(lambda: open_bin(path), str(path), "32 or 64 bits", ".astype('<u2').tofile('train.bin')")
    for good in (rng.integers(0, 65, 5000), np.zeros(5000), rng.integers(0, 4, 5000), np.arange(5000) % 9):
        good.astype("<u2").tofile(path)
        assert open_bin(path).tolist() == good.tolist()


def test_a_folder_that_lacks_bins_or_names_them_unclearly_is_refused(tmp_path):
    refuses(lambda: open_corpus(tmp_path / "none"), "no data at", "python prepare.py")
    for name, says in (("val_0", "holds no train bins"), ("a_train", None),
                       ("train-00001", "is train-00001.bin for training or validation?")):
        write_bin(tmp_path / f"{name}.bin", [1, 2])
        if says:
            refuses(lambda: open_corpus(tmp_path), str(tmp_path), says)


def test_unigram_entropy(tmp_path):
    write_bin(tmp_path / "val.bin", [3] * 50 + [4] * 25 + [900] * 25)
    assert Corpus([tmp_path / "val.bin"]).unigram_entropy() == pytest.approx(1.5 * np.log(2))
    kinds = np.repeat(np.arange(16), 500_000)  # once only the first tokens counted, here all of one kind
    kinds.astype("<u2").tofile(tmp_path / "val.bin")
    assert Corpus([tmp_path / "val.bin"]).unigram_entropy() == pytest.approx(np.log(16), rel=1e-2)


@pytest.mark.parametrize("place, is_sampled", [(100, True), (2 * STRETCH + 100, False)])
def test_an_id_outside_the_vocabulary_is_reported_by_the_sample_or_when_it_is_read(
        tmp_path, monkeypatch, place, is_sampled):
    monkeypatch.setattr(bins, "STRETCHES", 4)
    path, ids = tmp_path / "train.bin", np.full(16 * STRETCH, 9)
    ids[place] = 700
    write_bin(path, ids)
    corpus = Corpus([path])
    corpus.check(701)
    message = f"{path}: token id 700 at {place:,} is outside the vocabulary of 700"
    if is_sampled:
        refuses(lambda: corpus.check(700), message)
    else:
        corpus.check(700)
    refuses(lambda: corpus.read(0, place - 5, 20), message)
    assert corpus.read(0, place + 1, 20).tolist() == [9] * 20
