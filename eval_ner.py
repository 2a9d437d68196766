"""Universal NER (Mayhew et al. 2023, arXiv 2311.09122): fine-tunes a checkpoint and scores it.

    python eval_ner.py out/demo --train=da_ddt --test=all             # fine-tunes the whole model
    python eval_ner.py out/demo --train=da_ddt --mode=head --lr=0.1   # frozen backbone: minutes on a CPU
    python eval_ner.py out/demo --train=da_ddt --mode=majority        # baseline without a model
    python eval_ner.py out/demo --train=da_ddt --shots=8,32,128 --seeds=5   # few-shot: five draws of each

The first argument is a run's folder (its newest checkpoint is used) or a checkpoint file. Treebanks that are
missing in --data are downloaded. Scores are printed and appended to ner.jsonl beside the checkpoint.
Shapes: B batch, T positions, D model width, n words of a batch, W words of a treebank.
"""
import difflib
import http.client
import itertools
import math
import os
import re
import statistics
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import config
import data
import logs
from config import UserError, require
from logs import start_wandb
from machine import DTYPES, autocast, pick_device

TYPES = ("PER", "ORG", "LOC")
TAGS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))

SERVER = "https://raw.githubusercontent.com/UniversalNER"
REPOSITORIES = {  # of version 1: treebank, its repository and branch
    "ceb_gja": "UNER_Cebuano-GJA/master",
    "da_ddt": "UNER_Danish-DDT/main",
    "de_pud": "UNER_German-PUD/master",
    "en_ewt": "UNER_English-EWT/master",
    "en_pud": "UNER_English-PUD/master",
    "hr_set": "UNER_Croatian-SET/main",
    "pt_bosque": "UNER_Portuguese-Bosque/master",
    "pt_pud": "UNER_Portuguese-PUD/master",
    "ru_pud": "UNER_Russian-PUD/master",
    "sk_snk": "UNER_Slovak-SNK/master",
    "sr_set": "UNER_Serbian-SET/main",
    "sv_pud": "UNER_Swedish-PUD/master",
    "sv_talbanken": "UNER_Swedish-Talbanken/master",
    "tl_trg": "UNER_Tagalog-TRG/master",
    "tl_ugnayan": "UNER_Tagalog-Ugnayan/master",
    "zh_gsd": "UNER_Chinese-GSD/master",
    "zh_gsdsimp": "UNER_Chinese-GSDSIMP/master",
    "zh_pud": "UNER_Chinese-PUD/master",
}
TRAINABLE = (  # have train and dev splits; the others have test only
    "da_ddt", "en_ewt", "hr_set", "pt_bosque", "sk_snk", "sr_set", "sv_talbanken", "zh_gsd", "zh_gsdsimp",
)
# Written to each result, so that only results under the same settings are compared
SETTINGS = ("shots", "label", "bidirectional", "lr", "epochs", "patience", "batch_size")


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""  # a run's folder (its newest checkpoint) or a file; usually the first argument
    train: str = "en_ewt"  # treebanks to fine-tune on, comma-separated, or all; en_ewt:dev: its dev split
    test: str = "all"  # treebanks to score, comma-separated, or all; en_ewt:dev: its dev split
    mode: str = "full"  # full; head: frozen backbone; majority: no model, the most frequent tag of each word
    data: str = "data/uner"  # folder of <treebank>-ud-<split>.iob2 files; missing ones are downloaded into it
    seeds: int = 1  # fine-tuning runs, seeded 1, 2, ...: initial head, order of batches, choice of shots
    shots: str = "0"  # sentences to fine-tune on, drawn from all training treebanks; 0: all; or 8,32,128
    epochs: int = 10  # at most; the learning rate falls linearly to 0 over them
    patience: int = 5  # epochs without a better dev score before training stops; the best epoch is scored
    lr: float = 3e-5  # initial learning rate of AdamW
    batch_size: int = 16  # sentences per batch; one longer than the context counts once per window
    label: str = "first"  # sub-token at which a word is read: first (as published) or last (sees it whole)
    bidirectional: bool = False  # True: no causal mask, so that words also see what follows them
    wandb: str = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # wandb project
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it

    def __post_init__(self):
        config.require_at_least(self, 1, "seeds", "epochs", "patience", "batch_size")
        config.require_positive(self, "lr")
        config.require_choice(self, "mode", "full", "head", "majority")
        config.require_choice(self, "label", "first", "last")
        config.require_choice(self, "wandb", *logs.WANDB_MODES)
        config.require_choice(self, "dtype", *DTYPES)
        require(
            re.fullmatch(r" *\d+ *(, *\d+ *)*", self.shots),
            f"shots must be numbers of sentences, comma-separated, got {self.shots!r}",
        )

    @property
    def shot_counts(self):
        """The numbers that `shots` lists, each once; 0 stands for all sentences."""
        return list(dict.fromkeys(map(int, self.shots.split(","))))


