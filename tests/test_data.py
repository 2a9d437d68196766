import base64
import gzip
import json

import numpy as np
import pytest
import torch
from conftest import SHARED, TOY_VOCAB, write_bin

import data
from config import UserError
from data import Corpus, Episodes, Prepare, Sequences, open_bin, open_corpus


def refuses(call, *says):
    with pytest.raises(UserError) as error:
        call()
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value), str(error.value)


# ---- bins ----


def test_shards_round_trip(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 2500).astype("<u2")
    writer = data.ShardWriter(tmp_path, "train", 1000)
    for part in np.split(tokens, [1, 999, 1000, 2100]):
        writer.write(part)
    writer.close()
    paths = sorted(tmp_path.glob("*.bin"))
    assert [path.name for path in paths] == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert [len(open_bin(path)) for path in paths] == [1000, 1000, 500]
    assert np.array_equal(np.concatenate([open_bin(path) for path in paths]), tokens)
    assert np.fromfile(paths[2], "<i4", 256).tolist() == [20240520, 1, 500] + [0] * 253


def test_bins_of_llm_c_and_of_nanogpt_are_read(tmp_path):
    (tmp_path / "llmc").mkdir()
    write_bin(tmp_path / "llmc" / "fineweb_train_000001.bin", [1, 2, 3])
    write_bin(tmp_path / "llmc" / "fineweb_val_000000.bin", [4, 5])
    (tmp_path / "nanogpt").mkdir()
    np.array([1, 2, 3], "<u2").tofile(tmp_path / "nanogpt" / "train.bin")
    np.array([4, 5], "<u2").tofile(tmp_path / "nanogpt" / "val.bin")
    for folder in ("llmc", "nanogpt"):
        train, val = open_corpus(tmp_path / folder)
        assert train.shards[0].tolist() == [1, 2, 3] and list(val) == ["val"] and val["val"].shards[0].tolist() == [4, 5]


def test_validation_bins_are_grouped_by_domain(tmp_path):
    for name in ("train_000000", "val_news-2_000000", "val_news-2_000001", "val_blogs_000000"):
        write_bin(tmp_path / f"{name}.bin", [1, 2])
    assert {name: len(split.paths) for name, split in open_corpus(tmp_path)[1].items()} == {"news-2": 2, "blogs": 1}


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
    _, train, val = prepare(tmp_path, source=str(tmp_path / "text.txt"), val=str(tmp_path / name))
    assert list(val) == [domain] and [path.name for path in train.paths] == ["train_000000.bin"]
    refuses(lambda: prepare(tmp_path, out=str(tmp_path / "other"), val=f"x/{name},{name}"), "names two files alike")


def test_bad_bins_are_refused_in_one_line(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_bin(path, range(100))
    whole = path.read_bytes()
    for content, says in (
        (whole[:-2], "the header says 100 tokens, the file holds 99"),
        (whole + b"ab", "holds 101"),
        (b"\1" + whole[1:], "a token bin with 20240520"),
        (whole[:4] + b"\2" + whole[5:], "version 2, only 1"),
        (b"", "starts with nothing"),
        (whole[:1000], "holds -12"),
    ):
        path.write_bytes(content)
        refuses(lambda: open_bin(path), str(path), says)
    odd = tmp_path / "val.bin"
    odd.write_bytes(b"abc")
    refuses(lambda: open_bin(odd), "3 bytes are not a positive number of uint16 tokens")
    write_bin(path, [1, 700, 2])
    Corpus([path]).check(701)
    refuses(lambda: Corpus([path]).check(700), str(path), "token id 700 is outside the vocabulary of 700")
    refuses(lambda: open_corpus(tmp_path / "none"), "no data at", "python data.py")
    odd.unlink()
    refuses(lambda: open_corpus(tmp_path), "holds no val bins")


# ---- sequences ----


def test_an_epoch_visits_every_sequence_once_and_epochs_differ(toy):
    train, _ = open_corpus(toy)
    sequences = Sequences(train, 32, seed=3)
    n = int(sequences.ends[-1])
    assert n == (100_000 - 32) // 32 + (50_000 - 32) // 32
    whole = {
        shard[i : i + 32].tobytes()
        for shard in train.shards
        for offset in [sequences._epoch(0)[0]]
        for i in range(offset, len(shard) - 32, 32)
    }
    epoch = [row.numpy().astype("<u2").tobytes() for row in sequences[range(n)].ids]
    assert len(set(epoch)) == n and set(epoch) <= whole
    batch = sequences[range(n, n + 4)]
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1]) and batch.ids.shape == (4, 32)
    assert {row.numpy().astype("<u2").tobytes() for row in batch.ids} != set(epoch[:4])


