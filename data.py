"""Token bins to batches: tokenizers, the bin reader, next-token sequences and Subset-Masked-LM episodes.

    train, validation = data.open_corpus("data/pydocs")            # prepare.py wrote it
    batch = data.Sequences(train, 128, seed=1)[range(8)]           # LMBatch of sequences 0 to 7

A bin is 256 int32 (magic 20240520, version 1, token count), then uint16 tokens: the layout of llm.c and
modded-nanogpt. nanoGPT's train.bin and val.bin, which have no header, are read too. Every batch is a pure
function of (seed, index).
"""
import base64
import functools
import itertools
import json
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from config import UserError

MAGIC, VERSION, HEADER = 20240520, 1, 256  # HEADER: int32 words before the tokens
EMBEDDED = "data/pydocs"  # train.py prepares this folder by itself where it is missing
SPECIAL = ("<|endoftext|>", "<|mask|>")

# Where an episode looks for its words: PIECES stretches of PIECE tokens at random places, sorted by token. A
# word may make up at most MAX_SHARE of them, which leaves out the likes of "the"; at least, it must fill its
# windows.
PIECES, PIECE, MAX_SHARE = 32, 4096, 1e-3


# ---- tokenizer ----


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
            raise UserError(f"{path} is not a tokenizer that prepare.py wrote; remove it where the bins hold "
                            "GPT-2 tokens") from None
    if spec["name"] == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets the HTTP client's own errors through
            raise UserError(f"tiktoken cannot download its gpt2 tokenizer ({type(error).__name__}): run once "
                            "with a network, or set TIKTOKEN_CACHE_DIR to a folder copied from a machine "
                            "that has it") from None
        pattern, ranks = gpt2._pat_str, gpt2._mergeable_ranks
    else:
        tokens = [base64.b64decode(token) for token in spec["tokens"]]
        pattern, ranks = spec["pattern"], {token: rank for rank, token in enumerate(tokens)}
    return encoding(spec["name"], pattern, ranks)


def save_tokenizer(tokenizer, folder):
    """Writes folder/tokenizer.json, which `load_tokenizer(folder)` reads; for gpt2 the name is enough."""
    spec = {"name": tokenizer.name}
    if tokenizer.name != "gpt2":
        by_rank = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
        tokens = [base64.b64encode(token).decode() for token in by_rank]
        spec |= {"pattern": tokenizer._pat_str, "tokens": tokens}
    Path(folder, "tokenizer.json").write_text(json.dumps(spec))


def is_held_out(spelling):
    """Whether a word is never a class in training: a tenth of all, by a hash of the lower-case spelling."""
    return zlib.crc32(spelling.lower().encode()) % 10 == 0


class WordTables(NamedTuple):
    """What episodes need to know of each token, arrays (n_vocab,)."""

    word: np.ndarray  # may it be a whole word: a space and letters
    continues: np.ndarray  # would it continue a word before it
    spelling: np.ndarray  # a number that tokens share which spell one word, in any case, with a space or not
    held_out: np.ndarray  # is its word kept for evaluation


@functools.lru_cache(maxsize=1)
def word_tables(tokenizer):
    n = tokenizer.n_vocab
    tables = WordTables(np.zeros(n, bool), np.zeros(n, bool), np.arange(n), np.zeros(n, bool))
    numbers = {}
    for token in tokenizer.token_byte_values():
        text = token.decode(errors="replace")
        i, word = tokenizer.encode_single_token(token), text.strip().lower()
        tables.word[i] = len(text) > 2 and text[0] == " " and text[1:].isalpha()
        tables.continues[i] = text[0].isalpha() or text[0] == "\ufffd"
        if word.isalpha():
            tables.spelling[i] = numbers.setdefault(word, i)
            tables.held_out[i] = is_held_out(word)
    return tables


# ---- reading bins ----


def open_bin(path):
    """The tokens of one bin, a read-only uint16 memory map. Refuses a wrong magic, version or length."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != MAGIC:
        if path.name not in ("train.bin", "val.bin"):  # nanoGPT's names; its bins have no header
            start = header[0] if len(header) else "nothing"
            raise UserError(f"{path}: starts with {start}, a token bin with {MAGIC}; prepare it with "
                            "prepare.py")
        if size == 0 or size % 2:
            raise UserError(f"{path}: {size} bytes are not a positive number of uint16 tokens")
        return np.memmap(path, "<u2", "r")
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]}, only {VERSION} is known")
    if header[2] < 1 or size != 4 * HEADER + 2 * int(header[2]):
        tokens = (size - 4 * HEADER) / 2
        raise UserError(f"{path}: the header says {header[2]} tokens, the file holds {tokens:g}; "
                        "copy or prepare it again")
    return np.memmap(path, "<u2", "r", offset=4 * HEADER)


def largest_id(tokens):
    return max(int(tokens[i:i + 2**26].max()) for i in range(0, len(tokens), 2**26))


class Corpus:
    """The bins of one split of a folder: `shards`, a list of uint16 arrays."""

    def __init__(self, paths):
        self.paths, self.shards = paths, [open_bin(path) for path in paths]
        self.tokens = sum(map(len, self.shards))

    def check(self, vocab_size, part=0, parts=1):
        """Refuses a token id outside the vocabulary. Reads every parts-th shard: ranks share the work."""
        for path, shard in list(zip(self.paths, self.shards))[part::parts]:
            largest = largest_id(shard)
            if largest >= vocab_size:
                raise UserError(f"{path}: token id {largest} is outside the vocabulary of {vocab_size}: "
                                "raise vocab_size, or put the data's own tokenizer.json beside it")


def open_corpus(folder):
    """(train Corpus, {domain: validation Corpus}) of a folder of bins.

    `val` or `train` in a file's name, alone or after an underscore, gives the split, val first.
    val_<domain>_000000.bin belongs to a domain of that name, other validation bins to "val".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no data at {folder}: prepare it with python prepare.py --out={folder} --source=...")
    train, val, others = [], {}, []
    for path in sorted(folder.glob("*.bin")):
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
        missing = "val" if train else "train"
        raise UserError(f"{folder} holds no {missing} bins (NAME_{missing}_000000.bin or {missing}.bin)")
    return Corpus(train), {domain: Corpus(paths) for domain, paths in val.items()}


