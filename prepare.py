"""Text to token bins: reads sources, learns a tokenizer where asked to, writes shards.

    python prepare.py --out=data/mine --source=corpus/             # .txt, .md, .jsonl, .parquet; .gz, .zst
    python prepare.py --out=data/mine --source=a.txt,b.jsonl.gz --val=news.txt,blogs.txt --vocab_size=8192
    python prepare.py --out=data/fineweb --source=HuggingFaceFW/fineweb-edu:sample-10BT \\
        --max_tokens=3_200_000_000 --tokenizer=gpt2                # streamed; pip install datasets
    python prepare.py                                              # this installation's own documentation

The folder then holds train_000000.bin, ..., val_000000.bin (or val_<domain>_000000.bin), tokenizer.json and
meta.json. nanomaml/sources.py reads the sources, nanomaml/bins.py defines the format of bins. Until all is
written the folder is called OUT.partial; after a break, the same command goes on after its last whole shard.
"""
import itertools
import json
import os
import re
import signal
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from data import EMBEDDED
from nanomaml import config, files, ranks, sources
from nanomaml import tokenizer as tokenizers
from nanomaml.bins import MAX_IDS, ShardWriter
from nanomaml.config import Natural, TextEncoding, UserError, one_line, require
from nanomaml.console import clock
from nanomaml.tokenizer import SPECIAL, encoding, load_tokenizer

# Pre-tokenizer of the tokenizers trained here: a word includes its leading space, digits come in threes. The
# marks of a letter (accents, vowel signs, niqqud) belong to its word, as do words.JOINERS: soft hyphen and
# joiners that Persian and the scripts of India write within words. An apostrophe ends a word (don ' t), as it
# may stand for an elision or a quote, and no rule tells these apart in all languages.
PATTERN = r" ?\p{L}[\p{L}\p{M}\u00ad\u200c\u200d]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TOKENIZER_CHARACTERS = 2e8  # enough to settle the merges of a small vocabulary
STATE = "state.json"  # in OUT.partial: what is on disk so far
# What a preparation writes, and may therefore remove.
OWN = re.compile(r"(train|val(_.+)?)_\d{6,}\.bin|(tokenizer|meta|state)\.json(\.partial)?")

HeldOut = Annotated[float, "in [0, 0.5]", lambda x: 0 <= x <= 0.5]
VocabSize = Annotated[int, f"in {256 + len(SPECIAL)} (bytes and special tokens) to {MAX_IDS} (uint16)",
                      lambda x: 256 + len(SPECIAL) <= x <= MAX_IDS]
ShardTokens = Annotated[int, "in 1 to 2**31 - 1, as the header counts in int32", lambda x: 1 <= x < 2**31]


@dataclass(frozen=True)
class Config(config.Settings):
    out: str = EMBEDDED  # folder to write; must not exist yet
    source: str = ""  # files, folders, datasets (name:subset:split), comma-separated; empty: documentation
    val: str = ""  # files, comma-separated, each a validation domain; empty: hold out val_share of documents
    val_share: HeldOut = 0.02  # documents held out if val is empty: one in round(1 / val_share); 0: none
    tokenizer: str = "train"  # train: learn one; gpt2; a folder with a tokenizer.json; USER/NAME on the hub
    vocab_size: VocabSize = 4096  # ids of a tokenizer trained here, including 2 special tokens
    max_tokens: Natural = 0  # stop after exactly this many training tokens; 0: read all
    shard_tokens: ShardTokens = 100_000_000  # tokens per shard, 2 bytes each
    text_key: str = "text"  # field of .jsonl, .parquet and datasets: text, or token ids (as input_ids)
    encoding: TextEncoding = "utf-8"  # of text files that do not start with a byte-order mark: gb18030, ...


