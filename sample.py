"""Generates text from a checkpoint, and shows it as it comes.

    python sample.py out/demo --prompt="The function returns" --tokens=100
    python sample.py out/demo --samples=3 --temperature=0.8 --top_k=50 --seed=2 < prompt.txt

The first argument is a run's folder (its newest checkpoint is used) or a checkpoint file. A sample ends
early where the model ends the text. Without --prompt the prompt comes from standard input, without the
newline that `echo` adds. An empty prompt begins a text. <|endoftext|> and <|mask|> in a prompt are read as
the special tokens.
"""
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from nanomaml import checkpoint, config, machine
from nanomaml.config import Count, Natural, UserError, require
from nanomaml.tokenizer import load_tokenizer

MAX_PROMPT = 2**18  # characters: a tokenizer's pattern fails on a million blanks
Temperature = Annotated[float, "0 (always the likeliest token) or from 0.001 to 1000",
                        lambda x: x == 0 or 1e-3 <= x <= 1e3]


@dataclass(frozen=True)
class Config(config.Settings):
    prompt: str = ""  # text to continue
    tokens: Count = 200  # most tokens of a sample; each is drawn after at most the last `context` tokens
    samples: Count = 1  # samples, one after the other
    temperature: Temperature = 0.8  # of the softmax; 0: always the likeliest token
    top_k: Natural = 50  # draw only from the likeliest k tokens; 0: from all
    seed: Natural = 1  # of the first sample; the next has seed + 1, and so on
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: machine.Dtype = "auto"  # of matrix products; auto: bfloat16 where the hardware has it


def pieces(tokenizer, ids, new_ids):
    """Yields what each of new_ids adds to the text of `ids`; a character of several tokens comes whole."""
    ids = list(ids)
    shown = len(tokenizer.decode(ids))
    for new in new_ids:
        ids.append(new)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an unfinished character
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def main(argv):
    source, flags = config.one_operand(Config, argv)
    cfg, source = config.load(Config, flags, __doc__), Path(source)
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    decoder = checkpoint.load_model(source).to(device)
    tokenizer = load_tokenizer(source if source.is_dir() else source.parent, decoder.cfg.vocab_size)
    text, end = cfg.prompt, tokenizer.eot_token
    if not text and sys.stdin and not sys.stdin.isatty():  # None: it is closed
        try:
            text = re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read(4 * MAX_PROMPT + 4).decode())
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read the prompt from standard input: {error}") from None
    require(len(text) <= MAX_PROMPT, f"the prompt has {len(text):,} characters, more than {MAX_PROMPT:,}")
    prompt = tokenizer.encode(text, allowed_special="all") or [end]

    for i in range(cfg.samples):
        if cfg.samples > 1:
            print(f"---- sample {i + 1}, seed {cfg.seed + i} ----")
        print(text, end="", flush=True)
        generator = torch.Generator(device).manual_seed(cfg.seed + i)
        ids = torch.tensor([prompt], device=device)
        with machine.autocast(device, dtype):
            sampled = decoder.sample(ids, cfg.tokens, cfg.temperature, cfg.top_k or None, generator)
            until_end = itertools.takewhile(lambda new: new != end, (new.item() for new in sampled))
            known = (new for new in until_end if new < tokenizer.n_vocab)  # the last rows may be padding
            for piece in pieces(tokenizer, prompt, known):
                print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    config.run(main)
