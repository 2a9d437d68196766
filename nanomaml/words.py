"""What a word is: tables over a tokenizer's ids that episodes look words up in."""
import functools
import re
import unicodedata
import zlib
from typing import NamedTuple

import numpy as np

from nanomaml.tokenizer import token_bytes

JOINERS = "\u00ad\u200c\u200d"  # soft hyphen, zero-width non-joiner and joiner: they stand within words


def fold(text):
    """One form for all ways to write a word: in any case, accents as part of the letter or as marks."""
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
    return any(not any(map(in_word, text[max(0, match.start() - 1):match.start()] + text[match.end():][:1]))
               for match in re.finditer(re.escape(word), text))


def is_held_out(spelling):
    """Whether a word is never a class in training: a tenth of all, by a hash of the lower-case spelling."""
    return zlib.crc32(spelling.lower().encode()) % 10 == 0


class WordTables(NamedTuple):
    """What episodes need to know of each token, arrays (n_vocab,)."""

    word: np.ndarray  # may it be a class
    continues: np.ndarray  # would it continue a word before it
    spelling: np.ndarray  # a number shared by tokens that spell one word, in any case, with a space or not
    held_out: np.ndarray  # is its word kept for evaluation


@functools.lru_cache(maxsize=2)
def word_tables(tokenizer, word_targets="spaced"):
    """word_targets "spaced": a class is a space and at least two letters, and nothing continues the word.

    "any": a class is any letters, and only a mark on the last of them would continue it.
    """
    n = tokenizer.n_vocab
    tables = WordTables(np.zeros(n, bool), np.zeros(n, bool), np.arange(n), np.zeros(n, bool))
    numbers = {}
    for i, token in token_bytes(tokenizer).items():
        text = token.decode(errors="replace")
        word = fold(text.strip())
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


def lack_of_words(tokenizer, word_targets, tokens, words, ways, max_occurrences):
    """Why `tokens` give too few classes, and what to do. words: the occurrences of possible classes."""
    text, counts = tokenizer.decode(tokens.ravel()[:2**16].tolist()), np.unique(words, return_counts=True)[1]
    if word_targets == "spaced" and sum(map(in_word, text)) > 16 * text.count(" "):
        return "it has no words between spaces: set word_targets = any, and prepare it with --tokenizer=train"
    frequent = int((counts > max_occurrences).sum())
    return (f"{len(counts)} different words are single tokens there, {frequent} of them too frequent, more "
            f"than {max_occurrences} times: lower ways, shots, queries or window, raise max_word_share, or "
            "give more text")