# ---- treebanks ----


def read_iob2(path):
    """The sentences of a treebank file: pairs (words, tags) of equally long lists, with tags from TAGS.

    Tags of the fourth published type, OTH, are read as O, and so are B-O and I-O, slips in those files, and
    the - of Norwegian ones.
    Raises UserError for a file that cannot be read, and for a malformed line with its number.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    sentences, words, tags = [], [], []
    # Not splitlines(): it also splits at characters that occur inside words. The "" ends the last sentence.
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.rstrip("\r")
        if line.startswith("#"):
            continue
        if not line.strip():
            if words:
                sentences.append((words, tags))
                words, tags = [], []
            continue
        columns = line.split("\t")
        tag = columns[2].strip() if len(columns) > 2 else ""
        if "OTH" in tag or tag in ("B-O", "I-O", "-"):
            tag = "O"
        if tag not in TAGS or not columns[1]:
            raise UserError(
                f"{path}, line {number}: expected id, word and one of {' '.join(TAGS)} or *-OTH, "
                f"separated by tabs, got {line[:100]!r}"
            )
        words.append(columns[1])
        tags.append(tag)
    return sentences


class MissingTreebank(UserError):
    """A published treebank is not in the folder and could not be downloaded.

    is_offline: the server was not reached, so that other downloads will fail as well.
    """

    def __init__(self, message, is_offline=False):
        super().__init__(message)
        self.is_offline = is_offline


def find_treebank(treebank, split, folder):
    """The path of a treebank's split in `folder`, downloaded if it is missing.

    Raises MissingTreebank where the download fails, UserError where the split was never published.
    """
    path = Path(folder, f"{treebank}-ud-{split}.iob2")
    if path.exists():
        return path
    if treebank not in REPOSITORIES:
        near = difflib.get_close_matches(treebank, REPOSITORIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(REPOSITORIES)}"
        raise UserError(f"{path} does not exist, and {treebank!r} is not a treebank of Universal NER; {hint}")
    if split not in ("train", "dev", "test"):
        raise UserError(f"{treebank}:{split}: the splits are train, dev and test")
    if split != "test" and treebank not in TRAINABLE:
        names = ", ".join(TRAINABLE)
        raise UserError(f"{treebank} has no {split} split, only test; those with one are {names}")
    download(f"{SERVER}/{REPOSITORIES[treebank]}/{path.name}", path)
    return path


def download(url, path):
    """Saves the treebank at `url` as `path`, complete or not at all. Raises MissingTreebank."""
    print(f"download  {url}", flush=True)
    partial = path.with_suffix(".partial")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "eval_ner.py"})
        with urllib.request.urlopen(request, timeout=20) as response:
            content = response.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        if not read_iob2(partial):  # raises UserError for other content, such as a network's login page
            raise UserError("the file is empty")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, UserError) as error:  # urllib's errors are OSErrors
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "reason", None) or error
        is_answer = isinstance(error, urllib.error.HTTPError)  # a URLError too, but the server was reached
        is_offline = isinstance(error, (urllib.error.URLError, TimeoutError)) and not is_answer
        raise MissingTreebank(
            f"{path} is missing and the download failed ({reason}): fetch {url} and put it there", is_offline
        ) from None


def resolve(names, split, folder):
    """{name: path} of the treebanks that --train or --test names: "all", or "da_ddt,en_ewt:dev".

    split: "train" or "test", for names without one of their own.
    """
    if names == "all":
        return find_all(split, folder)
    paths = {}
    for name in filter(None, map(str.strip, names.split(","))):
        treebank, colon, own_split = name.partition(":")
        paths[name] = find_treebank(treebank, own_split if colon else split, folder)
    require(paths, f"no treebank named: give --{split}=all or names like da_ddt,en_ewt")
    return paths


def find_all(split, folder):
    """{treebank: path} of the published treebanks with this split and of any others in `folder`.

    A note names those that cannot be downloaded. Raises MissingTreebank if no treebank is left.
    """
    suffix = f"-ud-{split}.iob2"
    local = {path.name.removesuffix(suffix) for path in Path(folder).glob(f"*{suffix}")}
    published = REPOSITORIES if split == "test" else TRAINABLE
    paths, errors, offline_error = {}, {}, None
    for treebank in sorted(local.union(published)):
        if offline_error and treebank not in local:  # one time-out is enough
            errors[treebank] = offline_error
            continue
        try:
            paths[treebank] = find_treebank(treebank, split, folder)
        except MissingTreebank as error:
            errors[treebank] = error
            if error.is_offline:
                offline_error = error
    if errors:
        first_error = next(iter(errors.values()))
        if not paths:
            raise first_error
        print(f"note      --{split}=all leaves out {', '.join(errors)}: {first_error}", flush=True)
    return paths


# ---- sentences to train on, to choose the epoch on, and to score ----


def choose_sentences(cfg):
    """(train, dev, {test: sentences}) as --train and --test name them; the best epoch is chosen on dev.

    dev holds the dev splits of the training treebanks. For a treebank without one, and for names like
    en_ewt:dev, every tenth training sentence is held out instead.
    """
    train_paths = resolve(cfg.train, "train", cfg.data)
    test_paths = resolve(cfg.test, "test", cfg.data)
    dev_paths = {name: find_dev(name, cfg.data) for name in train_paths}
    uses = Counter([*train_paths.values(), *filter(None, dev_paths.values()), *test_paths.values()])
    repeated = ", ".join(path.name for path, n in uses.items() if n > 1)
    require(
        not repeated,
        f"{repeated} would be used twice (to train, choose the epoch or score): change --train or --test",
    )

    train, dev = [], []
    for name, path in train_paths.items():
        sentences = read_iob2(path)
        if dev_paths[name]:
            train += sentences
            dev += read_iob2(dev_paths[name])
        else:
            train += [sentence for i, sentence in enumerate(sentences) if i % 10 != 9]
            dev += sentences[9::10]
    tests = read_tests(test_paths, cfg.test == "all")

    shots = max(cfg.shot_counts)
    require(
        shots <= len(train),
        f"shots = {shots} is more than the {len(train)} training sentences of {cfg.train}: lower it",
    )
    require(
        train and dev,
        f"{cfg.train} gives {len(train)} sentences to train on and {len(dev)} to choose the epoch on: see "
        f"the files in {cfg.data} (without a dev split, every tenth training sentence is held out)",
    )
    return train, dev, tests


def read_tests(paths, skip_unusable):
    """{test: sentences} of the treebanks to score.

    Raises UserError for one that cannot be read or is empty or, if `skip_unusable`, only where none is left;
    a note names each that is left out.
    """
    tests, errors = {}, []
    for name, path in paths.items():
        try:
            sentences = read_iob2(path)
            require(sentences, f"{path} has no sentences to score: fetch it again or leave it out of --test")
            tests[name] = sentences
        except UserError as error:
            if not skip_unusable:
                raise
            errors.append(error)
            print(f"note      --test=all leaves out {name}: {error}", flush=True)
    if not tests:
        raise errors[0]
    return tests


def find_dev(name, folder):
    """The path of the dev split that belongs to the training treebank `name`, or None."""
    treebank, _, split = name.partition(":")
    if split not in ("", "train"):
        return None
    if treebank in REPOSITORIES or Path(folder, f"{treebank}-ud-dev.iob2").exists():
        return find_treebank(treebank, "dev", folder)
    return None


def draw_shots(sentences, shots, seed):
    """`shots` different sentences at random; more shots with the same seed contain them."""
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
    return [sentences[i] for i in order[:shots].tolist()]


# ---- span F1 ----


def spans(tags, strict=False):
    """{(type, first word, last word + 1)} of a sentence's tags.

    An I- tag that does not continue a span of its type begins one or, if `strict`, belongs to no span.
    """
    result = set()
    open_type, first = None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if open_type is not None and (prefix != "I" or name != open_type):
            result.add((open_type, first, i))
            open_type = None
        if prefix == "B" or prefix == "I" and open_type is None and not strict:
            open_type, first = name, i
    return result


def span_f1(true, pred, strict=False):
    """Micro-averaged span scores of tags `pred` against `true`: lists of sentences, which are lists of tags.

    Returns {"f1", "precision", "recall", "per_type": {type: the same and "support"}}; 0 where a ratio has no
    denominator. Equals seqeval by default (as CoNLL's script) or, if `strict`, its mode="strict" with IOB2.
    """
    n_true, n_pred, n_correct = Counter(), Counter(), Counter()
    for true_tags, pred_tags in zip(true, pred, strict=True):
        if len(true_tags) != len(pred_tags):
            raise ValueError(f"a sentence has {len(true_tags)} true tags and {len(pred_tags)} predicted ones")
        true_spans, pred_spans = spans(true_tags, strict), spans(pred_tags, strict)
        n_true.update(name for name, _, _ in true_spans)
        n_pred.update(name for name, _, _ in pred_spans)
        n_correct.update(name for name, _, _ in true_spans & pred_spans)

    def scores(types):
        support, predicted, correct = (sum(n[name] for name in types) for n in (n_true, n_pred, n_correct))
        return {
            "f1": 2 * correct / max(predicted + support, 1),
            "precision": correct / max(predicted, 1),
            "recall": correct / max(support, 1),
            "support": support,
        }

    total = scores(n_true.keys() | n_pred.keys())
    del total["support"]
    return total | {"per_type": {name: scores([name]) for name in sorted({*TYPES, *n_true, *n_pred})}}


# ---- words and sub-tokens ----


class Window(NamedTuple):
    """What the model reads at once: a sentence, or a part of one that is longer than the context."""
    ids: list  # sub-tokens
    positions: list  # one for each word that is tagged in this window: the sub-token at which it is read
    words: list  # numbers of these words in the treebank


def cut(sentences, tokenizer, context, label):
    """Cuts sentences into windows of at most `context` sub-tokens, in which each word is tagged exactly once.

    A word's sub-tokens are those of the word after a space. A word longer than the context is cut off there.
    """
    windows, n_before = [], 0  # n_before: words of the sentences before this one
    for words, _ in sentences:
        tokens = [tokenizer.encode_ordinary(" " + word)[:context] for word in words]
        offsets = [0, *itertools.accumulate(map(len, tokens))]  # word i: sub-tokens offsets[i]:offsets[i + 1]
        for start, first, end in window_bounds(offsets, context):
            first_tokens = offsets[first:end]
            last_tokens = [offset - 1 for offset in offsets[first + 1:end + 1]]
            read_at = first_tokens if label == "first" else last_tokens
            windows.append(Window(
                ids=sum(tokens[start:end], []),
                positions=[offset - offsets[start] for offset in read_at],
                words=list(range(n_before + first, n_before + end)),
            ))
        n_before += len(words)
    return windows


def window_bounds(offsets, context):
    """(start, first, end) of each window of a sentence: it holds words start:end and tags words first:end.

    Words start:first, up to half a window, were tagged in an earlier window and are repeated as context.
    """
    n_words = len(offsets) - 1
    first = 0
    while first < n_words:
        start = first
        while (
            start > 0
            and offsets[first] - offsets[start - 1] <= context // 2
            and offsets[first + 1] - offsets[start - 1] <= context  # leaves room for the word `first`
        ):
            start -= 1
        end = first + 1
        while end < n_words and offsets[end + 1] - offsets[start] <= context:
            end += 1
        yield start, first, end
        first = end


class Treebank:
    """Sentences, their windows, and their tags as numbers (W,).

    features: (W, D) from `cache_features` where the backbone is frozen, else None.
    """

    def __init__(self, sentences, tokenizer, context, label):
        self.sentences = sentences
        self.windows = cut(sentences, tokenizer, context, label)
        self.tags = torch.tensor([TAGS.index(tag) for _, tags in sentences for tag in tags])
        self.features = None

    def score(self, predicted):
        """`span_f1` of the predicted tag numbers (W,), and "f1_strict"."""
        if len(predicted) != len(self.tags) or (predicted < 0).any():
            n_tagged = (predicted >= 0).sum()
            raise ValueError(f"{n_tagged} words were tagged, the treebank has {len(self.tags)}")
        remaining = iter(predicted.tolist())
        true = [tags for _, tags in self.sentences]
        pred = [[TAGS[next(remaining)] for _ in words] for words, _ in self.sentences]
        return span_f1(true, pred) | {"f1_strict": span_f1(true, pred, strict=True)["f1"]}


def batches(windows, size, generator=None):
    """Lists of up to `size` windows of similar length, which keeps padding low.

    With a generator they come in random order, and windows are sorted by length within random pools of 32
    batches only, so that each epoch gets new batches. Without one all windows are sorted.
    """
    def order(n):
        return torch.randperm(n, generator=generator).tolist() if generator else range(n)

    shuffled = order(len(windows))
    pool = 32 * size if generator else max(len(windows), 1)
    result = []
    for start in range(0, len(windows), pool):
        by_length = sorted(shuffled[start:start + pool], key=lambda i: len(windows[i].ids))
        for first in range(0, len(by_length), size):
            result.append([windows[i] for i in by_length[first:first + size]])
    return [result[i] for i in order(len(result))]


def padding(batches):
    """The share of padding among the positions of batches."""
    used = sum(len(window.ids) for batch in batches for window in batch)
    padded = sum(len(batch) * max(len(window.ids) for window in batch) for batch in batches)
    return 1 - used / padded


def word_numbers(batch):
    """The numbers (n,) in the treebank of the words that a batch of windows tags."""
    return torch.tensor([word for window in batch for word in window.words])


# ---- model ----


def read_words(decoder, batch, bidirectional, dtype):
    """The backbone's features (n, D) at the words of a batch of windows, in the order of `word_numbers`."""
    device = decoder.lm_head.weight.device
    sequences = [torch.tensor(window.ids) for window in batch]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)  # (B, T)
    visible = None  # padding lies on the right, where the causal mask hides it
    if bidirectional:
        lengths = torch.tensor([len(window.ids) for window in batch], device=device)
        visible = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (B, T)
    rows = torch.tensor([row for row, window in enumerate(batch) for _ in window.positions], device=device)
    columns = torch.tensor([position for window in batch for position in window.positions], device=device)
    with autocast(device, dtype):
        return decoder.hidden(ids, visible)[rows, columns]


