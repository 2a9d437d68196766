"""Universal NER (Mayhew et al. 2023, arXiv 2311.09122): fine-tunes a checkpoint and scores it.

    python eval_ner.py out/demo --train=da_ddt --test=all             # fine-tunes the whole model
    python eval_ner.py out/demo --train=da_ddt --mode=head --lr=0.1   # frozen backbone: minutes on a CPU
    python eval_ner.py out/demo --train=da_ddt --mode=majority        # baseline without a model
    python eval_ner.py out/demo --train=da_ddt --shots=8,32,128 --seeds=5   # few-shot: five draws of each
    python eval_ner.py out/demo --data=data/conll2003 --train=conll2003   # its train.txt, test.txt

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
from report import markdown, mean_std

TYPES = ("PER", "ORG", "LOC")  # of Universal NER; its fourth, OTH, does not count

SERVER = "https://raw.githubusercontent.com/UniversalNER"
REPOSITORIES = {  # treebank: its repository and branch, and the file where it is not divided into splits
    "ceb_gja": "UNER_Cebuano-GJA/master",
    "da_ddt": "UNER_Danish-DDT/main",
    "de_pud": "UNER_German-PUD/master",
    "en_ewt": "UNER_English-EWT/master",
    "en_pud": "UNER_English-PUD/master",
    "hr_set": "UNER_Croatian-SET/main",
    "nno_norne": "UNER_Norwegian-NDT/master",
    "nob_norne": "UNER_Norwegian-NDT/master",
    "pt_bosque": "UNER_Portuguese-Bosque/master",
    "pt_pud": "UNER_Portuguese-PUD/master",
    "ro_legalnero": "UNER_Romanian-LegalNERo/master/ro_legalnero.iob2",
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
    "da_ddt", "en_ewt", "hr_set", "nno_norne", "nob_norne", "pt_bosque", "sk_snk", "sr_set", "sv_talbanken",
    "zh_gsd", "zh_gsdsimp",
)
SPLITS = {  # a split in a file's name: train, dev or test
    "train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "testa": "dev",
    "test": "test", "testb": "test",
}
# Written to each result, so that only results under the same settings are compared
SETTINGS = ("shots", "label", "bidirectional", "lr", "epochs", "patience", "batch_size")


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""  # a run's folder (its newest checkpoint) or a file; usually the first argument
    train: str = "en_ewt"  # treebanks to fine-tune on, comma-separated, or all; en_ewt:dev: its dev split
    test: str = "all"  # treebanks to score, comma-separated, or all; en_ewt:dev: its dev split
    mode: str = "full"  # full; head: frozen backbone; majority: no model, the most frequent tag of each word
    data: str = "data/uner"  # folder of .iob2 or CoNLL files; Universal NER's are downloaded where missing
    tags: str = ""  # entity types, comma-separated, others are O; empty: Universal NER's, or those of train
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


def read_treebank(path, types=None):
    """The sentences of a file: pairs (words, tags) of equally long lists, tags O, B-TYPE or I-TYPE.

    Rows are id, word, tag and more, as in Universal NER, if the first has the id 1 and three columns or more;
    else, as in CoNLL's files, a word, perhaps more, and last its tag. Tabs separate them or, if the first row
    has none, blanks. B-O and I-O, slips in published files, and the - of Norwegian ones are read as O.
    types: those that may occur; None: any. Raises UserError for a file that cannot be read, and for a
    malformed line or another type with its number.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    # Not splitlines(): it also splits at characters that occur inside words. The "" ends the last sentence.
    lines = [line.rstrip("\r\t ") for line in [*text.split("\n"), ""]]
    first = next((line for line in lines if line and not line.startswith(("#", "-DOCSTART-"))), "")
    separator = "\t" if "\t" in first else " +"
    n_columns = len(re.split(separator, first))
    has_ids = n_columns > 2 and re.match(f"1{separator}", first)

    sentences, words, tags = [], [], []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("-DOCSTART-"):
            if words:
                sentences.append((words, tags))
                words, tags = [], []
            continue
        columns = re.split(separator, line)
        word, tag = columns[1:3] if has_ids and len(columns) > 2 else (columns[0], columns[-1])
        tag = "O" if tag.strip() in ("B-O", "I-O", "-") else tag.strip()
        is_row = word and len(columns) > (2 if has_ids else 1) and re.fullmatch("O|[BI]-.+", tag)
        # Where rows have no ids, # may also begin a word.
        if line.startswith("#") and (has_ids or not is_row or len(columns) != n_columns):
            continue
        if not is_row:
            row = "id, word and tag" if has_ids else "a word and, last, its tag"
            between = "tabs" if separator == "\t" else "blanks"
            raise UserError(f"{path}, line {number}: expected {row} (O, B-TYPE or I-TYPE), "
                            f"separated by {between}, got {line[:100]!r}")
        if tag != "O" and types is not None and tag[2:] not in types:
            raise UserError(f"{path}, line {number}: {tag} is none of the types {', '.join(types)}; "
                            "--tags lists those that count and reads others as O")
        words.append(word)
        tags.append(tag)
    return sentences