def test_sequences_are_a_pure_function_of_seed_and_index(toy):
    train, _ = open_corpus(toy)
    a, b = Sequences(train, 32, 3), Sequences(train, 32, 3)
    b[range(500)]
    np.random.default_rng(0).random()
    assert torch.equal(a[[7, 20_000]].ids, b[[7, 20_000]].ids)
    assert not torch.equal(a[[7]].ids, Sequences(train, 32, 4)[[7]].ids)


def test_a_corpus_too_short_for_the_context_is_refused(toy):
    refuses(lambda: Sequences(open_corpus(toy)[0], 60_000, 0), "2 x context = 120000", "the longest has 100000")


def test_eval_sequences_shrink_to_a_short_corpus(tmp_path):
    write_bin(tmp_path / "val.bin", range(20))
    batch = data.eval_sequences(Corpus([tmp_path / "val.bin"]), 64, 8)
    assert batch.ids.tolist() == [list(range(19))] and batch.targets.tolist() == [list(range(1, 20))]


def test_unigram_entropy(tmp_path):
    write_bin(tmp_path / "val.bin", [3] * 50 + [4] * 25 + [900] * 25)
    assert data.unigram_entropy(Corpus([tmp_path / "val.bin"])) == pytest.approx(1.5 * np.log(2))


# ---- episodes ----


def episodes(toy, ways=6, shots=3, queries=2, window=16, seed=5):
    return Episodes(open_corpus(toy)[0], data.load_tokenizer(str(toy)), ways, shots, queries, window, seed)


def test_episodes_hold_n_distinct_words_masked_in_windows_of_the_corpus_that_do_not_overlap(toy):
    maker, tokenizer = episodes(toy), data.load_tokenizer(str(toy))
    mask = tokenizer.encode_single_token("<|mask|>")
    corpus = np.concatenate([np.asarray(shard, np.int64) for shard in maker.corpus.shards])
    for index in range(5):
        ids = maker.episode(index)
        assert ids.shape == (6, 5, 16) and (ids[..., -1] == mask).all()
        words = []
        for windows in ids:
            found = []
            for window in windows:  # where in the corpus: all tokens but the masked ones agree
                starts = np.flatnonzero(
                    np.all([(corpus[i : len(corpus) - 16 + i] == window[i]) | (window[i] == mask) for i in range(16)], axis=0)
                )
                found.append({(int(start), int(corpus[start + 15])) for start in starts})
            word = set.intersection(*[{word for _, word in places} for places in found])
            assert len(word) == 1, "one word was masked in all windows of a class"
            word = word.pop()
            words.append(word)
            assert tokenizer.decode([word])[0] == " " and tokenizer.decode([word])[1:].isalpha()
            starts = [next(start for start, w in sorted(places) if w == word) for places in found]
            for start, window in zip(starts, windows):
                original = corpus[start : start + 16]
                assert np.array_equal(window == mask, original == word), "every occurrence is masked, and nothing else"
                assert not tokenizer.decode([int(corpus[start + 16])])[0].isalpha(), "a whole word"
            assert all(abs(a - b) >= 16 for i, a in enumerate(starts) for b in starts[:i]), "windows of a word overlap"
        assert len(set(words)) == 6


def test_a_word_in_another_case_or_without_its_space_is_masked_too_and_never_a_second_class(tmp_path):
    """Only the drawn token was masked once; "The" or "(the" then gave the word away."""
    words = [f" {a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]  # 512
    forms = [form for word in words for form in (word, word[1:], word.title(), word[1:].title())]
    tokens = [bytes([i]) for i in range(256)] + [form.encode() for form in forms]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"name": "forms", "pattern": data.PATTERN, "tokens": [base64.b64encode(token).decode() for token in tokens]})
    )
    rng = np.random.default_rng(0)
    ids = 256 + 4 * np.tile(rng.integers(0, 512, (4000, 1, 10)), (1, 3, 1)).ravel() + rng.integers(0, 4, 120_000)  # thrice, 10 apart
    ids[1::2] = ord(".")  # ... and apart, so that forms without a space end a word
    write_bin(tmp_path / "train.bin", ids)
    write_bin(tmp_path / "val.bin", [1, 2])
    tokenizer = data.load_tokenizer(str(tmp_path))
    maker = Episodes(open_corpus(tmp_path)[0], tokenizer, 40, 3, 2, 16, 0)
    contexts = np.lib.stride_tricks.sliding_window_view(maker.corpus.shards[0], 16)
    seen, several = set(), 0
    for windows in maker.episode(0):
        starts = []
        for window in windows:
            place = np.flatnonzero(((contexts == window) | (window == maker.mask_id)).all(1))
            word = {tokenizer.decode([int(contexts[i][-1])]).strip().lower() for i in place}
            masked = {tokenizer.decode([int(t)]).strip().lower() for i in place for t in contexts[i][window == maker.mask_id]}
            assert len(word) == 1 and masked == word
            assert not any(tokenizer.decode([int(t)]).strip().lower() in word for t in window[window != maker.mask_id])
            several += (window == maker.mask_id).sum() > 1
            assert len(place) == 1 and all(abs(place[0] - start) >= 16 for start in starts), "windows of a word overlap"
            starts.append(place[0])
        assert not word & seen
        seen |= word
    assert several > 10


