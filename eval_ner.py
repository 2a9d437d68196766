"""Universal NER (Mayhew et al. 2023, arXiv 2311.09122): fine-tunes a checkpoint and scores it.

    python eval_ner.py out/demo --train=da_ddt --test=all             # fine-tunes the whole model
    python eval_ner.py out/demo --train=da_ddt --mode=head --lr=0.1   # frozen backbone: minutes on a CPU
    python eval_ner.py out/demo --train=da_ddt --mode=majority        # baseline without a model
    python eval_ner.py out/demo --train=da_ddt --shots=8,32,128 --seeds=5   # few-shot: five draws of each
    python eval_ner.py out/demo --data=data/conll2003 --train=conll2003   # train.txt, test.txt there

The first argument is a run's folder (its newest checkpoint is used) or a checkpoint file. Treebanks
missing from --data are downloaded. Scores are printed and appended to ner.jsonl beside the checkpoint.
Of the model it only calls `hidden`. nanomaml/treebanks.py handles the files and names of treebanks.
Shapes: B batch, T positions, D model width, n words of a batch, W words of a treebank.
"""
import itertools
import math
import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomaml import checkpoint, config, files, treebanks
from nanomaml import tokenizer as tokenizer_files
from nanomaml.config import Count, Positive, TextEncoding, require
from nanomaml.console import clock
from nanomaml.machine import Dtype, autocast, pick_device
from nanomaml.ranks import rank_and_world
from nanomaml.stats import markdown, mean_std
from nanomaml.treebanks import TYPES, keep_types, read_iob2  # noqa: F401
from nanomaml.wandb_logs import Wandb, start_wandb

# Written into each result, so that only results under the same settings are compared
SETTINGS = ("shots", "label", "lr", "epochs", "patience", "batch_size")
Mode, Label = Literal["full", "head", "majority"], Literal["first", "last"]
Counts = Annotated[str, "numbers of sentences, comma-separated", re.compile(r" *\d+ *(, *\d+ *)*").fullmatch]


@dataclass(frozen=True)
class Config(config.Settings):
    train: str = "en_ewt"  # treebanks to fine-tune on, comma-separated, or all; en_ewt:dev: its dev split
    test: str = "all"  # treebanks to score, comma-separated, or all; en_ewt:dev: its dev split
    mode: Mode = "full"  # full; head: frozen backbone; majority: no model, the most frequent tag of each word
    data: str = "data/uner"  # folder of .iob2 or CoNLL files; Universal NER's are downloaded where missing
    encoding: TextEncoding = "utf-8"  # of the files in data
    tags: str = ""  # entity types, comma-separated; others count as O; empty: Universal NER's or all in train
    seeds: Count = 1  # fine-tuning runs, seeded 1, 2, ...: initial head, order of batches, choice of shots
    shots: Counts = "0"  # sentences to fine-tune on, drawn from all training treebanks; 0: all; or 8,32,128
    epochs: Count = 10  # most epochs; the learning rate falls linearly to 0 over them
    patience: Count = 5  # epochs without a better dev score before training stops; the best epoch is scored
    lr: Positive = 3e-5  # initial learning rate of AdamW
    batch_size: Count = 16  # sentences per batch; one longer than the context counts once per window
    label: Label = "first"  # sub-token at which a word is read: first (as published) or last (sees it whole)
    wandb: Wandb = "disabled"  # disabled, offline or online
    wandb_project: str = "nanomaml"  # name of the project there
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: Dtype = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it

    @property
    def shot_counts(self):
        """The numbers that `shots` lists, each once; 0 stands for all sentences."""
        return list(dict.fromkeys(map(int, self.shots.split(","))))


# ---- sentences to train on, to choose the epoch on, and to score ----


