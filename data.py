"""Token bins to batches: tokenizers, the bin reader, next-token sequences and Subset-Masked-LM episodes.

    train, validation = data.open_corpus("data/pydocs")            # prepare.py wrote it
    batch = data.Sequences(train, 128, seed=1)[range(8)]           # LMBatch of sequences 0 to 7

A bin is 256 int32 (magic 20240520, version 1, token count), then uint16 tokens: the layout of llm.c and
modded-nanogpt. nanoGPT's train.bin and val.bin, which have no header, are read too. Every batch is a pure
function of (seed, index).
"""
import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import mmap
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import logs
from config import UserError

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

MAGIC, VERSION, HEADER = 20240520, 1, 256  # HEADER: int32 words before the tokens
MAX_IDS = 2**16  # bins hold uint16
EMBEDDED = "data/pydocs"  # train.py prepares this folder by itself where it is missing
SPECIAL = ("<|endoftext|>", "<|mask|>")

# Where an episode looks for its words: PIECES stretches of PIECE tokens at random places, sorted by token.
PIECES, PIECE = 32, 4096

# What is known of a whole corpus is known from so many stretches of so many tokens, evenly spread over it.
STRETCHES, STRETCH = 256, 16384

JOINERS = "\u00ad\u200c\u200d"  # soft hyphen, zero-width non-joiner and joiner: they stand within words

# How files of tokens start that are no bins.
FOREIGN = {b"\x93NUMPY": "a NumPy array", b"PK\3\4": "a zip archive, as np.savez and torch.save write",
           (20240801).to_bytes(4, "little"): "a bin of uint32 tokens, as llm.c writes for Llama 3"}
AS_UINT16 = "a bin holds uint16: write ids.astype('<u2').tofile('train.bin') where all are below 65,536"


# ---- tokenizer ----


def encoding(name, pattern, ranks):
    """The tiktoken Encoding of these merges, with the special tokens behind them."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def hugging_face_tokenizer(content):
    """The tokenizers.Tokenizer of the content of a Hugging Face tokenizer.json."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("an imported model's tokenizer needs a package: pip install tokenizers") from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # it raises no class of its own
        raise UserError(f"tokenizers {tokenizers.__version__} cannot read the model's tokenizer.json "
                        f"({error}): pip install --upgrade tokenizers, or download it again") from None


class HuggingFaceTokenizer:
    """The tokenizer of an imported model (export.py), with the methods of a tiktoken Encoding that reading
    and writing text take. Those of episodes are refused: it has no <|mask|>, and its tokens are no bytes.
    """

    name = "huggingface"

    def __init__(self, spec):
        self.spec, self.eot_token = spec, spec["ids"]["eos_token_id"]
        self.special, self.ordinary = (hugging_face_tokenizer(spec["tokenizer"]) for _ in range(2))
        self.ordinary.encode_special_tokens = True  # as the text that they are
        self.n_vocab = 1 + max(self.special.get_vocab().values(), default=-1)  # ids may have gaps

    def encode(self, text, allowed_special="all"):
        """The ids of a text that begins here: special tokens read as such, those of a beginning added."""
        return self.special.encode(text).ids

    def encode_ordinary(self, text):
        return self.ordinary.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), np.uint32)

    def decode(self, ids):
        return self.special.decode(ids, skip_special_tokens=False)

    def token_byte_values(self):
        raise UserError("episodes need a tokenizer of prepare.py, this is an imported model's: set "
                        "meta_share = 0 and eval_episodes = 0")


class NoDownload(UserError):
    """tiktoken has no GPT-2 tokenizer at hand."""


def tokenizer_spec(source):
    """The content of a tokenizer.json: {"name": "gpt2"}, or name, pattern and tokens. `source` as below.

    Of an imported model: name, the Hugging Face "tokenizer" and its "config", and "ids" of special tokens.
    """
    if source == "gpt2":
        return {"name": source}
    path = Path(source)
    if not path.exists():
        raise UserError(f"no tokenizer at {source}: give 'gpt2' or a folder that holds a tokenizer.json")
    path = path if path.is_file() else path / "tokenizer.json"
    if not path.exists():
        if path.with_name("meta.pkl").exists():
            raise UserError(f"{source} holds character-level tokens of nanoGPT (meta.pkl), which have no "
                            "words: prepare their text with python prepare.py --source=...")
        return {"name": "gpt2"}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["name"] == HuggingFaceTokenizer.name:
            spec["tokenizer"], spec["config"], spec["ids"]["eos_token_id"]
        elif spec["name"] != "gpt2":
            tokens = [base64.b64decode(token, validate=True) for token in spec["tokens"]]
            if not {bytes([i]) for i in range(256)} <= set(tokens) or len(set(tokens)) < len(tokens):
                raise ValueError("its tokens do not hold every byte, or one of them twice")
            if not isinstance(spec["name"], str):
                raise TypeError("its name is no text")
            encoding(spec["name"], spec["pattern"], {token: rank for rank, token in enumerate(tokens)})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} is not a tokenizer that prepare.py wrote ({reason}): copy it again, or "
                        "remove it where the bins hold GPT-2 tokens") from None
    return spec


