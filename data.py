"""Text to token bins, and bins to batches: next-token sequences and Subset-Masked-LM episodes.

    python data.py --out=data/mine --source=corpus/                 # .txt, .md, .jsonl, each also .gz; files or folders
    python data.py --out=data/mine --source=a.txt,b.jsonl.gz --val=news.txt,blogs.txt --vocab_size=8192
    python data.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu:sample-10BT --max_tokens=4_000_000_000 --tokenizer=gpt2
                                                                    # a Hugging Face dataset, streamed; pip install datasets
    python data.py                                                  # the embedded corpus: this installation's own documentation

A bin is 256 int32 (magic 20240520, version 1, token count), then uint16 tokens: the layout of llm.c and modded-nanogpt.
nanoGPT's headerless train.bin and val.bin are read too. Every batch is a pure function of (seed, index).
"""
import ast
import base64
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
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import config
from config import UserError

MAGIC, VERSION, HEADER = 20240520, 1, 256  # HEADER: int32 words before the tokens
EMBEDDED = "data/pydocs"  # train.py prepares this folder by itself where it is missing
SPECIAL = ("<|endoftext|>", "<|mask|>")
# Pre-tokenizer of the tokenizers trained here: a word takes its leading space along, digits go in threes.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Where an episode looks for its words: PIECES stretches of PIECE tokens at random places, sorted by token. A word may
# make up at most MAX_SHARE of them, which leaves out the likes of "the"; at least, it must fill its windows.
PIECES, PIECE, MAX_SHARE = 32, 4096, 1e-3


# ---- tokenizer ----------------------------------------------------------------------------------------------------------------------