def choose_sentences(cfg):
    """(train, dev, {test: sentences}, types) as --train, --test and --tags name them.

    The best epoch is chosen on dev, which holds the dev splits of the training treebanks. For a treebank
    without one, and for names like en_ewt:dev, every tenth training sentence is held out instead.
    """
    of_train = treebanks.load(cfg.train, "train", cfg.data, None, cfg.encoding)
    types = choose_types(cfg.tags, of_train)
    readable = None if cfg.tags else (*TYPES, "OTH") if types == TYPES else types
    tests = treebanks.load(cfg.test, "test", cfg.data, readable, cfg.encoding)
    uses = [treebanks.treebank_and_split(name, "test") for name in tests]
    train, dev = [], []
    for name, sentences in of_train.items():
        treebank, split = treebanks.treebank_and_split(name, "train")
        uses.append((treebank, split))
        if split == "train" and treebanks.has_dev(treebank, cfg.data):
            uses.append((treebank, "dev"))
            dev += treebanks.load(treebank, "dev", cfg.data, readable, cfg.encoding)[treebank]
        else:
            dev += sentences[9::10]
            del sentences[9::10]
        train += sentences
    repeated = ", ".join(":".join(use) for use, n in Counter(uses).items() if n > 1)
    require(not repeated,
            f"{repeated} would be used twice (to train, choose the epoch or score): change --train or --test")
    require(dev, f"{cfg.train} has no dev split, and fewer than 10 sentences to hold out a tenth of")
    require(max(cfg.shot_counts) <= len(train),
            f"shots = {max(cfg.shot_counts)} is more than the {len(train)} training sentences of {cfg.train}")
    return train, dev, tests, types


def choose_types(tags, of_train):
    """The entity types that count: those in `tags` or, if empty, TYPES or, for other data, all that occur."""
    found = {tag[2:] for sentences in of_train.values() for _, tags in sentences for tag in tags} - {""}
    types = tuple(dict.fromkeys(filter(None, map(str.strip, tags.split(",")))))
    require(found.issuperset(types), f"tags = {tags} must be types that occur in {', '.join(of_train)}: "
                                     f"{', '.join(sorted(found)) or 'none'}")
    return types or (TYPES if found <= {*TYPES, "OTH"} else tuple(sorted(found)))


def draw_shots(sentences, shots, seed):
    """`shots` different sentences at random; more shots with the same seed contain them."""
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
    return [sentences[i] for i in order[:shots].tolist()]


# ---- span F1 ----


def spans(tags, strict=False):
    """{(type, first word, last word + 1)} of a sentence's tags.

    An I- tag that does not continue a span of its type begins one or, if `strict`, belongs to no span.
    """
    result, open_type, first = set(), None, 0
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
        return {"f1": 2 * correct / max(predicted + support, 1), "precision": correct / max(predicted, 1),
                "recall": correct / max(support, 1), "support": support}

    total = scores(n_true.keys() | n_pred.keys())
    del total["support"]
    return total | {"per_type": {name: scores([name]) for name in sorted({*types, *n_true, *n_pred})}}


class Window(NamedTuple):
    """What the model reads at once: a sentence, or a part of one that is longer than the context."""
    ids: list  # sub-tokens
    positions: list  # for each word that is tagged in this window, the sub-token at which it is read
    words: list  # the numbers of the tagged words in the treebank


def blank_before(tokenizer):
    """What to put before a word to get its sub-tokens in a text: " " or "", or None if neither does.

    Tokenizers that write a blank as "▁" put one before every text.
    """
    for blank in (" ", ""):
        the, end, both = (tokenizer.encode_ordinary(blank + text) for text in ("the", "end", "the end"))
        if the + end == both:
            return blank