def check_sources(cfg):
    """({validation file: domain named after it}, {path: bytes} of all files); refuses what cannot be read."""
    domains = {name: re.sub(r"\W", "-", sources.SUFFIX.sub("", Path(name).name).removesuffix(".val"))
               for name in sources.split_list(cfg.val)}
    require(domains or not cfg.val, f"val = {cfg.val!r} names no file")
    require(len(set(domains.values())) == len(domains), f"val: files of one domain: {', '.join(domains)}")
    names, sizes, read_for = sources.split_list(cfg.source), {}, {}
    require(names or not cfg.source, f"source = {cfg.source!r} names nothing")
    for source in names:
        paths, others = sources.find_files(source)
        sizes |= {str(path): path.stat().st_size for path in paths}
        kinds = defaultdict(list)
        for path in paths if os.path.isdir(source) else []:
            kinds[sources.SUFFIX.search(path.name)[0].lower()].append(path.name)
        for kind, found in (kinds | {"skipped": [path.name for path in others]} if kinds else {}).items():
            if found:
                print(one_line(f"{source}: {len(found)} {kind}: {', '.join(found)}", 110), file=sys.stderr)
        for name in map(os.path.realpath, paths) if paths else [":".join(sources.hub_dataset(source))]:
            other = read_for.get(name)
            require(not other, f"source: {name} would be read twice, for {other} and {source}: name it once")
            read_for[name] = source
    for name, domain in domains.items():
        require(os.path.isfile(name), f"val: there is no file {name}")
        sources.find_files(name)  # refuses what cannot be read
        require(domain != "loss", f"val: {name} would be logged as val/loss, the mean of domains: rename it")
        source = read_for.get(os.path.realpath(name))
        require(not source, f"val: {name} is also trained on, in source {source}: give another file")
    return domains, sizes | {name: os.path.getsize(name) for name in domains}


def read_sources(cfg, names, *args, characters=float("inf"), empty=lambda: None):
    """The documents of the named sources, or only those that begin within so many characters.

    empty: called for each document without text, which is skipped.
    """
    documents = (document for source in names
                 for document in sources.read_documents(source, cfg.text_key, cfg.encoding, *args))
    for document in documents if names else sources.embedded_documents():
        if len(document) == 0:
            empty()
            continue
        yield document
        characters -= len(document)
        if characters < 0:
            return


def held_out_every(cfg):
    """One in this many documents is held out; 0: none."""
    return round(1 / cfg.val_share) if cfg.val_share and not cfg.val else 0


def pieces(cfg, domains, n_ids, progress, is_whole):
    """(split, does a document start here, text or token ids) of all documents, validation files first.

    is_whole: texts are not cut, since the tokenizer adds a blank at the start of each.
    """
    every, names = held_out_every(cfg), sources.split_list(cfg.source)
    validation = ((f"val_{domain}", document) for name, domain in domains.items()
                  for document in read_sources(cfg, [name], n_ids, empty=progress.empty))
    documents = read_sources(cfg, names, n_ids, progress.opened, empty=progress.empty)
    training = (("val" if every and i % every == every - 1 else "train", document)
                for i, document in enumerate(documents))
    for split, document in itertools.chain(validation, training):
        is_text = isinstance(document, str)  # otherwise token ids, which include end tokens
        parts = sources.PIECES.findall(document) if is_text and not is_whole else [document]
        for i, piece in enumerate(parts):
            yield split, is_text and i == 0, piece


