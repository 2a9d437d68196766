"""sample.py: what is shown is what the model draws, whole characters at a time."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_VOCAB, random_run, refuses

import checkpoint
import data
import sample
from model import Decoder, ModelConfig

MODEL = ModelConfig(d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=TOY_VOCAB + 6, context=32)
END = TOY_VOCAB - 2


@pytest.fixture
def run(toy, tmp_path):
    return str(random_run(toy, tmp_path / "run", MODEL))


@pytest.fixture
def shown(run, capsys, monkeypatch):
    """What the command prints with these flags, and `stdin` on standard input."""

    def call(*flags, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
        sample.main([run, "--device=cpu", "--dtype=float32", *flags])
        return capsys.readouterr().out

    return call


def draw(run, prompt, n, seed, temperature=0.8, top_k=50):
    ids = torch.tensor([prompt])
    generator = torch.Generator().manual_seed(seed)
    return checkpoint.load_model(run).generate(ids, n, temperature, top_k, generator)[0].tolist()


def as_text(tokenizer, ids):
    ids = ids[: ids.index(END)] if END in ids else ids
    return tokenizer.decode([i for i in ids if i < TOY_VOCAB])


def test_the_text_is_what_the_model_draws(run, toy, shown):
    """Past the context of 32 tokens, and for a prompt of bytes that are no whole words."""
    tokenizer = data.load_tokenizer(toy)
    prompt = tokenizer.encode_ordinary("été abc")
    expected = as_text(tokenizer, draw(run, prompt, 60, seed=3))
    assert shown("--prompt=été abc", "--tokens=60", "--seed=3") == expected + "\n"
    assert len(expected) > 60
    greedy = as_text(tokenizer, draw(run, prompt, 10, 1, temperature=0))
    assert shown("--prompt=été abc", "--tokens=10", "--temperature=0") == greedy + "\n"


def test_samples_have_seeds_of_their_own_and_come_again(shown):
    three = shown("--prompt=abc", "--samples=3", "--seed=5", "--tokens=20")
    assert three == shown("--prompt=abc", "--samples=3", "--seed=5", "--tokens=20")
    parts = three.split("---- sample ")
    assert [part[:9] for part in parts[1:]] == ["1, seed 5", "2, seed 6", "3, seed 7"]
    texts = [part.split("----\n", 1)[1] for part in parts[1:]]
    assert len(set(texts)) == 3 and texts[2] == shown("--prompt=abc", "--seed=7", "--tokens=20")


def test_the_prompt_comes_from_a_flag_a_file_or_standard_input(shown, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("some\nlines é", encoding="utf-8")
    expected = shown("--prompt=some\nlines é", "--tokens=5")
    assert expected.startswith("some\nlines é")
    assert expected == shown(f"--file={path}", "--tokens=5") == shown("--tokens=5", stdin=path.read_bytes())
    assert shown("--prompt=some\nlines é", "--tokens=5", stdin=b"not this") == expected


def test_the_newline_that_echo_adds_is_no_part_of_the_prompt(shown, tmp_path):
    """It was, so the model went on after it. A second newline is, and that at the end of a file."""
    expected = shown("--prompt=abc", "--tokens=5")
    assert expected == shown("--tokens=5", stdin=b"abc\n") == shown("--tokens=5", stdin=b"abc\r\n")
    (tmp_path / "prompt.txt").write_bytes(b"abc\n")
    expected = shown("--prompt=abc\n", "--tokens=5")
    assert expected.startswith("abc\n") and expected == shown("--tokens=5", stdin=b"abc\n\n")
    assert expected == shown(f"--file={tmp_path / 'prompt.txt'}", "--tokens=5")


def test_a_closed_standard_input_is_no_prompt(run, shown, capsys, monkeypatch):
    """As with `<&-`: Python has no sys.stdin then, and there was a traceback."""
    expected = shown("--tokens=9")
    monkeypatch.setattr(sys, "stdin", None)
    sample.main([run, "--device=cpu", "--dtype=float32", "--tokens=9"])
    assert capsys.readouterr().out == expected


def test_characters_that_the_terminal_lacks_are_replaced(run, monkeypatch):
    """Those of a prompt, or of the model: they ended the command with UnicodeEncodeError."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main([run, "--device=cpu", "--prompt=é日", "--tokens=1"])
    terminal.flush()
    assert terminal.buffer.getvalue().startswith(b"\xe9?")


