"""prepare.py: sources become documents, documents become bins, and a preparation may break off anywhere."""
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from conftest import ROOT, SHARED, refuses

import data
import prepare
from nanomaml import ranks, sources, tokenizer, words
from nanomaml.config import UserError


def prepared(folder, **options):
    """(tokenizer, train Corpus, {domain: validation Corpus}) of the bins that prepare.py makes."""
    cfg = prepare.Config(**{"out": f"{folder}/bins", "vocab_size": 400} | options)
    prepare.prepare(cfg)
    return data.load_tokenizer(cfg.out), *data.open_corpus(cfg.out)


def tokens_of(corpus):
    return np.concatenate(corpus.shards).tolist()


def documents_of(encoding, corpus):
    return encoding.decode(tokens_of(corpus)).split("<|endoftext|>")[1:]


def byte_tokenizer(folder):
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer.save_tokenizer(tokenizer.encoding("bytes", prepare.PATTERN, ranks), folder)
    return str(folder)


def written(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- sources ----


def test_sources_become_the_same_documents_and_twice_the_same_bytes(tmp_path, capsys):
    texts = [f"Document {i} speaks of {i * i} and no other.\n\nA second paragraph." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts[:10]))
    rows = "\n".join(json.dumps({"text": text}) for text in texts[10:20]) + "\n\n"
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "one.txt.gz").write_bytes(gzip.compress("\n\n\n".join(texts[20:30]).encode()))
    (tmp_path / "c" / "two.md").write_text("\n\n\n".join(texts[30:]))
    (tmp_path / "c" / "skipped.html").write_text("<html>")
    options = {"source": ",".join(str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz", "c")),
               "val_share": 0.1, "shard_tokens": 500}
    encoding, train, val = prepared(tmp_path, **options)
    said = capsys.readouterr().err
    assert all(line in said for line in ("c: 1 .md: two.md\n", "c: 1 .txt.gz: one.txt.gz\n",
                                         "c: 1 skipped: skipped.html\n"))
    assert len(train.shards) > 1 and {*map(len, train.shards[:-1])} == {500} and list(val) == ["val"]
    header = np.fromfile(train.paths[-1], "<i4", 256).tolist()
    assert header == [20240520, 1, len(train.shards[-1])] + [0] * 253
    assert documents_of(encoding, train) == [text for i, text in enumerate(texts) if i % 10 != 9]
    assert documents_of(encoding, val["val"]) == texts[9::10]
    assert json.loads((tmp_path / "bins" / "meta.json").read_text()) == {
        "tokenizer": "bpe400", "vocab_size": encoding.n_vocab, "source": options["source"],
        "tokens": {"train": train.tokens, "val": val["val"].tokens}}
    assert texts[:2] == [*prepare.read_sources(prepare.Config(), [f"{tmp_path}/a.txt"], characters=100)]
    prepared(tmp_path, **options, out=f"{tmp_path}/again/")  # a slash at the end changes nothing
    assert list(written(tmp_path / "bins").values()) == list(written(tmp_path / "again").values())
    refuses(lambda: prepared(tmp_path, **options), "exists already", "--out=")


@pytest.mark.parametrize("source, val, says", [
    ("in,in/a.txt", "", "a.txt would be read twice, for in and in/a.txt"),
    ("user/name,user/name::train", "", "would be read twice, for user/name and user/name::train"),
    ("b.txt,link.txt", "", "b.txt would be read twice"), ("b.txt", ",", "val = ',' names no file"),
    ("in", "in/a.txt", "a.txt is also trained on, in source in"), ("b.txt", "in", "there is no file in"),
    ("b.txt", "v.csv", "v.csv: sources are plain files"), ("b.txt", "x/a.txt,a.txt", "files of one domain"),
    ("b.txt", "loss.txt", "would be logged as val/loss"), ("bad.jsonl", "", "bad.jsonl, line 2: no 'text'"),
    ("b.txt", "", "one document in 50 is held out"), ("blank.txt", "b.txt", "no text for train"),
    ("b.txt", "blank.txt", "no text for val_blank"), ("ids.jsonl", "", "line 2: 'text' holds token ids"),
    ("b.txt,ids.jsonl", "", "line 2: 'text' holds token ids"), ("b.txt", "ids.jsonl", "holds token ids"),
])
@pytest.mark.parametrize("characters", [2e8, 10])
def test_where_it_fails_nothing_is_left_behind(tmp_path, monkeypatch, characters, source, val, says):
    """Not even the lock. Some faults went unnoticed."""
    monkeypatch.setattr(prepare, "TOKENIZER_CHARACTERS", characters)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name, text in (("in/a.txt", "words"), ("b.txt", "words"), ("loss.txt", "words"), ("v.csv", "no text"),
                       ("bad.jsonl", '{"text": "fine"}\n{"txt": "not"}\n'), ("blank.txt", "\n\n\n"),
                       ("ids.jsonl", '{"text": "plain words"}\n{"text": [1, 2]}\n')):
        (tmp_path / name).write_text(text)
    (tmp_path / "link.txt").symlink_to("b.txt")
    before = names_in(tmp_path)
    refuses(lambda: prepared(tmp_path, source=source, val=val), says)
    assert names_in(tmp_path) == before
    refuses(lambda: prepared(tmp_path, source="b.txt", out="b.txt/bins"), "cannot write")


def test_a_validation_file_of_any_name_stays_out_of_training(tmp_path):
    """`"train" in path.name` once took val_constraints_000000.bin for training data."""
    domains = {"constraints.txt": "constraints", "2024news.val.txt": "2024news", "2024.md": "2024",
               "train.jsonl": "train", "a_val.txt": "a_val", "v,1.txt": "v-1"}
    for name in ("a,b.txt", *domains):
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    val = ",".join(str(tmp_path / name) for name in domains)
    encoding, train, validation = prepared(tmp_path, source=f"{tmp_path}/a,b.txt", val=val)
    found = {documents_of(encoding, corpus)[0]: domain for domain, corpus in validation.items()}
    assert found == domains and documents_of(encoding, train) == ["a,b.txt"]


def test_rows_of_token_ids_go_straight_to_bins(tmp_path):
    """Pretokenized datasets have 2,049 ids a row, with an end token after each document: none is added."""
    rows = np.random.default_rng(0).integers(0, 257, (40, 2049)).tolist()
    options = {"source": f"{tmp_path}/a.jsonl", "tokenizer": byte_tokenizer(tmp_path)}
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [1, 300]}')
    refuses(lambda: prepared(tmp_path, **options, text_key="ids"), "a.jsonl, line 2", "300", "258")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    _, train, val = prepared(tmp_path, **options, val_share=0.1, shard_tokens=10_000)
    assert tokens_of(train) == sum((row for i, row in enumerate(rows) if i % 10 != 9), [])
    assert tokens_of(val["val"]) == sum(rows[9::10], [])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_real_text_with_the_gpt2_tokenizer_as_the_documentation_measures_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    source, val = f"{SHARED}/corpus/state_union.val.txt", f"{SHARED}/corpus/inaugural.val.txt"
    encoding, train, _ = prepared(tmp_path, source=source, val=val, tokenizer="gpt2")
    assert encoding.n_vocab == 50258 and encoding.encode_single_token("<|mask|>") == 50257
    text = encoding.decode(tokens_of(train)).replace("<|endoftext|>", "\n")
    assert text.split() == Path(source).read_text().split()
    code = re.search(r"python - text.txt <<'END'\n(.*?)END\n", (ROOT / "docs" / "data.md").read_text(), re.S)
    monkeypatch.setattr(sys, "argv", ["-", corpus_of(tmp_path)["source"]])
    exec(code[1], {})
    assert re.search(r"\nencode_ordinary_batch [\d.]+ s, prepare [\d.]+ s, ratio", capsys.readouterr().out)


