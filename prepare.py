"""Text to token bins: reads sources, learns a tokenizer where asked to, writes shards.

    python prepare.py --out=data/mine --source=corpus/             # .txt, .md, .jsonl, .parquet; .gz, .zst
    python prepare.py --out=data/mine --source=a.txt,b.jsonl.gz --val=news.txt,blogs.txt --vocab_size=8192
    python prepare.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu:sample-10BT \\
        --max_tokens=4_000_000_000 --tokenizer=gpt2                # streamed; pip install datasets
    python prepare.py                                              # this installation's own documentation

The folder then holds train_000000.bin, ..., val_000000.bin (or val_<domain>_000000.bin), tokenizer.json and
meta.json. sources.py reads the sources; data.py reads the bins and knows their format. Until all is
written the folder is called OUT.partial; after a break, the same command goes on after its last whole shard.
"""
import codecs
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
import machine
from config import UserError
from data import EMBEDDED, HEADER, MAGIC, MAX_IDS, SPECIAL, VERSION, encoding, load_tokenizer, save_tokenizer
from sources import (
    PIECES,
    SUFFIX,
    dataset_files,
    dataset_identity,
    embedded_documents,
    find_files,
    read_documents,
    split_list,
)

# Pre-tokenizer of the tokenizers trained here: a word takes its leading space along, digits go in threes. The
# marks of a letter (accents, vowel signs, niqqud) belong to its word, and so do data.JOINERS: soft hyphen and
# the joiners that Persian and the scripts of India write within words. An apostrophe ends a word: don't is
# don ' t, l'homme is l ' homme. It may stand for an elision or quote, and no rule tells these apart in all
# languages.
PATTERN = r" ?\p{L}[\p{L}\p{M}\u00ad\u200c\u200d]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NO_TEXT = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}  # codecs of other things
STATE = "state.json"  # in OUT.partial, what is on disk so far
# What a preparation writes, so what it may remove.
OWN = re.compile(r"(train|val(_.+)?)_\d{6,}\.bin|(tokenizer|meta|state)\.json|state\.new")
FILES = "files"  # in the state, {path: bytes} of all that is read: the same settings may find others


@dataclass(frozen=True)
class Config:
    out: str = EMBEDDED  # folder to write; must not exist yet
    source: str = ""  # files, folders, datasets (name:subset:split), comma-separated; empty: documentation
    val: str = ""  # files, comma-separated, each a validation domain; empty: hold out val_share of documents
    val_share: float = 0.02  # documents held out where val is empty: one in round(1 / val_share); 0: none
    tokenizer: str = "train"  # train: learn a byte-pair encoding; gpt2; or a folder with a tokenizer.json
    vocab_size: int = 4096  # ids of a tokenizer trained here, its 2 special tokens included
    max_tokens: int = 0  # stop after exactly this many training tokens; 0: read all
    shard_tokens: int = 100_000_000  # tokens of a shard, 2 bytes each
    text_key: str = "text"  # field of .jsonl, .parquet and datasets: text, or token ids (as input_ids)
    encoding: str = "utf-8"  # of text files that do not start with a byte-order mark: gb18030, cp1252, ...

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
        try:
            "".encode(self.encoding)  # a LookupError where it is none of text, such as hex
            if codecs.lookup(self.encoding).name in NO_TEXT:
                raise LookupError
        except (LookupError, ValueError):
            raise UserError(f"encoding = {self.encoding!r} is no text encoding of Python; utf-8, utf-16-le, "
                            "gb18030, shift_jis, cp1251 and latin-1 are some") from None


# ---- sources ----