def test_an_empty_prompt_is_the_beginning_of_a_text(run, toy, shown):
    expected = as_text(data.load_tokenizer(toy), draw(run, [END], 9, seed=1)[1:])
    assert shown("--tokens=9") == expected + "\n"


def test_special_tokens_of_a_prompt_are_read_as_such(run, toy, shown):
    tokenizer = data.load_tokenizer(toy)
    prompt = tokenizer.encode("a<|mask|>b", allowed_special="all")
    assert END + 1 in prompt
    assert shown("--prompt=a<|mask|>b", "--tokens=9") == as_text(tokenizer, draw(run, prompt, 9, 1)) + "\n"


def test_a_sample_ends_with_the_text_and_ids_of_no_token_are_left_out(run, toy, shown):
    """The output has rows beyond the tokenizer's ids, to a round number."""
    state = checkpoint.load(run)
    decoder = checkpoint.load_model(state)
    tokenizer = data.load_tokenizer(toy)
    word, padding = tokenizer.encode_ordinary("ab")[0], TOY_VOCAB + 3
    with torch.no_grad():  # the token before decides: ab -> padding -> c -> <|endoftext|>
        for p in decoder.parameters():
            p.zero_() if p.dim() == 2 else p.fill_(1)
        for i, (now, after) in enumerate(
            [(ord("b"), padding), (padding, ord("c")), (ord("c"), END), (END, word)]
        ):
            decoder.model.embed_tokens.weight[now, i] = decoder.lm_head.weight[after, i] = 1
    checkpoint.save(run, state | {"model": decoder.state_dict()}, keep=1)
    assert shown("--prompt=ab", "--temperature=0", "--tokens=50") == "abc\n"


def test_a_character_of_several_tokens_comes_whole(toy):
    tokenizer = data.load_tokenizer(toy)
    ids = tokenizer.encode_ordinary("a日é👍b")  # every byte a token
    assert len(ids) == 1 + 3 + 2 + 4 + 1
    assert list(sample.pieces(tokenizer, ids[:1], ids[1:])) == ["日", "é", "👍", "b", ""]
    assert list(sample.pieces(tokenizer, [], ids[:-2])) == ["a", "日", "é", "\ufffd"]  # it ends within 👍
    assert "".join(sample.pieces(tokenizer, [], [0xFF, ord("a")])) == "\ufffda"  # never a character


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tokens=0"], "tokens must be at least 1"),
        (["--temperature=-1"], "temperature must be 0"),
        (["--temperature=1e-40"], "or from 0.001 to 1000, got 1e-40"),
        (["--temperature=1e39"], "or from 0.001 to 1000, got 1e+39"),
        (["--seed=99999999999999999999"], "seed must be below 2**63"),
        (["--prompt=" + " " * 2**20], "1,048,576 characters, at most 262,144 are taken"),
        (["--samples=0"], "samples must be at least 1"),
        (["--top_k=-1"], "top_k must be at least 0"),
        (["--prompt=a", "--file=b"], "not both"),
        (["--file=nowhere.txt"], "cannot read the prompt from nowhere.txt"),
        (["--temp=1"], "unknown key"),
        (["out/other"], "name one run's folder or checkpoint"),
    ],
)
def test_bad_input_ends_with_one_line(shown, flags, says):
    refuses(lambda: shown(*flags), says)


def test_a_prompt_that_is_no_text_or_of_another_vocabulary_is_refused(run, shown):
    refuses(lambda: shown(stdin=b"\xff\xfe"), "cannot read the prompt from standard input")
    small = ModelConfig(**vars(MODEL) | {"vocab_size": 300})
    checkpoint.save(run, {"step": 8, "model": Decoder(small).state_dict(), "config": vars(small)}, keep=1)
    refuses(lambda: shown("--prompt=<|mask|>"), f"token id {END + 1}, the model 300")