def cut(sentences, tokenizer, context, label):
    """Cuts sentences into windows of at most `context` sub-tokens, in which each word is tagged exactly once.

    A word is encoded as it is after a space. A word longer than the context is cut off there.
    Up to half a window repeats words that an earlier window tagged, as context.
    """
    windows, blank = [], blank_before(tokenizer)
    n_before = 0  # words of the sentences before this one
    for words, _ in sentences:
        tokens = [tokenizer.encode_ordinary(blank + word)[:context] for word in words]
        offsets = [0, *itertools.accumulate(map(len, tokens))]  # word i: sub-tokens offsets[i]:offsets[i + 1]
        first = 0
        while first < len(words):  # a window of the words start:end, which tags first:end
            start = bisect_left(offsets, max(offsets[first] - context // 2, offsets[first + 1] - context))
            end = bisect_right(offsets, offsets[start] + context) - 1
            read_at = offsets[first:end] if label == "first" else [x - 1 for x in offsets[first + 1:end + 1]]
            windows.append(Window(sum(tokens[start:end], []), [x - offsets[start] for x in read_at],
                                  list(range(n_before + first, n_before + end))))
            first = end
        n_before += len(words)
    return windows


class Treebank:
    """Sentences, their windows, and their tags as numbers (W,); tags of other types than `types` become O.

    tag_names: what the numbers stand for, O and then B- and I- of each type.
    features: (W, D) from `cache_features` where the backbone is frozen, else None.
    """

    def __init__(self, sentences, tokenizer, context, label, types=TYPES):
        self.sentences, self.types = keep_types(sentences, types), types
        self.windows = cut(sentences, tokenizer, context, label)
        self.tag_names = ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]
        self.tags = torch.tensor([self.tag_names.index(tag) for _, tags in self.sentences for tag in tags])
        self.features = None

    def score(self, predicted):
        """`span_f1` of the predicted tag numbers (W,), and "f1_strict"."""
        true = [tags for _, tags in self.sentences]
        of_sentences = predicted.split([len(tags) for tags in true])
        pred = [[self.tag_names[i] for i in numbers.tolist()] for numbers in of_sentences]
        return span_f1(true, pred, types=self.types) | {"f1_strict": span_f1(true, pred, strict=True)["f1"]}


def batches(windows, size, generator=None):
    """Lists of up to `size` windows of similar length, which keeps padding low.

    With a generator they come in random order, sorted within random pools of 32 batches, new in each epoch.
    """
    n = len(windows)
    order = torch.randperm(n, generator=generator).tolist() if generator else range(n)
    pool = 32 * size if generator else n
    result = []
    for start in range(0, n, pool):
        by_length = sorted(order[start:start + pool], key=lambda i: len(windows[i].ids))
        result += [[windows[i] for i in by_length[j:j + size]] for j in range(0, len(by_length), size)]
    return [result[i] for i in torch.randperm(len(result), generator=generator)] if generator else result


def word_numbers(batch):
    """The numbers (n,) in the treebank of the words that a batch of windows tags."""
    return torch.tensor([word for window in batch for word in window.words])


# ---- model and fine-tuning ----


def read_words(decoder, batch, dtype):
    """The backbone's features (n, D) at the words of a batch of windows, in the order of `word_numbers`."""
    device = decoder.lm_head.weight.device
    sequences = [torch.tensor(window.ids) for window in batch]
    # Padding lies on the right, where the causal mask hides it.
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)  # (B, T)
    places = [(row, position) for row, window in enumerate(batch) for position in window.positions]
    with autocast(device, dtype):
        return decoder.hidden(ids)[*torch.tensor(places, device=device).T]


@torch.no_grad()
def cache_features(decoder, treebank, cfg, dtype):
    """Computes the features of all words of a treebank once: with a frozen backbone they never change."""
    device = decoder.lm_head.weight.device
    treebank.features = torch.empty(len(treebank.tags), decoder.cfg.d_model, device=device)  # (W, D)
    for batch in batches(treebank.windows, 64):
        treebank.features[word_numbers(batch)] = read_words(decoder, batch, dtype)


def logits(decoder, head, treebank, batch, cfg, dtype):
    """The logits (n, number of tags) of a batch's words."""
    if treebank.features is not None:
        return head(treebank.features[word_numbers(batch).to(treebank.features.device)])
    return head(read_words(decoder, batch, dtype).float())


@torch.no_grad()
def predict(decoder, head, treebank, cfg, dtype):
    """(numbers of the likeliest tags (W,) on the CPU, mean cross-entropy in nats)."""
    predicted, total_loss = torch.zeros_like(treebank.tags), 0.0
    for batch in batches(treebank.windows, 64):
        words = word_numbers(batch)
        scores = logits(decoder, head, treebank, batch, cfg, dtype).float().cpu()
        predicted[words] = scores.argmax(-1)
        total_loss += F.cross_entropy(scores, treebank.tags[words], reduction="sum").item()
    return predicted, total_loss / len(predicted)


def majority(train, test):
    """The most frequent tag (W,) of each test word in the training sentences; O for other words."""
    counts = defaultdict(Counter)
    for sentence in train.sentences:
        for word, tag in zip(*sentence):
            counts[word][tag] += 1
    number = {word: train.tag_names.index(count.most_common(1)[0][0]) for word, count in counts.items()}
    return torch.tensor([number.get(word, 0) for words, _ in test.sentences for word in words])


