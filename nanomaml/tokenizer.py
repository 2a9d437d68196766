"""Tokenizer files: tokenizer.json, ours or Hugging Face's, to a tokenizer and back."""
import base64
import json
import re
from pathlib import Path

import numpy as np
import tiktoken

from nanomaml import files
from nanomaml.config import UserError, one_line, require

SPECIAL = ("<|endoftext|>", "<|mask|>")
PROBE = "Some words, 3 of them;\n\tnot\u00e9s.  "


def encoding(name, pattern, ranks):
    """The tiktoken Encoding of these merges, with the special tokens after them."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# ---- Hugging Face's ----


def byte_characters():
    """{byte: the character that stands for it in byte-level tokenizers}, of GPT-2 (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def hugging_face_tokenizer(content):
    """The tokenizers.Tokenizer of the content of a Hugging Face tokenizer.json."""
    try:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # ImportError, and whatever tokenizers raises: it has no exception class
        raise UserError(f"cannot read tokenizer.json ({error}): pip install -U tokenizers") from None


def hugging_face_spec(folder):
    """The content of our tokenizer.json, made from a Hugging Face folder's and the files beside it."""
    folder = Path(folder)
    content, settings, special, model = (
        files.parse((folder / name).read_bytes()) if (folder / name).exists() else None
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"))
    require(content is not None, f"cannot read a JSON object from {folder / 'tokenizer.json'} (a pico "
            "model's tokenizer is allenai/OLMo-7B-0724-hf's: ids of another would run and mean nothing)")
    content |= {"truncation": None, "padding": None}
    settings, model = (special or {}) | (settings or {}), model or {}
    settings.pop("auto_map", None)  # custom code
    known, ids = hugging_face_tokenizer(content), {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token, number = settings.get(key), model.get(f"{key}_id")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            number = known.token_to_id(str(token))  # an added token's, if there is one
            require(number is not None, f"tokenizer.json of {folder} lacks the {key} {token!r}")
        ids[f"{key}_id"] = number[0] if isinstance(number, list) and number else number
    require(ids["eos_token_id"] in known.get_vocab().values(), f"{folder} names no token that ends a text: "
            "give eos_token in tokenizer_config.json, as the model was trained")
    return {"name": HuggingFaceTokenizer.name, "tokenizer": content, "config": settings, "ids": ids}


def download(name):
    """The folder with the tokenizer files of a model of the Hugging Face hub."""
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name), f"tokenizer = {name!r} is neither train, gpt2, a "
            "folder with a tokenizer.json nor USER/NAME on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"there is no {name}/tokenizer.json; to look for {name} on the Hugging Face hub, "
                        "pip install huggingface_hub") from None
    try:
        return snapshot_download(name, allow_patterns=[
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
    except Exception as error:  # network, name, access: whatever the library raises
        raise UserError(f"neither {name}/tokenizer.json nor the Hugging Face hub has that tokenizer: "
                        f"{type(error).__name__}: {one_line(error, 200)}") from None


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer, with the methods of a tiktoken Encoding that are used here.

    n_vocab counts its own ids. The next id is <|mask|>, unless it has a token of that name.
    rows: the vocabulary size of the model that reads it, if known.
    """

    name = "huggingface"

    def __init__(self, spec, rows=None):
        self.spec, self.rows, self.eot_token = spec, rows, spec["ids"]["eos_token_id"]
        self.special, self.ordinary = (hugging_face_tokenizer(spec["tokenizer"]) for _ in range(2))
        self.ordinary.encode_special_tokens = True  # special tokens as plain text
        vocabulary = self.special.get_vocab()
        self.n_vocab = 1 + max(vocabulary.values(), default=-1)  # ids may have gaps
        self.mask_id = vocabulary.get(SPECIAL[1], self.n_vocab)

    def encode(self, text, allowed_special="all"):
        """The ids of a text that begins here and goes on: special tokens, <|mask|> too, are read as such, and
        of those that the tokenizer adds, only those before the text stay.
        """
        first, *rest = text.split(SPECIAL[1])
        whole, ids = self.special.encode(first).ids, self.special.encode(first, add_special_tokens=False).ids
        start = next(n for n in range(len(whole) + 1) if whole[n:n + len(ids)] == ids)
        ids = whole[:start] + ids
        for part in rest:
            ids += [self.mask_id, *self.special.encode(part, add_special_tokens=False).ids]
        return ids

    def encode_ordinary(self, text):
        # A batch of one, since `encode` blocks other threads of Python.
        return self.ordinary.encode_batch([text], add_special_tokens=False)[0].ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), np.uint32)

    def encode_single_token(self, token):
        """The id of <|mask|>. UserError where the model has no row for it."""
        require(token == SPECIAL[1] and (self.rows is None or self.mask_id < self.rows),
                f"vocab_size = {self.rows} leaves no row for {token}, which episodes read: the tokenizer has "
                f"{self.n_vocab} ids, so give at least {self.mask_id + 1}, or set meta_share = eval_episodes "
                "= 0")
        return self.mask_id

    def decode(self, ids):
        parts = [[]]
        for i in ids:
            parts.append([]) if i == self.mask_id else parts[-1].append(i)
        return SPECIAL[1].join(self.special.decode(part, skip_special_tokens=False) for part in parts)

    def token_bytes(self):
        """{id: bytes} of the tokens that are text. UserError if tokens do not show their bytes."""
        content = self.spec["tokenizer"]
        model = content["model"]
        added = {token["content"]: token for token in content.get("added_tokens") or []}  # ids may differ
        steps = json.dumps([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
        is_byte_level = '"ByteLevel"' in steps
        require(is_byte_level or r"\u2581" in steps, "episodes find words in byte-level tokenizers and in "
                f"those that write a blank as \u2581; this one ({model.get('type')}) is neither: set "
                "meta_share = eval_episodes = 0")
        byte_of = {character: bytes([i]) for i, character in byte_characters().items()}
        result = {}
        for token, i in self.special.get_vocab().items():
            if token in added:
                text = b"" if added[token].get("special") else token.encode()
            elif is_byte_level:
                text = b"".join(byte_of.get(c, c.encode()) for c in token)
            elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
                text = bytes([int(token[3:5], 16)])
            else:
                text = token.replace("\u2581", " ").encode()
            if text:
                result[i] = text
        return result


def token_bytes(tokenizer):
    """{id: bytes} of a tokenizer's tokens that are text; the special ones are not."""
    if tokenizer.name == HuggingFaceTokenizer.name:
        return tokenizer.token_bytes()
    return {i: token for token, i in tokenizer._mergeable_ranks.items()}


# ---- files ----


class NoDownload(UserError):
    """tiktoken has no GPT-2 tokenizer in its cache, and cannot download it."""


def read_spec(source):
    """The content of a tokenizer.json: {"name": "gpt2"}, or name, pattern and tokens. `source` as below.

    For a Hugging Face tokenizer: name, its files as "tokenizer" and "config", and "ids" of special tokens.
    """
    if source == "gpt2":
        return {"name": source}
    path = Path(source)
    require(path.exists(), f"no tokenizer at {source}: give 'gpt2' or a folder that holds a tokenizer.json")
    path = path if path.is_file() else path / "tokenizer.json"
    if not path.exists():
        require(not path.with_name("meta.pkl").exists(),
                f"{source} holds nanoGPT's characters (meta.pkl): prepare the text with prepare.py")
        return {"name": "gpt2"}
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if "name" not in spec and "model" in spec:
            return hugging_face_spec(path.parent)
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
        raise ValueError("its tokens lack a byte, or hold one token twice")
    return {token: rank for rank, token in enumerate(tokens)}


def load_tokenizer(source, vocab_size=None):
    """A tiktoken Encoding with <|endoftext|> and <|mask|>: "gpt2", or a folder of bins or of a run.

    A folder without a tokenizer.json (bins from elsewhere) is taken to hold GPT-2 tokens. A Hugging Face
    tokenizer.json gives a HuggingFaceTokenizer. UserError if it has more than `vocab_size` ids.
    """
    spec = read_spec(source)
    if spec["name"] == HuggingFaceTokenizer.name:
        tokenizer = HuggingFaceTokenizer(spec, vocab_size)
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