def check_sources(cfg):
    """({validation file: domain}, {path: bytes} of all files), for names that can be read, each but once."""
    domains, reads = validation_domains(cfg), {}
    sizes = {name: os.path.getsize(name) for name in domains}
    sources = split_list(cfg.source)
    if cfg.source and not sources:
        raise UserError(f"source = {cfg.source!r} names nothing; without --source, the corpus is this "
                        "installation's documentation")
    for source in sources:
        files, others = find_files(source)
        sizes |= {str(path): path.stat().st_size for path in files or dataset_files(source)}
        if others:
            names = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
            print(f"{source}: {len(files)} files to read, {len(others)} skipped ({names})", file=sys.stderr)
        for name in map(os.path.realpath, files) if files else [dataset_identity(source)]:
            if name in reads:
                raise UserError(f"source: {name} would be read twice, for {reads[name]} and {source}: name "
                                "it once")
            reads[name] = source
    for name in domains:
        if os.path.realpath(name) in reads:
            raise UserError(f"val: {name} is also trained on, source {reads[os.path.realpath(name)]} has it: "
                            "move it elsewhere, or give another file")
    return domains, sizes


def validation_domains(cfg):
    """{file: domain}: each file that `val` names is a validation domain of its own, called after it."""
    domains = {}
    if cfg.val and not split_list(cfg.val):
        raise UserError(f"val = {cfg.val!r} names no file; without it, a share of the documents is held out")
    for name in split_list(cfg.val):
        stem = SUFFIX.sub("", Path(name).name).removesuffix(".val")
        domains[name] = re.sub(r"\W", "-", stem)
    if len(set(domains.values())) < len(domains):
        raise UserError(f"val names two files alike ({', '.join(domains)}): each makes a validation domain "
                        "of its name; rename one")
    for name, domain in domains.items():
        if not os.path.isfile(name):
            raise UserError(f"val: there is no file {name}")
        find_files(name)  # refuses what cannot be read
        if domain == "loss":
            raise UserError(f"val: {name} would be logged as val/loss, which is the mean over domains; "
                            "rename it")
    return domains


def training_documents(cfg, n_ids=0, progress=None):
    documents = embedded_documents() if not cfg.source else itertools.chain.from_iterable(
        read_documents(source, cfg.text_key, cfg.encoding, n_ids, progress)
        for source in split_list(cfg.source))
    return (document for document in documents if len(document))


def held_out_every(cfg):
    """Every so many documents one is held out; 0: none."""
    return round(1 / cfg.val_share) if cfg.val_share and not cfg.val else 0


def pieces(cfg, domains, n_ids, progress):
    """(split, does a document start here, text or token ids) of all documents, validation files first."""
    documents = ((f"val_{domain}", document) for name, domain in domains.items()
                 for document in read_documents(name, cfg.text_key, cfg.encoding, n_ids) if len(document))
    every = held_out_every(cfg)
    training = (("val" if every and i % every == every - 1 else "train", document)
                for i, document in enumerate(training_documents(cfg, n_ids, progress)))
    for split, document in itertools.chain(documents, training):
        if isinstance(document, str):
            for i, piece in enumerate(PIECES.findall(document)):
                yield split, i == 0, piece
        else:  # the end tokens are among the ids
            yield split, False, document