def encoding(name, pattern, ranks):
    """The tiktoken Encoding of these merges, with the special tokens behind them."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def load_tokenizer(source):
    """A tiktoken Encoding with <|endoftext|> and <|mask|>: "gpt2", or that of a folder of bins or of a run.

    A folder without a tokenizer.json (bins from elsewhere) is taken to hold GPT-2 tokens.
    """
    spec = {"name": source}
    if source != "gpt2":
        path = Path(source)
        if not path.exists():
            raise UserError(f"no tokenizer at {source}: give 'gpt2' or a folder that holds a tokenizer.json")
        path = path if path.is_file() else path / "tokenizer.json"
        try:
            spec = json.loads(path.read_text()) if path.exists() else {"name": "gpt2"}
            spec["name"] == "gpt2" or (spec["pattern"], spec["tokens"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no tokenizer that data.py wrote; remove it where the bins hold GPT-2 tokens") from None
    if spec["name"] == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets the HTTP client's own errors through
            raise UserError(f"tiktoken cannot download its gpt2 tokenizer ({type(error).__name__}): run once with a network, or set "
                            "TIKTOKEN_CACHE_DIR to a folder copied from a machine that has it") from None
        pattern, ranks = gpt2._pat_str, gpt2._mergeable_ranks
    else:
        pattern, ranks = spec["pattern"], {base64.b64decode(token): rank for rank, token in enumerate(spec["tokens"])}
    return encoding(spec["name"], pattern, ranks)


def save_tokenizer(tokenizer, folder):
    """Writes folder/tokenizer.json, which `load_tokenizer(folder)` reads; for gpt2 the name is enough."""
    spec = {"name": tokenizer.name}
    if tokenizer.name != "gpt2":
        by_rank = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
        spec |= {"pattern": tokenizer._pat_str, "tokens": [base64.b64encode(token).decode() for token in by_rank]}
    Path(folder, "tokenizer.json").write_text(json.dumps(spec))


def train_tokenizer(documents, vocab_size):
    """A byte-pair encoding of at most `vocab_size` ids, the special ones included, learned from the documents; a short text gives fewer."""
    import rustbpe

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size - len(SPECIAL), pattern=PATTERN)
    return encoding(f"bpe{vocab_size}", PATTERN, {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})


@functools.lru_cache(maxsize=1)
def word_tables(tokenizer):
    """Three (n_vocab,) arrays: may the token be a whole word (a space and letters); would it continue a word before it; and a number
    that tokens share which spell the same word, with or without the space, in whatever case."""
    word, continues = np.zeros((2, tokenizer.n_vocab), bool)
    spelling, numbers = np.arange(tokenizer.n_vocab), {}
    for token in tokenizer.token_byte_values():
        text = token.decode(errors="replace")
        i = tokenizer.encode_single_token(token)
        word[i] = len(text) > 2 and text[0] == " " and text[1:].isalpha()
        continues[i] = text[0].isalpha() or text[0] == "\ufffd"
        if text.strip().isalpha():
            spelling[i] = numbers.setdefault(text.strip().lower(), i)
    return word, continues, spelling


# ---- preparing a corpus -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prepare:
    out: str = EMBEDDED  # folder to write; must not exist yet
    source: str = ""  # comma-separated files, folders or Hugging Face datasets (name or name:subset); empty: documentation found here
    val: str = ""  # comma-separated files, each a validation domain of its own; empty: hold out val_share of the documents
    val_share: float = 0.02  # share of the documents held out where val is empty: one in round(1 / val_share); 0: none
    tokenizer: str = "train"  # train: a byte-pair encoding learned from the corpus; gpt2; or a folder that holds a tokenizer.json
    vocab_size: int = 4096  # ids of a tokenizer trained here, its 2 special tokens included
    max_tokens: int = 0  # stop after this many training tokens, to about a million; 0: read all
    shard_tokens: int = 100_000_000  # tokens of a shard, 2 bytes each
    text_key: str = "text"  # the field of .jsonl files and datasets that holds the text

    def __post_init__(self):
        if not 0 <= self.val_share <= 0.5:
            raise UserError(f"val_share must lie in [0, 0.5], got {self.val_share}")
        if not 258 <= self.vocab_size <= 65536:
            raise UserError(f"vocab_size must lie in 258 (the bytes and 2 special tokens) to 65536 (uint16), got {self.vocab_size}")
        if not 1 <= self.shard_tokens < 2**31:
            raise UserError(f"shard_tokens must lie in 1 to {2**31 - 1} (the header counts in int32), got {self.shard_tokens}")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens must not be negative, got {self.max_tokens}")


@functools.lru_cache(maxsize=1)
def embedded_documents():
    """English prose that every installation has on disk: the language reference and the docstrings of Python, NumPy and PyTorch."""
    import pydoc_data.topics

    def docstrings(node):
        yield ast.get_docstring(node)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings(child)

    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    skip = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
    warnings.simplefilter("ignore", SyntaxWarning)  # theirs, of odd escapes
    collecting = gc.isenabled()
    gc.disable()  # the collector walks the millions of syntax nodes again and again: 3 times the time
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(np.__file__).parent, Path(torch.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
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


SUFFIX = re.compile(r"\.(txt|md|jsonl)(\.gz)?$")


def read_file(path, key):
    """The documents of one text or .jsonl file; in text, two blank lines part them, and at the latest 64 K characters."""
    lines = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace")
    with lines:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[key]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}, line {number}: no JSON object with a {key!r} field: {line[:60]!r}") from None
                if not isinstance(text, str):
                    raise UserError(f"{path}, line {number}: {key!r} is no text: {text!r:.60}")
                yield text
        else:
            buffer, size, blank = [], 0, 0
            for line in iter(lambda: lines.readline(2**16), ""):
                blank = 0 if line.strip() else blank + 1
                buffer.append(line)
                size += len(line)
                if blank == 2 or size > 2**16:
                    yield "".join(buffer).strip()
                    buffer, size = [], 0
            yield "".join(buffer).strip()


def read_documents(source, key):
    """The documents of a file, of the files of a folder in sorted order, or of a Hugging Face dataset (streamed); memory stays bounded."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if SUFFIX.search(file.name)]
        if not files:
            raise UserError(f"{source} holds no .txt, .md or .jsonl file (each may also be .gz)")
        for file in files:
            yield from read_documents(file, key)
    elif path.is_file():
        if not SUFFIX.search(path.name):
            raise UserError(f"{path}: sources are .txt, .md or .jsonl files (each may also be .gz); convert or rename it")
        try:
            yield from read_file(path, key)
        except (OSError, EOFError, zlib.error) as error:  # no right to read it, or damaged gzip
            raise UserError(f"cannot read {path}: {error}") from None
    else:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{source} is no file or folder; if it is a Hugging Face dataset, pip install datasets first") from None
        try:
            name, _, subset = str(source).partition(":")
            rows = datasets.load_dataset(name, subset or None, split="train", streaming=True)
            for row in rows:
                yield row[key]
        except Exception as error:  # network, name, field: whatever the library meets
            raise UserError(f"dataset {source}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


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


def prepare(cfg):
    """Writes cfg.out: shards, tokenizer.json and meta.json. The folder appears whole or not at all; same input, same bytes."""
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} is already there: remove it, or write elsewhere with --out=")
    sources = [source for source in cfg.source.split(",") if source]
    domains = {name: re.sub(r"\W", "-", SUFFIX.sub("", Path(name).name).removesuffix(".val")) for name in cfg.val.split(",") if name}
    if len(set(domains.values())) < len(domains):
        raise UserError(f"val names two files alike ({', '.join(domains)}): each makes a validation domain of its name; rename one")
    for name, domain in domains.items():
        if not Path(name).is_file():
            raise UserError(f"val: there is no file {name}")
        if domain == "loss":
            raise UserError(f"val: {name} would be logged as val/loss, which is the mean over domains; rename it")

    def documents():
        texts = itertools.chain.from_iterable(read_documents(s, cfg.text_key) for s in sources) if sources else embedded_documents()
        return (text for text in texts if text)

    def start_of(texts, characters=2e8):  # that much settles the merges of a small vocabulary
        for text in texts:
            characters -= len(text)
            if characters < 0:
                break
            yield text

    start, shown = time.perf_counter(), 0.0
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        partial.chmod(0o755)  # mkdtemp keeps others out
        if cfg.tokenizer == "train":
            tokenizer = train_tokenizer(start_of(documents()), cfg.vocab_size)
        else:
            if cfg.tokenizer != "gpt2" and not Path(cfg.tokenizer, "tokenizer.json").exists():
                raise UserError(f"tokenizer = {cfg.tokenizer!r} is neither train, gpt2 nor a folder that holds a tokenizer.json")
            tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.n_vocab > 65536:
            raise UserError(f"tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} ids; bins hold uint16, at most 65536")
        save_tokenizer(tokenizer, partial)
        writers = {}

        def add(split, texts):
            nonlocal shown
            encoded = tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            writer = writers.setdefault(split, ShardWriter(partial, split, cfg.shard_tokens))
            for tokens in encoded:
                writer.write(np.array([tokenizer.eot_token, *tokens], "<u2"))
            if time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                total = sum(writer.total for writer in writers.values())
                rate = total / (shown - start)
                print(f"\r{out}: {total / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M tokens/s ", end="", file=sys.stderr, flush=True)

        def add_all(documents, split_of, most=0):
            waiting, sizes = {}, {}
            for i, text in enumerate(documents):
                if most and "train" in writers and writers["train"].total >= most:
                    break
                split = split_of(i)
                waiting.setdefault(split, []).append(text)
                sizes[split] = sizes.get(split, 0) + len(text)
                if sizes[split] > 4e6:  # characters: enough for all cores, little in memory
                    add(split, waiting.pop(split))
                    sizes[split] = 0
            for split, texts in waiting.items():
                add(split, texts)

        every = round(1 / cfg.val_share) if cfg.val_share and not cfg.val else 0
        add_all(documents(), lambda i: "val" if every and i % every == every - 1 else "train", cfg.max_tokens)
        for name, domain in domains.items():
            add_all(filter(None, read_documents(name, cfg.text_key)), lambda i: f"val_{domain}")
        print("\r\033[K" if shown else "", end="", file=sys.stderr)
        if "train" not in writers:
            raise UserError(f"no text in {cfg.source}")
        for split in [f"val_{domain}" for domain in domains.values()] or ["val"] * (every > 0):
            if split not in writers:
                raise UserError(f"no text for {split} in {cfg.val}" if domains else
                                f"fewer than {every} documents leave none for validation: give --val=FILE or a larger --val_share, "
                                "or part documents by two blank lines")
        for writer in writers.values():
            writer.close()
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, "source": cfg.source or "embedded",
                "tokens": {split: writer.total for split, writer in sorted(writers.items())}}
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
    counts = ", ".join(f"{total:,} {split}" for split, total in meta["tokens"].items())
    print(f"{out}: {counts} tokens, tokenizer {tokenizer.name}, {time.perf_counter() - start:.0f} s", flush=True)


