"""eval_ner.py: reading, aligning, scoring, fine-tuning, downloading."""
import base64
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, TOY_VOCAB, last_of_each, random_run, refuses
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.scheme import IOB2

import checkpoint
import data
import eval_ner
from config import UserError
from eval_ner import TYPES
from model import Decoder, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
UNER, CASES = SHARED / "uner", SHARED / "cases"
shared = pytest.mark.skipif(not UNER.exists(), reason=f"no treebanks in {UNER}")
MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=TOY_VOCAB + 6, context=24)


@pytest.fixture(scope="module")
def tokenizer(toy):
    return data.load_tokenizer(toy)


@pytest.fixture(scope="module")
def treebanks(tmp_path_factory, toy):
    """Treebanks "one" and "two" over the toy corpus's words, with tags that can be learned.

    The vocabulary's first words are people, the next are places, the next organisations of two words.
    """
    folder, rng = tmp_path_factory.mktemp("uner"), random.Random(0)
    encoding = data.load_tokenizer(toy)
    words = [encoding.decode([256 + i]).strip() for i in range(200)]

    def sentence():
        for _ in range(rng.randint(2, 12)):
            kind = rng.random()
            if kind < 0.15:
                yield words[rng.randrange(20)], "B-PER"
            elif kind < 0.3:
                yield words[20 + rng.randrange(20)], "B-LOC"
            elif kind < 0.4:
                yield words[40 + rng.randrange(20)], "B-ORG"
                yield words[60 + rng.randrange(20)], "I-ORG"
            else:
                yield words[80 + rng.randrange(120)], "O"

    for name in ("one", "two"):
        for split, n in (("train", 200), ("dev", 40), ("test", 40)):
            lines = []
            for i in range(n):
                lines.append(f"# sent_id = {i}")
                lines += [f"{j}\t{word}\t{tag}\t-\t-" for j, (word, tag) in enumerate(sentence(), 1)]
                lines.append("")
            (folder / f"{name}-ud-{split}.iob2").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(toy, tmp_path):
    """A run's folder with a checkpoint of a small random model."""
    return random_run(toy, tmp_path / "run", MODEL)


def read_results(run):
    return [json.loads(line) for line in (run / "ner.jsonl").read_text().splitlines()]


def evaluate(run, treebanks, *flags):
    """Runs eval_ner.py on the CPU in float32; all results that ner.jsonl then holds."""
    flags = last_of_each("--device=cpu", "--dtype=float32", "--lr=3e-3", *flags)
    eval_ner.main([str(run), f"--data={treebanks}", *flags])
    return read_results(run)


def read_split(treebanks, name):
    """The sentences of, for instance, "one-ud-dev"."""
    return eval_ner.read_treebank(treebanks / f"{name}.iob2")


def load_treebank(treebanks, name, tokenizer):
    return eval_ner.Treebank(read_split(treebanks, name), tokenizer, MODEL.context, "first")


# ---- reading ----


def test_reads_every_form_of_the_published_files(tmp_path):
    """Blank lines that hold a tab, Windows line ends, a byte-order mark, 3 to 5 columns.

    Words may contain spaces and unusual line separators.
    """
    path = tmp_path / "a.iob2"
    path.write_bytes((
        "\ufeff# newdoc id = 1\n# sent_id = 1\n"
        "1\t国际\tB-ORG\t-\tlinpq\n2\t北极\tI-ORG\t-\tlinpq\n3\t。\tO\t-\t-\n\t\n"
        "# text = x\r\n1\tОбамы\tB-PER\r\n2\t20 000\tO\tO#O\ts\r\n\r\n\n\n"
        "1\t#\tO\n2\ta\u2028b\x85c\tB-OTH\n3\td\tI-OTH\n4\te\tB-O\n5\tf\tI-LOC\n"
        "# comment\n6\tg\tI-O\n\n# the end"
    ).encode())
    sentences = eval_ner.read_treebank(path)
    assert eval_ner.keep_types(sentences, TYPES) == {"OTH": 2}
    assert sentences == [
        (["国际", "北极", "。"], ["B-ORG", "I-ORG", "O"]),
        (["Обамы", "20 000"], ["B-PER", "O"]),
        (["#", "a\u2028b\x85c", "d", "e", "f", "g"], ["O", "O", "O", "O", "I-LOC", "O"]),
    ]


def test_a_dash_is_read_as_outside(tmp_path):
    """The Norwegian treebanks have it where the fourth column holds a tag that does not count here."""
    path = tmp_path / "a.iob2"
    path.write_text("1\tEU-møte\t-\tB-DRV\t-\n2\ti\tO\t-\t-\n3\tHamar\tB-LOC\t-\t-\n4\tnå\t-\n")
    assert eval_ner.read_treebank(path) == [(["EU-møte", "i", "Hamar", "nå"], ["O", "O", "B-LOC", "O"])]


@pytest.mark.shared
@pytest.mark.skipif(not CASES.exists(), reason=f"no cases in {CASES}")
def test_the_dash_of_the_shared_cases():
    sentences = eval_ner.read_treebank(CASES / "xx_dash-ud-test.iob2", TYPES)
    assert (len(sentences), sum(len(words) for words, _ in sentences)) == (60, 260)
    assert {tag for _, tags in sentences for tag in tags} == {"O", "B-PER", "I-PER", "B-ORG", "B-LOC"}