def batches(items, characters=4_000_000):
    """Lists of the items, of about so many characters: enough for all cores, little in memory."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[2]) + 100  # the overhead of an object; a source may consist of short lines
        if size > characters:
            yield batch
            batch, size = [], 0
    yield batch


def train_tokenizer(documents, vocab_size):
    """A byte-pair encoding of at most `vocab_size` ids, special ones included; a short text gives fewer."""
    import rustbpe

    bpe = rustbpe.Tokenizer()
    pieces = itertools.chain.from_iterable(map(sources.PIECES.findall, documents))
    bpe.train_from_iterator(pieces, vocab_size=vocab_size - len(SPECIAL), pattern=PATTERN, buffer_size=1024)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return encoding(f"bpe{vocab_size}", PATTERN, ranks)


def make_tokenizer(cfg):
    """The tokenizer that `cfg.tokenizer` names, or one trained on the start of the corpus."""
    if cfg.tokenizer == "train":
        documents = read_sources(cfg, sources.split_list(cfg.source), characters=TOKENIZER_CHARACTERS)
        return train_tokenizer(documents, cfg.vocab_size)
    source = cfg.tokenizer
    if source != "gpt2":
        source = source if Path(source).exists() else tokenizers.download(source)
        require(Path(source).is_file() or Path(source, "tokenizer.json").exists(),
                f"tokenizer = {cfg.tokenizer!r}: there is no tokenizer.json in {source}; AutoTokenizer's "
                "save_pretrained writes one")
    tokenizer = load_tokenizer(source)
    require(tokenizer.n_vocab <= MAX_IDS,
            f"tokenizer = {cfg.tokenizer!r} has {tokenizer.n_vocab} ids; bins are uint16 and hold {MAX_IDS}")
    return tokenizer


def own_files(folder):
    """{name: bytes} of the files in a folder that a preparation wrote."""
    return {path.name: path.stat().st_size for path in folder.iterdir()
            if OWN.fullmatch(path.name) and path.is_file()}


def save_state(writers, state):
    """Saves {settings, pieces of text that are done, tokens of splits, bytes of files}, with a checksum."""
    for writer in writers.values():
        writer.sync()
    folder = writers["train"].folder
    state["tokens"] = {split: writer.total for split, writer in writers.items()}
    state["files"] = {name: size for name, size in own_files(folder).items() if STATE not in name}
    text = json.dumps(state)
    files.replace(folder / STATE, f"{zlib.crc32(text.encode())} {text}")


def load_state(partial, settings):
    """The state that an interrupted preparation saved, or a new one. Removes what was written after it."""
    own, state = own_files(partial), {"settings": settings, "pieces": 0, "tokens": {}, "files": {}}
    foreign = ", ".join(sorted({path.name for path in partial.iterdir()} - own.keys()))
    require(not foreign, f"{partial} holds {foreign}, which no preparation writes: move it, or change --out")
    if (partial / STATE).exists():
        checksum, _, text = (partial / STATE).read_text(errors="replace").partition(" ")
        require(checksum == str(zlib.crc32(text.encode())), f"{partial} has a damaged {STATE}: remove it all")
        state = json.loads(text)
        begun = state["settings"]
        changed = ", ".join(key for key in begun | settings if begun.get(key) != settings.get(key))
        require(not changed, f"{partial} was begun with another {changed}: give the same, or remove it")
        lost = ", ".join(name for name, size in state["files"].items() if own.get(name, 0) < size)
        require(not lost, f"{partial} lacks a part of {lost}: remove that folder to start again")
        print(f"{partial}: continuing after {sum(state['tokens'].values()):,} tokens", file=sys.stderr)
    for name in own.keys() - state["files"].keys() - {STATE}:  # written after that state
        (partial / name).unlink()
    return state


class Progress:
    """A line on stderr every ten seconds: tokens, rate and time left. Counts documents without text."""

    def __init__(self, cfg, size):
        self.cfg, self.size = cfg, size  # bytes of all files; 0: not known
        self.before, self.file, self.n_empty = 0, None, 0  # bytes of the files before the one being read
        self.start, self.shown = None, time.perf_counter()  # start: (time, tokens, share) before new text

    def empty(self):
        self.n_empty += 1

    def opened(self, file):
        self.before += os.path.getsize(self.file.name) if self.file else 0
        self.file = file

    def show(self, writers):
        tokens, share = sum(writer.total for writer in writers.values()), 0.0
        if self.cfg.max_tokens:
            share = writers["train"].total / self.cfg.max_tokens
        elif self.file is not None and not self.file.closed:
            share = (self.before + self.file.tell()) / self.size
        now = time.perf_counter(), tokens, share
        self.start = self.start or now
        seconds, new, advance = np.subtract(now, self.start)
        left = f", {clock(seconds * (1 - share) / advance)} left" if advance > 0 else ""
        self.line(f"{tokens / 1e6:,.1f} M tokens, {new / max(seconds, 1e-9) / 1e6:.2f} M tokens/s{left}")

    def line(self, text):
        if time.perf_counter() - self.shown >= 10:
            self.shown = time.perf_counter()
            print(f"{self.cfg.out}: {text}", file=sys.stderr, flush=True)


def write_splits(cfg, domains, tokenizer, writers, state, sizes):
    """Writes the bins of all splits with {split: ShardWriter}, from `state` on; saves that once a shard."""
    end, limit = np.array([tokenizer.eot_token], "<u2"), cfg.max_tokens or 2**63
    n_ids = 0 if cfg.tokenizer == "train" else tokenizer.n_vocab  # no source has ids of a new tokenizer
    progress = Progress(cfg, sum(sizes[name] for name in sizes.keys() - domains.keys()))
    rest = pieces(cfg, domains, n_ids, progress, isinstance(tokenizer, tokenizers.HuggingFaceTokenizer))

    def encode(item):
        _, is_start, piece = item
        ids = tokenizer.encode_to_numpy(piece, disallowed_special=()) if isinstance(piece, str) else piece
        return np.concatenate([end[:is_start], ids.astype("<u2")])

    for number, _ in enumerate(itertools.islice(rest, state["pieces"])):
        progress.line(f"skipping the text that is already on disk, {number / state['pieces']:.0%}")
    progress.show(writers)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(rest):
            for (split, *_), ids in zip(batch, pool.map(encode, batch)):
                if writers["train"].total < limit:
                    writers[split].write(ids[:limit - writers["train"].total] if split == "train" else ids)
            progress.show(writers)
            if writers["train"].total == limit:
                break
            state["pieces"] += len(batch)
            total = sum(writer.total for writer in writers.values())
            if total - sum(state["tokens"].values()) >= cfg.shard_tokens:
                save_state(writers, state)
    for writer in writers.values():
        writer.close()
    if progress.n_empty:
        print(f"{cfg.out}: documents without text, passed over: {progress.n_empty:,}", file=sys.stderr)


def fill(partial, cfg, domains, sizes):
    """Writes tokenizer, bins and meta.json, and returns its content. On failure only whole shards stay."""
    partial.mkdir(exist_ok=True)
    settings = asdict(cfg) | {"out": None} | sizes  # out may be written in several ways
    state, every = load_state(partial, settings), held_out_every(cfg)
    splits = ["train", *(["val"] if every else (f"val_{domain}" for domain in domains.values()))]
    writers = {split: ShardWriter(partial, split, cfg.shard_tokens, state["tokens"].get(split, 0))
               for split in splits}
    try:
        tokenizer = load_tokenizer(partial) if state["pieces"] else make_tokenizer(cfg)
        if not state["pieces"]:
            tokenizers.save_tokenizer(tokenizer, partial)
        write_splits(cfg, domains, tokenizer, writers, state, sizes)
        few = ": give --val or a larger --val_share, since one document in "
        few += f"{every} is held out, and there are fewer" if writers["train"].total != cfg.max_tokens else (
            f"{every} is held out, and max_tokens = {cfg.max_tokens} is reached before that")
        for split, writer in writers.items():
            require(writer.total, f"no text for {split}{few if split == 'val' else ''}")
        counts = {split: writer.total for split, writer in sorted(writers.items())}
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "source": cfg.source or "embedded", "tokens": counts}
        files.replace(partial / "meta.json", json.dumps(meta, indent=1))
        return meta
    except BaseException as error:
        for writer in writers.values():
            with suppress(OSError):  # the disk may be full; but Windows removes no file that is open
                writer.close()
        if (partial / STATE).exists():
            print(f"{partial} keeps whole shards: the same command continues after them", file=sys.stderr)
        else:
            for name in own_files(partial):
                (partial / name).unlink()
            with suppress(OSError):  # if another file came in
                partial.rmdir()
        if isinstance(error.__cause__, KeyboardInterrupt):  # libraries turn it into a SystemError
            raise KeyboardInterrupt from None
        raise


def prepare(cfg):
    """Writes cfg.out. The folder appears whole or not at all; the same input gives the same bytes.

    A second process that is to write the same folder waits, and uses what the first has written.
    """
    out, start = Path(cfg.out), time.perf_counter()
    require(not os.path.lexists(out), f"{out} exists already: remove it, or write elsewhere with --out=")
    domains, sizes = check_sources(cfg)
    # The lock lies beside the folder, not in it: Windows renames no folder in which a file is open.
    partial, lock = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.lock")
    done, is_held = "written by another process meanwhile", False
    try:
        with ranks.only_writer(lock, out, wait=True):
            is_held = True
            if not out.exists():
                meta = fill(partial, cfg, domains, sizes)
                partial.rename(out)
                (out / STATE).unlink(missing_ok=True)
                done = ", ".join(f"{total:,} {split}" for split, total in meta["tokens"].items())
                done += f" tokens, tokenizer {meta['tokenizer']}, {time.perf_counter() - start:.0f} s"
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        if is_held:
            with suppress(OSError):  # Windows: another process has it open
                lock.unlink()  # only now: whoever still waits for it finds the folder
    print(f"{out}: {done}", flush=True)


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill ends it as Ctrl-C does
    prepare(config.load(Config, argv, __doc__))


if __name__ == "__main__":
    config.run(main)
