"""Universal NER (Mayhew et al. 2023, arXiv 2311.09122): fine-tunes a checkpoint on treebanks, scores it on others.

    python eval_ner.py out/demo --train=da_ddt --test=all --mode=full --data=data/uner     # a run's newest checkpoint, or a file
    python eval_ner.py out/demo --train=da_ddt --mode=head --lr=0.1 --seeds=3              # frozen backbone; minutes on a laptop
    python eval_ner.py out/demo --train=da_ddt --mode=majority                             # the floor: no model

Treebanks that are missing in --data are downloaded. Results go to ner.jsonl beside the checkpoint, and to a table.
Shapes: B batch, T positions, D model width, n words of a batch, W words of a treebank.
"""
import difflib
import http.client
import json
import os
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import config
import data
from config import UserError
from train import pick_device, start_wandb

TYPES = ("PER", "ORG", "LOC")
TAGS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))
SERVER = "https://raw.githubusercontent.com/UniversalNER"
REPOSITORIES = {  # of version 1: folder on the server, branch
    "ceb_gja": "UNER_Cebuano-GJA/master", "da_ddt": "UNER_Danish-DDT/main", "de_pud": "UNER_German-PUD/master",
    "en_ewt": "UNER_English-EWT/master", "en_pud": "UNER_English-PUD/master", "hr_set": "UNER_Croatian-SET/main",
    "pt_bosque": "UNER_Portuguese-Bosque/master", "pt_pud": "UNER_Portuguese-PUD/master", "ru_pud": "UNER_Russian-PUD/master",
    "sk_snk": "UNER_Slovak-SNK/master", "sr_set": "UNER_Serbian-SET/main", "sv_pud": "UNER_Swedish-PUD/master",
    "sv_talbanken": "UNER_Swedish-Talbanken/master", "tl_trg": "UNER_Tagalog-TRG/master", "tl_ugnayan": "UNER_Tagalog-Ugnayan/master",
    "zh_gsd": "UNER_Chinese-GSD/master", "zh_gsdsimp": "UNER_Chinese-GSDSIMP/master", "zh_pud": "UNER_Chinese-PUD/master",
}
TRAINABLE = ("da_ddt", "en_ewt", "hr_set", "pt_bosque", "sk_snk", "sr_set", "sv_talbanken", "zh_gsd", "zh_gsdsimp")  # others: test only


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""  # a run's folder (its newest checkpoint) or a checkpoint file; may be given without --checkpoint=
    train: str = "en_ewt"  # treebanks to fine-tune on, comma-separated, or all; en_ewt:dev takes another split than train
    test: str = "all"  # treebanks to score, comma-separated, or all; en_ewt:dev takes another split than test
    mode: str = "full"  # what is trained: full, head (the backbone frozen), or majority (no model: a word's most frequent tag)
    data: str = "data/uner"  # folder of <treebank>-ud-<split>.iob2 files; missing ones are downloaded into it
    seeds: int = 1  # fine-tuning runs, with seeds 1, 2, ...: the head's start, the order of the batches, the shots
    shots: int = 0  # sentences to fine-tune on, drawn from the training treebanks together; 0: all
    epochs: int = 10  # most passes over the training sentences; the learning rate falls linearly to 0 over them
    patience: int = 5  # epochs without a better dev score that end the training; the best epoch is scored
    lr: float = 3e-5  # AdamW's learning rate at the start
    batch_size: int = 16  # sentences of a batch (of one that is longer than the context: its windows)
    label: str = "first"  # sub-token that is read for a word: first (as published), or last (which has seen the whole word)
    bidirectional: bool = False  # True: without the causal mask, so that words on the right are seen too
    wandb: str = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # project there
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: str = "auto"  # of the matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it

    def __post_init__(self):
        for key in ("seeds", "epochs", "patience", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.shots < 0 or self.lr <= 0:
            raise UserError(f"shots = {self.shots} must not be negative and lr = {self.lr} must be positive")
        for key, choices in (("mode", ("full", "head", "majority")), ("label", ("first", "last")),
                             ("wandb", ("disabled", "offline", "online")), ("dtype", ("auto", "bfloat16", "float32"))):
            if getattr(self, key) not in choices:
                raise UserError(f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}")


# ---- treebanks ----


def read_iob2(path):
    """A treebank file -> its sentences, each a pair (words, tags) of equally long lists, with tags among TAGS.

    As published, tags of the fourth type (OTH) and the slips B-O and I-O are read as O. UserError names the line that is malformed.
    """
    sentences, words, tags = [], [], []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.split("\n") + [""], 1):  # not splitlines(), which also splits at characters that words contain
        line = line.rstrip("\r")
        if not line.strip():
            if words:
                sentences.append((words, tags))
                words, tags = [], []
        elif not line.startswith("#"):
            columns = line.split("\t")
            tag = columns[2].strip() if len(columns) > 2 else ""
            if "OTH" in tag or tag in ("B-O", "I-O"):
                tag = "O"
            if tag not in TAGS or not columns[1]:
                raise UserError(f"{path}, line {number}: expected id, word and one of {' '.join(TAGS)} or *-OTH, between tabs, "
                                f"got {line[:100]!r}")
            words.append(columns[1])
            tags.append(tag)
    return sentences


