"""Universal NER (Mayhew et al. 2023, arXiv 2311.09122): fine-tunes a checkpoint on treebanks, scores it on others.

    python eval_ner.py out/demo --train=da_ddt --test=all --mode=full --data=data/uner     # a run's newest checkpoint, or a file
    python eval_ner.py out/demo --train=da_ddt --mode=head --lr=1e-2 --seeds=3             # frozen backbone; minutes on a laptop
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
import urllib.request
from collections import Counter, defaultdict
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
    train: str = "en_ewt"  # treebanks to fine-tune on, comma-separated, or all; en_ewt:dev takes another split than train
    test: str = "all"  # treebanks to score, comma-separated, or all; en_ewt:dev takes another split than test
    mode: str = "full"  # what is trained: full, head (the backbone frozen), or majority (no model: a word's most frequent tag)
    data: str = "data/uner"  # folder of <treebank>-ud-<split>.iob2 files; missing ones are downloaded into it
    seeds: int = 1  # fine-tuning runs, with seeds 1, 2, ...: the head's start, the order of the batches, the shots
    shots: int = 0  # sentences to fine-tune on, drawn from the training treebanks together; 0: all
    epochs: int = 10  # most passes over the training sentences; the learning rate falls linearly to 0 over them
    patience: int = 5  # epochs without a better dev score that end the training; the best epoch is scored
    lr: float = 3e-5  # AdamW's learning rate at the start
    batch_size: int = 16  # sentences of a batch
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
    """A treebank that is known is not there and cannot be downloaded."""


def find(treebank, split, folder):
    """The path of a treebank's split in `folder`, downloaded where it is missing; UserError where that is impossible."""
    path = Path(folder, f"{treebank}-ud-{split}.iob2")
    if path.exists():
        return path
    if treebank not in REPOSITORIES:
        near = difflib.get_close_matches(treebank, REPOSITORIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(REPOSITORIES)}"
        raise UserError(f"{path} does not exist, and {treebank!r} is no treebank of Universal NER; {hint}")
    if split != "test" and treebank not in TRAINABLE:
        raise UserError(f"{treebank} has no {split} split, only test; those with one are {', '.join(TRAINABLE)}")
    url = f"{SERVER}/{REPOSITORIES[treebank]}/{path.name}"
    partial = path.with_suffix(".partial")
    try:
        print(f"download  {url}", flush=True)
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        read_iob2(partial)  # a login page of some network is no treebank
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, UserError) as error:  # urllib's errors are OSErrors
        partial.unlink(missing_ok=True)
        reason = getattr(error, "reason", error)
        raise Missing(f"{path} is missing and the download failed ({reason}): fetch {url} and put it there") from None
    return path


def resolve(names, split, folder):
    """`names` as in --train and --test -> {"treebank" or "treebank:split": path}."""
    if names != "all":
        pairs = [(name, *name.split(":", 1)) for name in filter(None, (name.strip() for name in names.split(",")))]
        if not pairs:
            raise UserError(f"no treebank named: give --{split}=all or names like da_ddt,en_ewt")
        return {name: find(treebank, given[0] if given else split, folder) for name, treebank, *given in pairs}
    here = {path.name.removesuffix(f"-ud-{split}.iob2") for path in Path(folder).glob(f"*-ud-{split}.iob2")}
    paths, lacking, reason = {}, [], None
    for treebank in sorted(here | set(REPOSITORIES if split == "test" else TRAINABLE)):
        try:
            if reason is None or treebank in here:
                paths[treebank] = find(treebank, split, folder)
                continue
        except Missing as error:  # do not wait for the network again
            reason = error
        lacking.append(treebank)
    if not paths:
        raise reason
    if lacking:
        print(f"note      all is without {', '.join(lacking)}: {reason}", flush=True)
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
        if len(predicted) != len(self.tags):
            raise ValueError(f"{len(predicted)} words were predicted, the treebank has {len(self.tags)}")
        tags = iter(predicted.tolist())
        true = [tags for _, tags in self.sentences]
        pred = [[TAGS[next(tags)] for _ in words] for words, _ in self.sentences]
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
              f"{seconds:.1f} s, {len(train.tags) / seconds:,.0f} words/s", flush=True)
        log({"step": step, "ner/loss": total.item() / len(order), "ner/dev_loss": dev_loss, "ner/dev_f1": f1})
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