# ---- reading bins -------------------------------------------------------------------------------------------------------------------

def open_bin(path):
    """The tokens of one bin as a read-only uint16 memory map; refuses wrong magic, version or length in one line."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != MAGIC:
        if path.name not in ("train.bin", "val.bin"):  # nanoGPT's names; its bins have no header
            start = header[0] if len(header) else "nothing"
            raise UserError(f"{path}: starts with {start}, a token bin with {MAGIC}; prepare it with data.py")
        if size == 0 or size % 2:
            raise UserError(f"{path}: {size} bytes are not a positive number of uint16 tokens")
        return np.memmap(path, "<u2", "r")
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]}, only {VERSION} is known")
    if header[2] < 1 or size != 4 * HEADER + 2 * int(header[2]):
        raise UserError(f"{path}: the header says {header[2]} tokens, the file holds {(size - 4 * HEADER) / 2:g}; copy or prepare it again")
    return np.memmap(path, "<u2", "r", offset=4 * HEADER)


class Corpus:
    """The bins of one split of a folder: `shards`, a list of uint16 arrays."""

    def __init__(self, paths):
        self.paths, self.shards = paths, [open_bin(path) for path in paths]
        self.tokens = sum(map(len, self.shards))

    def check(self, vocab_size, part=0, parts=1):
        """Refuses a token id outside the vocabulary. Reads every parts-th shard, so that ranks can share the work."""
        for path, shard in list(zip(self.paths, self.shards))[part::parts]:
            largest = max(int(shard[i:i + 2**26].max()) for i in range(0, len(shard), 2**26))
            if largest >= vocab_size:
                raise UserError(f"{path}: token id {largest} is outside the vocabulary of {vocab_size}: "
                                "raise vocab_size, or put the data's own tokenizer.json beside it")


def open_corpus(folder):
    """(train Corpus, {domain: validation Corpus}) of a folder of bins.

    `val` or `train` in a file's name, alone or after an underscore, tells the split, val first; val_<domain>_000000.bin makes a domain
    of that name, other validation bins are "val".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data at {folder}: prepare it with python data.py --out={folder} --source=...")
    train, val, others = [], {}, []
    for path in sorted(folder.glob("*.bin")):
        if match := re.search(r"(?:^|_)val(?:_(?!\d{1,6}\.bin$)(.+?))?(?:_\d{1,6})?\.bin$", path.name):
            val.setdefault(match[1] or "val", []).append(path)
        elif re.search(r"(?:^|_)train(?:_\d+)?\.bin$", path.name):
            train.append(path)
        else:
            others.append(path.name)
    if others:
        raise UserError(f"{folder}: is {others[0]} for training or validation? Name it NAME_train_000000.bin or NAME_val_000000.bin")
    if not train or not val:
        missing = "val" if train else "train"
        raise UserError(f"{folder} holds no {missing} bins (NAME_{missing}_000000.bin or {missing}.bin)")
    return Corpus(train), {domain: Corpus(paths) for domain, paths in val.items()}