def load_tokenizer(source):
    """A tiktoken Encoding with <|endoftext|> and <|mask|>: "gpt2", or that of a folder of bins or of a run.

    A folder without a tokenizer.json (bins from elsewhere) is taken to hold GPT-2 tokens. Of an imported
    model it is a HuggingFaceTokenizer.
    """
    spec = tokenizer_spec(source)
    if spec["name"] == HuggingFaceTokenizer.name:
        return HuggingFaceTokenizer(spec)
    if spec["name"] == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets the HTTP client's own errors through
            reason = type(error).__name__
            raise NoDownload(f"tiktoken cannot download its gpt2 tokenizer ({reason}): run once with a "
                             "network, or set TIKTOKEN_CACHE_DIR to a folder copied from a machine that has "
                             "it") from None
        pattern, ranks = gpt2._pat_str, gpt2._mergeable_ranks
    else:
        tokens = [base64.b64decode(token) for token in spec["tokens"]]
        pattern, ranks = spec["pattern"], {token: rank for rank, token in enumerate(tokens)}
    return encoding(spec["name"], pattern, ranks)


def save_tokenizer(tokenizer, folder):
    """Writes folder/tokenizer.json, which `load_tokenizer(folder)` reads; for gpt2 the name is enough."""
    spec = {"name": tokenizer.name}
    if tokenizer.name == HuggingFaceTokenizer.name:
        spec = tokenizer.spec
    elif tokenizer.name != "gpt2":
        by_rank = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
        tokens = [base64.b64encode(token).decode() for token in by_rank]
        spec |= {"pattern": tokenizer._pat_str, "tokens": tokens}
    logs.replace(Path(folder, "tokenizer.json"), json.dumps(spec).encode())


# ---- words ----


def fold(text):
    """The same for all ways to write a word: in any case, accents as part of the letter or as marks."""
    return unicodedata.normalize("NFC", text).lower()


def in_word(character):
    """Is it a letter, a mark on one (Unicode's L and M) or a joiner? An apostrophe or digit ends a word."""
    return unicodedata.category(character)[0] in "LM" or character in JOINERS


def is_letter(character):
    return unicodedata.category(character)[0] == "L"


def is_word(text):
    return text != "" and is_letter(text[0]) and all(map(in_word, text))


def spells(text, word):
    """Does the text hold the word on its own, not only as part of a longer one?"""
    places = (match.span() for match in re.finditer(re.escape(word), text))
    return any(not any(map(in_word, text[max(0, start - 1):start] + text[end:end + 1]))
               for start, end in places)


def is_held_out(spelling):
    """Whether a word is never a class in training: a tenth of all, by a hash of the lower-case spelling."""
    return zlib.crc32(spelling.lower().encode()) % 10 == 0


class WordTables(NamedTuple):
    """What episodes need to know of each token, arrays (n_vocab,)."""

    word: np.ndarray  # may it be a class
    continues: np.ndarray  # would it continue a word before it
    spelling: np.ndarray  # a number that tokens share which spell one word, in any case, with a space or not
    held_out: np.ndarray  # is its word kept for evaluation