def fine_tune(decoder, train, dev, cfg, seed, dtype, log):
    """Trains a new linear head and, with --mode=full, the backbone: (head, best epoch, its dev F1).

    The head starts with weights from N(0, 0.02^2) and biases 0. Head and backbone (in place) end up with the
    weights of the epoch that is best on `dev`. After each epoch, log(line) gets a dict of metrics.
    """
    device, generator = decoder.lm_head.weight.device, torch.Generator().manual_seed(seed)
    head = nn.Linear(decoder.cfg.d_model, len(train.tag_names))
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(device)
    trained = nn.ModuleList([head] if cfg.mode == "head" else [head, decoder.model])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    total_steps = cfg.epochs * math.ceil(len(train.windows) / cfg.batch_size)
    step, best_epoch, best_weights = 0, 0, None
    best_score = (-1.0, 0.0)  # (dev F1, minus the dev loss): the loss decides while no span is correct yet
    start = shown = time.perf_counter()
    for epoch in range(1, cfg.epochs + 1):
        order = batches(train.windows, cfg.batch_size, generator)
        total_loss = torch.zeros((), device=device)  # read once per epoch, since reading waits for the device
        for batch in order:
            targets = train.tags[word_numbers(batch)].to(device)
            loss = F.cross_entropy(logits(decoder, head, train, batch, cfg, dtype), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / total_steps)
            optimizer.step()
            optimizer.zero_grad()
            total_loss += loss.detach()
            step += 1
        loss = total_loss.item() / len(order)
        require(math.isfinite(loss), f"the loss of epoch {epoch} is not finite: lower lr = {cfg.lr:g}")

        predicted, dev_loss = predict(decoder, head, dev, cfg, dtype)
        dev_f1 = dev.score(predicted)["f1"]
        now = time.perf_counter()
        is_last = epoch == cfg.epochs or epoch - best_epoch >= cfg.patience
        if is_last or now - shown > 10:
            shown, left = now, clock((now - start) / epoch * (cfg.epochs - epoch))
            print(f"{len(train.sentences):,} sentences, seed {seed}/{cfg.seeds}  epoch {epoch}/{cfg.epochs}  "
                  f"loss {loss:.3f}  dev F1 {100 * dev_f1:.1f}  at most {left} left", flush=True)
        metrics = {"loss": loss, "dev_loss": dev_loss, "dev_f1": dev_f1}
        log({"step": step} | {f"ner/seed{seed}/{name}": value for name, value in metrics.items()})
        if (dev_f1, -dev_loss) > best_score:
            best_score, best_epoch = (dev_f1, -dev_loss), epoch
            best_weights = {name: p.detach().to("cpu", copy=True) for name, p in trained.state_dict().items()}
        elif epoch - best_epoch >= cfg.patience:
            break
    trained.load_state_dict(best_weights)
    return head, best_epoch, best_score[0]


def summary(cfg, results, types):
    """Tables in Markdown of {shots: {test: [result of each seed]}}: percent, mean ± sample deviation."""
    def cell(lines, key):
        return mean_std([100 * line[key] for line in lines], ".1f")

    title, parts = f"span F1 in percent, {cfg.mode}, trained on {cfg.train}", []
    seeds = f", mean ± standard deviation of {cfg.seeds} seeds" if cfg.seeds > 1 else ""
    for shots, tests in results.items():
        rows = [["test", "precision", "recall", "F1", *(f"F1 {name}" for name in types), "spans"]]
        for test, lines in tests.items():
            of_types = [[line["per_type"][name] for line in lines] for name in types]
            rows.append([test, *(cell(lines, key) for key in ("precision", "recall", "f1")),
                         *(cell(of_type, "f1") for of_type in of_types),
                         str(sum(of_type[0]["support"] for of_type in of_types))])
        parts += [title + (f" ({shots} sentences)" if shots else "") + seeds, markdown(rows)]
    if len(results) > 1:
        rows = [["test", *(str(shots or "all") for shots in results)]]
        rows += [[test, *(cell(of_shots[test], "f1") for of_shots in results.values())] for test in tests]
        parts += [f"{title}, by number of sentences{seeds}", markdown(rows)]
    return "\n\n".join(parts)