# ---- text and words ----


@pytest.mark.parametrize("text", [
    "café über naïve", unicodedata.normalize("NFD", "café über naïve"), "हिन्दी विद्यालय कि",
    "தமிழ் மொழி பள்ளிக்கூடம்", "ภาษาไทย กำลัง ที่นี่",
    "كِتَابٌ مَدْرَسَةٌ", "שָׁלוֹם סֵפֶר",
    "слово й ё и\u0306", "한국어 학교", "می\u200cخواهم کتاب\u200cها", "അവന്\u200d നന്\u200cമ",
    "Donau\u00addampf\u00adschiff co\u00adoperate"])
def test_a_word_keeps_its_marks(text):
    r"""\p{L}+ ended a word at a combining mark: 69% of Hindi words and 99% of Tamil ones were fragments."""
    encoding = prepare.train_tokenizer([" " + text] * 20, 2000)
    assert all(len(encoding.encode(" " + word)) == 1 for word in text.split())


def test_what_is_in_a_word_is_the_same_for_the_pattern_and_for_the_episodes():
    """The pattern ended a word at a soft hyphen, where an episode did not. An apostrophe ends it in both."""
    skipped = ("Cn", "Cs", "Co")  # not yet a character for this Python; half of one; private
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in skipped]
    found = regex.findall(prepare.PATTERN, " x".join(["", *known]))
    assert {word[2] for word in found if len(word) == 3} == set(filter(words.in_word, known))
    tokens = ["I", " don", "'", "t", " ('", "own", "')", " l", "’", "homme", " 123", "4", "\n\n", " x"]
    assert regex.findall(prepare.PATTERN, "".join(tokens)) == tokens