class Missing(UserError):
    """A treebank that is known is not there and could not be downloaded; `offline`: since the server was not reached."""

    def __init__(self, text, offline=False):
        super().__init__(text)
        self.offline = offline


def find(treebank, split, folder):
    """The path of a treebank's split in `folder`, downloaded where it is missing; Missing or UserError where that is impossible."""
    path = Path(folder, f"{treebank}-ud-{split}.iob2")
    if path.exists():
        return path
    if treebank not in REPOSITORIES:
        near = difflib.get_close_matches(treebank, REPOSITORIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(REPOSITORIES)}"
        raise UserError(f"{path} does not exist, and {treebank!r} is no treebank of Universal NER; {hint}")
    if split not in ("train", "dev", "test"):
        raise UserError(f"{treebank}:{split}: the splits are train, dev and test")
    if split != "test" and treebank not in TRAINABLE:
        raise UserError(f"{treebank} has no {split} split, only test; those with one are {', '.join(TRAINABLE)}")
    url = f"{SERVER}/{REPOSITORIES[treebank]}/{path.name}"
    partial = path.with_suffix(".partial")
    try:
        print(f"download  {url}", flush=True)
        request = urllib.request.Request(url, headers={"User-Agent": "eval_ner.py"})
        with urllib.request.urlopen(request, timeout=20) as response:
            content = response.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        if not read_iob2(partial):  # nor is a login page of some network a treebank
            raise UserError("the answer is empty")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, UserError) as error:  # urllib's errors are OSErrors
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "reason", None) or error
        offline = isinstance(error, (urllib.error.URLError, TimeoutError)) and not isinstance(error, urllib.error.HTTPError)
        raise Missing(f"{path} is missing and the download failed ({reason}): fetch {url} and put it there", offline) from None
    return path


def resolve(names, split, folder):
    """`names` as in --train and --test -> {"treebank" or "treebank:split": path}."""
    if names != "all":
        pairs = [(name, *name.split(":", 1)) for name in filter(None, (name.strip() for name in names.split(",")))]
        if not pairs:
            raise UserError(f"no treebank named: give --{split}=all or names like da_ddt,en_ewt")
        return {name: find(treebank, given[0] if given else split, folder) for name, treebank, *given in pairs}
    here = {path.name.removesuffix(f"-ud-{split}.iob2") for path in Path(folder).glob(f"*-ud-{split}.iob2")}
    paths, lacking = {}, {}
    for treebank in sorted(here | set(REPOSITORIES if split == "test" else TRAINABLE)):
        offline = next((error for error in lacking.values() if error.offline), None)  # do not wait for the network again
        try:
            if offline and treebank not in here:
                raise offline
            paths[treebank] = find(treebank, split, folder)
        except Missing as error:
            lacking[treebank] = error
    if not paths:
        raise next(iter(lacking.values()))
    if lacking:
        print(f"note      all is without {', '.join(lacking)}: {next(iter(lacking.values()))}", flush=True)
    return paths


