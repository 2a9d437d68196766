"""nanomaml/tokenizer.py: what a folder's tokenizer is, and what is refused in one line."""
import json

import pytest
from conftest import TOY_VOCAB, refuses

from nanomaml import tokenizer
from nanomaml.tokenizer import load_tokenizer, save_tokenizer


def test_a_tokenizer_is_read_back_as_it_was_saved(toy, tmp_path):
    given = load_tokenizer(toy)
    save_tokenizer(given, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.n_vocab == TOY_VOCAB and again._pat_str == given._pat_str
    assert again._mergeable_ranks == given._mergeable_ranks
    assert again._special_tokens == given._special_tokens
    assert [again.decode([TOY_VOCAB - n]) for n in (2, 1)] == list(tokenizer.SPECIAL)


def test_bins_from_elsewhere_are_taken_for_gpt2s_but_nanogpts_characters_are_not(tmp_path):
    assert tokenizer.read_spec("gpt2") == tokenizer.read_spec(tmp_path) == {"name": "gpt2"}
    (tmp_path / "meta.pkl").write_bytes(b"")
    refuses(lambda: load_tokenizer(tmp_path), "meta.pkl", "prepare.py")


@pytest.mark.parametrize("pattern", ["", "(a+)+$", "(a|a)*b", "(", "[a-z]+"])
def test_a_pattern_that_is_empty_backtracks_or_loses_text_is_refused(toy, tmp_path, pattern):
    """An empty one ended the first text in a panic, others lost the text in silence."""
    spec = tokenizer.read_spec(toy) | {"pattern": pattern}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refuses(lambda: load_tokenizer(tmp_path), "is not a tokenizer that prepare.py wrote")


@pytest.mark.parametrize("content", [b'{"version": "1.0"}', b"{", b"[]", b"\xff"])
def test_a_tokenizer_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    refuses(lambda: load_tokenizer(tmp_path), "is not a tokenizer that prepare.py wrote")


def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    refuses(lambda: load_tokenizer("gpt2"), "gpt2", "TIKTOKEN_CACHE_DIR")
    refuses(lambda: load_tokenizer(tmp_path / "none"), "no tokenizer at", "holds a tokenizer.json")