@functools.lru_cache(maxsize=2)
def word_tables(tokenizer, word_targets="spaced"):
    """word_targets "spaced": a class is a space and at least two letters, and nothing continues the word.

    "any": it is any letters, and only a mark on the last of them would continue them.
    """
    n = tokenizer.n_vocab
    tables = WordTables(np.zeros(n, bool), np.zeros(n, bool), np.arange(n), np.zeros(n, bool))
    numbers = {}
    for token in tokenizer.token_byte_values():
        text = token.decode(errors="replace")
        i, word = tokenizer.encode_single_token(token), fold(text.strip())
        if word_targets == "spaced":
            tables.word[i] = text[0] == " " and is_word(text[1:]) and len(word) > 1
            tables.continues[i] = in_word(text[0])
        else:
            tables.word[i] = is_word(text.removeprefix(" "))
            tables.continues[i] = in_word(text[0]) and not is_letter(text[0])
        tables.continues[i] |= text[0] == "\ufffd"  # a part of a character, maybe of a letter or a mark
        if is_word(word):
            tables.spelling[i] = numbers.setdefault(word, i)
            tables.held_out[i] = is_held_out(word)
    return tables


def lack_of_words(tokenizer, word_targets, tokens, words, ways, most):
    """Why a text has too few classes for `ways`, with what to do, for the end of an error's line.

    tokens: of the text; words: those of them that may be classes; most: how often a class may come. ""
    where the text has words enough.
    """
    text, is_gpt2 = tokenizer.decode(tokens.ravel()[:2**16].tolist()), tokenizer.name == "gpt2"
    if word_targets == "spaced" and sum(map(in_word, text)) > 16 * text.count(" "):
        return ("it has no words between spaces, as Chinese, Japanese or Thai; set word_targets = any, which "
                "takes single tokens of letters" + is_gpt2 * ", and prepare it with --tokenizer=train")
    counts = np.unique(words, return_counts=True)[1]
    if len(counts) < ways:
        if is_gpt2:
            return (f"only {len(counts)} different words are single tokens of GPT-2's tokenizer there; "
                    "prepare it with --tokenizer=train, which learns its words")
        return (f"only {len(counts)} different words are single tokens there; lower ways, give more text or "
                "prepare it with a larger vocab_size")
    too_frequent = int((counts > most).sum())
    if 2 * too_frequent > len(counts):
        return (f"{too_frequent} of its {len(counts)} words are too frequent, above {most} times; raise "
                "max_word_share, or give text of more different words")
    return ""


# ---- reading bins ----


def open_bin(path):
    """The tokens of one bin, a read-only uint16 memory map. Refuses what is no bin, or not whole."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(12)
    for signature, kind in FOREIGN.items():
        if start.startswith(signature):
            raise UserError(f"{path} is {kind}; {AS_UINT16}")
    header = np.frombuffer(start[:len(start) // 4 * 4], "<i4")
    if len(header) < 3 or header[0] != MAGIC:
        if path.name not in ("train.bin", "val.bin"):  # nanoGPT's names; its bins have no header
            start = header[0] if len(header) else "nothing"
            raise UserError(f"{path}: starts with {start}, a token bin with {MAGIC}; prepare it with "
                            "prepare.py")
        if size == 0 or size % 2:
            raise UserError(f"{path}: {size} bytes are not a positive number of uint16 tokens")
        tokens = map_tokens(path, 0)
        if is_wider_than_16_bits(tokens):
            raise UserError(f"{path}: every second uint16 is zero or nearly, so it holds tokens of 32 or 64 "
                            f"bits; {AS_UINT16}")
        return tokens
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]}, only {VERSION} is known")
    if header[2] > 0 and size == 4 * HEADER + 4 * int(header[2]):
        raise UserError(f"{path}: the header says {header[2]} tokens, the file holds 4 bytes of each; "
                        "a bin holds uint16: prepare it again")
    if header[2] < 1 or size != 4 * HEADER + 2 * int(header[2]):
        tokens = (size - 4 * HEADER) / 2
        raise UserError(f"{path}: the header says {header[2]} tokens, the file holds {tokens:g}; "
                        "copy or prepare it again")
    return map_tokens(path, 4 * HEADER)


# Each map keeps its file open, unless told not to, which Python 3.13 brought for Unix.
MAP_OPTIONS = {"trackfd": False} if resource and sys.version_info >= (3, 13) else {}


def allow_open_files(n):
    """Raises this process' limit of open files, often 1,024 where 2**20 are allowed, to hold n maps more."""
    if resource and not MAP_OPTIONS:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = n + 1024 if hard == resource.RLIM_INFINITY else min(n + 1024, hard)
        if soft != resource.RLIM_INFINITY and soft < min(n + 256, wanted):
            with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def map_tokens(path, offset):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **MAP_OPTIONS)
    if hasattr(mmap, "MADV_RANDOM"):  # reading 8 MB ahead at each place, the first batches took seconds
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, "<u2", offset=offset)


