"""Text from a checkpoint, shown as it is made.

    python sample.py out/demo --prompt="The function returns" --tokens=100
    python sample.py out/demo --samples=3 --temperature=0.8 --top_k=50 --seed=2 < prompt.txt

The first argument is a run's folder (its newest checkpoint is used) or a checkpoint file. A sample ends
early where the model ends the text. Without --prompt and --file the prompt comes from standard input, unless
that is a terminal or closed, and less one newline at its end, which `echo` adds; a file is read as it is. An
empty prompt is the beginning of a text. <|endoftext|> and <|mask|> in a prompt are these tokens.
"""
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import config
import data
import machine
from config import UserError, require

MAX_PROMPT = 2**18  # characters: a tokenizer's pattern fails on a million blanks


@dataclass(frozen=True)
class Config:
    prompt: str = ""  # text to continue
    file: str = ""  # a file that holds it
    tokens: int = 200  # most tokens of a sample; beyond the context each is drawn after the last `context`
    samples: int = 1  # samples, one after the other
    temperature: float = 0.8  # of the softmax; 0: always the likeliest token
    top_k: int = 50  # draw from the likeliest k tokens alone; 0: from all
    seed: int = 1  # of the first sample; the next has seed + 1, and so on
    device: str = "auto"  # auto: cuda, else mps, else cpu; or a name like cuda:1
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where the hardware has it

    def __post_init__(self):
        config.require_at_least(self, 1, "tokens", "samples")
        config.require_at_least(self, 0, "top_k", "seed")
        require(self.temperature == 0 or 1e-3 <= self.temperature <= 1e3, "temperature must be 0 (always the "
                f"likeliest token) or from 0.001 to 1000, got {self.temperature:g}")
        config.require_choice(self, "dtype", *machine.DTYPES)
        require(not (self.prompt and self.file), "give --prompt or --file, not both")


def read_prompt(cfg):
    if cfg.prompt or not cfg.file and (sys.stdin is None or sys.stdin.isatty()):
        return cfg.prompt
    try:
        if cfg.file:
            return Path(cfg.file).read_bytes().decode()
        return re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt from {cfg.file or 'standard input'}: {error}") from None


def pieces(tokenizer, ids, new_ids):
    """Yields what each of new_ids (any iterable of ints) adds to the text of `ids`.

    A character may be spread over several tokens: it comes whole, with the last of them.
    """
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
    given, flags = config.operands(argv)
    cfg = config.load(Config, flags, __doc__)
    require(len(given) == 1, "name one run's folder or checkpoint, for instance out/demo; got "
                             f"{', '.join(given) or 'none'}")
    device, dtype = machine.pick_device(cfg.device, cfg.dtype)
    source = Path(given[0])
    decoder = checkpoint.load_model(source).to(device)
    tokenizer = data.load_tokenizer(source if source.is_dir() else source.parent)
    end = tokenizer.eot_token
    text = read_prompt(cfg)
    require(len(text) <= MAX_PROMPT, f"the prompt has {len(text):,} characters, at most {MAX_PROMPT:,} are "
            f"taken: give its end, since the model reads the last {decoder.cfg.context:,} tokens alone")
    prompt = tokenizer.encode(text, allowed_special="all") or [end]
    require(max(prompt) < decoder.cfg.vocab_size, f"the prompt has the token id {max(prompt)}, the model "
            f"{decoder.cfg.vocab_size} ids: put the run's tokenizer.json beside the checkpoint")

    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model has
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
