"""Token bins: the shards of a corpus, mapped into memory, and how they are written.

    train, validation = open_corpus("data/pydocs")                 # prepare.py wrote it

A bin is 256 int32 (magic 20240520, version 1, token count), then uint16 tokens: the layout of llm.c and
modded-nanogpt. nanoGPT's train.bin and val.bin, which have no header, are read too.
"""
import functools
import hashlib
import mmap
import os
import re
from contextlib import suppress
from pathlib import Path
from shlex import quote

import numpy as np

from nanomaml.config import UserError, require

MAGIC, VERSION, HEADER = 20240520, 1, 256  # HEADER: int32 words before the tokens
MAX_IDS = 2**16  # bins hold uint16
# What is known of a whole corpus comes from so many stretches of so many tokens, evenly spread over it.
STRETCHES, STRETCH = 256, 16384

opened = []  # every Corpus since train.py began to read: a run's digests cover them all

# How other files of tokens start.
FOREIGN = {b"\x93NUMPY": "a NumPy array", b"PK\3\4": "a zip archive, as np.savez and torch.save write",
           (20240801).to_bytes(4, "little"): "a bin of uint32 tokens, as llm.c writes for Llama 3"}
AS_UINT16 = "a bin holds uint16: write ids.astype('<u2').tofile('train.bin') where all are below 65,536"


def open_bin(path):
    """The tokens of one bin, a read-only uint16 memory map. Refuses what is not a whole bin."""
    size, header = os.path.getsize(path), np.fromfile(path, "<i4", 3)
    for signature, kind in FOREIGN.items():
        require(not header.tobytes().startswith(signature), f"{path} is {kind}; {AS_UINT16}")
    has_header = len(header) == 3 and header[0] == MAGIC
    if has_header:
        require(header[1] == VERSION, f"{path}: version {header[1]}, only {VERSION} is known")
        held = (size - 4 * HEADER) / 2
        require(header[2] > 0 and held == header[2],
                f"{path}: the header says {header[2]} tokens, the file holds {held:g} of uint16")
    else:
        found = header[0] if len(header) else "nothing"
        require(path.name in ("train.bin", "val.bin"),  # nanoGPT's names; its bins have no header
                f"{path}: starts with {found}, not with {MAGIC} as a token bin; prepare it with prepare.py")
        require(size > 0 and size % 2 == 0,
                f"{path}: {size} bytes are not a positive number of uint16 tokens")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # with 8 MB read ahead at each place, the first batches took seconds
        mapped.madvise(mmap.MADV_RANDOM)
    tokens = np.frombuffer(mapped, "<u2", offset=4 * HEADER * has_header)
    require(has_header or not is_wider_than_16_bits(tokens),
            f"{path}: every second uint16 is nearly zero, so it holds tokens of 32 or 64 bits; {AS_UINT16}")
    return tokens


def is_wider_than_16_bits(tokens):
    """Are these the halves of larger integers, of which the upper ones are below 4 (ids below 2**18)?"""
    sample = tokens[:2**16]  # with fewer than 16 it may be so by chance
    return len(tokens) % 2 == 0 and len(tokens) >= 16 and sample[1::2].max() < 4 <= sample[::2].max()


def locate(ends, number):
    """(shard, place in it) of the item `number`; shard i holds the items up to ends[i]."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, int(number - (ends[shard - 1] if shard else 0))


class Corpus:
    """The bins of one split of a folder: `shards`, a list of uint16 arrays."""

    def __init__(self, paths):
        self.paths, self.sizes = paths, list(map(os.path.getsize, paths))
        self.shards = list(map(open_bin, paths))
        self.tokens = sum(map(len, self.shards))
        self.vocab_size = MAX_IDS  # until it is known
        opened.append(self)

    def check(self, vocab_size):
        """Refuses a token id outside the vocabulary: here in a sample, later wherever one is read."""
        self.vocab_size = vocab_size
        for _ in self.stretches():
            pass

    def read(self, shard, start, length):
        """`length` tokens of a shard, from `start` on. UserError if the file changed or an id is too big."""
        path = self.paths[shard]
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        # Reading on would end the process with a bus error.
        require(size == self.sizes[shard], f"{path} had {self.sizes[shard]:,} bytes, now it has {size:,}")
        tokens = self.shards[shard][start:start + length]
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{path}: token id {largest} at {start + int(tokens.argmax()):,} is outside the "
                            f"vocabulary of {self.vocab_size}")
        return tokens

    def stretches(self):
        """Yields the tokens of stretches that are evenly spread, at most 4 M; a small corpus comes whole."""
        ends = np.cumsum([-(-len(shard) // STRETCH) for shard in self.shards])
        for number in np.unique(np.linspace(0, ends[-1] - 1, STRETCHES).astype(int)):
            shard, place = locate(ends, number)
            yield self.read(shard, place * STRETCH, STRETCH)

    @functools.cached_property
    def digest(self):
        """A hash of the shards' sizes and of the tokens in `stretches`; its cost is bounded."""
        digest = hashlib.sha256(repr(list(map(len, self.shards))).encode())
        for tokens in self.stretches():
            digest.update(tokens.tobytes())
        return digest.hexdigest()[:16]

    def unigram_entropy(self):
        """Entropy of the token frequencies in nats: the loss of the best model that ignores the context."""
        counts = sum(np.bincount(tokens, minlength=MAX_IDS) for tokens in self.stretches())
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())


def open_corpus(folder):
    """(train Corpus, {domain: validation Corpus}) of a folder of bins.

    `val` or `train` in a file's name, alone or after an underscore, gives the split, val first.
    val_<domain>_000000.bin belongs to a domain of that name, other validation bins to "val".
    """
    folder = Path(folder)
    require(folder.is_dir(), f"no data at {folder}: python prepare.py --out={quote(str(folder))} prepares it")
    paths = sorted(folder.glob("*.bin"))
    # Each map keeps its file open, and often only 1,024 may be: FineWeb-100B has more shards.
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS less than it says
        import resource

        (soft, hard), wanted = resource.getrlimit(resource.RLIMIT_NOFILE), len(paths) + 1024
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
    train, val = [], {}
    for path in paths:
        if match := re.search(r"(?:^|_)val(?:_(?!\d{1,6}\.bin$)(.+?))?(?:_\d{1,6})?\.bin$", path.name):
            val.setdefault(match[1] or "val", []).append(path)
        elif re.search(r"(?:^|_)train(?:_\d+)?\.bin$", path.name):
            train.append(path)
        else:
            raise UserError(f"{folder}: is {path.name} for training or validation?")
    require("loss" not in val, f"{folder}: the domain loss would be logged as val/loss, the mean: rename it")
    missing = "val" if train else "train"
    require(train and val, f"{folder} holds no {missing} bins (NAME_{missing}_000000.bin or {missing}.bin)")
    return Corpus(train), {domain: Corpus(paths) for domain, paths in val.items()}


class ShardWriter:
    """Writes tokens to folder/<name>_000000.bin, _000001.bin, ... of at most `shard_tokens` each.

    total: continue after this many existing tokens; drops what was written after them.
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
        """Puts what was written on disk, as a valid bin."""
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