def is_wider_than_16_bits(tokens):
    """Are these the halves of larger integers, of which the upper ones are below 4 (ids below 2**18)?"""
    starts = np.linspace(0, max(0, len(tokens) - 4096), 16).astype(int) // 2 * 2  # each at a lower half
    sample = np.concatenate([tokens[start:start + 4096] for start in starts])
    is_whole = len(tokens) % 2 == 0 and len(tokens) >= 16  # fewer may be so by chance
    return is_whole and sample[1::2].max() < 4 <= sample[::2].max()


def locate(ends, number):
    """(shard, place in it) of the item of this number, where shard i holds those up to ends[i]."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, int(number - (ends[shard - 1] if shard else 0))


class Corpus:
    """The bins of one split of a folder: `shards`, a list of uint16 arrays."""

    def __init__(self, paths):
        self.paths, self.sizes = paths, list(map(os.path.getsize, paths))
        try:
            self.shards = list(map(open_bin, paths))
        except OSError as error:
            if error.errno != errno.EMFILE or resource is None:
                raise
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise UserError(f"{paths[0].parent}: {len(paths):,} bins in a split, and {limit:,} files that "
                            "this process may open: raise that (ulimit -n), take Python 3.13 or later, or "
                            "prepare larger shards (--shard_tokens)") from None
        self.tokens = sum(map(len, self.shards))
        self.vocab_size = MAX_IDS  # as long as it is not known

    def check(self, vocab_size):
        """Refuses a token id outside the vocabulary: here in a sample, later wherever one is read."""
        self.vocab_size = vocab_size
        try:
            for _ in self.stretches():
                pass
        except UserError as error:
            raise UserError(f"{error}: raise vocab_size, or put its own tokenizer.json there") from None

    def read(self, shard, start, length):
        """`length` tokens of a shard, from `start` on. Raises UserError where they are not what they were."""
        path = self.paths[shard]
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if size != self.sizes[shard]:  # reading on would end the process with a bus error
            raise UserError(f"{path} had {self.sizes[shard]:,} bytes, now it has {size:,}")
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

    def digest(self):
        """A hash of the shards' sizes and of the tokens in `stretches`; its cost does not grow with them."""
        digest = hashlib.sha256(repr(list(map(len, self.shards))).encode())
        for tokens in self.stretches():
            digest.update(tokens.tobytes())
        return digest.hexdigest()[:16]


def open_corpus(folder):
    """(train Corpus, {domain: validation Corpus}) of a folder of bins.

    `val` or `train` in a file's name, alone or after an underscore, gives the split, val first.
    val_<domain>_000000.bin belongs to a domain of that name, other validation bins to "val".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data at {folder}: prepare it with python prepare.py --out={folder} --source=...")
    train, val, others = [], {}, []
    paths = sorted(folder.glob("*.bin"))
    allow_open_files(len(paths))
    for path in paths:
        if match := re.search(r"(?:^|_)val(?:_(?!\d{1,6}\.bin$)(.+?))?(?:_\d{1,6})?\.bin$", path.name):
            val.setdefault(match[1] or "val", []).append(path)
        elif re.search(r"(?:^|_)train(?:_\d+)?\.bin$", path.name):
            train.append(path)
        else:
            others.append(path.name)
    if others:
        raise UserError(f"{folder}: is {others[0]} for training or validation? Name it "
                        "NAME_train_000000.bin or NAME_val_000000.bin")
    if not train or not val:
        for path in sorted(folder.glob("*.npy")):
            raise UserError(f"{path} is a NumPy array; {AS_UINT16}")
        missing = "val" if train else "train"
        raise UserError(f"{folder} holds no {missing} bins (NAME_{missing}_000000.bin or {missing}.bin)")
    return Corpus(train), {domain: Corpus(paths) for domain, paths in val.items()}


def unigram_entropy(corpus):
    """Entropy in nats of the token frequencies, in a sample where the corpus is large.

    That is the loss of the best model that ignores the context: a language model must get well below it.
    """
    counts = sum(np.bincount(tokens, minlength=MAX_IDS) for tokens in corpus.stretches())
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ---- batches ----

ORDER = 2  # of the sequences of an epoch; 1 was another permutation


class LMBatch(NamedTuple):
    """ids and targets (B, T) int64: targets are the ids one position on."""

    ids: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self):
        return self.ids.numel()

    lm_tokens = tokens  # those that a next-token loss reads


class EpisodeBatch(NamedTuple):
    """E episodes, int64: support (E, N ways, K shots, T), query (E, N ways, Q queries, T), words (E, N).

    A window of T tokens is read at its last position; its label is its place among the N. words: the
    token ids of the classes, for analysis; the model does not see them. targets: of the query, one
    position on, as in LMBatch.
    """

    support: torch.Tensor
    query: torch.Tensor
    words: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self):
        return self.support.numel() + self.query.numel()

    @property
    def lm_tokens(self):
        return self.targets.numel()


class JointBatch(NamedTuple):
    """An LMBatch, and E episodes at its own positions: support (E, N ways, K shots), query (E, N ways, Q).

    These are indices into the flat (B * T,) positions, each before a word of the class. words (E, N): the
    token id of one of its spellings. Without an episode, N is 0.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    support: torch.Tensor
    query: torch.Tensor
    words: torch.Tensor

    @property
    def tokens(self):
        return self.ids.numel()

    lm_tokens = tokens