def unigram_entropy(corpus, limit=20_000_000):
    """Entropy in nats of the token frequencies in at most the first `limit` tokens.

    That is the loss of the best model that ignores the context: a language model must get well below it.
    """
    counts, left = np.zeros(65536), limit
    for shard in corpus.shards:
        counts += np.bincount(shard[:left], minlength=65536)
        left -= min(left, len(shard))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ---- batches ----


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


class Sequences:
    """The endless series of training sequences of T tokens.

    Each epoch is a new permutation of the corpus, cut at a new offset.
    """

    def __init__(self, corpus, T, seed):
        self.corpus, self.T, self.seed = corpus, T, seed
        # A sequence takes T + 1 tokens, because of the targets; the epoch's offset loses up to T - 1.
        self.counts = np.array([max(0, (len(shard) - T) // T) for shard in corpus.shards])
        self.ends = np.cumsum(self.counts)
        if self.ends[-1] == 0:
            raise UserError(f"{corpus.paths[0].parent}: no training bin holds 2 x context = {2 * T} tokens, "
                            f"the longest has {max(map(len, corpus.shards))}; lower context or add text")
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch):
        """(offset, order of the sequences) of an epoch."""
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
    """LMBatch of up to n sequences, evenly spread over a validation corpus; T shrinks to a shorter corpus."""
    longest = max(corpus.shards, key=len)
    T = min(T, len(longest) - 1)
    if T < 1:
        raise UserError(f"{corpus.paths[0]}: {len(longest)} token is too short to evaluate on")
    starts = [(shard, start) for shard in corpus.shards for start in range(0, len(shard) - T, T)]
    picked = [starts[i] for i in np.unique(np.linspace(0, len(starts) - 1, n).round().astype(int))]
    rows = [shard[start:start + T + 1] for shard, start in picked]
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
    held_out: the classes are words that are kept for evaluation; else all others.
    """

    def __init__(self, corpus, tokenizer, ways, shots, queries, window, seed, read_out="mask",
                 held_out=False):
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.ways, self.shots, self.queries, self.window = ways, shots, queries, window
        self.read_out, self.tables = read_out, word_tables(tokenizer)
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
                        "needed; lower ways, shots, queries or window, or add text")

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
            shard = int(np.searchsorted(self.ends, i, side="right"))
            tokens = self.corpus.shards[shard]
            place = i - (self.ends[shard] - self.counts[shard])
            start = min(offset, len(tokens) - self.counts[shard] * self.piece) + place * self.piece
            rows.append(tokens[start:start + self.piece])
        return np.stack(rows)

    def candidates(self, rng, pieces, count):
        """Step 2: yields, in random order, words of the pieces that come often enough, but not too often.

        Each is (token id, places in pieces.ravel(), so far apart that windows do not overlap).
        """
        following = np.roll(pieces, -1, axis=1)
        whole = self.is_class[pieces] & ~self.tables.continues[following]
        before = self.window - (self.read_out == "mask")  # tokens of a window before the word
        whole[:, :before] = whole[:, -1] = False  # no room for the window; the next token is unknown
        at = np.flatnonzero(whole)
        tokens = pieces.ravel()[at]
        order = np.argsort(tokens, kind="stable")  # by word, then by place
        at, tokens = at[order], tokens[order]
        words, first, occurrences = np.unique(tokens, return_index=True, return_counts=True)
        most = max(count, MAX_SHARE * pieces.size)
        in_band = np.flatnonzero((occurrences >= count) & (occurrences <= most))
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
        spelling = self.tokenizer.decode([int(word)]).strip().lower()
        windows = []
        for place in rng.permutation(places):
            end = place + 1 if self.read_out == "mask" else place
            text = pieces.ravel()[end - self.window:end + 1].astype(np.int64)  # one more, for the targets
            ids = text[:-1].copy()
            is_word = self.tables.spelling[ids] == self.tables.spelling[word]
            if self.read_out == "context" and is_word.any():
                continue
            ids[is_word] = self.mask_id
            decoded = self.tokenizer.decode(ids.tolist()).lower()
            # The first test is the fast one.
            if spelling not in decoded or not re.search(rf"\b{spelling}\b", decoded):
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

    def __init__(self, sequences, tokenizer, ways, shots, queries, episodes, seed):
        self.sequences, self.tables, self.seed = sequences, word_tables(tokenizer), seed
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