def batches(items, most=4_000_000):
    """Lists of the items up to so many characters: enough for all cores, little in memory."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[2]) + 100  # what an object takes; a source may be made of short lines
        if size > most:
            yield batch
            batch, size = [], 0
    yield batch


# ---- tokenizer ----


def train_tokenizer(documents, vocab_size):
    """A byte-pair encoding of at most `vocab_size` ids, special ones included; a short text gives fewer."""
    import rustbpe

    bpe = rustbpe.Tokenizer()
    pieces = itertools.chain.from_iterable(map(PIECES.findall, documents))
    bpe.train_from_iterator(pieces, vocab_size=vocab_size - len(SPECIAL), pattern=PATTERN, buffer_size=1024)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return encoding(f"bpe{vocab_size}", PATTERN, ranks)


def first_characters(documents, characters):
    for text in documents:
        yield text
        characters -= len(text)
        if characters < 0:
            return


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
    """Writes tokens to folder/<name>_000000.bin, _000001.bin, ... of at most `shard_tokens` each.

    `total`: goes on after so many tokens that are there, and drops what was written after them.
    """

    def __init__(self, folder, name, shard_tokens, total=0):
        self.folder, self.name, self.limit = folder, name, shard_tokens
        self.total, self.shards, self.file = total, -(-total // shard_tokens), None
        if total % shard_tokens:
            self.file, self.room = open(self.path(self.shards - 1), "r+b"), -total % shard_tokens
            self.file.truncate(4 * HEADER + 2 * (total % shard_tokens))
            self.file.seek(0, os.SEEK_END)

    def path(self, shard):
        return self.folder / f"{self.name}_{shard:06d}.bin"

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.path(self.shards), "wb")
                self.file.write(bytes(4 * HEADER))  # filled in by sync(), when the count is known
                self.shards, self.room = self.shards + 1, self.limit
            part, tokens = tokens[:self.room], tokens[self.room:]
            self.file.write(part.tobytes())
            self.total, self.room = self.total + len(part), self.room - len(part)
            if self.room == 0:
                self.close()

    def sync(self):
        """What was written is on disk, and a valid bin."""
        if self.file is not None:
            header = np.zeros(HEADER, "<i4")
            header[:3] = MAGIC, VERSION, self.limit - self.room
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.seek(0, os.SEEK_END)
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file is not None:
            self.sync()
            self.file.close()
            self.file = None

    def abandon(self):
        """After an error. Windows removes no file that is open."""
        with contextlib.suppress(OSError):  # the disk may be full
            if self.file is not None:
                self.file.close()


class Progress:
    """Tokens, rate and time left: a line that a terminal overwrites, in a log file one every half minute."""

    def __init__(self, cfg, size):
        self.cfg, self.size = cfg, size  # bytes of all files; 0: not known
        self.done, self.file = 0, None  # bytes of the files that are read, and the one being read
        self.start = None  # (time, tokens, share of the whole) when the first new text is read
        self.shown = None  # time of the last line
        self.on_terminal = sys.stderr.isatty()

    def is_due(self, now):
        self.shown = now if self.shown is None else self.shown
        if now - self.shown < (0.5 if self.on_terminal else 30):
            return False
        self.shown = now
        return True

    def print(self, line):
        line = f"{self.cfg.out}: {line}"
        print(f"\r\033[K{line} " if self.on_terminal else f"{line}\n", end="", file=sys.stderr, flush=True)

    def pass_over(self, pieces, of):
        """So many pieces of what is on disk have been read again."""
        if self.is_due(time.perf_counter()):
            self.print(f"passing over the text that is on disk, {pieces / of:.0%}")

    def show(self, tokens, training_tokens):
        now, share = time.perf_counter(), 0.0
        if self.cfg.max_tokens:
            share = training_tokens / self.cfg.max_tokens
        elif self.size:
            inside = self.file.tell() if self.file and not self.file.closed else 0
            share = (self.done + inside) / self.size
        if self.start is None:
            self.start, self.shown = (now, tokens, share), now
        if not self.is_due(now):
            return
        seconds, new, advance = now - self.start[0], tokens - self.start[1], share - self.start[2]
        line = f"{tokens / 1e6:,.1f} M tokens, {new / seconds / 1e6:.2f} M tokens/s"
        if advance > 0:
            left = seconds * max(0.0, 1 - share) / advance
            line += f", {left / 60:,.0f} min left" if left > 90 else f", {left:.0f} s left"
        self.print(line)

    def close(self):
        print("\r\033[K" if self.on_terminal else "", end="", file=sys.stderr, flush=True)


def write_splits(cfg, domains, tokenizer, folder, writers, state):
    """Writes the bins of all splits with the ShardWriters of `writers`, from `state` on.

    The state goes to disk with each whole shard: the tokens of the splits, the pieces of text they are of.
    """
    def encode(item):
        _, _, piece = item
        is_text = isinstance(piece, str)
        ids = tokenizer.encode_to_numpy(piece, disallowed_special=()) if is_text else piece
        return ids.astype("<u2")

    def total(split):
        return writers[split].total if split in writers else 0

    def whole_shards():
        return sum(writer.total // writer.limit for writer in writers.values())

    end, is_full = np.array([tokenizer.eot_token], "<u2"), False
    n_ids = 0 if cfg.tokenizer == "train" else tokenizer.n_vocab  # ids of a tokenizer trained here cannot be
    sizes = state["settings"][FILES]
    progress = Progress(cfg, sum(sizes[name] for name in sizes.keys() - domains.keys()))
    rest = pieces(cfg, domains, n_ids, progress)
    for number, _ in enumerate(itertools.islice(rest, state["pieces"])):
        progress.pass_over(number, state["pieces"])
    progress.show(sum(map(total, writers)), total("train"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(rest):
            shards = whole_shards()
            for (split, is_start, _), ids in zip(batch, pool.map(encode, batch)):
                if split not in writers:
                    writers[split] = ShardWriter(folder, split, cfg.shard_tokens)
                ids = np.concatenate([end, ids]) if is_start else ids
                if cfg.max_tokens and split == "train":
                    ids = ids[:cfg.max_tokens - total("train")]
                writers[split].write(ids)
                is_full = cfg.max_tokens and total("train") == cfg.max_tokens
                if is_full:
                    break
            progress.show(sum(map(total, writers)), total("train"))
            if is_full:
                break
            state["pieces"] += len(batch)
            if whole_shards() > shards:
                for writer in writers.values():
                    writer.sync()
                state["tokens"] = {split: writer.total for split, writer in writers.items()}
                save_state(folder, state)
    progress.close()
    for writer in writers.values():
        writer.close()


def check_splits(cfg, domains, writers):
    """Every split has text."""
    if "train" not in writers:
        raise UserError(f"no text in {cfg.source}")
    for name, domain in domains.items():
        if f"val_{domain}" not in writers:
            raise UserError(f"no text for validation in {name}")
    if held_out_every(cfg) and "val" not in writers:
        raise UserError(f"fewer than {held_out_every(cfg)} documents leave none for validation: give "
                        "--val=FILE or a larger --val_share, or separate documents by two blank lines")


# ---- breaks ----


def sync(path):
    """What a file holds, or which files a folder holds, is on disk and outlives a failure of power."""
    if os.path.isdir(path) and os.name == "nt":  # Windows opens no folders
        return
    number = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save_state(folder, state):
    sync(folder)  # the bins and the tokenizer.json that the state counts on
    (folder / "state.new").write_text(json.dumps(state))
    sync(folder / "state.new")
    (folder / "state.new").replace(folder / STATE)
    sync(folder)


def shards(tokens, limit):
    """Yields (name of a bin, its tokens) for {split: tokens}; lazily, as a damaged state may say billions."""
    for split, total in tokens.items():
        for start in range(0, total, limit):
            yield f"{split}_{start // limit:06d}.bin", min(limit, total - start)


def require_same_files(partial, before, now):
    """Of two {path: bytes}. Another file, and the pieces that are passed over would not be those written."""
    before = before if isinstance(before, dict) else {}
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            had, has = (f"{sizes[path]} bytes" if path in sizes else "not there" for sizes in (before, now))
            raise UserError(f"{partial} was begun with other files: {path} was {had}, now it is {has}: put "
                            "it back as it was, or remove that folder to start anew")


def load_state(partial, settings):
    """What a preparation that was broken off has written, or where there is nothing, the state of a new one.

    Removes what was written after that state, and refuses a folder where anything else has been put.
    """
    paths = sorted(partial.iterdir())
    for path in paths:
        if not OWN.fullmatch(path.name) or not path.is_file():
            raise UserError(f"{partial} holds {path.name}, which no preparation writes: move that elsewhere, "
                            "or give another --out=")
    if not (partial / STATE).exists():
        if paths:
            print(f"{partial}: left by a preparation that was killed before its first whole shard; starting "
                  "anew", file=sys.stderr)
        for path in paths:
            path.unlink()
        return {"settings": settings, "pieces": 0, "tokens": {}}
    sizes = {path.name: path.stat().st_size for path in paths}
    try:
        state = json.loads((partial / STATE).read_text(encoding="utf-8"))
        begun, tokens = state["settings"], state["tokens"]
        limit = begun["shard_tokens"]
        numbers = limit, state["pieces"], len(tokens), *tokens.values()
        is_right = all(type(number) is int and number > 0 for number in numbers) and all(
            sizes.get(name, 0) >= 4 * HEADER + 2 * count for name, count in shards(tokens, limit))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_right = False
    if not is_right or "tokenizer.json" not in sizes:
        what = "has no tokenizer.json" if is_right else f"has a {STATE} that does not fit its bins"
        raise UserError(f"{partial} {what}: it cannot be taken up, remove that folder to start anew")
    for key, value in settings.items():
        if key == FILES:
            require_same_files(partial, begun.get(key), value)
        elif begun.get(key) != value:
            raise UserError(f"{partial} was begun with {key} = {begun.get(key)!r}, now it is {value!r}: go "
                            "on with the same, or remove that folder to start anew")
    for name in sizes.keys() - {STATE, "tokenizer.json"} - {name for name, _ in shards(tokens, limit)}:
        (partial / name).unlink()  # written after that state
    print(f"{partial}: going on after {sum(tokens.values()):,} tokens; their text is passed over",
          file=sys.stderr, flush=True)
    return state


def remove(partial):
    """Removes the folder, but for what no preparation writes."""
    for path in partial.iterdir():
        if OWN.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # something came in
        partial.rmdir()


# ---- the whole ----


def fill(partial, cfg, domains, settings):
    """Writes tokenizer, bins and meta.json, and returns that. Where it fails, only whole shards stay."""
    partial.mkdir(exist_ok=True)
    state, writers = load_state(partial, settings), {}
    try:
        for split, total in state["tokens"].items():
            writers[split] = ShardWriter(partial, split, cfg.shard_tokens, total)
        if writers:
            tokenizer = load_tokenizer(str(partial))
        else:
            tokenizer = make_tokenizer(cfg)
            save_tokenizer(tokenizer, partial)
            sync(partial / "tokenizer.json")
        write_splits(cfg, domains, tokenizer, partial, writers, state)
        check_splits(cfg, domains, writers)
        counts = {split: writer.total for split, writer in sorted(writers.items())}
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "source": cfg.source or "embedded", "tokens": counts}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        sync(partial / "meta.json")
        sync(partial)
        return meta
    except BaseException as error:
        for writer in writers.values():
            writer.abandon()
        if (partial / STATE).exists():
            print(f"{partial} keeps the shards that are whole: the same command on the same files goes on; "
                  "where a file has to be changed, remove that folder to start anew", file=sys.stderr)
        else:
            remove(partial)
        if type(error).__name__ == "PanicException":  # of the Rust libraries; it is no Exception
            raise UserError(f"the tokenizer failed on the text: {str(error).splitlines()[0]}") from None
        if isinstance(error.__cause__, KeyboardInterrupt):  # they let it surface as a SystemError
            raise KeyboardInterrupt from None
        raise


def prepare(cfg):
    """Writes cfg.out. The folder appears whole or not at all; the same input gives the same bytes.

    A second process that is to write the same folder waits, and takes what the first has written.
    """
    out, start = Path(cfg.out), time.perf_counter()
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it, or write elsewhere with --out=")
    domains, sizes = check_sources(cfg)
    settings = dataclasses.asdict(cfg) | {FILES: sizes}
    del settings["out"]  # it may be written in several ways
    # The lock lies beside the folder, so that no open file is in it when it is renamed: Windows refuses that.
    partial, lock = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.lock")
    meta = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with machine.only_writer(lock, out, wait=True):
            if not out.exists():
                meta = fill(partial, cfg, domains, settings)
                partial.rename(out)
                sync(out.parent)
                (out / STATE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows: another process has it open
            lock.unlink()  # only now: whoever still waits for it finds the folder
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write {out}: {error.strerror or error}{where}") from None
    if meta is None:
        print(f"{out}: written by another process meanwhile", flush=True)
        return
    listed = ", ".join(f"{total:,} {split}" for split, total in meta["tokens"].items())
    seconds = time.perf_counter() - start
    print(f"{out}: {listed} tokens, tokenizer {meta['tokenizer']}, {seconds:.0f} s", flush=True)


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill ends it as Ctrl-C does
    prepare(config.load(Config, argv, __doc__))


if __name__ == "__main__":
    config.run(main)