@torch.no_grad()
def cache_features(decoder, treebank, cfg, dtype):
    """Computes the features of all words of a treebank once: with a frozen backbone they never change."""
    device = decoder.lm_head.weight.device
    treebank.features = torch.empty(len(treebank.tags), decoder.cfg.d_model, device=device)  # (W, D)
    for batch in batches(treebank.windows, 64):
        treebank.features[word_numbers(batch)] = read_words(decoder, batch, cfg.bidirectional, dtype)


def logits(decoder, head, treebank, batch, cfg, dtype):
    """The logits (n, 7) of the tags of a batch's words."""
    if treebank.features is not None:
        return head(treebank.features[word_numbers(batch).to(treebank.features.device)])
    return head(read_words(decoder, batch, cfg.bidirectional, dtype).float())


@torch.no_grad()
def predict(decoder, head, treebank, cfg, dtype):
    """(numbers of the likeliest tags (W,) on the CPU, mean cross-entropy in nats)."""
    predicted = torch.full_like(treebank.tags, -1)
    total_loss = 0.0
    for batch in batches(treebank.windows, 64):
        words = word_numbers(batch)
        scores = logits(decoder, head, treebank, batch, cfg, dtype).float().cpu()
        predicted[words] = scores.argmax(-1)
        total_loss += F.cross_entropy(scores, treebank.tags[words], reduction="sum").item()
    return predicted, total_loss / max(len(predicted), 1)