def test_a_text_that_is_null_a_card_beside_rows_and_few_tokens(tmp_path, capsys):
    """A null ended it at its row, a dataset's card was data, and max_tokens blamed the documents."""
    (tmp_path / "in").mkdir()
    rows = [{"text": f"row {i} of text" if i % 9 else None} for i in range(300)]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "README.md").write_text("# The card")
    (tmp_path / "in" / "config.json").write_text('{"a": 1}')
    encoding, train, _ = prepared(tmp_path, source=f"{tmp_path}/in")
    said = capsys.readouterr().err
    assert "documents without text, passed over: 34" in said
    assert "in: 2 skipped: README.md, config.json" in said
    assert "card" not in encoding.decode(tokens_of(train))
    refuses(lambda: prepared(tmp_path, source=f"{tmp_path}/in", out=f"{tmp_path}/few", max_tokens=10),
            "one document in 50 is held out, and max_tokens = 10 is reached before")


@pytest.mark.parametrize("learn", [True, False])
def test_a_million_blanks_and_special_tokens_are_ordinary_text(tmp_path, learn):
    """In one document the blanks ended the run with a PanicException, which is no Exception."""
    texts = ["<|mask|>", *("x" + space * 1_100_000 + "y" for space in " \n\t")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {} if learn else {"tokenizer": byte_tokenizer(tmp_path)}
    encoding, train, val = prepared(tmp_path, source=f"{tmp_path}/a.jsonl", val_share=0.25, **options)
    assert documents_of(encoding, train) + documents_of(encoding, val["val"]) == texts
    assert max(tokens_of(train)) == encoding.eot_token and tokens_of(train).count(encoding.eot_token) == 3


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole():
    some = ["some", "naïve\u0301", "words,", "\n", " ", "12345", "don't"]
    text = " ".join(np.random.default_rng(0).choice(some, 60_000).tolist())
    encoding = prepare.train_tokenizer([text[:100_000]], 300)
    pieces = sources.PIECES.findall(text)
    assert len(pieces) > 3 and "".join(pieces) == text and max(map(len, pieces)) <= sources.LONGEST
    assert [i for piece in pieces for i in encoding.encode(piece)] == encoding.encode(text)
    no_spaces = "ที่" * 50_000
    pieces = sources.PIECES.findall(no_spaces)
    assert "".join(pieces) == no_spaces and {piece[0] for piece in pieces} == {"ท"}, "marks stay with letters"


# ---- interruptions ----


def corpus_of(folder, documents=200):
    """Options of a preparation of so many documents of 2,000 characters, by single bytes."""
    texts = (f"Document {i}: " + f"word{i} " * 300 for i in range(documents))
    (folder / "a.txt").write_text("\n\n\n".join(texts))
    (folder / "v.txt").write_text("word1 word2\n\n\nword3")
    return {"source": f"{folder}/a.txt", "val": f"{folder}/v.txt", "tokenizer": byte_tokenizer(folder),
            "shard_tokens": 30_000}


def test_max_tokens_is_exact_and_memory_does_not_grow_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.batches, "__defaults__", (100_000,))
    options, peaks = corpus_of(tmp_path, 500), []
    for most in (1, 89_999, 90_000, 90_001, 1_000_000):
        tracemalloc.start()
        assert prepared(tmp_path, **options, max_tokens=most, out=f"{tmp_path}/{most}")[1].tokens == most
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[-1] < peaks[1] + 3e5, "the last has 0.9 MB more of text, 1.8 MB of tokens"


