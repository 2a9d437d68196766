"""sample.py: what is shown is what the model draws, whole characters at a time."""
import dataclasses
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_VOCAB, random_run, refuses

import sample
from model import Decoder, ModelConfig
from nanomaml import checkpoint, config
from nanomaml.tokenizer import load_tokenizer

MODEL = ModelConfig(d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=TOY_VOCAB + 6, context=32)
END = TOY_VOCAB - 2


@pytest.fixture
def run(toy, tmp_path):
    return str(random_run(toy, tmp_path / "run", MODEL))


@pytest.fixture
def shown(run, capsys, monkeypatch):
    """What the command prints with these flags, and `stdin` on standard input (None: it is closed)."""
    def call(*flags, stdin=b""):
        source = SimpleNamespace(buffer=io.BytesIO(stdin or b""), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", source if stdin is not None else None)
        sample.main([run, "--device=cpu", "--dtype=float32", *flags])
        return capsys.readouterr().out

    return call


@pytest.fixture
def drawn(run, toy):
    """What the model draws after a prompt of token ids, as text with the prompt."""
    def draw(prompt, n, seed=1, temperature=0.8):
        generator = torch.Generator().manual_seed(seed)
        ids = checkpoint.load_model(run).generate(torch.tensor([prompt]), n, temperature, 50, generator)
        ids = ids[0, int(prompt == [END]):].tolist()
        ids = ids[:ids.index(END)] if END in ids else ids
        return load_tokenizer(toy).decode([i for i in ids if i < TOY_VOCAB]) + "\n"

    return draw


def test_the_text_is_what_the_model_draws(toy, shown, drawn):
    """Past the context of 32 tokens, for bytes that are no whole words, special tokens, and no prompt."""
    tokenizer = load_tokenizer(toy)
    prompt = tokenizer.encode_ordinary("été abc")
    text = shown("--prompt=été abc", "--tokens=60", "--seed=3")
    assert text == drawn(prompt, 60, seed=3) and len(text) > 60
    assert shown("--prompt=été abc", "--tokens=10", "--temperature=0") == drawn(prompt, 10, temperature=0)
    special = tokenizer.encode("a<|mask|>b", allowed_special="all")
    assert END + 1 in special and shown("--prompt=a<|mask|>b", "--tokens=9") == drawn(special, 9)
    # An empty prompt is the beginning of a text. With `<&-` Python has no sys.stdin: there was a traceback.
    assert shown("--tokens=9") == shown("--tokens=9", stdin=None) == drawn([END], 9)


def test_samples_have_seeds_of_their_own_and_come_again(shown):
    three = shown("--prompt=abc", "--samples=3", "--seed=5", "--tokens=20")
    assert three == shown("--prompt=abc", "--samples=3", "--seed=5", "--tokens=20")
    parts = three.split("---- sample ")
    assert [part[:9] for part in parts[1:]] == ["1, seed 5", "2, seed 6", "3, seed 7"]
    texts = [part.split("----\n", 1)[1] for part in parts[1:]]
    assert len(set(texts)) == 3 and texts[2] == shown("--prompt=abc", "--seed=7", "--tokens=20")


def test_the_prompt_comes_from_a_flag_or_standard_input(shown):
    """The newline that echo adds was part of it, so the model went on after it. A second newline is."""
    for text, stdins in (("some\nlines é", ["some\nlines é"]), ("abc", ["abc\n", "abc\r\n"]),
                         ("abc\n", ["abc\n\n"])):
        expected = shown(f"--prompt={text}", "--tokens=5", stdin=b"not this")
        assert expected.startswith(text)
        assert all(expected == shown("--tokens=5", stdin=stdin.encode()) for stdin in stdins)


def test_characters_that_the_terminal_lacks_are_replaced(run, monkeypatch):
    """Those of a prompt, or of the model: they ended the command with UnicodeEncodeError."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["sample.py", run, "--device=cpu", "--prompt=é日", "--tokens=1"])
    config.run(sample.main)
    terminal.flush()
    assert terminal.buffer.getvalue().startswith(b"\xe9?")


def test_a_sample_ends_with_the_text_and_ids_of_no_token_are_left_out(run, toy, shown):
    """The output has rows beyond the tokenizer's ids, to a round number."""
    state = checkpoint.load(run)
    decoder, padding = checkpoint.load_model(state), TOY_VOCAB + 3
    with torch.no_grad():  # the token before decides: ab -> padding -> c -> <|endoftext|>
        for p in decoder.parameters():
            p.zero_() if p.dim() == 2 else p.fill_(1)
        pairs = ((ord("b"), padding), (padding, ord("c")), (ord("c"), END), (END, ord("d")))
        for i, (now, after) in enumerate(pairs):
            decoder.model.embed_tokens.weight[now, i] = decoder.lm_head.weight[after, i] = 1
    checkpoint.save(run, state | {"model": decoder.state_dict()}, keep=1)
    assert shown("--prompt=ab", "--temperature=0", "--tokens=50") == "abc\n"


def test_a_character_of_several_tokens_comes_whole(toy):
    tokenizer = load_tokenizer(toy)
    ids = tokenizer.encode_ordinary("a日é👍b")  # every byte a token
    assert len(ids) == 1 + 3 + 2 + 4 + 1
    assert list(sample.pieces(tokenizer, ids[:1], ids[1:])) == ["日", "é", "👍", "b", ""]
    assert list(sample.pieces(tokenizer, [], ids[:-2])) == ["a", "日", "é", "\ufffd"]  # it ends within 👍
    assert "".join(sample.pieces(tokenizer, [], [0xFF, ord("a")])) == "\ufffda"  # never a character


def test_bad_input_ends_with_one_line(run, shown):
    for flags, says in (
        (["--temperature=-1"], "temperature must be 0"),
        (["--temperature=1e-40"], "or from 0.001 to 1000, got 1e-40"),
        (["--temperature=1e39"], "or from 0.001 to 1000, got 1e+39"),
        (["--prompt=" + " " * 2**20], "1,048,576 characters, more than 262,144"),
    ):
        refuses(lambda flags=flags: shown(*flags), says)
    refuses(lambda: shown(stdin=b"\xff\xfe"), "cannot read the prompt from standard input")
    small = dataclasses.replace(MODEL, vocab_size=300)
    checkpoint.save(run, {"step": 8, "model": Decoder(small).state_dict(), "config": vars(small)}, keep=1)
    refuses(lambda: shown("--prompt=<|mask|>"), "ids, vocab_size = 300")