def main(argv):
    sources = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    cfg = config.load(Config, [arg for arg in argv if arg not in sources], __doc__)
    if len(sources) != 1:
        raise UserError(f"name one checkpoint or one run's folder, for instance out/demo; got {len(sources)}: {' '.join(sources) or '-'}")
    state = checkpoint.load(sources[0])
    out_dir = Path(sources[0]) if Path(sources[0]).is_dir() else Path(sources[0]).parent
    device, dtype = pick_device(cfg)
    tokenizer, decoder = data.load_tokenizer(out_dir), checkpoint.load_model(state).to(device)
    start = {name: p.clone() for name, p in state["model"].items()}
    source, step = str(out_dir / f"ckpt_{state['step']:06d}.pt"), state["step"]
    del state  # three times the model

    # Training, dev and test sentences
    train_paths, test_paths = resolve(cfg.train, "train", cfg.data), resolve(cfg.test, "test", cfg.data)
    if both := [name for name, path in test_paths.items() if path in train_paths.values()]:
        raise UserError(f"{', '.join(both)} would be both trained on and scored: change --train or --test")
    train, dev = [], []
    for name, path in train_paths.items():
        found = read_iob2(path)
        treebank, _, split = name.partition(":")
        if split in ("", "train") and (treebank in REPOSITORIES or path.with_name(f"{treebank}-ud-dev.iob2").exists()):
            dev += read_iob2(find(treebank, "dev", cfg.data))
        else:  # every tenth sentence chooses the epoch instead
            dev, found = dev + found[9::10], [sentence for i, sentence in enumerate(found) if i % 10 != 9]
        train += found
    if cfg.shots > len(train):
        raise UserError(f"shots = {cfg.shots} sentences were asked for, {cfg.train} has {len(train)}")

    def prepare(sentences):
        return Treebank(sentences, tokenizer, decoder.cfg.context, cfg.label)

    dev, tests = prepare(dev), {name: prepare(read_iob2(path)) for name, path in test_paths.items()}
    everything = prepare(train)
    for name, treebank in (("train", everything), ("dev", dev), *tests.items()):
        if not len(treebank.tags):
            raise UserError(f"{name} holds no sentence: see the files in {cfg.data}")
    print(f"model     {source}: {sum(p.numel() for p in decoder.parameters()):,} parameters; {device}, {str(dtype).removeprefix('torch.')}")
    print(f"data      train {cfg.train}: {len(train):,} sentences, {len(everything.tags):,} words, "
          f"{padding(batches(everything.windows, cfg.batch_size, torch.Generator())):.0%} padding; "
          f"dev {len(dev.sentences):,} sentences; test {', '.join(tests)}", flush=True)
    frozen = cfg.mode == "head"
    if frozen:
        began = time.perf_counter()
        for treebank in (everything, dev, *tests.values()):
            freeze(decoder, treebank, cfg, dtype)
        print(f"features  of all words computed once, {time.perf_counter() - began:.1f} s", flush=True)

    log_wandb, finish_wandb = start_wandb(cfg, f"{out_dir.name}-ner-{cfg.mode}-{cfg.train}", out_dir)
    results = defaultdict(list)
    for seed in range(1, cfg.seeds + 1):
        chosen = everything
        if cfg.shots:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:cfg.shots].tolist()
            chosen = prepare([train[i] for i in order])
            if frozen:
                freeze(decoder, chosen, cfg, dtype)
        if cfg.mode == "majority":
            counts = defaultdict(Counter)
            for words, tags in chosen.sentences:
                for word, tag in zip(words, tags):
                    counts[word][tag] += 1
            likeliest = {word: TAGS.index(count.most_common(1)[0][0]) for word, count in counts.items()}
            trained = {}
        else:
            decoder.load_state_dict(start)
            head, epoch, dev_f1 = fine_tune(decoder, chosen, dev, cfg, seed, dtype, log_wandb)
            trained = {"epoch": epoch, "dev_f1": dev_f1}
        for name, treebank in tests.items():
            if cfg.mode == "majority":
                predicted = torch.tensor([likeliest.get(word, 0) for words, _ in treebank.sentences for word in words])
            else:
                predicted, _ = predict(decoder, head, treebank, cfg, dtype)
            result = {"checkpoint": source, "step": step, "mode": cfg.mode, "train": cfg.train, "test": name, "seed": seed,
                      **treebank.score(predicted), **trained, "words": len(predicted), "shots": cfg.shots, "lr": cfg.lr,
                      "label": cfg.label, "bidirectional": cfg.bidirectional}
            results[name].append(result)
            with open(out_dir / "ner.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            log_wandb({"step": seed} | {f"ner/{name}/{key}": result[key] for key in ("f1", "precision", "recall")})
    print(f"\nspan F1 in percent, {cfg.mode}, trained on {cfg.train}" + (f" ({cfg.shots} sentences)" if cfg.shots else "") +
          (f", mean ± standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else "") + f"\n\n{table(results)}\n")
    print(f"files     {out_dir / 'ner.jsonl'}", flush=True)
    finish_wandb()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
