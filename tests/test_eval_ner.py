"""eval_ner.py: aligning, scoring, fine-tuning; nanomaml/treebanks.py: reading, finding, downloading."""
import itertools
import json
import random
import re
import shutil
import threading
from collections import Counter, defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import SHARED, TOY_VOCAB, last_of_each, random_run, refuses
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

import eval_ner
from model import Decoder, ModelConfig
from nanomaml import checkpoint, treebanks
from nanomaml.tokenizer import load_tokenizer
from nanomaml.treebanks import TYPES, read_treebank

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
UNER, CASES = SHARED / "uner", SHARED / "cases"
MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=TOY_VOCAB + 6, context=24)
MAJORITY = ("--train=one", "--mode=majority")


def shared(test):
    return pytest.mark.shared(pytest.mark.skipif(not UNER.exists(), reason=f"no treebanks in {UNER}")(test))


@pytest.fixture(scope="module")
def tokenizer(toy):
    return load_tokenizer(toy)


@pytest.fixture(scope="module")
def uner(tmp_path_factory, tokenizer):
    """Treebanks "one" and "two" over the toy corpus's words, with tags that can be learned.

    The vocabulary's first words are people, the next are places, the next organisations of two words.
    """
    folder, rng = tmp_path_factory.mktemp("uner"), random.Random(0)
    words = [tokenizer.decode([256 + i]).strip() for i in range(200)]
    kinds = [("B-PER", 0, 20), ("B-LOC", 20, 20), ("B-ORG", 40, 20), *3 * [("O", 80, 120)]]

    def sentence():
        for _ in range(rng.randint(2, 12)):
            tag, first, n = rng.choice(kinds)
            yield words[first + rng.randrange(n)], tag
            if tag == "B-ORG":
                yield words[60 + rng.randrange(20)], "I-ORG"

    for name, (split, n) in itertools.product(("one", "two"), {"train": 200, "dev": 40, "test": 40}.items()):
        lines = []
        for i in range(n):
            rows = (f"{j}\t{word}\t{tag}\t-\t-" for j, (word, tag) in enumerate(sentence(), 1))
            lines += [f"# sent_id = {i}", *rows, ""]
        (folder / f"{name}-ud-{split}.iob2").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(toy, tmp_path):
    """A run's folder with a checkpoint of a small random model."""
    return random_run(toy, tmp_path / "run", MODEL)


def evaluate(run, folder, *flags):
    """Runs eval_ner.py on the CPU in float32; all results that ner.jsonl then holds."""
    flags = last_of_each("--device=cpu", "--dtype=float32", "--lr=3e-3", "--test=two", *flags)
    eval_ner.main([str(run), f"--data={folder}", *flags])
    return [json.loads(line) for line in (run / "ner.jsonl").read_text().splitlines()]


def read_split(folder, name):
    return read_treebank(folder / f"{name}.iob2")


def load_treebank(folder, name, tokenizer):
    return eval_ner.Treebank(read_split(folder, name), tokenizer, MODEL.context, "first")


# ---- reading ----


def test_reads_every_form_of_the_published_files(tmp_path):
    """Blank lines that hold a tab, Windows line ends, a byte-order mark, 3 to 5 columns, odd characters in
    words; in Norwegian a dash, where the fourth column holds a tag that does not count here.
    """
    path = tmp_path / "a.iob2"
    path.write_bytes((
        "\ufeff# newdoc id = 1\n# sent_id = 1\n"
        "1\t国际\tB-ORG\t-\tlinpq\n2\t北极\tI-ORG\t-\tlinpq\n3\t。\tO\t-\t-\n\t\n"
        "# text = x\r\n1\tОбамы\tB-PER\r\n2\t20 000\tO\tO#O\ts\r\n\r\n\n\n"
        "1\tEU-møte\t-\tB-DRV\t-\n2\ti\tO\t-\t-\n3\tHamar\tB-LOC\t-\t-\n4\tnå\t-\n\n"
        "1\t#\tO\n2\ta\u2028b\x85c\tB-OTH\n3\td\tI-OTH\n4\te\tB-O\n5\tf\tI-LOC\n"
        "# comment\n6\tg\tI-O\n\n# the end"
    ).encode())
    assert eval_ner.read_iob2(path) == [
        (["国际", "北极", "。"], ["B-ORG", "I-ORG", "O"]),
        (["Обамы", "20 000"], ["B-PER", "O"]),
        (["EU-møte", "i", "Hamar", "nå"], ["O", "O", "B-LOC", "O"]),
        (["#", "a\u2028b\x85c", "d", "e", "f", "g"], ["O", "O", "O", "O", "I-LOC", "O"]),
    ]
    assert read_treebank(path)[3][1] == ["O", "B-OTH", "I-OTH", "O", "I-LOC", "O"]


