"""prepare.py: sources become documents, documents become bins."""

import gzip
import itertools
import json
import os
import pydoc_data.topics
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from conftest import SHARED, refuses

import data
import prepare
import sources
from data import Episodes, open_bin, open_corpus

ROOT = Path(prepare.__file__).parent


def run(tmp_path, **options):
    prepare.prepare(prepare.Config(**({"out": str(tmp_path / "bins"), "vocab_size": 400} | options)))
    tokenizer = data.load_tokenizer(str(tmp_path / "bins"))
    train, val = open_corpus(tmp_path / "bins")
    return tokenizer, train, val


def byte_tokenizer(folder):
    """A folder with a tokenizer of single bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    data.save_tokenizer(data.encoding("bytes", prepare.PATTERN, ranks), folder)
    return str(folder)


def decoded(tokenizer, corpus):
    """The documents of a split's bins."""
    return tokenizer.decode(np.concatenate(corpus.shards).tolist()).split("<|endoftext|>")[1:]


def written(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
    """But the empty lock file: another process may be about to take it."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.jsonl")), "a.jsonl, line 2", "'text' field")
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.jsonl")), "line 1", "is not text: 3")
    refuses(lambda: run(tmp_path, source=str(tmp_path / "nowhere.txt")), "nowhere.txt: no such file")
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
    refuses(lambda: run(tmp_path, source=str(tmp_path / "empty")), "holds no file to read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bins.lock", "empty"]


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


# ---- words ----

SCRIPTS = {
    "Latin NFC": "café über naïve",
    "Latin NFD": unicodedata.normalize("NFD", "café über naïve"),
    "Devanagari": "हिन्दी विद्यालय कि",
    "Tamil": "தமிழ் மொழி பள்ளிக்கூடம்",
    "Thai": "ภาษาไทย กำลัง ที่นี่",
    "Arabic with harakat": "كِتَابٌ مَدْرَسَةٌ",
    "Hebrew with niqqud": "שָׁלוֹם סֵפֶר",
    "Cyrillic": "слово й ё и\u0306",
    "Korean": "한국어 학교",
    "Persian with a joiner": "می\u200cخواهم کتاب\u200cها",
    "Malayalam with a joiner": "അവന്\u200d നന്\u200cമ",
    "soft hyphens": "Donau\u00addampf\u00adschiff co\u00adoperate",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_word_keeps_its_marks(script):
    r"""\p{L}+ ended a word at a combining mark: 69% of Hindi words and 99% of Tamil ones were fragments."""
    words = SCRIPTS[script].split()
    tokenizer = prepare.train_tokenizer([" " + " ".join(words)] * 20, 2000)
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in words)


def test_what_is_in_a_word_is_the_same_for_the_pattern_and_for_the_episodes():
    """The pattern ended a word at a soft hyphen, where an episode did not."""
    for character in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(character)
        if category not in ("Cn", "Cs"):  # not yet a character for this Python; half of one
            in_one = regex.match(prepare.PATTERN, "x" + character).end() == 2
            assert in_one == data.in_word(character), f"U+{ord(character):04X} {category}"


def test_english_words_are_what_they_were():
    """Marks changed the pattern; that may change no token of English text, apostrophes included."""
    before = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    texts = [*pydoc_data.topics.topics.values(), "I don't, it's the dogs' 'own' l’homme; 1,234.5 £\n\n x"]
    texts += [path.read_text() for path in SHARED.glob("corpus/*.val.txt")]
    for text in texts:
        assert regex.findall(prepare.PATTERN, text) == regex.findall(before, text)
    assert regex.findall(prepare.PATTERN, "don't") == ["don", "'", "t"]


# ---- text ----


def test_what_is_no_text_encoding_is_refused_at_the_start():
    """`unicode_escape` and the like decode something, but no text."""
    for name in ("klingon", "", "hex", "rot13", "base64", "zlib", "idna", "punycode", "unicode_escape"):
        refuses(lambda name=name: prepare.Config(encoding=name), f"{name!r} is no text encoding", "gb18030")
    for name in ("UTF8", "utf-16-le", "gb18030", "latin-1", "cp037", "shift_jis"):
        prepare.Config(encoding=name)


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
@pytest.mark.parametrize("tokenizer", ["train", "of a folder"])
def test_a_million_blanks_do_not_reach_the_limit_of_the_regex_engine(tmp_path, space, tokenizer):
    """In one document they ended the run with a PanicException, which is no Exception."""
    text = "x" + space * 1_100_000 + "y"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("other", text)))
    if tokenizer != "train":
        tokenizer = byte_tokenizer(tmp_path)
    source = str(tmp_path / "a.jsonl")
    tokenizer, train, val = run(tmp_path, source=source, val_share=0.5, tokenizer=tokenizer)
    assert decoded(tokenizer, val["val"]) == [text]


def test_a_panic_of_a_library_is_one_line(tmp_path, monkeypatch):
    panic = type("PanicException", (BaseException,), {})
    (tmp_path / "a.txt").write_text("words")

    def train_tokenizer(documents, vocab_size):
        raise panic("regex match failed\nstack backtrace:")

    monkeypatch.setattr(prepare, "train_tokenizer", train_tokenizer)
    refuses(lambda: run(tmp_path, source=str(tmp_path / "a.txt")), "tokenizer failed", "regex match failed")
    assert not (tmp_path / "bins.partial").exists()


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(tmp_path):
    words = ["some", "naïve\u0301", "words,", "\n", " ", "12345", "don't"]
    text = " ".join(np.random.default_rng(0).choice(words, 60_000).tolist())
    tokenizer = prepare.train_tokenizer([text[:100_000]], 300)
    pieces = sources.PIECES.findall(text)
    assert len(pieces) > 3 and "".join(pieces) == text and max(map(len, pieces)) <= sources.LONGEST
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
    no_spaces = "ที่" * 50_000
    pieces = sources.PIECES.findall(no_spaces)
    assert "".join(pieces) == no_spaces and {piece[0] for piece in pieces} == {"ท"}, "marks stay with letters"
    (tmp_path / "a.txt").write_text("word " * 50_000)
    documents = list(sources.read_documents(tmp_path / "a.txt", "text"))
    assert len(documents) > 1 and {word for text in documents for word in text.split()} == {"word"}


def test_what_spells_a_special_token_is_ordinary_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n<|mask|> <|endoftext|> x\n")
    (tmp_path / "v.txt").write_text("words")
    tokenizer, train, _ = run(tmp_path, source=str(tmp_path / "a.txt"), val=str(tmp_path / "v.txt"))
    tokens = np.concatenate(train.shards)
    assert (tokens == tokenizer.eot_token).sum() == 2 and (tokens <= tokenizer.eot_token).all()


# ---- sources ----


def test_what_a_folder_holds_beside_text_is_named_once(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.TXT", "notes.pdf"):
        (tmp_path / "in" / name).write_text(f"words of {name}")
    run(tmp_path, source=str(tmp_path / "in"), val_share=0.5)
    assert capsys.readouterr().err.count("in: 2 files to read, 1 skipped (notes.pdf)\n") == 1


def test_names_that_make_no_sense_together_are_refused_before_anything_is_written(tmp_path):
    """A text trained on twice, a loss on what was trained on, and --source=,, that names nothing."""
    (tmp_path / "in").mkdir()
    for name in ("in/a.txt", "b.txt"):
        (tmp_path / name).write_text("words " * 100)
    (tmp_path / "link.txt").symlink_to("b.txt")
    (tmp_path / "v.csv").write_text("no text")
    folder, a, b = (str(tmp_path / name) for name in ("in", "in/a.txt", "b.txt"))
    for source, val, *says in (
        (",,", "", "source = ',,' names nothing"),
        (b, ",", "val = ',' names no file"),
        (f"{b},{b}", "", "b.txt would be read twice"),
        (f"{folder},{a}", "", "a.txt would be read twice", f"for {folder} and {a}"),
        (f"{b},{tmp_path}/link.txt", "", "b.txt would be read twice"),
        ("user/name,user/name::train", "", "would be read twice, for user/name and user/name::train"),
        (b, b, "b.txt is also trained on"),
        (folder, a, "a.txt is also trained on", f"source {folder} has it"),
        (b, str(tmp_path / "v.csv"), "v.csv: sources are", ".jsonl"),
        (b, folder, "there is no file"),
        (f"{b},x.csv", "", "x.csv: no such file"),
    ):
        refuses(lambda source=source, val=val: run(tmp_path, source=source, val=val), *says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "in", "link.txt", "v.csv"]


def test_a_name_with_a_comma_becomes_a_domain(tmp_path):
    for name in ("a,b.txt", "v,1.txt", "w.txt"):
        (tmp_path / name).write_text(f"words of {name}")
    val = f"{tmp_path}/v,1.txt,{tmp_path}/w.txt"
    tokenizer, train, val = run(tmp_path, source=f"{tmp_path}/a,b.txt", val=val)
    assert decoded(tokenizer, train) == ["words of a,b.txt"] and list(val) == ["v-1", "w"]


def test_rows_of_token_ids_go_straight_to_bins(tmp_path):
    """Pretokenized datasets have 2,049 ids a row, with an end token after each document: none is added."""
    tokenizer = byte_tokenizer(tmp_path)
    rows = np.random.default_rng(0).integers(0, 257, (40, 2049)).tolist()
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    options = {"source": str(tmp_path / "a.jsonl"), "val_share": 0.1, "shard_tokens": 10_000}
    _, train, val = run(tmp_path, tokenizer=tokenizer, **options)
    training = [row for i, row in enumerate(rows) if i % 10 != 9]
    assert np.array_equal(np.concatenate(train.shards), np.concatenate(training))
    assert np.array_equal(np.concatenate(val["val"].shards), np.concatenate(rows[9::10]))
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [1, 300]}')
    options = {"source": str(tmp_path / "a.jsonl"), "text_key": "ids", "out": str(tmp_path / "other")}
    refuses(lambda: run(tmp_path, tokenizer=tokenizer, **options), "a.jsonl, line 2", "id 300", "258 ids")


def test_a_tokenizer_trained_here_has_no_ids_of_rows_wherever_they_come(tmp_path, monkeypatch):
    """Rows of ids after the text that the training reads, or in a validation file, were taken for its ids."""
    (tmp_path / "text.txt").write_text("plain words\n" * 100)
    (tmp_path / "mixed.jsonl").write_text('{"text": "plain words"}\n{"text": [1, 2]}\n')
    text, mixed = (str(tmp_path / name) for name in ("text.txt", "mixed.jsonl"))
    enough = prepare.first_characters
    for limit in (2e8, 10):
        monkeypatch.setattr(prepare, "first_characters", lambda documents, _, n=limit: enough(documents, n))
        for source, val in ((mixed, ""), (f"{text},{mixed}", ""), (text, mixed)):
            says = "mixed.jsonl, line 2", "token ids", "--tokenizer=gpt2"
            refuses(lambda source=source, val=val: run(tmp_path, source=source, val=val), *says)


# ---- interruptions ----


def corpus_of(tmp_path, documents=600):
    texts = (f"Document {i}: " + f"word{i} " * 300 for i in range(documents))
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts))
    return {"source": str(tmp_path / "a.txt"), "vocab_size": 300, "shard_tokens": 50_000, "val_share": 0.1}


@pytest.mark.parametrize("maximum", [1, 99_999, 100_000, 100_001])
def test_max_tokens_is_exact(tmp_path, maximum):
    (tmp_path / "v.txt").write_text("word1 word2 word3")
    _, train, val = run(tmp_path, **corpus_of(tmp_path), max_tokens=maximum, val=str(tmp_path / "v.txt"))
    assert train.tokens == maximum


@pytest.mark.parametrize("break_at", [5, 250, 480, 599])
def test_a_stream_that_breaks_is_taken_up_with_the_same_bytes(tmp_path, monkeypatch, capsys, break_at):
    """After hours of a stream that broke, nothing was left."""
    options = corpus_of(tmp_path)
    prepare.prepare(prepare.Config(out=str(tmp_path / "whole"), **options))
    read, batches = prepare.read_documents, prepare.batches
    monkeypatch.setattr(prepare, "batches", lambda items: batches(items, 100_000))
    tokenizer = str(tmp_path / "whole")  # learning one would meet the break before anything is written

    def broken(*arguments):
        for i, document in enumerate(read(*arguments)):
            if i == break_at:
                raise prepare.UserError("the network is gone")
            yield document

    monkeypatch.setattr(prepare, "read_documents", broken)
    resumed = prepare.Config(out=str(tmp_path / "bins"), **options, tokenizer=tokenizer)
    refuses(lambda: prepare.prepare(resumed), "the network is gone")
    kept = (tmp_path / "bins.partial").exists()
    said = "the same command on the same files goes on; where a file has to be changed, remove that folder"
    assert kept == (break_at > 100) == (said in capsys.readouterr().err)
    monkeypatch.setattr(prepare, "read_documents", read)
    if kept:
        changed = replace(resumed, val_share=0.2)
        refuses(lambda: prepare.prepare(changed), "bins.partial", "val_share = 0.1, now it is 0.2", "remove")
        last = max((tmp_path / "bins.partial").glob("train*"))
        last.write_bytes(last.read_bytes() + b"written after the state")
        (tmp_path / "bins.partial" / "train_000099.bin").write_bytes(b"this too")
    encoded = []
    encode = data.tiktoken.Encoding.encode_to_numpy
    monkeypatch.setattr(
        data.tiktoken.Encoding, "encode_to_numpy", lambda *a, **k: encoded.append(1) or encode(*a, **k)
    )
    prepare.prepare(resumed)
    assert written(tmp_path / "bins") == written(tmp_path / "whole")
    assert len(encoded) < 600 or not kept
    assert not (tmp_path / "bins.partial").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_preparation_that_is_ended_leaves_nothing_or_what_it_goes_on_from(tmp_path, how):
    """SIGTERM left OUT.partial-xyz for ever."""
    options = corpus_of(tmp_path, 6000)
    command = [sys.executable, "prepare.py", f"--out={tmp_path}/bins"]
    command += [f"--{key}={value}" for key, value in options.items()]
    partial = tmp_path / "bins.partial"
    for wait_for in ("", "state.json"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not (partial / wait_for).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(how)
        said = process.communicate()[1]
        assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in said, said
        assert partial.exists() == (how == signal.SIGKILL or wait_for == "state.json")
    tokens = sum(json.loads((partial / "state.json").read_text())["tokens"].values())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"going on after {tokens:,} tokens" in done.stderr and not partial.exists()
    prepare.prepare(prepare.Config(out=f"{tmp_path}/whole", **options))
    assert written(tmp_path / "bins") == written(tmp_path / "whole")


def test_a_folder_left_before_the_first_shard_is_named_and_removed(tmp_path, capsys):
    options = corpus_of(tmp_path)
    (tmp_path / "bins.partial").mkdir()
    (tmp_path / "bins.partial" / "train_000099.bin").write_bytes(b"half")
    run(tmp_path, **options)
    assert "bins.partial: left by a preparation that was killed" in capsys.readouterr().err
    assert not any("99" in path.name for path in (tmp_path / "bins").iterdir())


def broken_off(tmp_path, monkeypatch, **more):
    """Options of a preparation that broke off after a few shards and left bins.partial."""
    options = corpus_of(tmp_path) | more
    read, batches = prepare.read_documents, prepare.batches

    def broken(source, *arguments):
        yield from itertools.islice(read(source, *arguments), 400)
        if source == options["source"]:
            raise prepare.UserError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "first_characters", lambda documents, n: itertools.islice(documents, 10))
        patch.setattr(prepare, "batches", lambda items: batches(items, 100_000))
        patch.setattr(prepare, "read_documents", broken)
        refuses(lambda: run(tmp_path, **options), "the network is gone")
    return options


def test_a_resume_asks_for_the_same_files_of_validation_too(tmp_path, monkeypatch):
    """They are read first: with a longer one, training documents came twice, with a shorter one never."""
    (tmp_path / "v.txt").write_text("words")
    options = broken_off(tmp_path, monkeypatch, val=str(tmp_path / "v.txt"))
    before = written(tmp_path / "bins.partial")
    for name, text in (("v.txt", "words\n\n\nand more"), ("a.txt", "other")):
        path, original = tmp_path / name, (tmp_path / name).read_bytes()
        path.write_text(text)
        refuses(lambda: run(tmp_path, **options), "bins.partial was begun with other files", "remove that",
                f"{path} was {len(original)} bytes, now it is {len(text)} bytes")
        path.write_bytes(original)
    assert written(tmp_path / "bins.partial") == before
    run(tmp_path, **options)
    prepare.prepare(prepare.Config(**options | {"out": f"{tmp_path}/whole", "tokenizer": f"{tmp_path}/bins"}))
    assert written(tmp_path / "bins") == written(tmp_path / "whole")


def test_a_resume_asks_for_the_same_files_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["words"]}).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    sizes = prepare.check_sources(prepare.Config(source=str(tmp_path / "saved")))[1]
    assert sizes[str(arrow)] == arrow.stat().st_size and len(sizes) == 3


FOREIGN = ("notes.txt", "train.bin", "model_000000.bin", "train_000000.bin/kept.bin", "sub/train_000000.bin")


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_partial_folder_with_foreign_files_is_refused_untouched(tmp_path, monkeypatch, name, has_state):
    """All that was in a folder of that name was deleted."""
    partial = tmp_path / "bins.partial"
    options = broken_off(tmp_path, monkeypatch) if has_state else corpus_of(tmp_path)
    if has_state:
        (partial / "train_000000.bin").unlink()
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    (partial / name).write_text("years of work")
    (partial / "val_000000.bin").write_bytes(b"half")
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    foreign = name.split("/")[0]
    refuses(lambda: run(tmp_path, **options), f"bins.partial holds {foreign}, which no preparation writes")
    assert before == {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}


def test_what_was_put_into_the_folder_meanwhile_survives_a_failure(tmp_path, monkeypatch):
    """rmtree took it along."""
    partial = tmp_path / "bins.partial"

    def fail(cfg):
        for name in ("notes.txt", "train_000000.bin"):
            (partial / name).write_text("words")
        raise prepare.UserError("no tokenizer")

    monkeypatch.setattr(prepare, "make_tokenizer", fail)
    refuses(lambda: run(tmp_path, **corpus_of(tmp_path)), "no tokenizer")
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]


def changed_state(**changes):
    return lambda state: json.dumps(state | changes)


@pytest.mark.parametrize("damage", [
    lambda state: "", lambda state: "\0" * 500, lambda state: json.dumps(state)[:-9],
    lambda state: "[" * 10**5, lambda state: "[]", lambda state: "{}", lambda state: json.dumps(list(state)),
    changed_state(pieces="3"), changed_state(pieces=True), changed_state(pieces=-1),
    changed_state(settings=[]), changed_state(settings={"shard_tokens": 0}), changed_state(settings=None),
    changed_state(tokens={}), changed_state(tokens=[1]), changed_state(tokens={"train": 1.5}),
    changed_state(tokens={"train": 10**18}), changed_state(tokens={"train": 10**6, "val": 10}),
    changed_state(tokens={"../a": 10}),
])
def test_a_damaged_state_ends_in_one_line_with_what_to_do(tmp_path, monkeypatch, damage):
    """It ended in tracebacks; one that counts more than the bins hold gave bins with holes."""
    options, path = broken_off(tmp_path, monkeypatch), tmp_path / "bins.partial" / "state.json"
    path.write_text(damage(json.loads(path.read_text())))
    before = written(tmp_path / "bins.partial")
    refuses(lambda: run(tmp_path, **options), "bins.partial has a state.json that does not fit its bins")
    assert written(tmp_path / "bins.partial") == before


def test_a_state_without_its_tokenizer_is_refused(tmp_path, monkeypatch):
    """A folder without a tokenizer.json is taken for bins of GPT-2 tokens."""
    options = broken_off(tmp_path, monkeypatch)
    (tmp_path / "bins.partial" / "tokenizer.json").unlink()
    refuses(lambda: run(tmp_path, **options), "bins.partial has no tokenizer.json", "remove that folder")


def test_what_a_state_counts_on_is_on_disk_before_it(tmp_path, monkeypatch):
    """After a failure of power a state could speak of a tokenizer that was not there."""
    order, sync, fsync, rename = [], prepare.sync, os.fsync, Path.rename

    def note(what):
        order.append(what)

    monkeypatch.setattr(prepare, "sync", lambda path: note(Path(path).name) or sync(path))
    monkeypatch.setattr(os, "fsync", lambda number: note(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(Path, "rename", lambda a, b: note("rename") or rename(a, b))
    options = corpus_of(tmp_path)
    run(tmp_path, **options)
    inode = (tmp_path / "bins" / "train_000000.bin").stat().st_ino
    names = [name for name in order if isinstance(name, str)]
    assert names[:4] == ["tokenizer.json", "bins.partial", "state.new", "bins.partial"]
    assert order.index(inode) < order.index("bins.partial")
    assert names[-4:] == ["meta.json", "bins.partial", "rename", tmp_path.name]


def test_nothing_of_a_break_is_in_the_finished_folder(tmp_path, monkeypatch):
    """Neither state.new of a kill at that moment nor a meta.json of before."""
    options = broken_off(tmp_path, monkeypatch)
    for name in ("state.new", "meta.json", "val_000099.bin"):
        (tmp_path / "bins.partial" / name).write_text("half")
    run(tmp_path, **options)
    again = {"out": str(tmp_path / "whole"), "tokenizer": str(tmp_path / "bins")}
    prepare.prepare(prepare.Config(**options | again))
    assert written(tmp_path / "bins") == written(tmp_path / "whole")


def test_two_preparations_at_once_write_one_folder(tmp_path):
    command = [sys.executable, "prepare.py", f"--out={tmp_path}/bins/"]  # a slash at the end changes nothing
    command += [f"--{key}={value}" for key, value in corpus_of(tmp_path, 3000).items()]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = "".join(out + err for out, err in (process.communicate() for process in both))
    assert [process.returncode for process in both] == [0, 0], said
    assert "waiting for process" in said and "bins: written by another process meanwhile" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "bins"]


def test_memory_does_not_grow_with_the_input(tmp_path, monkeypatch):
    batches = prepare.batches
    monkeypatch.setattr(prepare, "batches", lambda items: batches(items, 100_000))
    tokenizer, peaks = byte_tokenizer(tmp_path), []
    for documents in (100, 1000):
        options = corpus_of(tmp_path, documents) | {"tokenizer": tokenizer}
        tracemalloc.start()
        prepare.prepare(prepare.Config(out=str(tmp_path / str(documents)), **options))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6, "the second has 1.9 MB more of text, 3.8 MB of tokens"


def test_a_trailing_slash_of_the_folder_changes_nothing(tmp_path, monkeypatch):
    options = broken_off(tmp_path, monkeypatch)
    prepare.prepare(prepare.Config(out=f"{tmp_path}/bins/", **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "bins"]


def test_progress_is_plain_lines_in_a_log_file(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(seconds))
    progress = prepare.Progress(prepare.Config(out="x", max_tokens=10_000_000), 0)
    for i in range(7):
        progress.show(i * 1_000_000, i * 1_000_000)
    assert capsys.readouterr().err == (
        "x: 3.0 M tokens, 0.10 M tokens/s, 70 s left\nx: 6.0 M tokens, 0.10 M tokens/s, 40 s left\n"
    )


def test_what_is_passed_over_on_a_resume_is_shown_and_does_not_count_as_time(tmp_path, monkeypatch, capsys):
    """Nothing was shown for as long as that took, and then the rate was that of all the time."""
    options = broken_off(tmp_path, monkeypatch, tokenizer=byte_tokenizer(tmp_path))
    state = json.loads((tmp_path / "bins.partial" / "state.json").read_text())
    capsys.readouterr()
    clock = itertools.count(0, 10)  # seconds; each look at it is one of Progress
    monkeypatch.setattr(prepare, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(prepare, "batches", lambda items: ([item] for item in items))
    made, progress = [], prepare.Progress
    monkeypatch.setattr(prepare, "Progress", lambda *a: made.append(progress(*a)) or made[0])
    run(tmp_path, **options)
    said = [line for line in capsys.readouterr().err.splitlines() if "bins: " in line]
    passing = [line for line in said if "passing over" in line]
    assert passing == said[:len(passing)] and len(passing) == (state["pieces"] - 1) // 3
    assert passing[0].endswith(f"passing over the text that is on disk, {3 / state['pieces']:.0%}")
    assert made[0].start[0] == 10 * (1 + state["pieces"]) and "left" in said[-1]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_the_measurement_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = re.search(r"python - text.txt <<'END'\n(.*?)END\n", text, re.S)[1]
    command = [sys.executable, "-", corpus_of(tmp_path, 60)["source"]]
    done = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True)
    says = r"^encode_ordinary_batch [\d.]+ s, prepare [\d.]+ s, ratio [\d.]+$"
    assert re.search(says, done.stdout, re.M), done
