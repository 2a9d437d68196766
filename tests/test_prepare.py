"""prepare.py: sources become documents, documents become bins."""

import gzip
import json

import numpy as np
import pytest
from conftest import SHARED, refuses

import data
import prepare
from data import Episodes, open_bin, open_corpus


def run(tmp_path, **options):
    prepare.prepare(prepare.Config(**({"out": str(tmp_path / "bins"), "vocab_size": 400} | options)))
    tokenizer = data.load_tokenizer(str(tmp_path / "bins"))
    train, val = open_corpus(tmp_path / "bins")
    return tokenizer, train, val


def test_sources_become_the_same_documents(tmp_path):
    texts = [
        f"Document number {i} speaks of the number {i * i} and no other.\n\nIt has a second paragraph."
        for i in range(40)
    ]
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts[:10]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in texts[10:20]) + "\n\n")
    (tmp_path / "c").mkdir()
    with gzip.open(tmp_path / "c" / "one.txt.gz", "wt") as file:
        file.write("\n\n\n".join(texts[20:30]))
    (tmp_path / "c" / "two.md").write_text("\n\n\n".join(texts[30:]))
    (tmp_path / "c" / "skipped.html").write_text("<html>")
    tokenizer, train, val = run(
        tmp_path,
        source=",".join(str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz", "c")),
        val_share=0.1,
        shard_tokens=500,
    )
    assert len(train.shards) > 1

    def split(corpus):
        return "".join(tokenizer.decode(shard.tolist()) for shard in corpus.shards).split("<|endoftext|>")[1:]

    assert (
        split(train) == [text for i, text in enumerate(texts) if i % 10 != 9]
        and split(val["val"]) == texts[9::10]
    )
    meta = json.loads((tmp_path / "bins" / "meta.json").read_text())
    assert (
        meta["tokens"] == {"train": train.tokens, "val": val["val"].tokens}
        and 258 < meta["vocab_size"] == tokenizer.n_vocab <= 400
    )
    assert tokenizer.encode("<|mask|>", allowed_special="all") == [tokenizer.n_vocab - 1]


def test_preparing_twice_gives_the_same_bytes_and_never_overwrites(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"some words, and the word {i}" for i in range(300)))
    for out in ("x", "y"):
        prepare.prepare(
            prepare.Config(out=str(tmp_path / out), source=str(tmp_path / "a.txt"), vocab_size=300)
        )
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in names)
    refuses(lambda: prepare.prepare(prepare.Config(out=str(tmp_path / "x"))), "exists already", "--out=")


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.jsonl")), "a.jsonl, line 2", "'text' field")
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.jsonl")), "line 1", "is not text: 3")
    refuses(lambda: run(tmp_path, source=str(tmp_path / "nowhere.txt")), "is not a file or folder")
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08 and no more")
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.txt.gz")), "cannot read", "a.txt.gz")
    (tmp_path / "a.txt.gz").unlink()
    refuses(
        lambda: run(tmp_path, source=str(tmp_path / "a.jsonl"), val=str(tmp_path / "typo.txt")),
        "no file",
        "typo.txt",
    )
    refuses(
        lambda: run(tmp_path, source=str(tmp_path / "a.jsonl"), out=str(tmp_path / "a.jsonl" / "bins")),
        "cannot write",
    )
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}\n')
    refuses(
        lambda: run(tmp_path, source=str(tmp_path / "a.jsonl")),
        "fewer than 50 documents leave none for validation",
    )
    (tmp_path / "empty").mkdir()
    refuses(lambda: run(tmp_path, source=str(tmp_path / "empty")), "holds no .txt, .md or .jsonl file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "empty"]


def test_a_long_text_without_blank_lines_is_cut_so_that_memory_stays_bounded(tmp_path):
    for text in ("a line of text\n" * 200_000, "no line ends " * 200_000):
        (tmp_path / "a.txt").write_text(text)
        sizes = [len(part) for part in prepare.read_documents(tmp_path / "a.txt", "text")]
        assert max(sizes) <= 2**17 and len(sizes) > 1 and sum(sizes) > len(text) - 100


def test_max_tokens_stops_the_reading(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join("words " * 1000 for _ in range(3000)))
    _, train, _ = run(tmp_path, source=str(tmp_path / "a.txt"), max_tokens=100_000)
    assert 100_000 <= train.tokens < 1_000_000
    (tmp_path / "v.txt").write_text("other words")
    more = str(tmp_path / "more")
    prepare.prepare(
        prepare.Config(
            out=more,
            source=str(tmp_path / "a.txt"),
            max_tokens=1000,
            val=str(tmp_path / "v.txt"),
            vocab_size=300,
        )
    )
    train, val = open_corpus(more)
    assert 1000 <= train.tokens < 1_000_000 and list(val) == ["v"], "the limit is on the training text alone"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_real_text_with_the_gpt2_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    corpus = SHARED / "corpus"
    tokenizer, train, val = run(
        tmp_path,
        source=f"{corpus}/state_union.train.txt",
        val=f"{corpus}/state_union.val.txt,{corpus}/inaugural.val.txt",
        tokenizer="gpt2",
    )
    assert tokenizer.n_vocab == 50258 and tokenizer.encode_single_token("<|mask|>") == 50257
    assert list(val) == ["inaugural", "state_union"]
    text = tokenizer.decode(np.concatenate(train.shards).tolist()).replace("<|endoftext|>", "\n").split()
    assert text == (corpus / "state_union.train.txt").read_text().split()
    words, windows = Episodes(train, tokenizer, 32, 4, 1, 64, 0).episode(0)
    ids = windows[:, :, 0]
    assert len(set(words.tolist())) == 32 and ids.shape == (32, 5, 64) and (ids[..., -1] == 50257).all()


def test_shards_round_trip(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 2500).astype("<u2")
    writer = prepare.ShardWriter(tmp_path, "train", 1000)
    for part in np.split(tokens, [1, 999, 1000, 2100]):
        writer.write(part)
    writer.close()
    paths = sorted(tmp_path.glob("*.bin"))
    assert [path.name for path in paths] == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert [len(open_bin(path)) for path in paths] == [1000, 1000, 500]
    assert np.array_equal(np.concatenate([open_bin(path) for path in paths]), tokens)
    assert np.fromfile(paths[2], "<i4", 256).tolist() == [20240520, 1, 500] + [0] * 253


@pytest.mark.parametrize(
    "name, domain",
    [
        ("constraints.txt", "constraints"),
        ("2024news.val.txt", "2024news"),
        ("2024.md", "2024"),
        ("train.jsonl", "train"),
        ("a_val.txt", "a_val"),
    ],
)
def test_a_validation_file_of_any_name_stays_out_of_training(tmp_path, name, domain):
    """`"train" in path.name` once took val_constraints_000000.bin for training data."""
    text = "\n\n\n".join(f"some words, and the word {i}" for i in range(50))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    _, train, val = run(tmp_path, source=str(tmp_path / "text.txt"), val=str(tmp_path / name))
    assert list(val) == [domain] and [path.name for path in train.paths] == ["train_000000.bin"]
    refuses(
        lambda: run(tmp_path, out=str(tmp_path / "other"), val=f"x/{name},{name}"), "names two files alike"
    )