@pytest.mark.parametrize(
    "text",
    [
        "Anna B-PER\nin O\n\n\n#MeToo B-EVENT\n# O\n",
        "-DOCSTART- O\n\nAnna  B-PER \r\nin O\r\n\r\n#MeToo B-EVENT\n# O\n",
        "-DOCSTART- -X- O O\n\nAnna NNP B-NP B-PER\nin IN B-PP O\n\n#MeToo NN B-NP B-EVENT\n# SYM I-NP O",
        "-DOCSTART-\nAnna\tB-PER\nin\tO\n-DOCSTART-\n#MeToo\tB-EVENT\t\n#\t-\n\n",
        "# id 7 domain=en\nAnna _ _ B-PER\nin _ _ O\n\n# id 8 domain=en\n#MeToo _ _ B-EVENT\n# _ _ O\n",
        "# http://a.b [2009]\n1\tAnna\tB-PER\tB-X\n2\tin\tO\tO\n\n1\t#MeToo\tB-EVENT\tO\n2\t#\tO\tO\n",
        "1 Anna B-PER\n2 in O\n\n1 #MeToo B-EVENT\n2 # O\n",
    ],
    ids=["two columns", "CoNLL, line ends", "four columns", "tabs", "comments", "ids and nested tags", "ids"],
)
def test_reads_the_forms_of_conll_files(tmp_path, text):
    """The word is first and the tag last, unless ids come first: 1 in the first row."""
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert eval_ner.read_treebank(path) == [
        (["Anna", "in"], ["B-PER", "O"]), (["#MeToo", "#"], ["B-EVENT", "O"]),
    ]


@pytest.mark.parametrize("line", ["Anna", "Anna PER", "Anna S-PER", " O", "Anna\tB-PER", "#MeToo O O"])
def test_a_malformed_line_of_a_conll_file_is_named(tmp_path, line):
    """But for what begins with # and is no row of as many columns: a comment."""
    path = tmp_path / "a.conll"
    path.write_text(f"ok O\n\n{line}\n")
    if line.startswith("#"):
        assert eval_ner.read_treebank(path) == [(["ok"], ["O"])]
    else:
        message = f"{path}, line 3: expected a word and, last, its tag (O, B-TYPE or I-TYPE), separated by"
        refuses(lambda: eval_ner.read_treebank(path), f"{message} blanks", repr(line))


