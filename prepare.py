"""Text to token bins: reads sources, learns a tokenizer where asked to, writes shards.

    python prepare.py --out=data/mine --source=corpus/             # .txt, .md, .jsonl, each also .gz
    python prepare.py --out=data/mine --source=a.txt,b.jsonl.gz --val=news.txt,blogs.txt --vocab_size=8192
    python prepare.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu:sample-10BT \\
        --max_tokens=4_000_000_000 --tokenizer=gpt2                # streamed; pip install datasets
    python prepare.py                                              # this installation's own documentation

The folder then holds train_000000.bin, ..., val_000000.bin (or val_<domain>_000000.bin), tokenizer.json and
meta.json. data.py reads it and knows the format of a bin.
"""
import ast
import functools
import gc
import gzip
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
from config import UserError
from data import EMBEDDED, HEADER, MAGIC, SPECIAL, VERSION, encoding, load_tokenizer, save_tokenizer

SUFFIX = re.compile(r"\.(txt|md|jsonl)(\.gz)?$")
# Pre-tokenizer of the tokenizers trained here: a word takes its leading space along, digits go in threes.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # bins hold uint16


@dataclass(frozen=True)
class Config:
    out: str = EMBEDDED  # folder to write; must not exist yet
    source: str = ""  # files, folders, datasets (name or name:subset), comma-separated; empty: documentation
    val: str = ""  # files, comma-separated, each a validation domain; empty: hold out val_share of documents
    val_share: float = 0.02  # documents held out where val is empty: one in round(1 / val_share); 0: none
    tokenizer: str = "train"  # train: learn a byte-pair encoding; gpt2; or a folder with a tokenizer.json
    vocab_size: int = 4096  # ids of a tokenizer trained here, its 2 special tokens included
    max_tokens: int = 0  # stop after this many training tokens, to about a million; 0: read all
    shard_tokens: int = 100_000_000  # tokens of a shard, 2 bytes each
    text_key: str = "text"  # the field of .jsonl files and datasets that holds the text

    def __post_init__(self):
        config.require(0 <= self.val_share <= 0.5, f"val_share must lie in [0, 0.5], got {self.val_share}")
        smallest = 256 + len(SPECIAL)
        config.require(smallest <= self.vocab_size <= MAX_IDS,
                       f"vocab_size must lie in {smallest} (the bytes and {len(SPECIAL)} special tokens) "
                       f"to {MAX_IDS} (uint16), got {self.vocab_size}")
        config.require(1 <= self.shard_tokens < 2**31,
                       f"shard_tokens must lie in 1 to {2**31 - 1} (the header counts in int32), "
                       f"got {self.shard_tokens}")
        config.require_at_least(self, 0, "max_tokens")


# ---- sources ----


def read_file(path, key):
    """The documents of a text or .jsonl file. In text, two blank lines or 64 K characters end a document."""
    lines = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace")
    with lines:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[key]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}, line {number}: no JSON object with a {key!r} field: "
                                    f"{line[:60]!r}") from None
                if not isinstance(text, str):
                    raise UserError(f"{path}, line {number}: {key!r} is not text: {text!r:.60}")
                yield text
        else:
            document, size, blank_lines = [], 0, 0
            for line in iter(lambda: lines.readline(2**16), ""):
                blank_lines = 0 if line.strip() else blank_lines + 1
                document.append(line)
                size += len(line)
                if blank_lines == 2 or size > 2**16:
                    yield "".join(document).strip()
                    document, size = [], 0
            yield "".join(document).strip()