# ---- span F1 ----


def spans(tags, strict=False):
    """{(type, first, end)} of one sentence. An I- that continues no span of its type begins one, or is no span at all if `strict`."""
    found, kind, first = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind is not None and (prefix != "I" or name != kind):
            found.add((kind, first, i))
            kind = None
        if prefix == "B" or prefix == "I" and kind is None and not strict:
            kind, first = name, i
    return found


def span_f1(true, pred, strict=False):
    """Micro-averaged span scores of tags `pred` against `true` (lists of sentences, each a list of IOB2 tags).

    {"f1", "precision", "recall", "per_type": {type: the same and "support"}}, 0 where a ratio has no denominator. As seqeval by default
    (the reading of CoNLL's script); strict: as seqeval with mode="strict" and IOB2.
    """
    true_n, pred_n, both = Counter(), Counter(), Counter()
    for a, b in zip(true, pred, strict=True):
        if len(a) != len(b):
            raise ValueError(f"a sentence has {len(a)} true tags and {len(b)} predicted ones")
        a, b = spans(a, strict), spans(b, strict)
        for count, found in ((true_n, a), (pred_n, b), (both, a & b)):
            count.update(kind for kind, _, _ in found)

    def scores(kinds):
        right, said, there = (sum(count[kind] for kind in kinds) for count in (both, pred_n, true_n))
        f1, precision, recall = 2 * right / max(said + there, 1), right / max(said, 1), right / max(there, 1)
        return {"f1": f1, "precision": precision, "recall": recall, "support": there}

    total = scores(true_n.keys() | pred_n.keys())
    del total["support"]
    return total | {"per_type": {kind: scores([kind]) for kind in sorted({*TYPES, *true_n, *pred_n})}}


# ---- words and sub-tokens ----


class Window(NamedTuple):
    ids: list  # sub-tokens that the model reads
    at: list  # the positions at which words are read ...
    words: list  # ... and the number of each of these words in the treebank


def cut(sentences, tokenizer, context, label):
    """Sentences -> windows of at most `context` sub-tokens, in which every word is read exactly once.

    A word's sub-tokens are those of the word with a space before it. A sentence that is too long is read in several windows, each
    with up to half a window of what came before; of a word that alone is too long the first sub-tokens are read.
    """
    windows, number = [], 0
    for words, _ in sentences:
        tokens = [tokenizer.encode_ordinary(" " + word)[:context] for word in words]
        ends = [0]
        for part in tokens:
            ends.append(ends[-1] + len(part))
        first = 0  # word not read yet
        while first < len(words):
            start = first  # of the window; before `first` lies what came before
            while start > 0 and ends[first] - ends[start - 1] <= context // 2 and ends[first + 1] - ends[start - 1] <= context:
                start -= 1
            end = first + 1
            while end < len(words) and ends[end + 1] - ends[start] <= context:
                end += 1
            at = [(ends[word] if label == "first" else ends[word + 1] - 1) - ends[start] for word in range(first, end)]
            windows.append(Window(sum(tokens[start:end], []), at, list(range(number + first, number + end))))
            first = end
        number += len(words)
    return windows


class Treebank:
    """Sentences as tensors: windows, the tag of each word (W,), and the features (W, D) where the backbone is frozen."""

    def __init__(self, sentences, tokenizer, context, label):
        self.sentences = sentences
        self.windows = cut(sentences, tokenizer, context, label)
        self.tags = torch.tensor([TAGS.index(tag) for _, tags in sentences for tag in tags])
        self.features = None

    def score(self, predicted):
        """predicted (W,) numbers of tags -> `span_f1`, and the strict F1."""
        if len(predicted) != len(self.tags) or (predicted < 0).any():
            raise ValueError(f"{(predicted >= 0).sum()} words were read, the treebank has {len(self.tags)}")
        following = iter(predicted.tolist())
        true = [tags for _, tags in self.sentences]
        pred = [[TAGS[next(following)] for _ in words] for words, _ in self.sentences]
        return span_f1(true, pred) | {"f1_strict": span_f1(true, pred, strict=True)["f1"]}