@pytest.mark.parametrize(
    "line",
    ["1 Anna B-PER", "1\tAnna", "1\tAnna\tPER", "1\tAnna\tB-MISC", "1\tAnna\tb-per", "1\t\tO", "<html>"],
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "a.iob2"
    path.write_text(f"# c\n1\tok\tO\n\n{line}\n")
    with pytest.raises(UserError) as error:
        eval_ner.read_treebank(path, TYPES)
    message = str(error.value)
    assert f"{path}, line 4" in message and "\n" not in message
    assert ("B-MISC is none of the types PER, ORG, LOC;" if "MISC" in line else repr(line)) in message
    path.write_bytes(b"1\t\xff\tO\n")
    with pytest.raises(UserError, match="cannot read .*a.iob2"):
        eval_ner.read_treebank(path)


# From the .stats files beside the treebanks: sentences, words, spans. Those of en_pud and tl_trg predate
# a correction of the .iob2 files, so their spans are left out. da_ddt and hr_set have no .stats file.
STATS = {
    "ceb_gja-ud-test": (188, 1295, {"LOC": 6, "PER": 42, "ORG": 1}),
    "en_ewt-ud-dev": (2001, 25149, {"LOC": 399, "PER": 343, "ORG": 224}),
    "en_ewt-ud-test": (2077, 25097, {"LOC": 317, "PER": 449, "ORG": 322}),
    "en_pud-ud-test": (1000, 21176, None),
    "pt_bosque-ud-train": (7018, 171776, {"LOC": 2425, "PER": 2914, "ORG": 2762}),
    "pt_bosque-ud-test": (1167, 27604, {"LOC": 317, "PER": 442, "ORG": 456}),
    "sk_snk-ud-train": (8483, 80628, {"LOC": 277, "PER": 2277, "ORG": 153}),
    "sk_snk-ud-test": (1061, 12736, {"LOC": 326, "PER": 539, "ORG": 50}),
    "tl_trg-ud-test": (128, 734, None),
}


@pytest.mark.shared
@shared
@pytest.mark.parametrize("name", STATS)
def test_counts_are_those_published(name):
    sentences = read_split(UNER, name)
    span_counts = Counter(tag[2:] for _, tags in sentences for tag in tags if tag.startswith("B-"))
    n_sentences, n_words, n_spans = STATS[name]
    assert (len(sentences), sum(len(words) for words, _ in sentences)) == (n_sentences, n_words)
    assert n_spans is None or span_counts == n_spans


@pytest.mark.shared
@shared
def test_all_shared_files_are_read():
    paths = sorted(UNER.glob("*.iob2"))
    assert len(paths) >= 17
    for path in paths:
        lines = path.read_text().split("\n")
        rows = sum(bool(line) and not line.startswith("#") for line in lines)
        sentences = eval_ner.read_treebank(path)
        assert sum(len(words) for words, _ in sentences) == rows
        assert all(len(words) == len(tags) > 0 for words, tags in sentences)
        assert {tag for _, tags in sentences for tag in tags} <= {*TAGS, "B-OTH", "I-OTH"}


# ---- span F1 ----


def random_tags(rng, sentences, weights):
    return [rng.choices(TAGS, weights, k=rng.randint(1, 15)) for _ in range(sentences)]


@pytest.mark.parametrize("weight_of_o", [1, 5, 20])
@pytest.mark.parametrize("strict", [False, True])
def test_span_f1_equals_seqeval(strict, weight_of_o):
    """On random tags, most of which are not well-formed IOB2, and on predictions that are partly correct."""
    options = {"mode": "strict", "scheme": IOB2} if strict else {}
    for seed in range(30):
        rng = random.Random(seed)
        true = random_tags(rng, 20, [weight_of_o, 1, 1, 1, 1, 1, 1])
        pred = [[tag if rng.random() < 0.8 else rng.choice(TAGS) for tag in tags] for tags in true]
        ours = eval_ner.span_f1(true, pred, strict)
        for key, theirs in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
            assert ours[key] == pytest.approx(theirs(true, pred, zero_division=0, **options), abs=1e-12)
        report = classification_report(true, pred, output_dict=True, zero_division=0, **options)
        for kind in set(report) & set(TYPES):
            scores = ours["per_type"][kind]
            assert [scores[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
                [report[kind][key] for key in ("precision", "recall", "f1-score", "support")]
            )


@pytest.mark.parametrize(
    "tags",
    [
        "I-PER I-PER", "B-PER I-LOC I-PER", "O I-ORG O", "B-PER B-PER I-PER", "I-LOC B-LOC I-LOC",
        "B-ORG O I-ORG", "I-PER I-LOC B-LOC", "O O",
    ],
)
def test_span_f1_of_ill_formed_tags_equals_seqeval(tags):
    tags = tags.split()
    for other in (tags, tags[::-1], ["O"] * len(tags), ["B-PER"] + ["I-PER"] * (len(tags) - 1)):
        for strict, options in ((False, {}), (True, {"mode": "strict", "scheme": IOB2})):
            if strict and all(tag == "O" for tag in tags + other):
                continue  # seqeval fails without any span
            ours = eval_ner.span_f1([tags, ["I-PER"]], [other, ["O"]], strict)
            theirs = f1_score([tags, ["I-PER"]], [other, ["O"]], zero_division=0, **options)
            assert ours["f1"] == pytest.approx(theirs, abs=1e-12), (other, strict)


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
    for seed in range(40):
        rng = random.Random(seed)
        sentences = []
        for _ in range(rng.randint(1, 8)):
            words = []
            for _ in range(rng.choice([1, 3, 30, 90])):
                letters = rng.choices(rng.choice(alphabets), k=rng.choice([1, 2, 5, 9, 60]))
                words.append("".join(letters))
            sentences.append((words, ["O"] * len(words)))
        check_windows(sentences, tokenizer, rng.choice([2, 5, 24, 128]), label)


def test_a_long_sentence_is_read_with_what_came_before(tokenizer):
    words = [tokenizer.decode([256 + i]).strip() for i in range(60)]  # each one sub-token
    windows = eval_ner.cut([(words, ["O"] * 60)], tokenizer, 24, "first")
    assert [window.words[0] for window in windows] == [0, 24, 36, 48]
    assert [window.positions[0] for window in windows] == [0, 12, 12, 12]


@pytest.mark.shared
@shared
@pytest.mark.parametrize("context", [16, 128])
def test_each_word_of_the_real_treebanks_is_tagged_once(tokenizer, context):
    for name in ("da_ddt-ud-dev", "hr_set-ud-test", "sk_snk-ud-dev", "pt_bosque-ud-test", "ceb_gja-ud-test"):
        check_windows(read_split(UNER, name), tokenizer, context, "first")


@pytest.mark.shared
@shared
def test_batches_waste_little_on_padding_and_hold_every_sentence(tokenizer):
    windows = eval_ner.cut(read_split(UNER, "da_ddt-ud-train"), tokenizer, 128, "first")
    first, second = (eval_ner.batches(windows, 16, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert eval_ner.padding(first) < 0.2
    for batches in (first, eval_ner.batches(windows, 16)):
        batched = sorted(window.words[0] for batch in batches for window in batch)
        assert batched == [window.words[0] for window in windows]
    assert first != second


@pytest.mark.parametrize("bidirectional", [False, True])
def test_features_of_a_batch_equal_those_of_each_sentence_alone(treebanks, tokenizer, bidirectional):
    """Padding must not be seen: causal, it lies behind; bidirectional, it is masked."""
    decoder = Decoder(MODEL, torch.Generator().manual_seed(1)).eval()
    windows = eval_ner.cut(read_split(treebanks, "one-ud-dev"), tokenizer, MODEL.context, "last")[:9]
    together = eval_ner.read_words(decoder, windows, bidirectional, torch.float32)
    lengths = [len(window.ids) for window in windows]
    assert len(set(lengths)) > 3
    alone = []
    for window in windows:
        ids = torch.tensor([window.ids])
        rope = decoder.model.positions(ids.shape[1])
        x = decoder.model.embed_tokens(ids)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        for layer in decoder.model.layers:
            x = layer(x, *rope, mask if bidirectional else mask.tril())
        alone.append(decoder.model.norm(x)[0, window.positions])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)

    # Another last sub-token reaches the first word's features only without the causal mask.
    changed = windows[0]._replace(ids=windows[0].ids[:-1] + [5])
    features = eval_ner.read_words(decoder, [changed], bidirectional, torch.float32)
    difference = (features[0] - together[0]).abs().max()
    assert (difference > 1e-6) == bidirectional and max(lengths) > 1


# ---- fine-tuning ----


def test_full_learns_what_can_be_learned(run, treebanks):
    results = evaluate(run, treebanks, "--train=one", "--test=one,two", "--mode=full", "--seeds=2")
    tests_and_seeds = [(result["test"], result["seed"]) for result in results]
    assert tests_and_seeds == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    assert all(result["f1"] > 0.9 for result in results), [result["f1"] for result in results]
    first = results[0]
    assert first["checkpoint"].endswith("run/ckpt_000007.pt")
    assert (first["step"], first["mode"], first["train"]) == (7, "full", "one")
    assert set(first["per_type"]) == set(TYPES) and first["per_type"]["PER"]["support"] > 0
    assert 0 < first["f1_strict"] <= 1
    assert first["words"] == sum(len(words) for words, _ in read_split(treebanks, "one-ud-test"))


def test_same_seed_same_result_other_seed_another(run, treebanks):
    for mode in ("head", "full"):
        flags = ("--train=one", "--test=two", f"--mode={mode}", "--epochs=2")
        evaluate(run, treebanks, *flags, "--seeds=2")
        seed_1, seed_2, seed_1_again = evaluate(run, treebanks, *flags, "--seeds=1")[-3:]
        assert seed_1 == seed_1_again
        assert (seed_1["f1"], seed_1["dev_f1"]) != (seed_2["f1"], seed_2["dev_f1"])


def test_head_mode_trains_what_a_frozen_backbone_would(run, treebanks, tokenizer):
    """Cached features give the same head as running the backbone each time, and the backbone is as before."""
    decoder = checkpoint.load_model(run)
    before = {name: p.clone() for name, p in decoder.state_dict().items()}
    cfg = eval_ner.Config(mode="head", lr=1e-2, epochs=2)
    train, dev = (load_treebank(treebanks, f"one-ud-{split}", tokenizer) for split in ("train", "dev"))
    live, _, _ = eval_ner.fine_tune(decoder, train, dev, cfg, 1, torch.float32, lambda line: None)
    for treebank in (train, dev):
        eval_ner.cache_features(decoder, treebank, cfg, torch.float32)
    cached, _, _ = eval_ner.fine_tune(decoder, train, dev, cfg, 1, torch.float32, lambda line: None)
    torch.testing.assert_close(live.weight, cached.weight, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in decoder.state_dict().items())


@pytest.mark.parametrize("mode", ["head", "full"])
@pytest.mark.parametrize(
    ("scores", "best", "epochs"),  # (dev F1, dev loss) of each epoch; the epoch to keep; epochs to train
    [
        ([(0.2, 1), (0.5, 1), (0.4, 1), (0.3, 1), (0.9, 1)], 2, 4),
        ([(0, 3), (0, 2), (0, 1), (0, 2), (0, 2)], 3, 5),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends_training(
    run, treebanks, tokenizer, monkeypatch, mode, scores, best, epochs
):
    """Patience is 2. Head and backbone are those of the best epoch; while F1 is 0 the loss decides."""
    treebank = load_treebank(treebanks, "one-ud-dev", tokenizer)
    decoder = checkpoint.load_model(run)
    weights, remaining = [], iter(scores)

    def backbone_weight():
        return decoder.model.layers[0].mlp.up_proj.weight.detach().clone()

    def predict(decoder, head, *rest):
        f1, loss = next(remaining)
        weights.append((head.weight.detach().clone(), backbone_weight()))
        monkeypatch.setattr(treebank, "score", lambda predicted: {"f1": f1}, raising=False)
        return treebank.tags, loss

    monkeypatch.setattr(eval_ner, "predict", predict)
    cfg = eval_ner.Config(mode=mode, patience=2, lr=1e-2)
    head, epoch, f1 = eval_ner.fine_tune(
        decoder, treebank, treebank, cfg, 1, torch.float32, lambda line: None
    )
    assert (epoch, f1, len(weights)) == (best, scores[best - 1][0], epochs)
    (best_head, best_backbone), (last_head, last_backbone) = weights[best - 1], weights[-1]
    assert torch.equal(head.weight, best_head) and not torch.equal(head.weight, last_head)
    assert torch.equal(backbone_weight(), best_backbone)
    assert torch.equal(backbone_weight(), last_backbone) == (mode == "head")


def test_fine_tuning_is_adamw_with_linear_decay_and_clipping(run, treebanks, tokenizer):
    """Against an independent loop: the whole backbone in 16 sentences a batch, 3 epochs."""
    treebank = load_treebank(treebanks, "one-ud-dev", tokenizer)
    cfg = eval_ner.Config(lr=1e-4, epochs=3, batch_size=16)
    decoder, other = checkpoint.load_model(run), checkpoint.load_model(run)
    lines = []
    head, epoch, _ = eval_ner.fine_tune(decoder, treebank, treebank, cfg, 5, torch.float32, lines.append)
    assert epoch == 3 and [line["step"] for line in lines] == [3, 6, 9]

    generator = torch.Generator().manual_seed(5)
    weight = (0.02 * torch.randn(7, 32, generator=generator)).requires_grad_()
    bias = torch.zeros(7, requires_grad=True)
    params = [weight, bias, *other.model.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0, fused=True)
    for step in range(9):
        if step % 3 == 0:
            order = eval_ner.batches(treebank.windows, 16, generator)
        x = eval_ner.read_words(other, order[step % 3], False, torch.float32)
        words = [word for window in order[step % 3] for word in window.words]
        optimizer.param_groups[0]["lr"] = 1e-4 * (9 - step) / 9
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight.T + bias, treebank.tags[words]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    torch.testing.assert_close(head.weight, weight, rtol=1e-5, atol=1e-7)
    ours, theirs = (d.model.layers[1].mlp.down_proj.weight for d in (decoder, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert len(order) == 3
    assert order != eval_ner.batches(treebank.windows, 16, torch.Generator().manual_seed(6))


@pytest.fixture
def fine_tune_calls(monkeypatch):
    """(training sentences, dev sentences, initial weight of a backbone layer) of each call to `fine_tune`."""
    calls, original = [], eval_ner.fine_tune

    def fine_tune(decoder, train, dev, *rest):
        weight = decoder.model.layers[0].mlp.up_proj.weight.detach().clone()
        calls.append((train.sentences, dev.sentences, weight))
        return original(decoder, train, dev, *rest)

    monkeypatch.setattr(eval_ner, "fine_tune", fine_tune)
    return calls


def test_every_seed_starts_from_the_checkpoint_and_dev_chooses_the_epoch(run, treebanks, fine_tune_calls):
    evaluate(run, treebanks, "--train=one", "--test=two", "--seeds=2", "--epochs=1")
    weight = checkpoint.load_model(run).model.layers[0].mlp.up_proj.weight
    assert len(fine_tune_calls) == 2
    for train, dev, initial_weight in fine_tune_calls:
        assert train == read_split(treebanks, "one-ud-train")
        assert dev == read_split(treebanks, "one-ud-dev")
        assert torch.equal(initial_weight, weight)


def test_each_seed_draws_its_shots_from_all_training_treebanks(run, treebanks, fine_tune_calls):
    flags = ("--seeds=2", "--epochs=1", "--mode=head", "--shots=30")
    results = evaluate(run, treebanks, "--train=one,two", "--test=two", *flags)
    sentences = read_split(treebanks, "one-ud-train") + read_split(treebanks, "two-ud-train")
    (first, _, _), (second, _, _) = fine_tune_calls
    assert len(first) == len(second) == 30 and first != second
    assert all(sentence in sentences for sentence in first + second)
    assert {sentences.index(sentence) < 200 for sentence in first} == {True, False}
    assert first != sentences[:30]
    assert results[0]["shots"] == results[0]["sentences"] == 30


@pytest.mark.parametrize("mode", ["head", "full", "majority"])
def test_a_list_of_shots_gives_what_single_runs_give(run, treebanks, mode):
    flags = ("--train=one", "--test=one,two", f"--mode={mode}", "--epochs=2", "--seeds=2")
    results = evaluate(run, treebanks, *flags, "--shots=8, 0,30,8")
    described = [(result["shots"], result["seed"], result["test"]) for result in results]
    assert described == list(itertools.product([8, 0, 30], [1, 2], ["one", "two"]))
    for shots in (8, 0, 30):
        results += evaluate(run, treebanks, *flags, f"--shots={shots}")[len(results):]
    assert results[:12] == results[12:]


def test_treebanks_to_score_and_dev_are_prepared_once(run, treebanks, monkeypatch):
    sizes, original = [], eval_ner.Treebank

    def treebank(sentences, *rest):
        sizes.append(len(sentences))
        return original(sentences, *rest)

    monkeypatch.setattr(eval_ner, "Treebank", treebank)
    evaluate(run, treebanks, "--train=one", "--test=two", "--epochs=1", "--shots=8,9,0", "--seeds=2")
    assert sizes == [40, 40, 200, 8, 8, 9, 9]  # test, dev, all of train, then the draws


def test_more_shots_of_a_seed_contain_the_fewer():
    few, many, others = (eval_ner.draw_shots(range(99), n, seed) for n, seed in ((8, 1), (32, 1), (32, 2)))
    assert many[:8] == few and len(set(many)) == 32 and set(many) != set(others)


def test_few_shot_runs_say_that_dev_stays_whole(run, treebanks, capsys):
    note = "--shots draws from train only: the epoch is chosen on all 40 dev sentences"
    for flags, expected in ((["--shots=8"], 1), (["--shots=0,8"], 1), ([], 0), (["--mode=majority"], 0)):
        evaluate(run, treebanks, "--train=one", "--test=two", "--epochs=1", *flags)
        assert capsys.readouterr().out.count(note) == expected
    evaluate(run, treebanks, "--train=one", "--test=two", "--mode=majority", "--shots=8")
    assert "note" not in capsys.readouterr().out


def test_label_and_bidirectional_change_what_is_read(run, treebanks, tmp_path, monkeypatch):
    for path in treebanks.iterdir():  # an x before each word makes words of several sub-tokens
        rows = [line.split("\t") for line in path.read_text().split("\n")]
        rows = [[row[0], "x" + row[1], *row[2:]] if len(row) > 1 else row for row in rows]
        (tmp_path / path.name).write_text("\n".join("\t".join(row) for row in rows))
    sent = []
    monkeypatch.setattr(eval_ner, "start_wandb", lambda *args: (sent.append, lambda: None))
    for mode in ("head", "full"):
        for flags in ([], ["--label=last"], ["--bidirectional"], ["--label=last", "--bidirectional"]):
            common = ("--train=one", "--test=two", "--epochs=1", f"--mode={mode}")
            result = evaluate(run, tmp_path, *common, *flags)[-1]
            assert result["label"] == ("last" if "--label=last" in flags else "first")
            assert result["bidirectional"] == ("--bidirectional" in flags)
    losses = {line["ner/seed1/dev_loss"] for line in sent if "ner/seed1/dev_loss" in line}
    assert len(losses) == 8, losses


def test_the_table_shows_means_and_sample_deviations():
    def result(f1, precision, recall):
        per_type = {name: {"f1": f1 / 2, "support": 10} for name in TYPES}
        return {"f1": f1, "precision": precision, "recall": recall, "per_type": per_type}

    lines = eval_ner.table({"da_ddt": [result(0.2, 0.3, 0.1), result(0.4, 0.5, 0.3)]}).splitlines()
    assert lines[0].split() == "| test | precision | recall | F1 | F1 PER | F1 ORG | F1 LOC | spans |".split()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["da_ddt", "40.0 ± 14.1", "20.0 ± 14.1", "30.0 ± 14.1", *["15.0 ± 7.1"] * 3, "30"]
    assert "±" not in eval_ner.table({"da_ddt": [result(0.2, 0.3, 0.1)]})


def test_a_list_of_shots_ends_with_a_compact_table(run, treebanks, capsys):
    flags = ("--train=one", "--test=one,two", "--mode=majority", "--seeds=3")
    results = evaluate(run, treebanks, *flags, "--shots=8,32,0")
    out = capsys.readouterr().out
    assert out.index("(8 sentences)") < out.index("(32 sentences)") < out.index("by number of sentences")
    lines = out.split("by number of sentences, mean ± standard deviation of 3 seeds\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    assert rows[0] == ["test", "8", "32", "all"] and lines[4] == ""
    for row, test in zip(rows[2:], ("one", "two"), strict=True):
        expected = [test]
        for shots in (8, 32, 0):
            f1 = [100 * line["f1"] for line in results if (line["shots"], line["test"]) == (shots, test)]
            expected.append(f"{np.mean(f1):.1f} ± {np.std(f1, ddof=1):.1f}")
        assert row == expected
    assert len({len(line) for line in lines[:4]}) == 1 and rows[2][1] != rows[2][2]

    evaluate(run, treebanks, *flags, "--shots=8")
    assert "by number of sentences" not in capsys.readouterr().out


def test_scores_go_to_wandb(run, treebanks, monkeypatch):
    sent, finished = [], []

    def start_wandb(cfg, name, folder):
        return sent.append, lambda: finished.append((name, cfg.shots))

    monkeypatch.setattr(eval_ner, "start_wandb", start_wandb)
    flags = ("--epochs=1", "--mode=head", "--seeds=2")
    results = evaluate(run, treebanks, "--train=one", "--test=two", *flags)
    metrics = {key: value for line in sent for key, value in line.items()}
    assert metrics["ner/seed2/two/f1"] == results[1]["f1"]
    assert metrics["ner/seed1/dev_f1"] == results[0]["dev_f1"]
    assert finished == [("run-ner-head-one", "0")]
    evaluate(run, treebanks, "--train=one", "--test=two", "--epochs=1", "--mode=head", "--shots=8,30")
    assert finished[1:] == [("run-ner-head-one-8shots", "8"), ("run-ner-head-one-30shots", "30")]


def test_majority_gives_each_word_its_most_frequent_tag(run, treebanks):
    (result,) = evaluate(run, treebanks, "--train=one", "--test=two", "--mode=majority")
    counts = {}
    for words, tags in read_split(treebanks, "one-ud-train"):
        for word, tag in zip(words, tags):
            counts.setdefault(word, Counter())[tag] += 1
    tag_of = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    test = read_split(treebanks, "two-ud-test")
    pred = [[tag_of.get(word, "O") for word in words] for words, _ in test]
    assert result["f1"] == f1_score([tags for _, tags in test], pred) > 0.9


def test_lists_all_shots_and_held_out_sentences(run, treebanks, capsys):
    flags = ("--epochs=1", "--mode=head")
    evaluate(run, treebanks, "--train=one,two", "--test=two", *flags)
    assert "train one,two: 400 sentences" in capsys.readouterr().out
    shots = ("--shots=8", "--seeds=2", "--lr=0.1")
    results = evaluate(run, treebanks, "--train=two", "--test=one", *flags, *shots)
    assert results[-1]["shots"] == 8
    assert "(8 sentences), mean ± standard deviation of 2 seeds" in capsys.readouterr().out
    # Trained on a split that is not train, every tenth of its sentences chooses the epoch.
    evaluate(run, treebanks, "--train=two:dev", "--test=two", *flags, "--label=last", "--bidirectional")
    out = capsys.readouterr().out
    assert "train two:dev: 36 sentences" in out and "dev 4 sentences" in out


def test_a_checkpoint_file_can_be_named(run, treebanks):
    flags = ("--train=one", "--test=one", "--epochs=1", "--device=cpu")
    eval_ner.main([str(run / "ckpt_000007.pt"), f"--data={treebanks}", *flags])
    (result,) = read_results(run)
    assert result["step"] == 7 and result["epoch"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train=en_pud"], "en_pud has no train split, only test; those with one are da_ddt"),
        (["--train=da_dtd"], "'da_dtd' is not a treebank of Universal NER; did you mean da_ddt?"),
        (["--train=,"], "no treebank named"),
        (["--train=one:test", "--test=one"], "one-ud-test.iob2 would be used twice"),
        (["--test=one:dev"], "one-ud-dev.iob2 would be used twice (to train, choose the epoch or score)"),
        (["--train=one,one:dev"], "one-ud-dev.iob2 would be used twice"),
        (["--train=one,one:train"], "one-ud-train.iob2, one-ud-dev.iob2 would be used twice"),
        (["--train=da_ddt:tset"], "da_ddt:tset: the splits are train, dev and test"),
        (["--shots=1000"], "shots = 1000 is more than the 200 training sentences of one: lower it"),
        (["--mode=both"], "mode must be one of full, head, majority, got 'both'"),
        (["--seeds=0"], "seeds must be at least 1, got 0"),
        (["--shots=8,1000,0"], "shots = 1000 is more than the 200 training sentences of one: lower it"),
        (["--shots=8,x"], "shots must be numbers of sentences, comma-separated, got '8,x'"),
        (["--shots=-1"], "shots must be numbers of sentences, comma-separated, got '-1'"),
        (["--shots=8,,32"], "shots must be numbers of sentences, comma-separated, got '8,,32'"),
        (["--shots="], "shots must not be empty"),
        (["--lr=0"], "lr must be positive, got 0.0"),
        (["--epoch=3"], "unknown key 'epoch' in the flags; did you mean 'epochs'?"),
        (["more"], "name one checkpoint or one run's folder, for instance out/demo; got 2"),
    ],
)
def test_bad_input_ends_with_one_clear_line(run, treebanks, flags, message):
    with pytest.raises(UserError) as error:
        evaluate(run, treebanks, "--train=one", "--test=one", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_leaves_out_a_file_that_cannot_be_read(run, treebanks, tmp_path, monkeypatch, capsys):
    """Such a file ended --test=all; where it is named, or no other is left, it still does."""
    monkeypatch.setattr(eval_ner, "SERVER", "http://127.0.0.1:1")  # nothing listens there
    folder = tmp_path / "uner"
    shutil.copytree(treebanks, folder)
    unusable = {"bad": "1\tword\tB-MISC\n", "empty": "# nothing\n"}
    for name, content in unusable.items():
        (folder / f"{name}-ud-test.iob2").write_text(content)
    flags = ("--train=one", "--mode=majority")
    results = evaluate(run, folder, *flags, "--test=all")
    assert [result["test"] for result in results] == ["one", "two"]
    notes = [line for line in capsys.readouterr().out.splitlines() if "--test=all leaves out" in line]
    assert len(notes) == 3  # the first: what cannot be downloaded
    path = folder / "bad-ud-test.iob2"
    assert notes[1].startswith(f"note      --test=all leaves out bad: {path}, line 1: B-MISC is none of")
    assert notes[2].startswith("note      --test=all leaves out empty: ") and "no sentences" in notes[2]

    with pytest.raises(UserError, match="bad-ud-test.iob2, line 1"):
        evaluate(run, folder, *flags, "--test=two,bad")
    with pytest.raises(UserError, match="empty-ud-test.iob2 has no sentences to score"):
        evaluate(run, folder, *flags, "--test=two,empty")
    for name in ("one", "two"):
        (folder / f"{name}-ud-test.iob2").unlink()
    with pytest.raises(UserError, match="bad-ud-test.iob2, line 1"):
        evaluate(run, folder, *flags, "--test=all")


def test_an_unusable_run_is_refused_before_training(run, treebanks, toy, tmp_path):
    def assert_refused(message):
        with pytest.raises(UserError, match=message) as error:
            evaluate(run, treebanks, "--train=one", "--test=one", "--epochs=1")
        assert "\n" not in str(error.value)

    (run / "ner.jsonl").mkdir()  # the results could not be written
    assert_refused("cannot write .*ner.jsonl: Is a directory")
    (run / "ner.jsonl").rmdir()
    spec = json.loads((toy / "tokenizer.json").read_text())
    spec["tokens"] += [base64.b64encode(f" word{i}".encode()).decode() for i in range(9)]
    (run / "tokenizer.json").write_text(json.dumps(spec))
    assert_refused(f"has {TOY_VOCAB + 9} ids, the model {TOY_VOCAB + 6}")
    (run / "tokenizer.json").write_text((toy / "tokenizer.json").read_text())
    path = run / "ckpt_000007.pt"
    state = torch.load(path, weights_only=True)
    for broken in (state | {"config": {}}, state | {"model": {}}):
        torch.save(broken, path)
        assert_refused("holds no model of train.py")
    torch.save(state | {"step": "seven"}, path)
    assert_refused("every checkpoint in .* is damaged")


def test_help_lists_every_flag_and_errors_leave_with_1():
    out = subprocess.run([sys.executable, "eval_ner.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0
    flags = "train test mode data tags seeds shots epochs lr batch_size label bidirectional".split()
    for flag in flags:
        assert f"--{flag}=" in out.stdout
        line = out.stdout.split(f"--{flag}=")[1].split("\n")[0]
        assert line.strip().count(" ") > 3
    out = subprocess.run([sys.executable, "eval_ner.py", "no/such"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "error: no checkpoint at no/such\n"


# ---- other data, with a tag set of its own ----


@pytest.fixture
def conll(treebanks, tmp_path):
    """Treebank "one" as a folder of CoNLL files, "wnut", with PER called person and LOC called MISC."""
    folder = tmp_path / "wnut"
    folder.mkdir()
    for split, name in (("train", "train.txt"), ("dev", "valid.txt"), ("test", "test.txt")):
        lines = ["-DOCSTART- O", ""]
        for words, tags in read_split(treebanks, f"one-ud-{split}"):
            tags = [tag.replace("PER", "person").replace("LOC", "MISC") for tag in tags]
            lines += [*map(" ".join, zip(words, tags)), ""]
        (folder / name).write_text("\n".join(lines))
    return folder


def test_files_of_other_data_are_found_and_named(tmp_path):
    expected = {
        ("eng", "train"): "eng.train", ("eng", "dev"): "eng.testa", ("eng", "test"): "eng.testb",
        ("hau", "train"): "hau/train.txt", ("hau", "dev"): "hau/dev.txt", ("hau", "test"): "hau/test.txt",
        ("en", "dev"): "en-dev.conll", ("en_x", "test"): "en_x_test.tsv", ("da", "dev"): "da-ud-dev.iob2",
        (tmp_path.name, "dev"): "validation.bio",
    }
    others = ["readme.txt", "contest.txt", "testing.txt", "a.test.partial", "hau/more/test.txt"]
    for file in (*expected.values(), *others):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a O\n")
    assert eval_ner.local_files(tmp_path) == {key: [tmp_path / file] for key, file in expected.items()}
    for (treebank, split), file in expected.items():
        assert eval_ner.find_treebank(treebank, split, tmp_path) == tmp_path / file
    (tmp_path / "hau" / "valid.txt").write_text("a O\n")
    with pytest.raises(UserError, match="hau/dev.txt and .*hau/valid.txt are both hau:dev: keep one of them"):
        eval_ner.find_treebank("hau", "dev", tmp_path)
    with pytest.raises(UserError, match="'haus' is not a treebank of Universal NER; did you mean hau?"):
        eval_ner.find_treebank("haus", "test", tmp_path)


def test_the_types_of_other_data_are_found_told_and_scored(run, conll, capsys):
    """--test=all means what such a folder holds: Universal NER's treebanks are not downloaded into it."""
    results = evaluate(run, conll, "--train=wnut", "--test=all", "--seeds=2")
    out = capsys.readouterr().out
    assert "tags      found in train: MISC, ORG, person\n" in out and "download" not in out
    assert "| F1 MISC | F1 ORG | F1 person | spans |" in re.sub(" +", " ", out)
    assert [(result["test"], result["tags"]) for result in results] == [("wnut", "MISC,ORG,person")] * 2
    for result in results:
        assert result["f1"] > 0.9 and set(result["per_type"]) == {"MISC", "ORG", "person"}
        assert all(scores["support"] > 0 for scores in result["per_type"].values())


def test_other_data_with_the_types_of_universal_ner_gives_its_results(run, treebanks, conll, capsys):
    """Same sentences, same tags, same numbers; no tags are recorded where they are the default."""
    for path in conll.iterdir():
        path.write_text(path.read_text().replace("-person", "-PER").replace("-MISC", "-LOC"))
    for mode in ("head", "majority"):
        flags = ("--epochs=2", f"--mode={mode}")
        evaluate(run, treebanks, "--train=one", "--test=one", *flags)
        flags += ("--train=wnut", "--test=wnut")
        evaluate(run, conll, *flags)
        ours, found, given = evaluate(run, conll, *flags, "--tags=PER, ORG,LOC")[-3:]
        assert found == given == ours | {"train": "wnut", "test": "wnut"} and "tags" not in ours
    assert "tags  " not in capsys.readouterr().out


def test_tags_chooses_the_types_that_count(run, conll, capsys):
    (result,) = evaluate(run, conll, "--train=all", "--test=all", "--mode=majority", "--tags=person,ORG")
    assert result["tags"] == "person,ORG" and set(result["per_type"]) == {"person", "ORG"}
    sentences = [read for name in ("train", "valid", "test")
                 for read in eval_ner.read_treebank(conll / f"{name}.txt")]
    n_misc = sum(tag.endswith("MISC") for _, tags in sentences for tag in tags)
    out = capsys.readouterr().out
    assert f"note      read as O, since --tags=person,ORG leaves them out: MISC ({n_misc} words)\n" in out
    assert "tags      from --tags: person, ORG\n" in out


def test_a_type_that_was_not_trained_on_ends_with_one_clear_line(run, treebanks, conll):
    (conll / "test.txt").write_text("Anna B-person\n\nMay B-date\n")
    for flags, message in (
        (["--train=wnut"], f"{conll}/test.txt, line 3: B-date is none of the types MISC, ORG, person;"),
        (["--train=wnut", "--tags=person,date"], "tags: date does not occur in wnut; the types there are M"),
        (["--train=wnut:dev", "--test=wnut:train", "--tags=PER"], "tags: PER does not occur in wnut:dev"),
    ):
        with pytest.raises(UserError) as error:
            evaluate(run, conll, "--test=wnut", "--mode=majority", *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    (conll / "test.txt").unlink()
    with pytest.raises(UserError, match=f"{conll} has no test split: it holds {conll}/train.txt"):
        evaluate(run, conll, "--train=wnut", "--mode=majority")


def test_trained_on_universal_ner_other_data_is_scored_on_the_types_of_both(run, treebanks, conll):
    shutil.copytree(treebanks, conll, dirs_exist_ok=True)
    flags = ("--train=one", "--test=wnut", "--mode=majority")
    with pytest.raises(UserError, match="test.txt, line .* is none of the types PER, ORG, LOC, OTH; --tags"):
        evaluate(run, conll, *flags)
    (result,) = evaluate(run, conll, *flags, "--tags=PER,ORG,LOC")
    assert "tags" not in result and result["per_type"]["ORG"]["f1"] > 0.9
    assert result["per_type"]["LOC"]["support"] == 0


# ---- downloads ----


@pytest.fixture
def server(treebanks, monkeypatch):
    """A stand-in for GitHub that serves da_ddt whole and others broken; the paths requested from it."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            content = (treebanks / "one-ud-test.iob2").read_bytes()
            if "Danish-DDT/main/da_ddt-ud-" in self.path:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            elif "Norwegian-NDT/master/nob_norne-ud-" in self.path or "ro_legalnero" in self.path:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)
            elif "en_pud" in self.path:  # breaks off
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
            elif "ceb_gja" in self.path:  # empty
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif "de_pud" in self.path:  # a login page
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>please log in</html>")
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(eval_ner, "SERVER", f"http://127.0.0.1:{http.server_port}")
    yield requested
    http.shutdown()
    http.server_close()


def test_a_missing_treebank_is_downloaded_once_and_whole(server, treebanks, tmp_path, capsys):
    folder = tmp_path / "new" / "uner"
    path = eval_ner.find_treebank("da_ddt", "dev", folder)
    assert path == folder / "da_ddt-ud-dev.iob2"
    assert path.read_bytes() == (treebanks / "one-ud-test.iob2").read_bytes()
    assert eval_ner.find_treebank("da_ddt", "dev", folder) == path
    assert server == ["/UNER_Danish-DDT/main/da_ddt-ud-dev.iob2"]
    assert capsys.readouterr().out == f"download  {eval_ner.SERVER}{server[0]}\n"
    reasons = {
        "en_pud": "IncompleteRead", "de_pud": "please log in", "hr_set": "Not Found", "ceb_gja": "is empty",
    }
    for treebank, reason in reasons.items():
        with pytest.raises(eval_ner.MissingTreebank, match=reason) as error:
            eval_ner.find_treebank(treebank, "test", folder)
        message = str(error.value)
        assert f"fetch {eval_ner.SERVER}" in message and str(folder / f"{treebank}-ud-test.iob2") in message
    assert [path.name for path in folder.iterdir()] == ["da_ddt-ud-dev.iob2"]  # no torn file, no leftovers


def test_one_treebank_that_fails_does_not_keep_all_from_the_others(server, treebanks, tmp_path, capsys):
    """A 404 was taken for a dead network, and what the server did have was left out."""
    assert list(eval_ner.resolve("all", "test", tmp_path)) == ["da_ddt", "nob_norne", "ro_legalnero"]
    assert len(server) == len(eval_ner.REPOSITORIES)
    assert "--test=all leaves out ceb_gja, de_pud, en_ewt" in capsys.readouterr().out


def test_the_norwegian_and_romanian_treebanks_are_known(server, tmp_path):
    """The Romanian one is a single file, without splits: it is there to be scored."""
    for treebank, split in (("nob_norne", "train"), ("ro_legalnero", "test")):
        assert eval_ner.find_treebank(treebank, split, tmp_path) == tmp_path / f"{treebank}-ud-{split}.iob2"
    assert server == ["/UNER_Norwegian-NDT/master/nob_norne-ud-train.iob2",
                      "/UNER_Romanian-LegalNERo/master/ro_legalnero.iob2"]
    with pytest.raises(UserError, match="ro_legalnero has no train split, only test"):
        eval_ner.find_treebank("ro_legalnero", "train", tmp_path)


def test_an_unusable_data_folder_ends_with_one_clear_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    message = "file/da_ddt-ud-test.iob2 is missing and the download failed"
    with pytest.raises(eval_ner.MissingTreebank, match=message) as error:
        eval_ner.find_treebank("da_ddt", "test", tmp_path / "file")
    assert "\n" not in str(error.value)


def test_without_a_network_all_means_the_local_treebanks(treebanks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_ner, "SERVER", "http://127.0.0.1:1")  # nothing listens there
    assert set(eval_ner.resolve("all", "test", treebanks)) == {"one", "two"}
    out = capsys.readouterr().out
    assert out.count("download  ") == 1  # the network is tried once
    assert "note      --test=all leaves out ceb_gja, da_ddt, de_pud" in out and "refused" in out
    url = "http://127.0.0.1:1/UNER_Cebuano-GJA/master/ceb_gja-ud-test.iob2"
    with pytest.raises(eval_ner.MissingTreebank, match=f"fetch {url} and put it there"):
        eval_ner.resolve("all", "test", tmp_path)


def test_read_iob2_reads_oth_as_o(tmp_path):
    """The name and the meaning that others rely on."""
    path = tmp_path / "x-ud-test.iob2"
    path.write_text("1\tAnna\tB-PER\n2\tTuesday\tB-OTH\n3\tx\tB-O\n\n")
    assert eval_ner.read_iob2(path) == [(["Anna", "Tuesday", "x"], ["B-PER", "O", "O"])]