def unigram_entropy(corpus, limit=20_000_000):
    """Entropy in nats of the token frequencies, from at most the first `limit` tokens: the loss of a model that knows only these."""
    counts, left = np.zeros(65536), limit
    for shard in corpus.shards:
        counts += np.bincount(shard[:left], minlength=65536)
        left -= min(left, len(shard))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ---- batches ------------------------------------------------------------------------------------------------------------------------

class LMBatch(NamedTuple):
    """ids and targets (B, T) int64: targets are the ids one position on."""
    ids: torch.Tensor
    targets: torch.Tensor


class EpisodeBatch(NamedTuple):
    """Windows of E episodes, int64: support (E, N ways, K shots, window), query (E, N ways, Q queries, window).

    The label of a window is its place among the N.
    """
    support: torch.Tensor
    query: torch.Tensor


class Sequences:
    """The endless series of training sequences of T tokens: epoch after epoch, each a new permutation of the corpus cut at a new offset."""

    def __init__(self, corpus, T, seed):
        self.corpus, self.T, self.seed = corpus, T, seed
        # One more than T tokens, for the targets, and up to T - 1 given away to the epoch's offset.
        self.counts = np.array([max(0, (len(shard) - T) // T) for shard in corpus.shards])
        self.ends = np.cumsum(self.counts)
        if self.ends[-1] == 0:
            raise UserError(f"{corpus.paths[0].parent}: no training bin holds 2 x context = {2 * T} tokens, "
                            f"the longest has {max(map(len, corpus.shards))}; lower context or add text")
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch):
        rng = np.random.default_rng([self.seed, 0, epoch])
        return int(rng.integers(self.T)), rng.permutation(self.ends[-1])

    def __getitem__(self, indices):
        """LMBatch of the sequences with these numbers (any iterable of ints from 0 on)."""
        rows = []
        for index in indices:
            epoch, i = divmod(int(index), int(self.ends[-1]))
            offset, order = self._epoch(epoch)
            shard = int(np.searchsorted(self.ends, order[i], side="right"))
            start = offset + int(order[i] - (self.ends[shard] - self.counts[shard])) * self.T
            rows.append(self.corpus.shards[shard][start:start + self.T + 1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return LMBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def eval_sequences(corpus, T, n):
    """LMBatch of up to n sequences evenly spread over a validation corpus, always the same; T shrinks to a shorter corpus."""
    longest = max(corpus.shards, key=len)
    T = min(T, len(longest) - 1)
    if T < 1:
        raise UserError(f"{corpus.paths[0]}: {len(longest)} token is too short to evaluate on")
    starts = [(shard, start) for shard in corpus.shards for start in range(0, len(shard) - T, T)]
    picked = [starts[i] for i in np.unique(np.linspace(0, len(starts) - 1, n).round().astype(int))]
    tokens = torch.from_numpy(np.stack([shard[start:start + T + 1] for shard, start in picked]).astype(np.int64))
    return LMBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Episodes:
    """Subset-Masked-LM episodes (Bansal et al. 2020, arXiv 2009.08445): N-way classification of which word was masked.

    N words are drawn, and for each K support and Q query windows that end at the word and share no position; every occurrence of the
    word in its window becomes <|mask|>, also in another case or without the space; a window that still spells it out, in several
    tokens, is passed over. The label is the word's place in the order drawn,
    so it means nothing in the next episode. A decoder reads the left context only, which is why a window ends at the mask.
    """

    def __init__(self, corpus, tokenizer, ways, shots, queries, window, seed):
        self.corpus, self.ways, self.shots, self.queries, self.window, self.seed = corpus, ways, shots, queries, window, seed
        self.word, self.continues, self.spelling = word_tables(tokenizer)
        self.tokenizer, self.mask_id = tokenizer, tokenizer.encode_single_token("<|mask|>")
        # Pieces are cut from the shards at a random offset; a short corpus has few, or one that is shorter.
        self.piece = min(PIECE, max(map(len, corpus.shards)))
        self.counts = np.array([max(1, len(shard) // self.piece - 1) if len(shard) >= self.piece else 0 for shard in corpus.shards])
        self.ends = np.cumsum(self.counts)

    def pieces(self, rng, most):
        """(n, piece) tokens of at most `most` non-overlapping stretches of the corpus."""
        n = int(self.ends[-1])
        offset = rng.integers(self.piece)
        rows = []
        for i in rng.choice(n, min(n, most), replace=False):
            shard = int(np.searchsorted(self.ends, i, side="right"))
            tokens = self.corpus.shards[shard]
            start = min(offset, len(tokens) - self.counts[shard] * self.piece) + (i - (self.ends[shard] - self.counts[shard])) * self.piece
            rows.append(tokens[start:start + self.piece])
        return np.stack(rows)

    def episode(self, index):
        """Windows (N, K + Q, window) of episode `index`, masked; row n holds the windows of label n, its support first."""
        rng = np.random.default_rng([self.seed, 1, index])
        need, found = self.shots + self.queries, 0
        for attempt in range(8):  # where few words repeat, look in more text
            pieces = self.pieces(rng, PIECES << attempt)
            following = np.roll(pieces, -1, axis=1)
            whole = self.word[pieces] & ~self.continues[following]
            whole[:, :self.window - 1] = whole[:, -1] = False  # no room for the window; the next token is not known
            at = np.flatnonzero(whole)
            tokens = pieces.ravel()[at]
            order = np.argsort(tokens, kind="stable")  # by word, then by place
            at, tokens = at[order], tokens[order]
            words, first, count = np.unique(tokens, return_index=True, return_counts=True)
            band = np.flatnonzero((count >= need) & (count <= max(need, MAX_SHARE * pieces.size)))
            windows, spelled = [], set()
            for j in rng.permutation(band):
                places, last = [], -self.window
                for place in at[first[j]:first[j] + count[j]]:
                    if place - last >= self.window:  # windows of a word share no position
                        places.append(place)
                        last = place
                if len(places) < need or self.spelling[words[j]] in spelled:
                    continue
                chosen, spelt = [], self.tokenizer.decode([int(words[j])]).strip().lower()
                for place in rng.permutation(places):
                    ids = pieces.ravel()[place + 1 - self.window:place + 1].astype(np.int64)
                    ids[self.spelling[ids] == self.spelling[words[j]]] = self.mask_id
                    text = self.tokenizer.decode(ids.tolist()).lower()
                    if spelt not in text or not re.search(rf"\b{spelt}\b", text):  # the first test is the fast one
                        chosen.append(ids)
                    if len(chosen) == need:
                        windows.append(chosen)
                        spelled.add(self.spelling[words[j]])
                        break
                if len(windows) == self.ways:
                    return np.array(windows)
            found = max(found, len(windows))
        raise UserError(f"episodes: only {found} words have {need} windows of {self.window} tokens apart in {pieces.size:,} tokens, "
                        f"ways = {self.ways} are needed; lower ways, shots, queries or window, or add text")

    def __getitem__(self, indices):
        """EpisodeBatch of the episodes with these numbers."""
        ids = torch.from_numpy(np.stack([self.episode(int(index)) for index in indices]))  # (E, N, K + Q, window)
        return EpisodeBatch(ids[:, :, :self.shots].contiguous(), ids[:, :, self.shots:].contiguous())


if __name__ == "__main__":
    try:
        prepare(config.load(Prepare, sys.argv[1:], __doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