def batches(windows, size, generator=None):
    """Lists of `size` windows of about the same length. With a generator in a random order, by length only within 32 batches."""
    order = torch.randperm(len(windows), generator=generator).tolist() if generator else range(len(windows))
    pool = 32 * size if generator else len(windows)
    found = []
    for start in range(0, len(order), pool or 1):
        near = sorted(order[start:start + pool], key=lambda i: len(windows[i].ids))
        found += [[windows[i] for i in near[i:i + size]] for i in range(0, len(near), size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()] if generator else found


def padding(batches):
    """The share of the positions in batches of windows that is padding."""
    read = sum(len(window.ids) for batch in batches for window in batch)
    return 1 - read / sum(len(batch) * max(len(window.ids) for window in batch) for batch in batches)


def read_words(decoder, batch, bidirectional, dtype):
    """The backbone's features (n, D) at the words of a batch of windows, in their order."""
    device = decoder.lm_head.weight.device
    lengths = torch.tensor([len(window.ids) for window in batch], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(window.ids) for window in batch], batch_first=True).to(device)  # (B, T)
    # Padding lies on the right, where the causal mask hides it.
    visible = torch.arange(ids.shape[1], device=device) < lengths[:, None] if bidirectional else None  # (B, T)
    rows = torch.tensor([row for row, window in enumerate(batch) for _ in window.at], device=device)
    at = torch.tensor([position for window in batch for position in window.at], device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return decoder.hidden(ids, visible)[rows, at]


def numbers(batch):
    return torch.tensor([word for window in batch for word in window.words])


# ---- fine-tuning ----


@torch.no_grad()
def freeze(decoder, treebank, cfg, dtype):
    """Reads all words of a treebank once: what a frozen backbone says of them does not change."""
    treebank.features = torch.empty(len(treebank.tags), decoder.cfg.d_model, device=decoder.lm_head.weight.device)
    for batch in batches(treebank.windows, 64):
        treebank.features[numbers(batch)] = read_words(decoder, batch, cfg.bidirectional, dtype)


def logits(decoder, head, treebank, batch, cfg, dtype):
    """Of the words of a batch over the tags (n, 7)."""
    if treebank.features is not None:
        return head(treebank.features[numbers(batch).to(treebank.features.device)])
    return head(read_words(decoder, batch, cfg.bidirectional, dtype).float())


@torch.no_grad()
def predict(decoder, head, treebank, cfg, dtype):
    """(number of the likeliest tag of each word (W,), mean cross-entropy in nats), on the CPU."""
    predicted, total = torch.full_like(treebank.tags, -1), 0.0
    for batch in batches(treebank.windows, 64):
        words = numbers(batch)
        out = logits(decoder, head, treebank, batch, cfg, dtype).float().cpu()
        predicted[words] = out.argmax(-1)
        total += F.cross_entropy(out, treebank.tags[words], reduction="sum").item()
    return predicted, total / max(len(predicted), 1)


def fine_tune(decoder, train, dev, cfg, seed, dtype, log):
    """Trains a linear head, and with --mode=full the backbone in place, to its best epoch on `dev`: (head, epoch, dev F1)."""
    device, generator = decoder.lm_head.weight.device, torch.Generator().manual_seed(seed)
    head = nn.Linear(decoder.cfg.d_model, len(TAGS))
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(device)
    trained = nn.ModuleList([head] if cfg.mode == "head" else [head, decoder.model])
    params = list(trained.parameters())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=0.0, fused=True)
    steps, step, best = cfg.epochs * -(-len(train.windows) // cfg.batch_size), 0, None
    for epoch in range(1, cfg.epochs + 1):
        began, told, total = time.perf_counter(), time.perf_counter(), torch.zeros((), device=device)
        order = batches(train.windows, cfg.batch_size, generator)
        for i, batch in enumerate(order, 1):
            target = train.tags[numbers(batch)].to(device)
            loss = F.cross_entropy(logits(decoder, head, train, batch, cfg, dtype), target)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            total += loss.detach()
            if time.perf_counter() - told > 20:
                told = time.perf_counter()
                print(f"seed {seed} | epoch {epoch:>2}/{cfg.epochs} | batch {i:,} of {len(order):,}", flush=True)
        seconds = time.perf_counter() - began
        predicted, dev_loss = predict(decoder, head, dev, cfg, dtype)
        f1 = dev.score(predicted)["f1"]
        if not torch.isfinite(total):
            raise UserError(f"the loss is not finite in epoch {epoch} of seed {seed}: lower lr = {cfg.lr:g}")
        print(f"seed {seed} | epoch {epoch:>2}/{cfg.epochs} | loss {total / len(order):.4f} | dev loss {dev_loss:.4f} F1 {f1:.4f} | "
              f"{seconds:.1f} s, {len(train.tags) / seconds:,.0f} words/s, {padding(order):.0%} padding", flush=True)
        scores = {"loss": total.item() / len(order), "dev_loss": dev_loss, "dev_f1": f1}
        log({"step": step} | {f"ner/seed{seed}/{name}": score for name, score in scores.items()})
        if best is None or (f1, -dev_loss) > best[:2]:  # while no span is right yet, the loss tells
            best = f1, -dev_loss, epoch, {name: p.detach().to("cpu", copy=True) for name, p in trained.state_dict().items()}
        elif epoch - best[2] >= cfg.patience:
            break
    trained.load_state_dict(best[3])
    return head, best[2], best[0]


def table(results):
    """A Markdown table of {test: [result of each seed]}: percent, the mean over seeds with the sample standard deviation."""
    def cell(values):
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    rows = [["test", "precision", "recall", "F1", *(f"F1 {kind}" for kind in TYPES), "spans"]]
    for test, found in results.items():
        scores = [[result[key] for result in found] for key in ("precision", "recall", "f1")]
        scores += [[result["per_type"][kind]["f1"] for result in found] for kind in TYPES]
        rows.append([test, *map(cell, scores), str(sum(found[0]["per_type"][kind]["support"] for kind in TYPES))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    return "\n".join("| " + " | ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))) + " |"
                     for row in rows)


def majority(train, test):
    """For each word of a test treebank the tag that it has most often in the training sentences, O where it is not there (W,)."""
    counts = defaultdict(Counter)
    for words, tags in train.sentences:
        for word, tag in zip(words, tags):
            counts[word][tag] += 1
    likeliest = {word: TAGS.index(count.most_common(1)[0][0]) for word, count in counts.items()}
    return torch.tensor([likeliest.get(word, 0) for words, _ in test.sentences for word in words])


def main(argv):
    given = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    cfg = config.load(Config, [arg for arg in argv if arg not in given] + [f"--checkpoint={arg}" for arg in given[:1]], __doc__)
    if len(given) > 1 or not cfg.checkpoint:
        raise UserError(f"name one checkpoint or one run's folder, for instance out/demo; got {len(given)}: {' '.join(given) or '-'}")
    state, source = checkpoint.load(cfg.checkpoint), Path(cfg.checkpoint)
    if source.is_dir():
        source = source / f"ckpt_{state['step']:06d}.pt"
    step, start = state["step"], state["model"]
    device, dtype = pick_device(cfg)
    tokenizer, decoder = data.load_tokenizer(source.parent), checkpoint.load_model(state).to(device)
    if tokenizer.n_vocab > decoder.cfg.vocab_size:
        raise UserError(f"the tokenizer of {source.parent} has {tokenizer.n_vocab} ids, the model {decoder.cfg.vocab_size}: put the "
                        "tokenizer.json of the run beside the checkpoint")
    del state  # holds the optimizer's two copies of the model
    results_path = source.with_name("ner.jsonl")
    try:
        open(results_path, "a").close()
    except OSError as error:
        raise UserError(f"cannot write {results_path}: {error.strerror}") from None

    # Sentences to train on, to choose the epoch by, and to score
    train_paths, test_paths = resolve(cfg.train, "train", cfg.data), resolve(cfg.test, "test", cfg.data)
    train, dev, dev_paths = [], [], []
    for name, path in train_paths.items():
        found, (treebank, _, split) = read_iob2(path), name.partition(":")
        if split in ("", "train") and (treebank in REPOSITORIES or path.with_name(f"{treebank}-ud-dev.iob2").exists()):
            dev_paths.append(find(treebank, "dev", cfg.data))
            dev += read_iob2(dev_paths[-1])
        else:  # every tenth sentence chooses the epoch instead
            dev, found = dev + found[9::10], [sentence for i, sentence in enumerate(found) if i % 10 != 9]
        train += found
    uses = Counter([*train_paths.values(), *dev_paths, *test_paths.values()])
    if twice := [path.name for path, n in uses.items() if n > 1]:
        raise UserError(f"{', '.join(twice)} would be used twice, of training, choosing the epoch and scoring: change --train or --test")
    if cfg.shots > len(train):
        raise UserError(f"shots = {cfg.shots} sentences were asked for, {cfg.train} has {len(train)}")

    def prepare(sentences, name):
        treebank = Treebank(sentences, tokenizer, decoder.cfg.context, cfg.label)
        if not sentences:
            raise UserError(f"there is no sentence {name}: see the files in {cfg.data}" + " (every tenth is held out)" * (not dev_paths))
        if cfg.mode == "head":
            freeze(decoder, treebank, cfg, dtype)
        return treebank

    print(f"model     {source}: {sum(p.numel() for p in decoder.parameters()):,} parameters; {device}, {str(dtype).removeprefix('torch.')}")
    print(f"data      train {cfg.train}: {len(train):,} sentences, {sum(len(words) for words, _ in train):,} words; "
          f"dev {len(dev):,} sentences; test {', '.join(test_paths)}", flush=True)
    began = time.perf_counter()
    tests = {name: prepare(read_iob2(path), f"of {name} to score") for name, path in test_paths.items()}
    dev, everything = prepare(dev, "to choose the epoch by"), None if cfg.shots else prepare(train, "to train on")
    if cfg.mode == "head":
        print(f"features  of all words, computed once: {time.perf_counter() - began:.1f} s", flush=True)

    log_wandb, finish_wandb = start_wandb(cfg, f"{source.parent.name}-ner-{cfg.mode}-{cfg.train}", source.parent)
    results = defaultdict(list)
    for seed in range(1, cfg.seeds + 1):
        chosen = everything
        if cfg.shots:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:cfg.shots].tolist()
            chosen = prepare([train[i] for i in order], "to train on")
        trained = {}
        if cfg.mode != "majority":
            decoder.load_state_dict(start)
            head, epoch, dev_f1 = fine_tune(decoder, chosen, dev, cfg, seed, dtype, log_wandb)
            trained = {"epoch": epoch, "dev_f1": dev_f1}
        for name, test in tests.items():
            predicted = majority(chosen, test) if cfg.mode == "majority" else predict(decoder, head, test, cfg, dtype)[0]
            settings = {key: getattr(cfg, key) for key in ("shots", "label", "bidirectional", "lr", "epochs", "patience", "batch_size")}
            result = {"checkpoint": str(source), "step": step, "mode": cfg.mode, "train": cfg.train.replace(" ", ""), "test": name,
                      "seed": seed, **test.score(predicted), **trained, "sentences": len(chosen.sentences), "words": len(predicted),
                      **settings}
            results[name].append(result)
            with open(results_path, "a") as file:
                file.write(json.dumps(result) + "\n")
            log_wandb({f"ner/seed{seed}/{name}/{key}": result[key] for key in ("f1", "precision", "recall")} | {"step": 0})
    print(f"\nspan F1 in percent, {cfg.mode}, trained on {cfg.train}" + (f" ({cfg.shots} sentences)" if cfg.shots else "") +
          (f", mean ± standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else "") + f"\n\n{table(results)}\n")
    print(f"files     {results_path}", flush=True)
    finish_wandb()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