@pytest.mark.parametrize("text", [
    "Anna B-PER\nin O\n\n\n#MeToo B-EVENT\n# O\n",
    "-DOCSTART- O\n\nAnna  B-PER \r\nin O\r\n\r\n#MeToo B-EVENT\n# O\n",
    "-DOCSTART- -X- O O\n\nAnna NNP B-NP B-PER\nin IN B-PP O\n\n#MeToo NN B-NP B-EVENT\n# SYM I-NP O",
    "-DOCSTART-\nAnna\tB-PER\nin\tO\n-DOCSTART-\n#MeToo\tB-EVENT\t\n#\t-\n\n",
    "# id 7 domain=en\nAnna _ _ B-PER\nin _ _ O\n\n# id 8 domain=en\n#MeToo _ _ B-EVENT\n# _ _ O\n",
    "# http://a.b [2009]\n1\tAnna\tB-PER\tB-X\n2\tin\tO\tO\n\n1\t#MeToo\tB-EVENT\tO\n2\t#\tO\tO\n",
    "1 Anna B-PER\n2 in O\n\n1 #MeToo B-EVENT\n2 # O\n",
    "Anna B-PER\nin O\n#MeToo O O\n\n#MeToo B-EVENT\n# O\n",  # a comment: not as many columns
])
def test_reads_the_forms_of_conll_files(tmp_path, text):
    """The word is first and the tag last, unless ids come first."""
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert read_treebank(path) == [(["Anna", "in"], ["B-PER", "O"]), (["#MeToo", "#"], ["B-EVENT", "O"])]


ANNA = [(["Anna", "in", "Lier"], ["B-PER", "O", "B-LOC"]), (["Jos\u00e9", "7"], ["B-PER", "O"])]
SPLIT = [("Anna", "B-PER"), ("in", "O"), ("Lier", "B-LOC")], [("Jos\u00e9", "B-PER"), ("7", "O")]


@pytest.mark.parametrize("form, ids", [
    ("{id}\t{word}\t{tag}", range(0, 9)),  # F1 was 100, on numbers
    ("{id}\t{word}\t{tag}\tx", range(1, 9)), ("{id} {word} {tag}", range(0, 9)),
    ("{id}\t{word}\tNNP\t{tag}", range(1, 9)), ("{id} {word} X {tag}", range(5, 14)),
    ("1-2\t_\t_\n{id}\t{word}\t{tag}", None), ("8.1\t_\tO\n{id}\t{word}\t{tag}", None),
])
def test_ids_are_ids_where_they_count_up(tmp_path, form, ids):
    path, blocks = tmp_path / "a.tsv", []
    for sentence in SPLIT:
        rows = [form.format(id=i, word=word, tag=tag) for i, (word, tag) in zip(ids or range(1, 9), sentence)]
        blocks.append("\n".join(rows if ids else [rows[0], *(row.split("\n")[1] for row in rows[1:])]))
    path.write_text("\n\n".join(blocks))
    assert read_treebank(path) == ANNA
    path.write_text("\n\n".join(blocks), encoding="latin-1")
    refuses(lambda: read_treebank(path), "(0xe9) is not utf-8 text", "--encoding=latin-1")
    assert read_treebank(path, encoding="latin-1") == ANNA