def read_iob2(path):
    """The sentences of a treebank of Universal NER, with its fourth type, OTH, read as O."""
    sentences = read_treebank(path, (*TYPES, "OTH"))
    keep_types(sentences, TYPES)
    return sentences


class MissingTreebank(UserError):
    """A published treebank is not in the folder and could not be downloaded.

    is_offline: the server was not reached, so that other downloads will fail as well.
    """

    def __init__(self, message, is_offline=False):
        super().__init__(message)
        self.is_offline = is_offline


def local_files(folder):
    """{(treebank, split): [path, ...]} of what `folder` and the folders in it hold.

    Universal NER's are <treebank>-ud-<split>.iob2. Others are <name>-<split>, <name>.<split>, <name>_<split>
    or, named after their folder, <split>, and end in .iob2, .conll, .bio, .iob, .tsv, .txt or nothing.
    """
    files = defaultdict(list)
    for path in sorted([*Path(folder).glob("*"), *Path(folder).glob("*/*")]):
        match = re.fullmatch(
            rf"(?:(.+?)(?:-ud-|[-._]))?({'|'.join(SPLITS)})(?:\.(?:iob2|conll|bio|iob|tsv|txt))?", path.name
        )
        if match and path.is_file():
            files[match[1] or path.parent.resolve().name, SPLITS[match[2]]].append(path)
    return dict(files)


def find_treebank(treebank, split, folder):
    """The path of a treebank's split in `folder`, downloaded if it is missing.

    Raises MissingTreebank where the download fails, UserError where the split was never published.
    """
    path = Path(folder, f"{treebank}-ud-{split}.iob2")
    if path.exists():
        return path
    files = local_files(folder)
    paths = files.get((treebank, SPLITS.get(split)), [])
    require(len(paths) < 2, f"{' and '.join(map(str, paths))} are both {treebank}:{split}: keep one of them")
    if paths:
        return paths[0]
    if treebank not in REPOSITORIES:
        known = [*REPOSITORIES, *dict.fromkeys(name for name, _ in files if name not in REPOSITORIES)]
        near = difflib.get_close_matches(treebank, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"{path} does not exist, and {treebank!r} is not a treebank of Universal NER; {hint}")
    if split not in ("train", "dev", "test"):
        raise UserError(f"{treebank}:{split}: the splits are train, dev and test")
    if split != "test" and treebank not in TRAINABLE:
        names = ", ".join(TRAINABLE)
        raise UserError(f"{treebank} has no {split} split, only test; those with one are {names}")
    source = REPOSITORIES[treebank]
    download(f"{SERVER}/{source if source.endswith('.iob2') else f'{source}/{path.name}'}", path)
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
        if not read_treebank(partial):  # raises UserError for other content, such as a network's login page
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

    If it holds other data only, none named as Universal NER's, then of these alone. A note names those that
    cannot be downloaded. Raises UserError if no treebank is left.
    """
    files = local_files(folder)
    local = {treebank for treebank, of_split in files if of_split == split}
    is_other = files and not any("-ud-" in path.name for paths in files.values() for path in paths)
    published = () if is_other else REPOSITORIES if split == "test" else TRAINABLE
    paths, errors, offline_error = {}, {}, None
    for treebank in sorted(local.union(published)):
        if offline_error and treebank not in local:  # one time-out is enough
            errors[treebank] = offline_error
            continue
        try:
            paths[treebank] = find_treebank(treebank, split, folder)
        except UserError as error:
            errors[treebank] = error
            if isinstance(error, MissingTreebank) and error.is_offline:
                offline_error = error
    require(paths or errors, f"{folder} has no {split} split: it holds "
                             f"{', '.join(str(path) for of_split in files.values() for path in of_split)}")
    if errors:
        first_error = next(iter(errors.values()))
        if not paths:
            raise first_error
        print(f"note      --{split}=all leaves out {', '.join(errors)}: {first_error}", flush=True)
    return paths


# ---- sentences to train on, to choose the epoch on, and to score ----


def choose_sentences(cfg):
    """(train, dev, {test: sentences}, types) as --train, --test and --tags name them.

    The best epoch is chosen on dev, which holds the dev splits of the training treebanks. For a treebank
    without one, and for names like en_ewt:dev, every tenth training sentence is held out instead.
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

    of_train = {name: read_treebank(path) for name, path in train_paths.items()}
    types = choose_types(cfg.tags, of_train)
    readable = None if cfg.tags else (*TYPES, "OTH") if types == TYPES else types
    train, dev = [], []
    for name, sentences in of_train.items():
        if dev_paths[name]:
            train += sentences
            dev += read_treebank(dev_paths[name], readable)
        else:
            train += [sentence for i, sentence in enumerate(sentences) if i % 10 != 9]
            dev += sentences[9::10]
    tests = read_tests(test_paths, readable, cfg.test == "all")

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
    ignored = Counter()
    for sentences in (train, dev, *tests.values()):
        ignored += keep_types(sentences, types)
    if cfg.tags and ignored:
        counts = ", ".join(f"{name} ({n:,} words)" for name, n in sorted(ignored.items()))
        print(f"note      read as O, since --tags={cfg.tags} leaves them out: {counts}", flush=True)
    return train, dev, tests, types