def load_tokenizer(folder, vocab_size):
    """The tokenizer in `folder`, which must fit the model and encode each word separately."""
    tokenizer = tokenizer_files.load_tokenizer(folder, vocab_size)
    require(blank_before(tokenizer) is not None,
            f"the tokenizer of {folder} does not read a text word by word")
    return tokenizer


def main(argv):
    source, flags = config.one_operand(Config, argv)
    cfg, path = config.load(Config, flags, __doc__), Path(source)
    if rank_and_world()[0] > 0:  # one process scores, also where torchrun starts several
        return
    device, dtype = pick_device(cfg.device, cfg.dtype)
    state = checkpoint.load(path)
    if path.is_dir():
        path = path / f"ckpt_{state['step']:06d}.pt"
    decoder = checkpoint.load_model(state).to(device)
    tokenizer = load_tokenizer(path.parent, decoder.cfg.vocab_size)
    results_path = path.with_name("ner.jsonl")
    files.require_no_link(results_path)
    results_path.open("a").close()  # fail now rather than after training
    train, dev, tests, types = choose_sentences(cfg)
    n_parameters = sum(p.numel() for p in decoder.parameters())
    in_files = {tag[2:] for read in (train, dev, *tests.values()) for _, tags in read for tag in tags}
    ignored = "".join(f", not {name}" for name in sorted(in_files - {"", *types}))
    print(f"model     {path}: {n_parameters:,} parameters; {device}, {str(dtype).removeprefix('torch.')}")
    print(f"data      train {cfg.train}: {len(train):,} sentences, {sum(len(words) for words, _ in train):,} "
          f"words; dev {len(dev):,} sentences{' at any --shots' if any(cfg.shot_counts) else ''}; "
          f"test {', '.join(tests)}; types {', '.join(types)}{ignored}", flush=True)

    def prepare(sentences):
        treebank = Treebank(sentences, tokenizer, decoder.cfg.context, cfg.label, types)
        if cfg.mode == "head":
            cache_features(decoder, treebank, cfg, dtype)
        return treebank

    tests = {name: prepare(sentences) for name, sentences in tests.items()}
    dev = prepare(dev)
    all_train = prepare(train) if 0 in cfg.shot_counts else None
    run = {"checkpoint": str(path), "step": state["step"], "mode": cfg.mode,
           "train": cfg.train.replace(" ", "")} | ({} if types == TYPES else {"tags": ",".join(types)})
    results = {}  # {shots: {test: [result of each seed]}}
    for shots in cfg.shot_counts:
        settings = {key: getattr(cfg, key) for key in SETTINGS} | {"shots": shots}
        wandb_name = f"{path.parent.name}-ner-{cfg.mode}-{cfg.train}" + (f"-{shots}shots" if shots else "")
        send, finish = start_wandb(cfg, wandb_name, path.parent, facts=run | settings)
        results[shots] = defaultdict(list)
        for seed in range(1, cfg.seeds + 1):
            seed_train = prepare(draw_shots(train, shots, seed)) if shots else all_train
            training = {}
            if cfg.mode != "majority":
                decoder.load_state_dict(state["model"])  # an earlier seed may have trained it
                head, epoch, dev_f1 = fine_tune(decoder, seed_train, dev, cfg, seed, dtype, send)
                training = {"epoch": epoch, "dev_f1": dev_f1}
            for name, test in tests.items():
                predicted = (majority(seed_train, test) if cfg.mode == "majority"
                             else predict(decoder, head, test, cfg, dtype)[0])
                scores = test.score(predicted)
                sizes = {"sentences": len(seed_train.sentences), "words": len(test.tags)}
                result = run | {"test": name, "seed": seed} | scores | training | sizes | settings
                results[shots][name].append(result)
                files.append(results_path, result)
                send({"step": 0} | {f"ner/seed{seed}/{name}/{key}": scores[key]
                                    for key in ("f1", "precision", "recall")})
        finish()
    print(f"\n{summary(cfg, results, types)}\n\nfiles     {results_path}", flush=True)


if __name__ == "__main__":
    config.run(main)