def majority(train, test):
    """The most frequent tag (W,) of each test word in the training sentences; O for a word not among them."""
    counts = defaultdict(Counter)
    for words, tags in train.sentences:
        for word, tag in zip(words, tags):
            counts[word][tag] += 1
    most_frequent = {word: TAGS.index(count.most_common(1)[0][0]) for word, count in counts.items()}
    outside = TAGS.index("O")
    return torch.tensor([most_frequent.get(word, outside) for words, _ in test.sentences for word in words])


# ---- fine-tuning ----


def new_head(width, generator):
    """A linear head (width, 7) with weights from N(0, 0.02^2) and biases 0."""
    head = nn.Linear(width, len(TAGS))
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def fine_tune(decoder, train, dev, cfg, seed, dtype, log):
    """Trains a new linear head and, with --mode=full, the backbone: (head, best epoch, its dev F1).

    Head and backbone (in place) end up with the weights of the epoch that is best on `dev`. After each epoch,
    log(line) gets a dict of metrics.
    """
    device = decoder.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    head = new_head(decoder.cfg.d_model, generator).to(device)
    trained = nn.ModuleList([head] if cfg.mode == "head" else [head, decoder.model])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    total_steps = cfg.epochs * math.ceil(len(train.windows) / cfg.batch_size)

    def update(batch, step):
        targets = train.tags[word_numbers(batch)].to(device)
        loss = F.cross_entropy(logits(decoder, head, train, batch, cfg, dtype), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / total_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step, best_epoch, best_weights = 0, 0, None
    best_score = (-1.0, 0.0)  # (dev F1, minus the dev loss): the loss decides while no span is correct yet
    for epoch in range(1, cfg.epochs + 1):
        progress = f"seed {seed} | epoch {epoch:>2}/{cfg.epochs}"
        start = last_print = time.perf_counter()
        order = batches(train.windows, cfg.batch_size, generator)
        total_loss = torch.zeros((), device=device)  # read once per epoch, since reading waits for the device
        for i, batch in enumerate(order, 1):
            total_loss += update(batch, step)
            step += 1
            if time.perf_counter() - last_print > 20:
                last_print = time.perf_counter()
                print(f"{progress} | batch {i:,} of {len(order):,}", flush=True)
        loss = total_loss.item() / len(order)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite in epoch {epoch} of seed {seed}: lower lr = {cfg.lr:g}")

        predicted, dev_loss = predict(decoder, head, dev, cfg, dtype)
        dev_f1 = dev.score(predicted)["f1"]
        speed = f"{seconds:.1f} s, {len(train.tags) / seconds:,.0f} words/s, {padding(order):.0%} padding"
        print(f"{progress} | loss {loss:.4f} | dev loss {dev_loss:.4f} F1 {dev_f1:.4f} | {speed}", flush=True)
        metrics = {"loss": loss, "dev_loss": dev_loss, "dev_f1": dev_f1}
        log({"step": step} | {f"ner/seed{seed}/{name}": value for name, value in metrics.items()})

        if (dev_f1, -dev_loss) > best_score:
            best_score, best_epoch = (dev_f1, -dev_loss), epoch
            best_weights = {name: p.detach().to("cpu", copy=True) for name, p in trained.state_dict().items()}
        elif epoch - best_epoch >= cfg.patience:
            break
    trained.load_state_dict(best_weights)
    return head, best_epoch, best_score[0]


def train_tagger(decoder, train, dev, cfg, seed, dtype, log):
    """(tag, {"epoch", "dev_f1"}): what --mode trains; tag(treebank) predicts the tags (W,) of its words."""
    if cfg.mode == "majority":
        return partial(majority, train), {}
    head, epoch, dev_f1 = fine_tune(decoder, train, dev, cfg, seed, dtype, log)

    def tag(treebank):
        return predict(decoder, head, treebank, cfg, dtype)[0]

    return tag, {"epoch": epoch, "dev_f1": dev_f1}


# ---- results ----


def cell(values):
    """The mean of scores and, of several, their sample standard deviation: "12.3 ± 4.5", in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def markdown(rows):
    """Rows of texts, the first a heading, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    texts = []
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def table(results):
    """{test: [result of each seed]} as a Markdown table: percent, mean ± sample standard deviation."""
    rows = [["test", "precision", "recall", "F1", *(f"F1 {name}" for name in TYPES), "spans"]]
    for test, lines in results.items():
        overall = [cell([line[key] for line in lines]) for key in ("precision", "recall", "f1")]
        per_type = [cell([line["per_type"][name]["f1"] for line in lines]) for name in TYPES]
        support = sum(lines[0]["per_type"][name]["support"] for name in TYPES)
        rows.append([test, *overall, *per_type, str(support)])
    return markdown(rows)


def table_by_shots(results):
    """{shots: {test: [result of each seed]}} as a Markdown table of F1, a column for each of `shots`."""
    rows = [["test", *(str(shots or "all") for shots in results)]]
    for test in next(iter(results.values())):
        rows.append([test, *(cell([line["f1"] for line in tests[test]]) for tests in results.values())])
    return markdown(rows)


def summary(cfg, results):
    """The tables of {shots: {test: [result of each seed]}} under their titles."""
    def title(sentences):
        seeds = f", mean ± standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else ""
        return f"span F1 in percent, {cfg.mode}, trained on {cfg.train}{sentences}{seeds}"

    parts = []
    for shots, tests in results.items():
        parts += [title(f" ({shots} sentences)" if shots else ""), table(tests)]
    if len(results) > 1:
        parts += [title(", by number of sentences"), table_by_shots(results)]
    return "\n\n".join(parts)


# ---- the script ----


def load_settings(argv):
    paths, rest = config.operands(argv)
    cfg = config.load(Config, rest + [f"--checkpoint={path}" for path in paths[:1]], __doc__)
    received = f"{len(paths)} ({', '.join(paths)})" if paths else "none"
    require(
        cfg.checkpoint and len(paths) <= 1,
        f"name one checkpoint or one run's folder, for instance out/demo; got {received}",
    )
    return cfg


def load_checkpoint(source):
    """(path of the file, step, weights, decoder) of a checkpoint file, or of a run's newest one."""
    state, path = checkpoint.load(source), Path(source)
    if path.is_dir():
        path = path / f"ckpt_{state['step']:06d}.pt"
    return path, state["step"], state["model"], checkpoint.load_model(state)


def load_tokenizer(folder, vocab_size):
    tokenizer = data.load_tokenizer(folder)
    require(
        tokenizer.n_vocab <= vocab_size,
        f"the tokenizer of {folder} has {tokenizer.n_vocab} ids, the model {vocab_size}: "
        "put the run's tokenizer.json beside the checkpoint",
    )
    return tokenizer


def check_writable(path):
    try:
        open(path, "a").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def print_header(path, decoder, device, dtype, cfg, train, dev, tests):
    n_parameters = sum(p.numel() for p in decoder.parameters())
    n_words = sum(len(words) for words, _ in train)
    print(f"model     {path}: {n_parameters:,} parameters; {device}, {str(dtype).removeprefix('torch.')}")
    print(
        f"data      train {cfg.train}: {len(train):,} sentences, {n_words:,} words; "
        f"dev {len(dev):,} sentences; test {', '.join(tests)}",
        flush=True,
    )
    if any(cfg.shot_counts) and cfg.mode != "majority":
        print(
            f"note      --shots draws from train only: the epoch is chosen on all {len(dev):,} dev sentences",
            flush=True,
        )


def main(argv):
    cfg = load_settings(argv)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    path, step, weights, decoder = load_checkpoint(cfg.checkpoint)
    decoder.to(device)
    tokenizer = load_tokenizer(path.parent, decoder.cfg.vocab_size)
    results_path = path.with_name("ner.jsonl")
    check_writable(results_path)
    train, dev, tests = choose_sentences(cfg)
    print_header(path, decoder, device, dtype, cfg, train, dev, tests)

    def prepare(sentences):
        treebank = Treebank(sentences, tokenizer, decoder.cfg.context, cfg.label)
        if cfg.mode == "head":
            cache_features(decoder, treebank, cfg, dtype)
        return treebank

    start = time.perf_counter()
    tests = {name: prepare(sentences) for name, sentences in tests.items()}
    dev = prepare(dev)
    all_train = prepare(train) if 0 in cfg.shot_counts else None
    if cfg.mode == "head":
        print(f"features  of all words, computed once: {time.perf_counter() - start:.1f} s", flush=True)

    run = {"checkpoint": str(path), "step": step, "mode": cfg.mode, "train": cfg.train.replace(" ", "")}
    results = {}  # {shots: {test: [result of each seed]}}
    for shots in cfg.shot_counts:
        if len(cfg.shot_counts) > 1:
            print(f"shots     {shots or 'all'}", flush=True)
        wandb_name = f"{path.parent.name}-ner-{cfg.mode}-{cfg.train}" + (f"-{shots}shots" if shots else "")
        send, finish = start_wandb(replace(cfg, shots=str(shots)), wandb_name, path.parent)
        settings = {key: getattr(cfg, key) for key in SETTINGS} | {"shots": shots}
        results[shots] = defaultdict(list)
        for seed in range(1, cfg.seeds + 1):
            seed_train = prepare(draw_shots(train, shots, seed)) if shots else all_train
            decoder.load_state_dict(weights)  # an earlier seed may have trained it
            tag, training = train_tagger(decoder, seed_train, dev, cfg, seed, dtype, send)
            for name, test in tests.items():
                scores = test.score(tag(test))
                sizes = {"sentences": len(seed_train.sentences), "words": len(test.tags)}
                result = run | {"test": name, "seed": seed} | scores | training | sizes | settings
                results[shots][name].append(result)
                logs.append(results_path, result)
                totals = {key: scores[key] for key in ("f1", "precision", "recall")}
                send({"step": 0} | {f"ner/seed{seed}/{name}/{key}": value for key, value in totals.items()})
        finish()
    print(f"\n{summary(cfg, results)}\n\nfiles     {results_path}", flush=True)


if __name__ == "__main__":
    config.run(main)