def read_documents(source, key):
    """The documents of a file, of a folder's files in sorted order, or of a Hugging Face dataset."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if SUFFIX.search(file.name)]
        if not files:
            raise UserError(f"{source} holds no .txt, .md or .jsonl file (each may also be .gz)")
        for file in files:
            yield from read_documents(file, key)
    elif path.is_file():
        if not SUFFIX.search(path.name):
            raise UserError(f"{path}: sources are .txt, .md or .jsonl files (each may also be .gz); "
                            "convert or rename it")
        try:
            yield from read_file(path, key)
        except (OSError, EOFError, zlib.error) as error:  # no right to read it, or damaged gzip
            raise UserError(f"cannot read {path}: {error}") from None
    else:
        yield from read_dataset(str(source), key)


def read_dataset(source, key):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is not a file or folder; if it is a Hugging Face dataset, "
                        "pip install datasets first") from None
    try:
        name, _, subset = source.partition(":")
        for row in datasets.load_dataset(name, subset or None, split="train", streaming=True):
            yield row[key]
    except Exception as error:  # network, name, field: whatever the library meets
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"dataset {source}: {type(error).__name__}: {reason}") from None


@functools.lru_cache(maxsize=1)
def embedded_documents():
    """English prose that every installation has on disk, about 8 MB.

    The language reference of Python, and the docstrings of its standard library, NumPy and PyTorch.
    """
    import pydoc_data.topics

    def docstrings(node):
        yield ast.get_docstring(node)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings(child)

    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    skip = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
    warnings.simplefilter("ignore", SyntaxWarning)  # about odd escapes in code that is not ours
    collecting = gc.isenabled()
    gc.disable()  # it would walk millions of syntax nodes again and again: 3 times the time
    for folder in (sysconfig.get_paths()["stdlib"], Path(np.__file__).parent, Path(torch.__file__).parent):
        for path in sorted(Path(folder).rglob("*.py")):
            if skip.isdisjoint(path.relative_to(folder).parts):
                try:
                    text = "\n\n".join(filter(None, docstrings(ast.parse(path.read_bytes()))))
                except (SyntaxError, ValueError, OSError):  # templates, dangling links and the like
                    continue
                if len(text) > 200:
                    documents.append(text)
    if collecting:
        gc.enable()
    return documents


def training_documents(cfg):
    sources = [source for source in cfg.source.split(",") if source]
    if not sources:
        return filter(None, embedded_documents())
    return filter(None, itertools.chain.from_iterable(read_documents(name, cfg.text_key) for name in sources))


# ---- tokenizer ----


def train_tokenizer(documents, vocab_size):
    """A byte-pair encoding of at most `vocab_size` ids, special ones included; a short text gives fewer."""
    import rustbpe

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size - len(SPECIAL), pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return encoding(f"bpe{vocab_size}", PATTERN, ranks)


def first_characters(documents, characters):
    for text in documents:
        characters -= len(text)
        if characters < 0:
            return
        yield text


def make_tokenizer(cfg):
    """The tokenizer that `cfg.tokenizer` names, or one trained on the start of the corpus."""
    if cfg.tokenizer == "train":  # 200 M characters settle the merges of a small vocabulary
        return train_tokenizer(first_characters(training_documents(cfg), 2e8), cfg.vocab_size)
    if cfg.tokenizer != "gpt2" and not Path(cfg.tokenizer, "tokenizer.json").exists():
        raise UserError(f"tokenizer = {cfg.tokenizer!r} is neither train, gpt2 nor a folder with a "
                        "tokenizer.json")
    tokenizer = load_tokenizer(cfg.tokenizer)
    if tokenizer.n_vocab > MAX_IDS:
        raise UserError(f"tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} ids; bins hold uint16, "
                        f"at most {MAX_IDS}")
    return tokenizer


# ---- writing ----


class ShardWriter:
    """Appends tokens to folder/<name>_000000.bin, _000001.bin, ... of at most `shard_tokens` each."""

    def __init__(self, folder, name, shard_tokens):
        self.folder, self.name, self.limit = folder, name, shard_tokens
        self.total, self.shards, self.file = 0, 0, None

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.name}_{self.shards:06d}.bin", "wb")
                self.file.write(bytes(4 * HEADER))  # filled in by close(), when the count is known
                self.shards, self.room = self.shards + 1, self.limit
            part, tokens = tokens[:self.room], tokens[self.room:]
            self.file.write(part.tobytes())
            self.total, self.room = self.total + len(part), self.room - len(part)
            if self.room == 0:
                self.close()

    def close(self):
        if self.file is not None:
            header = np.zeros(HEADER, "<i4")
            header[:3] = MAGIC, VERSION, self.limit - self.room
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


class Splits:
    """Encodes documents on all cores and writes each to the bins of its split; shows how far it is."""

    def __init__(self, cfg, tokenizer, folder):
        self.cfg, self.tokenizer, self.folder = cfg, tokenizer, folder
        self.writers = {}  # {split: ShardWriter}
        self.pending, self.characters = {}, {}  # {split: documents not encoded yet, and their size}
        self.start, self.shown = time.perf_counter(), 0.0

    def tokens(self, split):
        return self.writers[split].total if split in self.writers else 0

    def add(self, split, text):
        self.pending.setdefault(split, []).append(text)
        self.characters[split] = self.characters.get(split, 0) + len(text)
        if self.characters[split] > 4e6:  # enough for all cores, little in memory
            self.flush(split)

    def flush(self, split):
        texts, self.characters[split] = self.pending.pop(split, []), 0
        encoded = self.tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        if split not in self.writers:
            self.writers[split] = ShardWriter(self.folder, split, self.cfg.shard_tokens)
        for tokens in encoded:
            self.writers[split].write(np.array([self.tokenizer.eot_token, *tokens], "<u2"))
        if time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            total = sum(writer.total for writer in self.writers.values()) / 1e6
            rate = total / (self.shown - self.start)
            print(f"\r{self.cfg.out}: {total:,.1f} M tokens, {rate:.2f} M tokens/s ", end="", file=sys.stderr,
                  flush=True)

    def close(self):
        """{split: tokens} of what was written."""
        for split in list(self.pending):
            self.flush(split)
        for writer in self.writers.values():
            writer.close()
        print("\r\033[K" if self.shown else "", end="", file=sys.stderr)
        return {split: writer.total for split, writer in sorted(self.writers.items())}


def validation_domains(cfg):
    """{file: domain}: each file that `val` names is a validation domain of its own, called after it."""
    domains = {}
    for name in filter(None, cfg.val.split(",")):
        stem = SUFFIX.sub("", Path(name).name).removesuffix(".val")
        domains[name] = re.sub(r"\W", "-", stem)
    if len(set(domains.values())) < len(domains):
        raise UserError(f"val names two files alike ({', '.join(domains)}): each makes a validation domain "
                        "of its name; rename one")
    for name, domain in domains.items():
        if not Path(name).is_file():
            raise UserError(f"val: there is no file {name}")
        if domain == "loss":
            raise UserError(f"val: {name} would be logged as val/loss, which is the mean over domains; "
                            "rename it")
    return domains


def write_splits(cfg, domains, tokenizer, folder):
    """Writes the bins of all splits: {split: tokens}."""
    splits = Splits(cfg, tokenizer, folder)
    # Every so many documents one is held out; 0: none.
    held_out_every = round(1 / cfg.val_share) if cfg.val_share and not domains else 0
    for i, text in enumerate(training_documents(cfg)):
        if cfg.max_tokens and splits.tokens("train") >= cfg.max_tokens:
            break
        is_held_out = held_out_every and i % held_out_every == held_out_every - 1
        splits.add("val" if is_held_out else "train", text)
    for name, domain in domains.items():
        for text in filter(None, read_documents(name, cfg.text_key)):
            splits.add(f"val_{domain}", text)
    counts = splits.close()
    if "train" not in counts:
        raise UserError(f"no text in {cfg.source}")
    for name, domain in domains.items():
        if f"val_{domain}" not in counts:
            raise UserError(f"no text for validation in {name}")
    if held_out_every and "val" not in counts:
        raise UserError(f"fewer than {held_out_every} documents leave none for validation: give --val=FILE "
                        "or a larger --val_share, or separate documents by two blank lines")
    return counts


def prepare(cfg):
    """Writes cfg.out. The folder appears whole or not at all; the same input gives the same bytes."""
    out, domains, start = Path(cfg.out), validation_domains(cfg), time.perf_counter()
    if out.exists():
        raise UserError(f"{out} exists already: remove it, or write elsewhere with --out=")
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        partial.chmod(0o755)  # mkdtemp keeps other users out
        tokenizer = make_tokenizer(cfg)
        save_tokenizer(tokenizer, partial)
        counts = write_splits(cfg, domains, tokenizer, partial)
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "source": cfg.source or "embedded", "tokens": counts}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            partial.rename(out)
        except OSError:  # another process was first; its folder is as good
            if not (out / "meta.json").exists():
                raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    listed = ", ".join(f"{total:,} {split}" for split, total in counts.items())
    seconds = time.perf_counter() - start
    print(f"{out}: {listed} tokens, tokenizer {tokenizer.name}, {seconds:.0f} s", flush=True)


def main(argv):
    prepare(config.load(Config, argv, __doc__))


if __name__ == "__main__":
    config.run(main)