def permuted(numbers, n, keys):
    """Where a pseudo-random permutation of 0 to n - 1 takes the numbers (int array); the keys choose it.

    Nothing of size n is held: a Feistel network permutes the numbers of an even count of bits, and takes
    one that lands at n or above further until it lands below (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64((int(n).bit_length() + 1) // 2)
    mask, numbers = np.uint64(2**int(half) - 1), numbers.astype(np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ (mixed >> np.uint64(40) & mask)
        numbers[outside] = left << half | right
        outside = numbers >= n
    return numbers.astype(np.int64)


class Sequences:
    """The endless series of training sequences of T tokens.

    Each epoch is a new permutation of the corpus, cut at a new offset.
    """

    def __init__(self, corpus, T, seed):
        self.corpus, self.T, self.seed = corpus, T, seed
        # A sequence takes T + 1 tokens, because of the targets; the epoch's offset loses up to T - 1.
        self.ends = np.cumsum([max(0, (len(shard) - T) // T) for shard in corpus.shards])
        if self.ends[-1] == 0:
            raise UserError(f"{corpus.paths[0].parent}: no training bin holds 2 x context = {2 * T} tokens, "
                            f"the longest has {max(map(len, corpus.shards))}; lower context or add text")

    def _epoch(self, epoch):
        """(offset, keys of the permutation) of an epoch."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        return int(rng.integers(self.T)), rng.integers(2**64, size=8, dtype=np.uint64)

    def __getitem__(self, indices):
        """LMBatch of the sequences with these numbers (any iterable of ints from 0 on)."""
        n = int(self.ends[-1])
        epochs, numbers = np.divmod(np.fromiter(indices, np.int64), n)
        places, offsets = np.zeros_like(numbers), np.zeros_like(numbers)
        for epoch in np.unique(epochs):
            is_now, (offset, keys) = epochs == epoch, self._epoch(epoch)
            offsets[is_now], places[is_now] = offset, permuted(numbers[is_now], n, keys)
        rows = []
        for place, offset in zip(places, offsets):
            shard, i = locate(self.ends, place)
            rows.append(self.corpus.read(shard, offset + i * self.T, self.T + 1))
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return LMBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def eval_sequences(corpus, T, n):
    """LMBatch of up to n sequences, evenly spread over a validation corpus; T shrinks to a shorter corpus."""
    longest = max(map(len, corpus.shards))
    T = min(T, longest - 1)
    if T < 1:
        raise UserError(f"{corpus.paths[0]}: {longest} token is too short to evaluate on")
    ends = np.cumsum([max(0, (len(shard) - 1) // T) for shard in corpus.shards])
    picked = np.unique(np.linspace(0, ends[-1] - 1, min(n, ends[-1])).round().astype(int))
    places = [locate(ends, number) for number in picked]
    rows = [corpus.read(shard, place * T, T + 1) for shard, place in places]
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (n, T + 1)
    return LMBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Episodes:
    """Subset-Masked-LM episodes (Bansal et al. 2020, arXiv 2009.08445): which of N words was masked?

    For each of N random words there are K support and Q query windows of text, and no two windows of a
    word share a position. The label is the word's place in a random order, so it means nothing in the
    next episode. A decoder sees the left context only, so a window ends where the word is read.

    read_out "mask": at <|mask|> in the word's place. Its other occurrences in the window become <|mask|>
    too, also in another case or without the space; a window that still spells it out, in several tokens,
    is not used. "context": at the position before the word; the window is plain text without the word.
    held_out: the classes are words that are kept for evaluation; else all others. word_targets: what may
    be a class, as `word_tables` says. max_share: at most that share of the tokens may be a class, which
    leaves out the likes of "the".
    """

    def __init__(self, corpus, tokenizer, ways, shots, queries, window, seed, read_out="mask",
                 held_out=False, word_targets="spaced", max_share=1e-3):
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.ways, self.shots, self.queries, self.window = ways, shots, queries, window
        self.read_out, self.word_targets, self.max_share = read_out, word_targets, max_share
        self.tables = word_tables(tokenizer, word_targets)
        self.is_class = self.tables.word & (self.tables.held_out == held_out)
        self.mask_id = tokenizer.encode_single_token("<|mask|>")
        # Pieces are cut from the shards at a random offset. A short corpus has few, or one that is shorter.
        self.piece = min(PIECE, max(map(len, corpus.shards)))
        self.counts = np.array([max(1, len(shard) // self.piece - 1) if len(shard) >= self.piece else 0
                                for shard in corpus.shards])
        self.ends = np.cumsum(self.counts)

    def __getitem__(self, indices):
        """EpisodeBatch of the episodes with these numbers."""
        words, windows = zip(*(self.episode(int(index)) for index in indices))
        windows = torch.from_numpy(np.stack(windows))  # (E, N, K + Q, 2, T)
        support, query = windows[:, :, :self.shots], windows[:, :, self.shots:]
        ids = (support[:, :, :, 0].contiguous(), query[:, :, :, 0].contiguous())
        return EpisodeBatch(*ids, torch.from_numpy(np.stack(words)), query[:, :, :, 1].contiguous())

    def episode(self, index):
        """(words (N,), windows (N, K + Q, 2, T)) of episode `index`: ids, and the targets one position on.

        Row n has label n, its support first.
        """
        rng, most = np.random.default_rng([self.seed, 1, index]), 0
        for attempt in range(8):  # where few words repeat, look in more text
            pieces = self.read_pieces(rng, PIECES << attempt)
            classes = list(itertools.islice(self.classes(rng, pieces, self.shots + self.queries), self.ways))
            if len(classes) == self.ways:
                words, windows = zip(*classes)
                return np.array(words, np.int64), np.array(windows)
            most = max(most, len(classes))
        raise UserError(f"episodes: only {most} words have {self.shots + self.queries} windows of "
                        f"{self.window} tokens apart in {pieces.size:,} tokens, ways = {self.ways} are "
                        f"needed; {self.lack(pieces)}")

    def lack(self, pieces):
        """Why the pieces give too few classes, and what to do."""
        words, most = pieces.ravel()[self.find(pieces)], self.most(pieces)
        return (lack_of_words(self.tokenizer, self.word_targets, pieces, words, self.ways, most)
                or "lower ways, shots, queries or window, or add text")

    def most(self, pieces):
        """How often a class may come in the pieces."""
        return max(self.shots + self.queries, int(self.max_share * pieces.size))

    def classes(self, rng, pieces, count):
        """Yields (token id, `count` windows) of words of the pieces, in random order, no spelling twice."""
        spellings = set()
        for word, places in self.candidates(rng, pieces, count):
            if self.tables.spelling[word] in spellings:
                continue
            windows = self.windows(rng, pieces, word, places, count)
            if windows is not None:
                spellings.add(self.tables.spelling[word])
                yield word, windows

    def read_pieces(self, rng, most):
        """Step 1: (n, piece) tokens of at most `most` non-overlapping stretches of the corpus."""
        n = int(self.ends[-1])
        offset = rng.integers(self.piece)
        rows = []
        for i in rng.choice(n, min(n, most), replace=False):
            shard, place = locate(self.ends, i)
            room = len(self.corpus.shards[shard]) - self.counts[shard] * self.piece
            rows.append(self.corpus.read(shard, min(offset, room) + place * self.piece, self.piece))
        return np.stack(rows)

    def find(self, pieces):
        """The places in pieces.ravel() of all words that may be classes."""
        following = np.roll(pieces, -1, axis=1)
        whole = self.is_class[pieces] & ~self.tables.continues[following]
        before = self.window - (self.read_out == "mask")  # tokens of a window before the word
        whole[:, :before] = whole[:, -1] = False  # no room for the window; the next token is unknown
        return np.flatnonzero(whole)

    def candidates(self, rng, pieces, count):
        """Step 2: yields, in random order, words of the pieces that come often enough, but not too often.

        Each is (token id, places in pieces.ravel(), so far apart that windows do not overlap).
        """
        at = self.find(pieces)
        tokens = pieces.ravel()[at]
        order = np.argsort(tokens, kind="stable")  # by word, then by place
        at, tokens = at[order], tokens[order]
        words, first, occurrences = np.unique(tokens, return_index=True, return_counts=True)
        in_band = np.flatnonzero((occurrences >= count) & (occurrences <= self.most(pieces)))
        for j in rng.permutation(in_band):
            places, last = [], -self.window
            for place in at[first[j]:first[j] + occurrences[j]]:
                if place - last >= self.window:
                    places.append(place)
                    last = place
            if len(places) >= count:
                yield words[j], places

    def windows(self, rng, pieces, word, places, count):
        """Step 3: `count` windows (2, T), ids and targets, that are read for the word; None if too few."""
        spelling = fold(self.tokenizer.decode([int(word)]).strip())
        windows = []
        for place in rng.permutation(places):
            end = place + 1 if self.read_out == "mask" else place
            text = pieces.ravel()[end - self.window:end + 1].astype(np.int64)  # one more, for the targets
            ids = text[:-1].copy()
            is_word = self.tables.spelling[ids] == self.tables.spelling[word]
            if self.read_out == "context" and is_word.any():
                continue
            ids[is_word] = self.mask_id
            if not spells(fold(self.tokenizer.decode(ids.tolist())), spelling):
                windows.append((ids, text[1:]))
            if len(windows) == count:
                return windows
        return None


class BatchEpisodes:
    """Episodes at no extra pass: LM batches, with episodes at positions of theirs where a word comes next.

    Only the first place of a word in a sequence counts, so none is copied from its own context, and
    support and query lie in different sequences. An episode has as many ways as there are words in K + Q
    sequences, up to N; a batch with less than two has none. Words are common ones, since a batch is
    short: in up to 4 (K + Q) sequences.
    """

    def __init__(self, sequences, tokenizer, ways, shots, queries, episodes, seed, word_targets="spaced"):
        self.sequences, self.tables, self.seed = sequences, word_tables(tokenizer, word_targets), seed
        self.ways, self.shots, self.queries, self.episodes = ways, shots, queries, episodes

    def __getitem__(self, indices):
        """JointBatch of the sequences with these numbers; the episodes follow from the first of them."""
        batch, rng = self.sequences[indices], np.random.default_rng([self.seed, 3, int(indices[0])])
        groups, needed = self.places(batch.ids.numpy(), batch.targets.numpy()), self.shots + self.queries
        groups = [places for places in groups if needed <= len(places) <= 4 * needed]
        ways = min(self.ways, len(groups)) if len(groups) >= 2 else 0
        chosen = [[rng.permutation(groups[i])[:needed] for i in rng.permutation(len(groups))[:ways]]
                  for _ in range(self.episodes)]
        places = torch.from_numpy(np.array(chosen, np.int64).reshape(self.episodes, ways, needed))
        words = batch.targets.flatten()[places[:, :, 0]]
        return JointBatch(*batch, *places.split([self.shots, self.queries], dim=2), words)

    def places(self, ids, targets):
        """[flat positions before a word's first place in each sequence] of each word, ids, targets (B, T)."""
        whole = self.tables.word[targets] & ~self.tables.held_out[targets]
        whole[:, :-1] &= ~self.tables.continues[targets[:, 1:]]
        whole[:, -1] = False  # the token after it is unknown
        # The first token of a sequence is no target, but it is read. Any spelling counts, whole word or not.
        read = self.tables.spelling[np.concatenate((ids[:, :1], targets), axis=1)]  # (B, T + 1)
        is_first = np.zeros(read.shape, bool)
        for row, spellings in enumerate(read):
            is_first[row, np.unique(spellings, return_index=True)[1]] = True
        at = np.flatnonzero(whole & is_first[:, 1:])
        spelling = self.tables.spelling[targets.ravel()[at]]
        order = np.argsort(spelling, kind="stable")
        _, starts = np.unique(spelling[order], return_index=True)
        return np.split(at[order], starts[1:])