def choose_types(tags, of_train):
    """The entity types that `tags` (--tags) lists or, if empty, those of the training sentences.

    Of files with none beside Universal NER's, these are TYPES.
    """
    sentences = itertools.chain.from_iterable(of_train.values())
    in_train = {tag[2:] for _, tags in sentences for tag in tags if tag != "O"}
    types = tuple(dict.fromkeys(filter(None, map(str.strip, tags.split(",")))))
    unknown = [name for name in types if name not in in_train]
    require(not unknown, f"tags: {', '.join(unknown)} does not occur in {', '.join(of_train)}; "
                         f"the types there are {', '.join(sorted(in_train)) or 'none'}")
    return types or (TYPES if in_train <= {*TYPES, "OTH"} else tuple(sorted(in_train)))


def keep_types(sentences, types):
    """Turns other tags than O and those of `types` into O, in place: {type: words} of what they were."""
    ignored = Counter()
    for _, tags in sentences:
        for i, tag in enumerate(tags):
            if tag != "O" and tag[2:] not in types:
                ignored[tag[2:]] += 1
                tags[i] = "O"
    return ignored


def read_tests(paths, types, skip_unusable):
    """{test: sentences} of the treebanks to score; types: that may occur there, as of `read_treebank`.

    Raises UserError for one that cannot be read or is empty or, if `skip_unusable`, only where none is left;
    a note names each that is left out.
    """
    tests, errors = {}, []
    for name, path in paths.items():
        try:
            sentences = read_treebank(path, types)
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
    if treebank in REPOSITORIES or (treebank, "dev") in local_files(folder):
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


def span_f1(true, pred, strict=False, types=TYPES):
    """Micro-averaged span scores of tags `pred` against `true`: lists of sentences, which are lists of tags.

    Returns {"f1", "precision", "recall", "per_type": {type: the same and "support"}}, with `types` even where
    they do not occur; 0 where a ratio has no denominator. Equals seqeval by default (as CoNLL's script) or,
    if `strict`, its mode="strict" with IOB2.
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
    return total | {"per_type": {name: scores([name]) for name in sorted({*types, *n_true, *n_pred})}}


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

    tag_names: what the numbers stand for, O and then B- and I- of each type.
    features: (W, D) from `cache_features` where the backbone is frozen, else None.
    """

    def __init__(self, sentences, tokenizer, context, label, types=TYPES):
        self.sentences, self.types = sentences, types
        self.windows = cut(sentences, tokenizer, context, label)
        self.tag_names = ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]
        number = {tag: i for i, tag in enumerate(self.tag_names)}
        self.tags = torch.tensor([number[tag] for _, tags in sentences for tag in tags])
        self.features = None

    def score(self, predicted):
        """`span_f1` of the predicted tag numbers (W,), and "f1_strict"."""
        if len(predicted) != len(self.tags) or (predicted < 0).any():
            n_tagged = (predicted >= 0).sum()
            raise ValueError(f"{n_tagged} words were tagged, the treebank has {len(self.tags)}")
        remaining = iter(predicted.tolist())
        true = [tags for _, tags in self.sentences]
        pred = [[self.tag_names[next(remaining)] for _ in words] for words, _ in self.sentences]
        strict = span_f1(true, pred, strict=True)
        return span_f1(true, pred, types=self.types) | {"f1_strict": strict["f1"]}


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
    """The logits (n, number of tags) of a batch's words."""
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
    number = train.tag_names.index
    most_frequent = {word: number(count.most_common(1)[0][0]) for word, count in counts.items()}
    words = itertools.chain.from_iterable(words for words, _ in test.sentences)
    return torch.tensor([most_frequent.get(word, number("O")) for word in words])


