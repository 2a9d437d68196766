"""Token bins to batches: next-token sequences and Subset-Masked-LM episodes.

    train, validation = data.open_corpus("data/pydocs")                       # prepare.py wrote it
    batch = data.Sequences(train, 128, seed=1)[range(8)]                      # LMBatch of sequences 0 to 7
    tokenizer = data.load_tokenizer("data/pydocs")
    episodes = data.Episodes(train, tokenizer, ways=16, shots=4, queries=2, window=32, seed=1)
    batch = episodes[range(1)]                                                # EpisodeBatch of episode 0

Every batch is a pure function of (seed, index). Bins are read in nanomaml/bins.py; nanomaml/words.py says
what a word is. Shapes: B sequences, T positions, E episodes, N ways, K shots, Q queries.
"""
import itertools
from typing import NamedTuple

import numpy as np
import torch

from nanomaml.bins import Corpus as Corpus
from nanomaml.bins import locate
from nanomaml.bins import open_corpus as open_corpus
from nanomaml.config import UserError, require
from nanomaml.tokenizer import load_tokenizer as load_tokenizer
from nanomaml.words import fold, lack_of_words, spells, word_tables

EMBEDDED = "data/pydocs"  # train.py prepares this folder by itself if it is missing

# Where an episode looks for its words: CHUNKS stretches of CHUNK tokens at random places, sorted by token.
CHUNKS, CHUNK = 32, 4096


# ---- next-token prediction ----


class LMBatch(NamedTuple):
    """ids and targets (B, T) int64: targets are the ids one position later."""

    ids: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self):
        return self.ids.numel()

    lm_tokens = tokens  # all count in the next-token loss


def lm_batch(rows):
    """LMBatch of rows of T + 1 tokens each."""
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
    return LMBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def permuted(numbers, n, keys):
    """The numbers (int array) mapped by a pseudo-random permutation of 0 to n - 1, which the keys choose.

    Nothing of size n is stored: a Feistel network permutes the numbers of an even count of bits; one that
    lands at n or above is permuted again until it lands below (cycle walking, Black & Rogaway 2002).
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
    """The endless series of training sequences of T tokens: each epoch cuts and permutes the corpus anew."""

    def __init__(self, corpus, T, seed):
        self.corpus, self.T, self.seed = corpus, T, seed
        # A sequence takes T + 1 tokens, because of the targets; the epoch's offset loses up to T - 1.
        self.ends = np.cumsum([max(0, (len(shard) - T) // T) for shard in corpus.shards])
        require(self.ends[-1] > 0, f"{corpus.paths[0].parent}: no training bin holds 2 x context = {2 * T} "
                f"tokens, the longest has {max(map(len, corpus.shards))}; lower context or add text")

    def _epoch(self, epoch):
        """(offset, keys of the permutation) of an epoch."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        return int(rng.integers(self.T)), rng.integers(2**64, size=8, dtype=np.uint64)

    def __getitem__(self, indices):
        """LMBatch of the sequences with these numbers (ints from 0 on)."""
        n = int(self.ends[-1])
        epochs, numbers = np.divmod(np.fromiter(indices, np.int64, len(indices)), n)
        places, offsets = np.zeros_like(numbers), np.zeros_like(numbers)
        for epoch in np.unique(epochs):
            is_now, (offset, keys) = epochs == epoch, self._epoch(epoch)
            offsets[is_now], places[is_now] = offset, permuted(numbers[is_now], n, keys)
        rows = []
        for place, offset in zip(places, offsets):
            shard, i = locate(self.ends, place)
            rows.append(self.corpus.read(shard, offset + i * self.T, self.T + 1))
        return lm_batch(rows)


