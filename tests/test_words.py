"""nanomaml/words.py: what a word is, and what to do where a text has too few."""
import numpy as np
import pytest

import prepare
from nanomaml.tokenizer import encoding, load_tokenizer
from nanomaml.words import is_held_out, lack_of_words, spells, word_tables


def tokenizer_of(tokens):
    """Every byte and these tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(t for t in tokens if t not in ranks)}
    return encoding("words", prepare.PATTERN, ranks)


@pytest.mark.parametrize("word_targets, words, continuing", [
    ("spaced", [" cafe", " naïve"], ["\u0301", "\u0301s", "s", "\u200d", "\ufffd"]),
    ("any", [" cafe", "s", " x", " naïve"], ["\u0301", "\u0301s", "\u200d", "\ufffd"]),
])
def test_what_is_a_word_and_what_continues_one(word_targets, words, continuing):
    tokens = [b" cafe", "\u0301".encode(), "\u0301s".encode(), b"'", b"s", "\u200d".encode(), b".", b" x",
              "\u0301".encode()[:1], " \u0947".encode(), " naïve".encode(), b" 12"]
    tokenizer = tokenizer_of(tokens)
    tables = word_tables(tokenizer, word_targets)
    ids = [tokenizer.encode_single_token(token) for token in tokens]
    texts = [token.decode(errors="replace") for token in tokens]
    assert [text for i, text in zip(ids, texts) if tables.word[i]] == words
    assert [text for i, text in zip(ids, texts) if tables.continues[i]] == continuing


def test_a_word_is_one_class_however_its_accents_are_written():
    tables = word_tables(tokenizer_of([" Café".encode(), "cafe\u0301".encode(), b" tea"]))
    assert tables.spelling[256] == tables.spelling[257] != tables.spelling[258]


@pytest.mark.parametrize("text, word, is_there", [
    ("a cafe, tea", "tea", True), ("steam tea", "tea", True), ("steam, teas", "tea", False),
    ("कि", "क", False), ("", "tea", False),
])
def test_a_text_spells_a_word_where_it_stands_on_its_own(text, word, is_there):
    assert spells(text, word) == is_there


def test_a_tenth_of_the_words_is_held_out_whatever_their_case(toy):
    tables = word_tables(load_tokenizer(toy))
    assert tables.held_out[tables.word].mean() == pytest.approx(0.1, abs=0.02)
    assert all(is_held_out(f"A{n}") == is_held_out(f"a{n}") for n in range(100))


ZH, HI = "在图书馆学校天气今很好" * 50, "हिन्दी भाषा में बहुत शब्द हैं " * 50


@pytest.mark.parametrize("word_targets, text, words, says", [
    ("spaced", ZH, [], "no words between spaces: set word_targets = any"),
    ("any", ZH, [], "0 different words are single tokens there, 0 of them too frequent, more than 50 times"),
    ("spaced", HI, [7] * 50, "1 different words are single tokens there, 0 of them too frequent"),
    ("spaced", HI, [7] * 51 + [8], "2 different words are single tokens there, 1 of them too frequent"),
])
def test_a_lack_of_words_is_explained(word_targets, text, words, says):
    tokenizer = tokenizer_of([])
    tokens = np.array(tokenizer.encode_ordinary(text))
    lack = lack_of_words(tokenizer, word_targets, tokens, np.array(words), ways=16, max_occurrences=50)
    assert says in lack
