"""Tokenizer files: tokenizer.json beside bins, runs and imported models, to a tokenizer and back."""
import base64
import json
from pathlib import Path

import numpy as np
import tiktoken

from nanomaml import files
from nanomaml.config import UserError, one_line, require

SPECIAL = ("<|endoftext|>", "<|mask|>")
PROBE = "Some words, 3 of them;\n\tnot\u00e9s.  "


def encoding(name, pattern, ranks):
    """The tiktoken Encoding of these merges, with the special tokens behind them."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def hugging_face_tokenizer(content):
    """The tokenizers.Tokenizer of the content of a Hugging Face tokenizer.json."""
    try:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # ImportError, and whatever tokenizers raises: it has no class of its own
        raise UserError(f"cannot read the model's tokenizer.json ({error}): update tokenizers") from None


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
        raise UserError("an imported model's tokenizer has no episodes: set meta_share = eval_episodes = 0")


class NoDownload(UserError):
    """tiktoken has no GPT-2 tokenizer at hand."""


def read_spec(source):
    """The content of a tokenizer.json: {"name": "gpt2"}, or name, pattern and tokens. `source` as below.

    Of an imported model: name, the Hugging Face "tokenizer" and its "config", and "ids" of special tokens.
    """
    if source == "gpt2":
        return {"name": source}
    path = Path(source)
    require(path.exists(), f"no tokenizer at {source}: give 'gpt2' or a folder that holds a tokenizer.json")
    path = path if path.is_file() else path / "tokenizer.json"
    if not path.exists():
        require(not path.with_name("meta.pkl").exists(),
                f"{source} holds characters, of nanoGPT (meta.pkl): prepare the text with prepare.py")
        return {"name": "gpt2"}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["name"] == HuggingFaceTokenizer.name:
            spec["tokenizer"], spec["config"], spec["ids"]["eos_token_id"]
        elif spec["name"] != "gpt2":
            known = spec["pattern"] and encoding(spec["name"], spec["pattern"], token_ranks(spec))
            if not known or known.decode(known.encode_ordinary(PROBE)) != PROBE:
                raise ValueError("its pattern loses text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer that prepare.py wrote ({type(error).__name__}: "
                        f"{one_line(error, 200)})") from None
    return spec


def token_ranks(spec):
    """{bytes of a token: its id} of a tokenizer that prepare.py wrote; ValueError where it is not whole."""
    tokens = [base64.b64decode(token, validate=True) for token in spec["tokens"]]
    if not {bytes([i]) for i in range(256)} <= set(tokens) or len(set(tokens)) < len(tokens):
        raise ValueError("its tokens do not hold every byte, or one of them twice")
    return {token: rank for rank, token in enumerate(tokens)}


def load_tokenizer(source, vocab_size=None):
    """A tiktoken Encoding with <|endoftext|> and <|mask|>: "gpt2", or that of a folder of bins or of a run.

    A folder without a tokenizer.json (bins from elsewhere) is taken to hold GPT-2 tokens. Of an imported
    model it is a HuggingFaceTokenizer. UserError where it has more than `vocab_size` ids.
    """
    spec = read_spec(source)
    if spec["name"] == HuggingFaceTokenizer.name:
        tokenizer = HuggingFaceTokenizer(spec)
    elif spec["name"] != "gpt2":
        tokenizer = encoding(spec["name"], spec["pattern"], token_ranks(spec))
    else:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets the HTTP client's own errors through
            raise NoDownload(f"tiktoken cannot download its gpt2 tokenizer ({type(error).__name__}): copy "
                             "its cache from another machine and set TIKTOKEN_CACHE_DIR to it") from None
        tokenizer = encoding("gpt2", gpt2._pat_str, gpt2._mergeable_ranks)
    require(vocab_size is None or tokenizer.n_vocab <= vocab_size,
            f"the tokenizer of {source} has {tokenizer.n_vocab} ids, vocab_size = {vocab_size}")
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Writes folder/tokenizer.json, which `load_tokenizer(folder)` reads; for gpt2 the name is enough."""
    spec = {"name": tokenizer.name}
    if tokenizer.name == HuggingFaceTokenizer.name:
        spec = tokenizer.spec
    elif tokenizer.name != "gpt2":
        ranks = tokenizer._mergeable_ranks
        tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
        spec |= {"pattern": tokenizer._pat_str, "tokens": tokens}
    files.replace(Path(folder, "tokenizer.json"), json.dumps(spec))