def break_off(folder, options, after):
    """A preparation whose stream breaks after so many documents; batches are small, so there are many."""
    def broken(*arguments, read=sources.read_documents):
        yield from itertools.islice(documents := read(*arguments), after)
        if next(documents, None):
            raise UserError("the network is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.batches, "__defaults__", (20_000,))
        patch.setattr(sources, "read_documents", broken)
        refuses(lambda: prepared(folder, **options), "the network is gone")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(options, content of the files of a preparation left alone, bins.partial of one that broke off)."""
    folder = tmp_path_factory.mktemp("whole")
    options = corpus_of(folder)
    prepared(folder, **options)
    break_off(folder / "broken", options, 150)
    return options, list(written(folder / "bins").values()), folder / "broken" / "bins.partial"


def equals(whole, tmp_path):
    return names_in(tmp_path) == ["bins"] and list(written(tmp_path / "bins").values()) == whole[1]


@pytest.mark.parametrize("after", [5, 60, 199])
def test_a_stream_that_breaks_is_taken_up_with_the_same_bytes(tmp_path, monkeypatch, capsys, whole, after):
    """After hours of a stream that broke, nothing was left."""
    partial = tmp_path / "bins.partial"
    break_off(tmp_path, whole[0], after)
    assert partial.exists() == (after > 20) == ("the same command continues" in capsys.readouterr().err)
    break_off(tmp_path, whole[0], after)  # again
    if is_kept := partial.exists():
        last = max(partial.glob("train*"))
        last.write_bytes(last.read_bytes() + b"written after the state")
        for name in ("train_000099.bin", "state.json.partial", "meta.json"):
            (partial / name).write_bytes(b"this too")
    encoded, encode = [], tokenizer.tiktoken.Encoding.encode_to_numpy
    monkeypatch.setattr(tokenizer.tiktoken.Encoding, "encode_to_numpy",
                        lambda *args, **options: encoded.append(1) or encode(*args, **options))
    prepared(tmp_path, **whole[0])
    assert equals(whole, tmp_path) and (len(encoded) < 202) == is_kept


def test_a_preparation_that_is_ended_leaves_nothing_or_what_it_goes_on_from(tmp_path, forks, whole):
    """SIGTERM left OUT.partial-xyz for ever."""
    flags = [f"--out={tmp_path}/bins", *(f"--{key}={value}" for key, value in whole[0].items())]
    patch = """import os, prepare, sys, train
prepare.batches.__defaults__, sys.exit = (20_000,), os._exit
train.main = lambda argv: os._exit(prepare.main(argv) or 0)  # a finalized PyTorch takes seconds
"""
    for how, where in ((signal.SIGTERM, "make_tokenizer"), (signal.SIGINT, "make_tokenizer"),
                       (signal.SIGKILL, "tokenizers.save_tokenizer"), (signal.SIGINT, "save_state"),
                       (signal.SIGTERM, "save_state"), (signal.SIGKILL, "batches")):
        [(code, said)] = forks.run(flags, patches={0: patch + f"""
def end(*args, real=prepare.{where}):
    result = real(*args)
    os.kill(os.getpid(), {int(how)})
    return result
prepare.{where} = end"""})
        assert code == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in said, said
        assert (tmp_path / "bins.partial").exists() == (where != "make_tokenizer")
    for moment in (("save_state", 100), ("fill", 3000), ("fill", 9000)):
        assert forks.run(flags, deaths={0: moment}, patches={0: patch})[0][0] == -signal.SIGKILL
    [(code, said)] = forks.run(flags, patches={0: patch})
    assert code == 0 and "bins.partial: continuing after" in said and equals(whole, tmp_path), said


@pytest.mark.parametrize("name, change, says", [
    ("v.txt", lambda text: text, "was begun with another val_share: "),  # 0.1 in place of 0.02
    ("a.txt", lambda text: text + b"more", "was begun with another {source}: "),
    ("v.txt", lambda text: text + b"\n\n\nmore", "was begun with another "),
    ("train_000002.bin", lambda tokens: tokens[:-1], "lacks a part of train_000002.bin: remove"),
    ("tokenizer.json", None, "lacks a part of tokenizer.json: remove"),
    *(("state.json", change, "has a damaged state.json: remove") for change in (
        lambda text: b"", lambda text: b"\0" * 500, lambda text: text[:-9], lambda text: b"[" * 10**5,
        lambda text: b"{}", lambda text: text.replace(b'"pieces": ', b'"pieces": 1'))),
    *((name, lambda _: b"years of work", f"holds {name.split('/')[0]}, which no") for name in (
        "notes.txt", "train.bin", "model_000000.bin", "train_000099.bin/kept.bin", "sub/train_000000.bin")),
])
def test_what_cannot_be_taken_up_is_refused_untouched(tmp_path, whole, name, change, says):
    """With another validation file, which is read first, training documents came twice or never. All in a
    folder of that name was deleted. A damaged state gave tracebacks or holes; no tokenizer.json means GPT-2.
    """
    partial, source = shutil.copytree(whole[2], tmp_path / "bins.partial"), Path(whole[0]["source"])
    path = (partial if "." not in name[:2] else source.parent) / name
    original, options = path.read_bytes() if path.exists() else b"", whole[0]
    options = options | {"val_share": 0.1} if "val_share" in says else options
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(change(original)) if change else path.unlink()
    for _ in range(2):
        before = written(partial)
        refuses(lambda: prepared(tmp_path, **options), f"bins.partial {says.format(source=source)}")
        assert written(partial) == before
        if "holds" in says:  # with or without a state
            (partial / "state.json").unlink(missing_ok=True)
    if path.parent == source.parent:
        path.write_bytes(original)


def test_what_was_put_into_the_folder_meanwhile_survives_a_failure(tmp_path, monkeypatch, whole):
    """rmtree took it along. What is left without a state is removed by the next."""
    partial = tmp_path / "bins.partial"

    def fail(cfg):
        for name in ("notes.txt", "train_000099.bin"):
            (partial / name).write_text("words")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_tokenizer", fail)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path, **whole[0])
    assert names_in(partial) == ["notes.txt"]
    (partial / "notes.txt").rename(partial / "train_000099.bin")
    prepared(tmp_path, **whole[0])
    assert equals(whole, tmp_path)


@pytest.mark.parametrize("shard_tokens, first", [(30_000, "state.json"), (10**6, "bins")])
def test_what_a_state_counts_on_is_on_disk_before_it(tmp_path, monkeypatch, whole, shard_tokens, first):
    """After a failure of power a state could speak of a tokenizer that was not there."""
    synced, moved, fsync, partial = {}, [], os.fsync, tmp_path / "bins.partial"

    def note(number):
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size
        fsync(number)

    def checked(a, b, real):
        if Path(b).name in ("state.json", "bins"):
            moved.append(Path(b).name)
            for path in partial.iterdir():
                assert path.name == "state.json" or synced[path.stat().st_ino] == path.stat().st_size, path
        real(a, b)

    monkeypatch.setattr(os, "fsync", note)
    for name, move in (("replace", os.replace), ("rename", os.rename)):
        monkeypatch.setattr(os, name, lambda a, b, move=move: checked(a, b, move))
    monkeypatch.setattr(prepare.batches, "__defaults__", (20_000,))
    prepared(tmp_path, **whole[0] | {"shard_tokens": shard_tokens})
    assert moved[0] == first and moved[-1] == "bins"


def test_a_second_preparation_takes_what_the_first_has_written(tmp_path, monkeypatch, capsys, whole):
    def waits(*args, real=ranks.only_writer, **options):
        monkeypatch.undo()
        prepared(tmp_path, **whole[0])  # another process, while this one waits for the lock
        return real(*args, **options)

    monkeypatch.setattr(ranks, "only_writer", waits)
    prepared(tmp_path, **whole[0])
    assert "bins: written by another process meanwhile" in capsys.readouterr().out and equals(whole, tmp_path)


# ---- what it says ----


@pytest.mark.parametrize("max_tokens, left", [(10_000_000, ["0:48", "0:36"]), (0, ["2:48", "1:36"])])
def test_progress_is_a_line_every_ten_seconds(tmp_path, monkeypatch, capsys, max_tokens, left):
    monkeypatch.setattr(prepare, "time", SimpleNamespace(perf_counter=lambda: 0))
    (tmp_path / "a.txt").write_bytes(b"1234567890")
    progress = prepare.Progress(prepare.Config(out="x", max_tokens=max_tokens), size=30)
    with open(tmp_path / "a.txt", "rb") as file:
        progress.opened(file)
        for i in range(5):
            prepare.time.perf_counter = lambda i=i: 6 * i
            progress.show({"train": SimpleNamespace(total=i * 10**6)})
            file.seek(2 * i)
        progress.opened(file)
    said = [f"x: {m}.0 M tokens, 0.17 M tokens/s, {minutes} left" for m, minutes in zip((2, 4), left)]
    assert progress.before == 10 and capsys.readouterr().err.splitlines() == said