def eval_sequences(corpus, T, n):
    """LMBatch of up to n sequences, evenly spread over a validation corpus; a short corpus lowers T."""
    longest = max(map(len, corpus.shards))
    T = min(T, longest - 1)
    require(T > 0, f"{corpus.paths[0]}: {longest} token is too short to evaluate on")
    ends = np.cumsum([max(0, (len(shard) - 1) // T) for shard in corpus.shards])
    picked = np.unique(np.linspace(0, ends[-1] - 1, min(n, ends[-1])).round().astype(int))
    places = [locate(ends, number) for number in picked]
    rows = [corpus.read(shard, place * T, T + 1) for shard, place in places]
    return lm_batch(rows)


# ---- episodes ----


class EpisodeBatch(NamedTuple):
    """E episodes, int64: support (E, N ways, K shots, T), query (E, N ways, Q queries, T), words (E, N).

    A window of T tokens is read at its last position; its label is its word's index among
    the N. words: the token ids of the classes, for analysis; the model does not see them.
    """

    support: torch.Tensor
    query: torch.Tensor
    words: torch.Tensor

    @property
    def tokens(self):
        return self.support.numel() + self.query.numel()


class Episodes:
    """Subset-Masked-LM episodes (Bansal et al. 2020, arXiv 2009.08445): which of N words was masked?

    For each of N random words there are K support and Q query windows of text, and windows of the same word
    never overlap. The label is the word's place in a random order, so it means nothing in the next episode. A
    decoder sees the left context only, so a window ends where the word is read.

    read_out "mask": at <|mask|> in the word's place. Its other occurrences in the window become <|mask|>
    too, also in another case or without the space; a window that still spells it out, in several tokens,
    is not used. "context": at the position before the word; the window is plain text without the word.
    held_out: True: the classes are words kept for evaluation; False: all others. word_targets: what may be
    a class, as `word_tables` says. max_share: a word that makes up more of the tokens is not a class (such
    as "the"). The methods follow the order in which an episode is made.
    """

    def __init__(self, corpus, tokenizer, *, ways, shots, queries, window, seed, read_out="mask",
                 held_out=False, word_targets="spaced", max_share=1e-3):
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.ways, self.shots, self.queries, self.window = ways, shots, queries, window
        self.read_out, self.word_targets, self.max_share = read_out, word_targets, max_share
        self.tables = word_tables(tokenizer, word_targets)
        self.is_class = self.tables.word & (self.tables.held_out == held_out)
        self.mask_id = tokenizer.encode_single_token("<|mask|>")
        # Chunks are cut from the shards at a random offset. A short corpus has few, or a shorter one.
        self.chunk = min(CHUNK, max(map(len, corpus.shards)))
        self.counts = np.array([max(1, len(shard) // self.chunk - 1) if len(shard) >= self.chunk else 0
                                for shard in corpus.shards])
        self.ends = np.cumsum(self.counts)

    def __getitem__(self, indices):
        """EpisodeBatch of the episodes with these numbers."""
        words, windows = zip(*(self.episode(int(index)) for index in indices))
        support, query = np.split(np.stack(windows), [self.shots], axis=2)  # (E, N, K or Q, T)
        return EpisodeBatch(*map(torch.from_numpy, (support.copy(), query.copy(), np.stack(words))))

    def episode(self, index):
        """(words (N,), windows (N, K + Q, T)) of episode `index`. Row n has label n, its support first."""
        rng, found, count = np.random.default_rng([self.seed, 1, index]), 0, self.shots + self.queries
        for attempt in range(8):  # if too few words repeat, look in more text
            chunks = self.read_chunks(rng, CHUNKS << attempt)
            classes = list(itertools.islice(self.classes(rng, chunks, count), self.ways))
            if len(classes) == self.ways:
                words, windows = zip(*classes)
                return np.array(words, np.int64), np.array(windows)
            found = max(found, len(classes))
        raise UserError(f"episodes: only {found} words have {count} separate windows of {self.window} tokens "
                        f"in {chunks.size:,} tokens, but ways = {self.ways}; {self.lack(chunks)}")

    def read_chunks(self, rng, limit):
        """Step 1: (n, chunk) tokens of at most `limit` non-overlapping stretches of the corpus."""
        n = int(self.ends[-1])
        offset = rng.integers(self.chunk)
        rows = []
        for i in rng.choice(n, min(n, limit), replace=False):
            shard, place = locate(self.ends, i)
            room = len(self.corpus.shards[shard]) - self.counts[shard] * self.chunk
            rows.append(self.corpus.read(shard, min(offset, room) + place * self.chunk, self.chunk))
        return np.stack(rows)

    def find(self, chunks):
        """Step 2: the places in chunks.ravel() of all words that may be classes."""
        following = np.roll(chunks, -1, axis=1)
        whole = self.is_class[chunks] & ~self.tables.continues[following]
        before = self.window - (self.read_out == "mask")  # tokens of a window before the word
        whole[:, :before] = whole[:, -1] = False  # no room for the window; the next token is unknown
        return np.flatnonzero(whole)

    def candidates(self, rng, chunks, count):
        """Step 3: yields (token id, places a window apart) of words of medium frequency, in random order."""
        at = self.find(chunks)
        tokens = chunks.ravel()[at]
        order = np.argsort(tokens, kind="stable")  # by word, then by place
        at, tokens = at[order], tokens[order]
        words, first, occurrences = np.unique(tokens, return_index=True, return_counts=True)
        in_band = np.flatnonzero((occurrences >= count) & (occurrences <= self.max_occurrences(chunks)))
        for j in rng.permutation(in_band):
            places, last = [], -self.window
            for place in at[first[j]:first[j] + occurrences[j]]:
                if place - last >= self.window:
                    places.append(place)
                    last = place
            if len(places) >= count:
                yield words[j], places

    def windows(self, rng, chunks, word, places, count):
        """Step 4: `count` windows (T,), each read at its end for the word; None if there are fewer."""
        spelling = fold(self.tokenizer.decode([int(word)]).strip())
        windows = []
        for place in rng.permutation(places):
            end = place + 1 if self.read_out == "mask" else place
            ids = chunks.ravel()[end - self.window:end].astype(np.int64)
            is_word = self.tables.spelling[ids] == self.tables.spelling[word]
            if self.read_out == "context" and is_word.any():
                continue
            ids[is_word] = self.mask_id
            if not spells(fold(self.tokenizer.decode(ids.tolist())), spelling):
                windows.append(ids)
            if len(windows) == count:
                return windows
        return None

    def classes(self, rng, chunks, count):
        """Steps 2 to 4: yields (token id, `count` windows) in random order, each spelling once."""
        spellings = set()
        for word, places in self.candidates(rng, chunks, count):
            if self.tables.spelling[word] in spellings:
                continue
            windows = self.windows(rng, chunks, word, places, count)
            if windows is not None:
                spellings.add(self.tables.spelling[word])
                yield word, windows

    def max_occurrences(self, chunks):
        """How often a class may occur in the chunks."""
        return max(self.shots + self.queries, int(self.max_share * chunks.size))

    def lack(self, chunks):
        """Why the chunks give too few classes, and what to do."""
        words = chunks.ravel()[self.find(chunks)]
        return lack_of_words(self.tokenizer, self.word_targets, chunks, words, self.ways,
                             self.max_occurrences(chunks))