def test_every_occurrence_of_the_word_is_masked(toy, tmp_path):
    """A corpus where ten words come three times over, so that a window of 16 that ends at the last holds its word twice."""
    rng = np.random.default_rng(0)
    write_bin(tmp_path / "train.bin", 256 + np.tile(rng.integers(0, 2000, (3000, 1, 10)), (1, 3, 1)).ravel())
    write_bin(tmp_path / "val.bin", [1, 2])
    maker = Episodes(open_corpus(tmp_path)[0], data.load_tokenizer(str(toy)), 6, 3, 2, 16, 0)
    ids = maker.episode(0)
    assert ((ids == maker.mask_id).sum(-1) >= 1).all() and ((ids == maker.mask_id).sum(-1) == 2).any()


def test_episodes_are_a_pure_function_and_their_labels_mean_nothing_across_them(toy):
    a, b = episodes(toy), episodes(toy)
    b.episode(99)
    assert np.array_equal(a.episode(7), b.episode(7))
    assert not np.array_equal(a.episode(7), a.episode(8)) and not np.array_equal(a.episode(7), episodes(toy, seed=6).episode(7))
    batch = a[[7, 8]]
    assert torch.equal(batch.support[0], torch.from_numpy(a.episode(7)[:, :3])) and torch.equal(
        batch.query[1], torch.from_numpy(a.episode(8)[:, 3:])
    )


def test_the_order_of_the_words_is_random(tmp_path, toy):
    """With just as many words as ways, each word takes every label in turn."""
    rng = np.random.default_rng(0)
    tokens = 256 + 4 + rng.integers(0, 2990, 60_000)
    tokens[rng.permutation(60_000)[:160]] = 256 + np.repeat(np.arange(4), 40)
    write_bin(tmp_path / "train.bin", tokens)
    write_bin(tmp_path / "val.bin", [1, 2])
    maker = Episodes(open_corpus(tmp_path)[0], data.load_tokenizer(str(toy)), 4, 3, 2, 16, 0)
    maker.word[260:] = False  # only these four are words
    corpus = maker.corpus.shards[0]
    contexts = np.lib.stride_tricks.sliding_window_view(corpus, 15)
    orders = set()
    for index in range(4):
        firsts = maker.episode(index)[:, 0, :15].astype("<u2")
        orders.add(tuple(int(corpus[np.flatnonzero((contexts == first).all(1))[0] + 15]) for first in firsts))
    assert all(sorted(order) == [256, 257, 258, 259] for order in orders) and len(orders) > 1


def test_too_few_words_for_the_ways_are_told_with_the_numbers(toy):
    refuses(lambda: episodes(toy, ways=2000, window=32).episode(0), "ways = 2000 are needed", "windows of 32 tokens")


# ---- preparing ----


def prepare(tmp_path, **options):
    data.prepare(Prepare(**({"out": str(tmp_path / "bins"), "vocab_size": 400} | options)))
    tokenizer = data.load_tokenizer(str(tmp_path / "bins"))
    train, val = open_corpus(tmp_path / "bins")
    return tokenizer, train, val