# ---- fine-tuning ----


def new_head(width, n_tags, generator):
    """A linear head (width, n_tags) with weights from N(0, 0.02^2) and biases 0."""
    head = nn.Linear(width, n_tags)
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
    head = new_head(decoder.cfg.d_model, len(train.tag_names), generator).to(device)
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
    return mean_std([100 * value for value in values], ".1f")


def table(results, types=TYPES):
    """{test: [result of each seed]} as a Markdown table: percent, mean ± sample standard deviation."""
    rows = [["test", "precision", "recall", "F1", *(f"F1 {name}" for name in types), "spans"]]
    for test, lines in results.items():
        overall = [cell([line[key] for line in lines]) for key in ("precision", "recall", "f1")]
        per_type = [cell([line["per_type"][name]["f1"] for line in lines]) for name in types]
        support = sum(lines[0]["per_type"][name]["support"] for name in types)
        rows.append([test, *overall, *per_type, str(support)])
    return markdown(rows)


def table_by_shots(results):
    """{shots: {test: [result of each seed]}} as a Markdown table of F1, a column for each of `shots`."""
    rows = [["test", *(str(shots or "all") for shots in results)]]
    for test in next(iter(results.values())):
        rows.append([test, *(cell([line["f1"] for line in tests[test]]) for tests in results.values())])
    return markdown(rows)


def summary(cfg, results, types):
    """The tables of {shots: {test: [result of each seed]}} under their titles."""
    def title(sentences):
        seeds = f", mean ± standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else ""
        return f"span F1 in percent, {cfg.mode}, trained on {cfg.train}{sentences}{seeds}"

    parts = []
    for shots, tests in results.items():
        parts += [title(f" ({shots} sentences)" if shots else ""), table(tests, types)]
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
    two, one = tokenizer.encode_ordinary(" the end"), map(tokenizer.encode_ordinary, (" the", " end"))
    require(
        two == sum(one, []),
        f"the tokenizer of {folder} does not read a text word by word, so words have no sub-tokens of their "
        "own: only tokenizers that take a word with the blank before it can be used",
    )
    return tokenizer


def check_writable(path):
    try:
        open(path, "a").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def print_header(path, decoder, device, dtype, cfg, train, dev, tests, types):
    n_parameters = sum(p.numel() for p in decoder.parameters())
    n_words = sum(len(words) for words, _ in train)
    print(f"model     {path}: {n_parameters:,} parameters; {device}, {str(dtype).removeprefix('torch.')}")
    print(
        f"data      train {cfg.train}: {len(train):,} sentences, {n_words:,} words; "
        f"dev {len(dev):,} sentences; test {', '.join(tests)}",
        flush=True,
    )
    if types != TYPES:
        origin = "from --tags" if cfg.tags else "found in train"
        print(f"tags      {origin}: {', '.join(types)}", flush=True)
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
    train, dev, tests, types = choose_sentences(cfg)
    print_header(path, decoder, device, dtype, cfg, train, dev, tests, types)

    def prepare(sentences):
        treebank = Treebank(sentences, tokenizer, decoder.cfg.context, cfg.label, types)
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
    if types != TYPES:
        run["tags"] = ",".join(types)
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
    print(f"\n{summary(cfg, results, types)}\n\nfiles     {results_path}", flush=True)


if __name__ == "__main__":
    config.run(main)