def test_an_unclear_layout_is_refused_and_an_odd_one_warned_of(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("1 CD B-LOC\n2 CD O\n\nAnna NNP B-PER\nin IN O\n")
    refuses(lambda: read_treebank(path), "is '1' an id before the word 'CD', or a word? ", "1 of 2 sentences")
    path.write_text("1990 CD O\n1991 CD O\n\n" + "Anna NNP B-PER\nin IN O\n\n" * 9)
    assert read_treebank(path)[0] == (["1990", "1991"], ["O", "O"]) and not capsys.readouterr().err
    path.write_text("s1 0 Anna B-PER\ns1 1 in O\n\ns2 0 Lier B-LOC\ns2 1 . O\n")
    read_treebank(path)
    assert "holds sentences of one word over and over" in capsys.readouterr().err
    path.write_text("01\tAnna\tB-PER\n02\tin\tO\n")
    assert read_treebank(path) == [(["Anna", "in"], ["B-PER", "O"])]
    path.write_text("3 B-LOC\n5 O\n")
    read_treebank(path)
    path.write_text("Anna O\n")
    read_treebank(path)
    said = capsys.readouterr().err
    assert "holds numbers as words" in said and "holds no entity" in said


@pytest.mark.parametrize(("first", "row", "lines"), [
    ("ok O", "a word and, last, its tag", ["Anna", "Anna PER", "Anna S-PER", " O", "Anna\tB-PER"]),
    ("1\tok\tO", "id, word and tag", [
        "1 Anna B-PER", "1\tAnna", "1\tAnna\tPER", "1\tAnna\tb-per", "1\t\tO", "<html>", "1\tAnna\tB-MISC"]),
])
def test_a_malformed_line_is_named(tmp_path, first, row, lines):
    path = tmp_path / "a.iob2"
    for line in lines:
        path.write_text(f"{first}\n\n{line}\n")
        says = ["B-MISC is not one of the types PER, ORG, LOC"] if "MISC" in line else [row, repr(line)]
        refuses(lambda: read_treebank(path, TYPES), f"{path}, line 3: ", *says)
    refuses(lambda: read_treebank(path, content=b"1\t\xff\tO\n"), f"cannot read {path}")
    refuses(lambda: read_treebank(path, content=b"# c\n\n"), f"{path} has no sentences")
    refuses(lambda: read_treebank(tmp_path), f"cannot read {tmp_path}")


# From the .stats files beside the treebanks: sentences, words, spans of LOC, PER, ORG. Those of en_pud and
# tl_trg predate a correction of the .iob2 files, so their spans are left out. da_ddt and hr_set have none.
STATS = {
    "ceb_gja-ud-test": (188, 1295, 6, 42, 1), "en_ewt-ud-dev": (2001, 25149, 399, 343, 224),
    "en_ewt-ud-test": (2077, 25097, 317, 449, 322), "en_pud-ud-test": (1000, 21176),
    "pt_bosque-ud-train": (7018, 171776, 2425, 2914, 2762), "pt_bosque-ud-test": (1167, 27604, 317, 442, 456),
    "sk_snk-ud-train": (8483, 80628, 277, 2277, 153), "sk_snk-ud-test": (1061, 12736, 326, 539, 50),
    "tl_trg-ud-test": (128, 734), "xx_dash-ud-test": (60, 260),
}


@shared
def test_all_shared_files_are_read_and_their_counts_are_those_published():
    paths = [*UNER.glob("*.iob2"), CASES / "xx_dash-ud-test.iob2"]
    assert len(paths) >= 18 and {path.stem for path in paths} >= set(STATS)
    for path in paths:
        sentences = read_treebank(path)
        n_words = sum(len(words) for words, _ in sentences)
        rows = [line for line in path.read_text().split("\n") if line and not line.startswith("#")]
        assert n_words == len(rows)
        assert all(len(words) == len(tags) > 0 for words, tags in sentences)
        count = Counter(itertools.chain.from_iterable(tags for _, tags in sentences))
        assert set(count) <= {*TAGS, "B-OTH", "I-OTH"}
        counts = len(sentences), n_words, *(count[f"B-{name}"] for name in ("LOC", "PER", "ORG"))
        assert counts[:len(STATS.get(path.stem, ()))] == STATS.get(path.stem, ())


# ---- span F1 ----


@pytest.mark.parametrize("weight_of_o", [1, 5, 20])
@pytest.mark.parametrize("strict", [False, True])
def test_span_f1_equals_seqeval(strict, weight_of_o):
    """On random tags, most of which are not well-formed IOB2, and on predictions that are partly correct."""
    options = {"mode": "strict", "scheme": IOB2} if strict else {}
    weights = [weight_of_o, 1, 1, 1, 1, 1, 1]
    for rng in map(random.Random, range(30)):
        true = [rng.choices(TAGS, weights, k=rng.randint(1, 15)) for _ in range(20)]
        pred = [[tag if rng.random() < 0.8 else rng.choice(TAGS) for tag in tags] for tags in true]
        ours = eval_ner.span_f1(true, pred, strict)
        report = classification_report(true, pred, output_dict=True, zero_division=0, **options)
        for kind, scores in {"micro avg": ours, **ours["per_type"]}.items():
            theirs = report.get(kind, defaultdict(int))  # it leaves out types that do not occur
            assert [scores[key] for key in ("precision", "recall", "f1")] == pytest.approx(
                [theirs[key] for key in ("precision", "recall", "f1-score")], abs=1e-12)
            assert scores.get("support", theirs["support"]) == theirs["support"]


def test_span_f1_without_spans_is_zero_and_lengths_must_agree():
    scores = eval_ner.span_f1([["O", "O"]], [["O", "O"]])
    assert scores["f1"] == scores["precision"] == scores["recall"] == 0
    assert set(scores["per_type"]) == set(TYPES)
    with pytest.raises(ValueError, match="2 true tags and 1"):
        eval_ner.span_f1([["O", "O"]], [["O"]])


# ---- words and sub-tokens ----


def check_windows(sentences, tokenizer, context, label):
    """Each word is tagged once, at its first or last sub-token, in a window that is part of its sentence."""
    windows = eval_ner.cut(sentences, tokenizer, context, label)
    tokens = [tokenizer.encode_ordinary(" " + word)[:context] for words, _ in sentences for word in words]
    sentence_ends = set(itertools.accumulate(len(words) for words, _ in sentences))  # in words
    assert [number for window in windows for number in window.words] == list(range(len(tokens)))
    for window in windows:
        assert len(window.ids) <= context and len(window.positions) == len(window.words) > 0
        for position, number in zip(window.positions, window.words):
            end = position + (len(tokens[number]) if label == "first" else 1)
            assert window.ids[end - len(tokens[number]):end] == tokens[number]
        if len(window.ids) < context:  # the sentence ends here, or its next word would not have fitted
            following = window.words[-1] + 1
            assert following in sentence_ends or len(window.ids) + len(tokens[following]) > context


@pytest.mark.parametrize("label", ["first", "last"])
def test_each_word_is_tagged_once_at_its_sub_token(tokenizer, label):
    """Random words of any script, of one to hundreds of sub-tokens, in sentences of any length."""
    alphabets = ["abcdefghij", "зиклмн", "国际北极研究", "🙂👍", " -'.", "éßø", "\u200d\u2028"]
    for rng in map(random.Random, range(40)):
        sentences = []
        for _ in range(rng.randint(1, 8)):
            words = ["".join(rng.choices(rng.choice(alphabets), k=rng.choice([1, 2, 5, 9, 60])))
                     for _ in range(rng.choice([1, 3, 30, 90]))]
            sentences.append((words, ["O"] * len(words)))
        check_windows(sentences, tokenizer, rng.choice([2, 5, 24, 128]), label)


@shared
def test_each_word_of_the_real_treebanks_is_tagged_once(tokenizer):
    for name, context in (("da_ddt-ud-dev", 16), ("hr_set-ud-test", 16), ("sk_snk-ud-dev", 128)):
        check_windows(read_split(UNER, name), tokenizer, context, "first")


def test_a_long_sentence_is_read_with_what_came_before(tokenizer):
    words = [tokenizer.decode([256 + i]).strip() for i in range(60)]  # each one sub-token
    windows = eval_ner.cut([(words, ["O"] * 60)], tokenizer, 24, "first")
    assert [(w.words[0], w.positions[0]) for w in windows] == [(0, 0), (24, 12), (36, 12), (48, 12)]


@shared
def test_batches_waste_little_on_padding_and_hold_every_sentence(tokenizer):
    windows = eval_ner.cut(read_split(UNER, "da_ddt-ud-train"), tokenizer, 128, "first")
    first, second = (eval_ner.batches(windows, 16, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    used = sum(len(window.ids) for window in windows)
    assert used > 0.8 * sum(len(batch) * max(len(window.ids) for window in batch) for batch in first)
    for batches in (first, eval_ner.batches(windows, 16)):
        batched = sorted(window.words[0] for batch in batches for window in batch)
        assert batched == [window.words[0] for window in windows]
    assert first != second


def test_features_of_a_batch_equal_those_of_each_sentence_alone(uner, tokenizer):
    """Padding must not be seen: it lies behind."""
    decoder = Decoder(MODEL, torch.Generator().manual_seed(1)).eval()
    windows = eval_ner.cut(read_split(uner, "one-ud-dev"), tokenizer, MODEL.context, "last")[:9]
    together = eval_ner.read_words(decoder, windows, torch.float32)
    assert len({len(window.ids) for window in windows}) > 3
    alone = [decoder.hidden(torch.tensor([window.ids]))[0, window.positions] for window in windows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


# ---- fine-tuning ----


def fine_tune(decoder, train, dev, seed=1, log=lambda line: None, **settings):
    return eval_ner.fine_tune(decoder, train, dev, eval_ner.Config(**settings), seed, torch.float32, log)


def test_head_mode_trains_what_a_frozen_backbone_would(run, uner, tokenizer):
    """Cached features give the same head as running the backbone each time, and the backbone is as before."""
    decoder = checkpoint.load_model(run)
    before = {name: p.clone() for name, p in decoder.state_dict().items()}
    train, dev = (load_treebank(uner, f"one-ud-{split}", tokenizer) for split in ("train", "dev"))
    live, _, _ = fine_tune(decoder, train, dev, mode="head", lr=1e-2, epochs=2)
    for treebank in (train, dev):
        eval_ner.cache_features(decoder, treebank, eval_ner.Config(), torch.float32)
    cached, _, _ = fine_tune(decoder, train, dev, mode="head", lr=1e-2, epochs=2)
    torch.testing.assert_close(live.weight, cached.weight, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in decoder.state_dict().items())


@pytest.mark.parametrize("mode", ["head", "full"])
@pytest.mark.parametrize(("scores", "best", "epochs"), [  # (dev F1, dev loss) of each epoch
    ([(0.2, 1), (0.5, 1), (0.4, 1), (0.3, 1), (0.9, 1)], 2, 4),
    ([(0, 3), (0, 2), (0, 1), (0, 2), (0, 2)], 3, 5),
])
def test_the_best_epoch_is_kept(run, uner, tokenizer, monkeypatch, mode, scores, best, epochs):
    """Patience, here 2, ends training. While F1 is 0 the loss decides."""
    treebank, decoder = load_treebank(uner, "one-ud-dev", tokenizer), checkpoint.load_model(run)
    weights, remaining, lines = [], iter(scores), []

    def predict(decoder, head, *rest):
        f1, loss = next(remaining)
        weights.append([head.weight.detach().clone(), decoder.model.layers[0].mlp.up_proj.weight.clone()])
        monkeypatch.setattr(treebank, "score", lambda predicted: {"f1": f1}, raising=False)
        return treebank.tags, loss

    monkeypatch.setattr(eval_ner, "predict", predict)
    head, *result = fine_tune(decoder, treebank, treebank, 1, lines.append, mode=mode, patience=2, lr=1e-2)
    assert result == [best, scores[best - 1][0]]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15][:epochs]
    kept = head.weight, decoder.model.layers[0].mlp.up_proj.weight
    assert all(map(torch.equal, kept, weights[best - 1]))
    assert [torch.equal(*pair) for pair in zip(kept, weights[-1])] == [False, mode == "head"]


def test_a_loss_that_is_not_finite_ends_in_one_line(run, uner, tokenizer):
    treebank, decoder = load_treebank(uner, "one-ud-dev", tokenizer), checkpoint.load_model(run)
    torch.nn.init.constant_(decoder.model.norm.weight, float("nan"))
    refuses(lambda: fine_tune(decoder, treebank, treebank), "epoch 1 is not finite: lower lr = 3e-05")


# ---- the script ----


def test_full_learns_what_can_be_learned(run, uner):
    results = evaluate(run, uner, "--train=one", "--test=one,two", "--seeds=2", "--epochs=6")
    for line, seed_and_test in zip(results, itertools.product([1, 2], ["one", "two"]), strict=True):
        assert [line[key] for key in ("checkpoint", "step", "mode", "train", "seed", "test")] == [
            str(run / "ckpt_000007.pt"), 7, "full", "one", *seed_and_test]
        assert line["f1"] > 0.9 and 0 < line["f1_strict"] <= 1 and "tags" not in line
        assert set(line["per_type"]) == set(TYPES) and line["per_type"]["PER"]["support"] > 0
        assert line["words"] == sum(len(words) for words, _ in read_split(uner, f"{line['test']}-ud-test"))


@pytest.mark.parametrize("mode", ["head", "full", "majority"])
def test_a_list_of_shots_gives_what_single_runs_give(run, uner, mode):
    """So does the same command again, and another seed gives something else."""
    flags = ("--train=one", "--test=one,two", f"--mode={mode}", "--epochs=2", "--seeds=2")
    results = evaluate(run, uner, *flags, "--shots=8, 0,30,8")
    described = [(result["shots"], result["seed"], result["test"]) for result in results]
    assert described == list(itertools.product([8, 0, 30], [1, 2], ["one", "two"]))
    for shots in (8, 0, 30):
        results += evaluate(run, uner, *flags, f"--shots={shots}")[len(results):]
    assert results[:12] == results[12:]
    assert results[8]["per_type"] != results[10]["per_type"]


def test_every_seed_starts_from_the_checkpoint_on_its_own_draw(run, uner, monkeypatch):
    """Shots come from all training treebanks together; what does not change is prepared once."""
    calls, sizes, tune, cut = [], [], eval_ner.fine_tune, eval_ner.cut

    def spy(decoder, train, dev, *rest):
        calls.append((train.sentences, dev.sentences, decoder.model.layers[0].mlp.up_proj.weight.clone()))
        return tune(decoder, train, dev, *rest)

    monkeypatch.setattr(eval_ner, "fine_tune", spy)
    monkeypatch.setattr(eval_ner, "cut", lambda read, *rest: sizes.append(len(read)) or cut(read, *rest))
    results = evaluate(run, uner, "--train=one,two", "--test=one", "--seeds=2", "--epochs=1", "--shots=30,0")
    assert sizes == [40, 80, 400, 30, 30]  # test, dev, all of train, then the draws
    weight = checkpoint.load_model(run).model.layers[0].mlp.up_proj.weight
    train, dev = (read_split(uner, f"one-ud-{split}") + read_split(uner, f"two-ud-{split}")
                  for split in ("train", "dev"))
    assert all(chosen_on == dev and torch.equal(initial, weight) for _, chosen_on, initial in calls)
    first, second, everything, _ = (call[0] for call in calls)
    assert everything == train and len(first) == len(second) == 30 and first not in (second, train[:30])
    assert {train.index(sentence) < 200 for sentence in first} == {True, False}
    assert eval_ner.draw_shots(train, 8, 1) == first[:8]  # more shots of a seed contain the fewer
    assert results[0]["shots"] == results[0]["sentences"] == 30 and results[-1]["sentences"] == 400


def test_label_changes_what_is_read(run, uner, tmp_path, monkeypatch):
    for path in uner.iterdir():  # an x before each word makes words of several sub-tokens
        (tmp_path / path.name).write_text(re.sub(r"(?m)^(\d+\t)", r"\1x", path.read_text()))
    sent = []
    monkeypatch.setattr(eval_ner, "start_wandb", lambda *args, **facts: (sent.append, lambda: None))
    for mode, label in itertools.product(("head", "full"), ("first", "last")):
        flags = ("--train=one", "--epochs=1", "--shots=16", f"--mode={mode}")
        assert evaluate(run, tmp_path, *flags, f"--label={label}")[-1]["label"] == label
    losses = {line["ner/seed1/dev_loss"] for line in sent if "ner/seed1/dev_loss" in line}
    assert len(losses) == 4, losses


def test_the_tables_show_means_and_sample_deviations():
    def line(f1):
        per_type = {name: {"f1": f1 / 2, "support": 10} for name in TYPES}
        return {"f1": f1, "precision": f1 + 0.1, "recall": f1 - 0.1, "per_type": per_type}

    results = {8: {"da_ddt": [line(0.2), line(0.4)]}, 0: {"da_ddt": [line(0.5), line(0.5)]}}
    text = eval_ner.summary(eval_ner.Config(mode="head", train="x", seeds=2), results, TYPES)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if "|" in row]
    assert rows[0] == ["test", "precision", "recall", "F1", "F1 PER", "F1 ORG", "F1 LOC", "spans"]
    assert rows[2] == ["da_ddt", "40.0 ± 14.1", "20.0 ± 14.1", "30.0 ± 14.1", *["15.0 ± 7.1"] * 3, "30"]
    assert rows[6:] == [["test", "8", "all"], rows[7], ["da_ddt", "30.0 ± 14.1", "50.0 ± 0.0"]]
    assert "trained on x (8 sentences), mean ± standard deviation of 2 seeds\n" in text
    one = eval_ner.summary(eval_ner.Config(), {0: {"da_ddt": [line(0.2)]}}, TYPES)
    assert "±" not in one and one.count("span F1") == 1


def test_scores_go_to_wandb(run, uner, monkeypatch):
    sent, finished = [], []

    def start_wandb(cfg, name, folder, facts):
        return sent.append, lambda: finished.append((name, facts["shots"], facts["step"]))

    monkeypatch.setattr(eval_ner, "start_wandb", start_wandb)
    results = evaluate(run, uner, "--train=one", "--epochs=1", "--mode=head", "--seeds=2", "--shots=0,8")
    metrics = {key: value for line in sent[:4] for key, value in line.items()}
    assert metrics["ner/seed2/two/f1"] == results[1]["f1"]
    assert metrics["ner/seed1/dev_f1"] == results[0]["dev_f1"]
    assert finished == [("run-ner-head-one", 0, 7), ("run-ner-head-one-8shots", 8, 7)]


def test_majority_gives_each_word_its_most_frequent_tag(tokenizer):
    sentences = [(["a", "b", "a", "a"], ["O", "B-LOC", "B-PER", "B-PER"]), (["c", "a"], ["O", "O"])]
    train, test = (eval_ner.Treebank(read, tokenizer, 24, "first") for read in (sentences[:1], sentences))
    assert [TAGS[i] for i in eval_ner.majority(train, test)] == [
        "B-PER", "B-LOC", "B-PER", "B-PER", "O", "B-PER"]


def test_what_is_read_is_printed_and_a_file_can_be_named(run, uner, capsys, monkeypatch):
    """Trained on a split that is not train, every tenth of its sentences chooses the epoch."""
    for flags, says in (
        (["--train=one,two"], "train one,two: 400 sentences"), ([], "dev 40 sentences; test two; types PER"),
        (["--shots=8"], "dev 40 sentences at any --shots"), (["--train=two:dev"], "two:dev: 36 sentences"),
        (["--train=two:valid"], "dev 4 sentences"),
    ):
        evaluate(run, uner, *MAJORITY, *flags)
        assert says in capsys.readouterr().out
    eval_ner.main([str(run / "ckpt_000007.pt"), f"--data={uner}", *MAJORITY, "--test=two", "--lr=3e-3"])
    monkeypatch.setattr(eval_ner, "rank_and_world", lambda: (1, 2))  # under torchrun each wrote every result
    eval_ner.main([str(run), f"--data={uner}", *MAJORITY, "--test=two"])
    lines = (run / "ner.jsonl").read_text().splitlines()
    assert len(lines) == 6 and lines[-1] == lines[1]


@pytest.mark.parametrize(("flags", "says"), [
    ("--train=en_pud", "en_pud has no train split: there is test and, of da_ddt"),
    ("--train=da_dtd", " nor of Universal NER: did you mean da_ddt?"),
    ("--train=,", "no treebank named"),
    ("--train=one:test --test=one", "one:test would be used twice"),
    ("--test=one:dev", "one:dev would be used twice (to train, choose the epoch or score)"),
    ("--train=one,one:dev", "one:dev would be used twice"),
    ("--train=one,one:train", "one:train, one:dev would be used twice"),
    ("--train=da_ddt:tset", "da_ddt has no tset split"),
    ("--shots=8,1000,0", "shots = 1000 is more than the 200 training sentences of one"),
    ("--shots=8,x", "shots must be numbers of sentences, comma-separated, got '8,x'"),
    ("--shots=-1", "shots must be numbers"), ("--shots=8,,32", "shots must be numbers"),
    ("--tags=PER,date", "tags = PER,date must be types that occur in one: LOC, ORG, PER"),
])
def test_bad_input_ends_with_one_clear_line(run, uner, flags, says):
    refuses(lambda: evaluate(run, uner, "--train=one", *flags.split()), says)


def test_an_unusable_run_is_refused_before_training(run, uner, toy):
    (run / "ner.jsonl").mkdir()  # the results could not be written
    with pytest.raises(IsADirectoryError):
        evaluate(run, uner, "--train=one")
    (run / "ner.jsonl").rmdir()
    small = random_run(toy, run / "small", replace(MODEL, vocab_size=TOY_VOCAB - 1))
    refuses(lambda: evaluate(small, uner), f"has {TOY_VOCAB} ids, vocab_size = {TOY_VOCAB - 1}")


# ---- other data, with a tag set of its own ----


@pytest.fixture
def conll(uner, tmp_path):
    """Treebank "one" as a folder of CoNLL files, "wnut", with PER called person and LOC called MISC."""
    folder = tmp_path / "wnut"
    folder.mkdir()
    for split, name in (("train", "train.txt"), ("dev", "valid.txt"), ("test", "test.txt")):
        text = re.sub(r"(?m)^\d+\t(\S+)\t(\S+).*", r"\1 \2", (uner / f"one-ud-{split}.iob2").read_text())
        (folder / name).write_text("-DOCSTART- O\n\n" + text.replace("PER", "person").replace("LOC", "MISC"))
    return folder


def test_files_of_other_data_are_found_and_named(tmp_path):
    expected = {
        "eng:train": "eng.train", "eng:dev": "eng.testa", "eng:test": "eng.testb", "en:dev": "en-dev.conll",
        "hau:train": "hau/train.txt", "hau:dev": "hau/dev.txt", "hau:test": "hau/test.txt",
        "en_x:test": "en_x_test.tsv", "da:dev": "da-ud-dev.iob2", f"{tmp_path.name}:dev": "validation.bio",
    }
    others = ["readme.txt", "contest.txt", "testing.txt", "a.test.partial", "hau/more/test.txt"]
    for file in (*expected.values(), *others):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a O\n")
    assert len(treebanks.local_files(tmp_path)) == len(expected)
    for name, file in expected.items():
        assert treebanks.find_treebank(name, "test", tmp_path) == tmp_path / file
    (tmp_path / "hau" / "valid.txt").write_text("a O\n")
    refuses(lambda: treebanks.find_treebank("hau:dev", "test", tmp_path), "hau/valid.txt are both hau:dev")
    refuses(lambda: treebanks.find_treebank("haus", "test", tmp_path), "did you mean hau?")


@pytest.mark.parametrize(("flags", "types", "ignored"), [
    ("--epochs=6", ["MISC", "ORG", "person"], ""),
    ("--mode=majority --tags=person,ORG", ["person", "ORG"], ", not MISC"),
])
def test_the_types_of_other_data_are_found_or_chosen(run, conll, capsys, flags, types, ignored):
    """--test=all means what such a folder holds: Universal NER's treebanks are not downloaded into it."""
    (result,) = evaluate(run, conll, "--train=all", "--test=all", *flags.split())
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert f"types {', '.join(types)}{ignored}\n" in out and "download" not in out
    assert f"| F1 | F1 {' | F1 '.join(types)} | spans |" in out
    assert (result["test"], result["tags"]) == ("wnut", ",".join(types)) and result["f1"] > 0.9
    assert set(result["per_type"]) == set(types) and result["per_type"]["ORG"]["support"] > 0


def test_a_type_that_was_not_trained_on_ends_with_one_clear_line(run, uner, conll):
    shutil.copytree(uner, conll, dirs_exist_ok=True)
    refuses(lambda: evaluate(run, conll, *MAJORITY, "--test=wnut"), "not one of the types PER, ORG, LOC, OTH")
    (result,) = evaluate(run, conll, *MAJORITY, "--test=wnut", "--tags=PER,ORG,LOC")
    assert "tags" not in result and result["per_type"]["ORG"]["f1"] > 0.9
    assert result["per_type"]["LOC"]["support"] == 0
    for path in conll.glob("*.iob2"):
        path.unlink()
    (conll / "test.txt").write_text("Anna B-person\n\nMay B-date\n")
    says = f"{conll}/test.txt, line 3: B-date is not one of the types MISC, ORG, person"
    refuses(lambda: evaluate(run, conll, "--train=wnut", "--test=wnut"), says)
    refuses(lambda: evaluate(run, conll, "--train=wnut", "--test=all"), says)
    (conll / "test.txt").unlink()
    refuses(lambda: evaluate(run, conll, "--train=wnut", "--test=all"), f"{conll} has no test split")


# ---- downloads ----


@pytest.fixture
def server(uner, monkeypatch):
    """A stand-in for GitHub that serves some treebanks whole and others broken; the requested paths."""
    requested, content = [], (uner / "one-ud-test.iob2").read_bytes()
    answers = {"da_ddt": content, "nob_norne": content, "ro_legalnero": content, "ceb_gja": b"",
               "en_pud": content[:len(content) // 2], "de_pud": b"<html>please log in</html>"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            answer = answers.get(re.split("[/.-]", self.path.split("/")[-1])[0])
            if answer is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content if "en_pud" in self.path else answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(treebanks, "SERVER", f"http://127.0.0.1:{http.server_port}")
        yield requested
        http.shutdown()


def test_a_missing_treebank_is_downloaded_once_and_whole(server, uner, tmp_path, capsys):
    """The Romanian one is a single file, without splits: it is there to be scored."""
    folder, whole = tmp_path / "new" / "uner", (uner / "one-ud-test.iob2").read_bytes()
    for name in 2 * ["da_ddt:dev", "nob_norne:train", "ro_legalnero:test"]:
        path = treebanks.find_treebank(name, "test", folder)
        assert path == folder / f"{name.replace(':', '-ud-')}.iob2" and path.read_bytes() == whole
    assert server == ["/UNER_Danish-DDT/main/da_ddt-ud-dev.iob2",
                      "/UNER_Norwegian-NDT/master/nob_norne-ud-train.iob2",
                      "/UNER_Romanian-LegalNERo/master/ro_legalnero.iob2"]
    assert capsys.readouterr().out.splitlines() == [f"download  {treebanks.SERVER}{path}" for path in server]
    reasons = {"en_pud": "IncompleteRead", "de_pud": "please log in", "hr_set": "Not Found",
               "ceb_gja": "has no sentences"}
    for name, reason in reasons.items():
        refuses(lambda: treebanks.find_treebank(name, "test", folder), reason,  # noqa: B023
                f"fetch {treebanks.SERVER}", str(folder / f"{name}-ud-test.iob2"))
    assert len(list(folder.iterdir())) == 3 and treebanks.has_dev("hr_set", folder)  # no torn file
    (tmp_path / "file").write_text("")
    refuses(lambda: treebanks.find_treebank("da_ddt", "test", tmp_path / "file"), "and the download failed")
    refuses(lambda: treebanks.find_treebank("ro_legalnero:train", "test", folder), "has no train split")


def test_one_treebank_that_fails_does_not_keep_all_from_the_others(server, tmp_path, capsys):
    """A 404 was taken for a dead network, and what the server did have was left out."""
    assert list(treebanks.load("all", "test", tmp_path)) == ["da_ddt", "nob_norne", "ro_legalnero"]
    assert len(server) == len(treebanks.REPOSITORIES)
    assert "--test=all leaves out ceb_gja, de_pud, en_ewt" in capsys.readouterr().out


def test_all_leaves_out_what_cannot_be_read_or_fetched(run, uner, tmp_path, monkeypatch, capsys):
    """A bad file ended --test=all; named, or alone, it still does. A network that is down is tried once."""
    monkeypatch.setattr(treebanks, "SERVER", "http://127.0.0.1:1")  # nothing listens there
    folder = shutil.copytree(uner, tmp_path / "uner")
    (folder / "bad-ud-test.iob2").write_text("1\tword\tB-MISC\n")
    (folder / "empty-ud-test.iob2").write_text("# nothing\n")
    results = evaluate(run, folder, *MAJORITY, "--test=all")
    assert [result["test"] for result in results] == ["one", "two"]
    out = capsys.readouterr().out
    assert out.count("download  ") == 1
    (note,) = re.findall("note .* leaves out bad, ceb_gja, da_ddt, .*, empty.*", out)
    assert "bad-ud-test.iob2, line 1: B-MISC is not one of" in note and "refused" in note

    for name, says in (("bad", "bad-ud-test.iob2, line 1"), ("empty", "empty-ud-test.iob2 has no sentences")):
        refuses(lambda: evaluate(run, folder, *MAJORITY, f"--test=two,{name}"), says)  # noqa: B023
    url = "http://127.0.0.1:1/UNER_Cebuano-GJA/master/ceb_gja-ud-test.iob2"
    refuses(lambda: treebanks.load("all", "test", tmp_path / "none"), f"fetch {url}")