def test_sources_become_the_same_documents(tmp_path):
    texts = [f"Document number {i} speaks of the number {i * i} and no other.\n\nIt has a second paragraph." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts[:10]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in texts[10:20]) + "\n\n")
    (tmp_path / "c").mkdir()
    with gzip.open(tmp_path / "c" / "one.txt.gz", "wt") as file:
        file.write("\n\n\n".join(texts[20:30]))
    (tmp_path / "c" / "two.md").write_text("\n\n\n".join(texts[30:]))
    (tmp_path / "c" / "skipped.html").write_text("<html>")
    tokenizer, train, val = prepare(
        tmp_path, source=",".join(str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz", "c")), val_share=0.1, shard_tokens=500
    )
    assert len(train.shards) > 1

    def split(corpus):
        return "".join(tokenizer.decode(shard.tolist()) for shard in corpus.shards).split("<|endoftext|>")[1:]

    assert split(train) == [text for i, text in enumerate(texts) if i % 10 != 9] and split(val["val"]) == texts[9::10]
    meta = json.loads((tmp_path / "bins" / "meta.json").read_text())
    assert meta["tokens"] == {"train": train.tokens, "val": val["val"].tokens} and 258 < meta["vocab_size"] == tokenizer.n_vocab <= 400
    assert tokenizer.encode("<|mask|>", allowed_special="all") == [tokenizer.n_vocab - 1]


def test_preparing_twice_gives_the_same_bytes_and_never_overwrites(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"some words, and the word {i}" for i in range(300)))
    for out in ("x", "y"):
        data.prepare(Prepare(out=str(tmp_path / out), source=str(tmp_path / "a.txt"), vocab_size=300))
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in names)
    refuses(lambda: data.prepare(Prepare(out=str(tmp_path / "x"))), "is already there", "--out=")


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.jsonl")), "a.jsonl, line 2", "'text' field")
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.jsonl")), "line 1", "is no text: 3")
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "nowhere.txt")), "is no file or folder")
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08 and no more")
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.txt.gz")), "cannot read", "a.txt.gz")
    (tmp_path / "a.txt.gz").unlink()
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.jsonl"), val=str(tmp_path / "typo.txt")), "no file", "typo.txt")
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.jsonl"), out=str(tmp_path / "a.jsonl" / "bins")), "cannot write")
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}\n')
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "a.jsonl")), "fewer than 50 documents leave none for validation")
    (tmp_path / "empty").mkdir()
    refuses(lambda: prepare(tmp_path, source=str(tmp_path / "empty")), "holds no .txt, .md or .jsonl file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "empty"]


def test_a_long_text_without_blank_lines_is_cut_so_that_memory_stays_bounded(tmp_path):
    for text in ("a line of text\n" * 200_000, "no line ends " * 200_000):
        (tmp_path / "a.txt").write_text(text)
        sizes = [len(part) for part in data.read_documents(tmp_path / "a.txt", "text")]
        assert max(sizes) <= 2**17 and len(sizes) > 1 and sum(sizes) > len(text) - 100


def test_max_tokens_stops_the_reading(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join("words " * 1000 for _ in range(3000)))
    _, train, _ = prepare(tmp_path, source=str(tmp_path / "a.txt"), max_tokens=100_000)
    assert 100_000 <= train.tokens < 1_000_000
    (tmp_path / "v.txt").write_text("other words")
    more = str(tmp_path / "more")
    data.prepare(Prepare(out=more, source=str(tmp_path / "a.txt"), max_tokens=1000, val=str(tmp_path / "v.txt"), vocab_size=300))
    train, val = open_corpus(more)
    assert 1000 <= train.tokens < 1_000_000 and list(val) == ["v"], "the limit is on the training text alone"


def test_bins_of_unclear_names_are_not_left_out_in_silence(tmp_path):
    for name in ("train_000000", "val_000000", "train-00001"):
        write_bin(tmp_path / f"{name}.bin", [1, 2])
    refuses(lambda: open_corpus(tmp_path), "is train-00001.bin for training or validation?")


def test_a_tokenizer_file_of_another_kind_is_refused(tmp_path):
    for content in ('{"version": "1.0", "model": {}}', "{", "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        refuses(lambda: data.load_tokenizer(str(tmp_path)), "is no tokenizer that data.py wrote")


def test_gpt2_offline_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    refuses(lambda: data.load_tokenizer("gpt2"), "gpt2", "TIKTOKEN_CACHE_DIR")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
def test_real_text_with_the_gpt2_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    corpus = SHARED / "corpus"
    tokenizer, train, val = prepare(
        tmp_path, source=f"{corpus}/state_union.train.txt", val=f"{corpus}/state_union.val.txt,{corpus}/inaugural.val.txt", tokenizer="gpt2"
    )
    assert tokenizer.n_vocab == 50258 and tokenizer.encode_single_token("<|mask|>") == 50257
    assert list(val) == ["inaugural", "state_union"]
    text = tokenizer.decode(np.concatenate(train.shards).tolist()).replace("<|endoftext|>", "\n").split()
    assert text == (corpus / "state_union.train.txt").read_text().split()
    ids = Episodes(train, tokenizer, 32, 4, 1, 64, 0).episode(0)
    assert ids.shape == (32, 5, 64) and (ids[..., -1] == 50257).all()


def test_toy_tokenizer_round_trip(toy, tmp_path):
    tokenizer = data.load_tokenizer(str(toy))
    data.save_tokenizer(tokenizer, tmp_path)
    again = data.load_tokenizer(str(tmp_path))
    assert (
        again.n_vocab == TOY_VOCAB
        and again._mergeable_ranks == tokenizer._mergeable_ranks
        and again._special_tokens == tokenizer._special_tokens
    )
