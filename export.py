"""Hugging Face folders, out and in: which way follows from what the first argument is.

    python export.py out/demo --to=hf/demo             # a run (its newest checkpoint) or a checkpoint, out
    python export.py hf/pico-decoder-small --to=out/pico-small         # a Hugging Face folder, in

Out: config.json, model.safetensors, tokenizer.json, tokenizer_config.json and a model card, which
AutoModelForCausalLM and AutoTokenizer of transformers 4.57 and 5 load without custom code. In: any model of
Llama's architecture, or pico-decoder and pico-maml-decoder, with its tokenizer, to a run's folder that
eval_ner.py, probes.py --data=..., sample.py and train.py --init_from read. Needs pip install safetensors.
"""
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import checkpoint
import config
import data
from config import UserError, require
from model import Decoder, ModelConfig
from report import markdown, read_jsonl


@dataclass(frozen=True)
class Config:
    to: str = ""  # the folder to write, new or empty


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("weights are read and written with a package: pip install safetensors") from None
    return safetensors.torch


def differences(weights, cfg):
    """Up to four names with shapes that only the weights or only the decoder have, as text; "": none."""
    with torch.device("meta"):
        expected = Decoder(cfg).state_dict()
    here, there = ({f"{name} {list(p.shape)}" for name, p in state.items()} for state in (expected, weights))
    names = sorted(here ^ there)
    return ", ".join(names[:4]) + " ..." * (len(names) > 4)


def make_folder(path):
    """Makes the folder, new or empty: a run and an export have other files of the same names."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        require(not any(path.iterdir()), f"--to={path} holds files already: name a new folder")
    except OSError as error:
        raise UserError(f"cannot write to --to={path}: {error.strerror}") from None
    return path


# ---- out: the tokenizer ----


def byte_characters():
    """The 256 characters that stand for bytes in byte-level tokenizers, as of GPT-2 (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def last_merge(token, ranks):
    """The two tokens that `token` is merged from last, or None where merges do not lead to it.

    The tokens between two borders are merged as if they stood alone, unless a merge crosses a border; so it
    is always this pair, and no other way to split the token is ever met.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        if pairs[i] == ranks[token]:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_files(tokenizer, context):
    """(tokenizer.json, tokenizer_config.json, {"bos_token_id": ..., "eos...", "pad..."}), as dicts."""
    if tokenizer.name == data.HuggingFaceTokenizer.name:
        return tokenizer.spec["tokenizer"], tokenizer.spec["config"], tokenizer.spec["ids"]
    ranks, characters = tokenizer._mergeable_ranks, byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str}, "behavior": "Isolated",
             "invert": False}
    end, mask = data.SPECIAL
    special = [{"id": tokenizer.encode_single_token(token), "content": token, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for token in (end, mask)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token needs no merges, as in tiktoken
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": [[text[a], text[b]] for a, b in filter(None, merges)],
        },
    }, {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
        # Documents end with <|endoftext|>, so it comes before each as well.
        "bos_token": end, "eos_token": end, "pad_token": end, "mask_token": mask, "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids
    }, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_token)


# ---- out: the folder ----


def model_config(cfg, special_ids):
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model, "intermediate_size": cfg.d_hidden, "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_model // cfg.n_heads, "max_position_embeddings": cfg.context, "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps, "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False,
        "rope_theta": cfg.rope_theta,  # transformers 4 reads this one, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": False, "torch_dtype": "float32",
    } | special_ids


def model_card(folder, state, parameters):
    """README.md: the last metrics up to this checkpoint, and the settings of the run."""
    last = {}
    for line in read_jsonl(folder / "log.jsonl", "step"):
        last |= line if line["step"] <= state["step"] else {}
    kinds = ("tokens", "flops", "seconds", "train/", "meta/query", "val/")
    rows = [["", f"at step {state['step']:,}"]]
    rows += [[key, f"{value:,.6g}"] for key, value in last.items() if key.startswith(kinds)]
    metrics = markdown(rows) + "\n\nLosses are in nats a token." if len(rows) > 1 else "No metrics were kept."
    origin = """trained by nanoMAML: next-token prediction,
mixed with first-order MAML on Subset-Masked-LM episodes where `meta_share` is not 0. The episode head is left
out."""
    if "imported_from" in state["config"]:
        origin = f"imported from\n`{Path(state['config']['imported_from']).name}`, and not trained since."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {folder.resolve().name}

A decoder of Llama's architecture, {parameters:,} parameters, {origin}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (auto.from_pretrained(".") for auto in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("The function returns", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

{metrics}

## Settings

```json
{json.dumps(state["config"], indent=1)}
```
"""


def write_export(source, folder):
    """Writes a checkpoint as a Hugging Face folder: returns what to print."""
    state = checkpoint.load(source)
    cfg = checkpoint.load_config(ModelConfig, state)
    run = source if source.is_dir() else source.parent
    others = differences(state["model"], cfg)
    require(not others, f"{source} is not of Llama's architecture, which transformers reads: {others}")
    tokenizer = data.load_tokenizer(run)
    require(tokenizer.n_vocab <= cfg.vocab_size, f"the tokenizer of {run} has {tokenizer.n_vocab} ids, the "
            f"model {cfg.vocab_size}: put the run's tokenizer.json beside the checkpoint")
    tokenizer_json, tokenizer_config, special_ids = tokenizer_files(tokenizer, cfg.context)
    files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config,
             "config.json": model_config(cfg, special_ids)}
    weights = {name: p.clone() for name, p in state["model"].items()}  # tied ones are written twice
    parameters = sum(p.numel() for p in weights.values())
    card = model_card(run, state, parameters)
    content = safetensors().save(weights, metadata={"format": "pt"})
    folder = make_folder(folder)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(content)
    return f"{parameters:,} parameters after {state['step']:,} steps; AutoModelForCausalLM loads it"


# ---- in ----

# pico-decoder's settings and modules (github.com/pico-lm/pico-train), and Llama's
LLAMA_KEYS = {
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "d_hidden": "intermediate_size", "vocab_size": "vocab_size",
    "context": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}
PICO_KEYS = {
    "d_model": "d_model", "n_layers": "n_layers", "n_heads": "attention_n_heads",
    "n_kv_heads": "attention_n_kv_heads", "d_hidden": "activation_hidden_dim", "vocab_size": "vocab_size",
    "context": "max_seq_len", "rope_theta": "position_emb_theta", "norm_eps": "norm_eps",
}
PICO_MODULES = {
    "embedding_proj": "model.embed_tokens", "output_norm": "model.norm", "de_embedding_proj": "lm_head",
    "attention_norm": "input_layernorm", "swiglu_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj", "attention.o_proj": "self_attn.o_proj",
    "swiglu.w_0": "mlp.gate_proj", "swiglu.w_1": "mlp.up_proj", "swiglu.w_2": "mlp.down_proj",
}


def read_json(path, remedy):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(content, dict), f"{path} is no JSON object: {remedy}")
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}): {remedy}") from None


def read_config(folder):
    """(ModelConfig, config.json) of a Hugging Face folder; refuses what this decoder cannot compute."""
    there = read_json(folder / "config.json", "download the whole folder")
    kind = there.get("model_type")
    require(kind in ("llama", "pico_decoder"),
            f"{folder} holds a model of type {kind!r}: llama and pico_decoder are known")
    ropes = [there.get(key) or {} for key in ("rope_parameters", "rope_scaling")]  # transformers 5, and 4
    require(all(isinstance(rope, dict) for rope in ropes),
            f"{folder}/config.json: rope_parameters or rope_scaling is no JSON object: download it again")
    there = {"rope_theta": ropes[0].get("rope_theta", 10000.0), "rms_norm_eps": 1e-6, **there}
    keys = LLAMA_KEYS if kind == "llama" else PICO_KEYS
    if kind == "llama" and there.get("num_key_value_heads") is None:
        there["num_key_value_heads"] = there.get("num_attention_heads")
    missing = [key for key in keys.values() if there.get(key) is None]
    require(not missing, f"{folder}/config.json lacks {', '.join(missing)}")
    kinds = {field.name: field.type for field in fields(ModelConfig)}
    cfg = ModelConfig(**{
        ours: config.convert(f"{folder}/config.json: {theirs}", there[theirs], kinds[ours], is_text=False)
        for ours, theirs in keys.items()})
    head_dim = there.get("head_dim") or cfg.d_model // cfg.n_heads
    for is_other, what in (
        (any(rope.get("rope_type", rope.get("type", "default")) != "default" for rope in ropes),
         "scaled rotary positions"),
        (any(place.get("partial_rotary_factor", 1) != 1 for place in (there, *ropes)), "partial rotation"),
        (there.get("attention_bias") or there.get("mlp_bias"), "biases"),
        (head_dim * cfg.n_heads != cfg.d_model,
         f"heads of {head_dim} channels, not of {cfg.d_model} / {cfg.n_heads}"),
        (there.get("hidden_act", "silu") != "silu", f"the activation {there.get('hidden_act')}, not silu"),
        (there.get("quantization_config"), "quantized weights"),
    ):
        require(not is_other, f"{folder} holds a model with {what}, which model.py does not have")
    return cfg, there


def read_weights(folder):
    """{name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        shards = read_json(index, "download it again").get("weight_map")
        require(isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values()),
                f"{index} has no weight_map of names to files: download it again")
        names = sorted(set(shards.values()))
    weights, pickled = {}, folder / "pytorch_model.bin"
    for name in names:
        require((folder / name).exists() or not pickled.exists(),
                f"{folder / name} is missing: make it of {pickled.name} with python -c \"import torch, "
                f"safetensors.torch as s; w = torch.load({str(pickled)!r}, 'cpu', weights_only=True); "
                f"s.save_file({{k: w[k].clone().contiguous() for k in w}}, {str(folder / name)!r})\"")
        require((folder / name).exists(), f"{folder / name} is missing: download it; transformers' "
                "save_pretrained makes safetensors of other formats")
        try:
            weights |= safetensors().load_file(folder / name)
        except UserError:
            raise
        except Exception as error:  # safetensors has its own
            raise UserError(f"cannot read {folder / name} ({error}): download it again") from None
    return weights


def as_llama(weights, cfg, is_pico, is_tied):
    """The weights under Llama's names, in float32, with q and k laid out for its rotation."""
    result = {}
    for name, w in weights.items():
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold what rope_theta says
            continue
        require(w.is_floating_point() and w.element_size() > 1,
                f"{name} is of type {w.dtype}: float32, float16 and bfloat16 are known")
        if is_pico:
            layer, module = re.fullmatch(r"(?:pico_decoder\.)?(layers\.\d+\.)?(.+)", name).groups()
            module, _, kind = module.rpartition(".")
            name = f"{'model.' + layer if layer else ''}{PICO_MODULES.get(module, module)}.{kind}"
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # It rotates channels 2c and 2c + 1 of a head, Llama c and c + C / 2.
                channels = cfg.d_model // cfg.n_heads
                if len(w) % channels == 0:  # else the shape is refused
                    w = w.unflatten(0, (-1, channels // 2, 2)).transpose(1, 2).flatten(0, 2)
        result[name] = w.float()
    # An output matrix that is there is used: so does pico's code, and transformers 5 (4.57 would tie).
    if is_tied and "model.embed_tokens.weight" in result and "lm_head.weight" not in result:
        result["lm_head.weight"] = result["model.embed_tokens.weight"].clone()
    return result


def read_tokenizer(folder, there, is_pico):
    """The content of our tokenizer.json, made of those of a Hugging Face folder."""
    whose = ", for a pico model allenai/OLMo-7B-0724-hf's" * is_pico
    remedy = f"put the model's own tokenizer.json and tokenizer_config.json there{whose}; ids of another " \
             "tokenizer would run and mean nothing"
    tokenizer = read_json(folder / "tokenizer.json", remedy)
    settings = read_json(folder / "tokenizer_config.json", remedy)
    require("model" in tokenizer, f"{folder}/tokenizer.json is not one of Hugging Face: {remedy}")
    settings.pop("auto_map", None)  # custom code
    tokenizer |= {"truncation": None, "padding": None}
    known, ids = data.hugging_face_tokenizer(tokenizer), {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token, number = settings.get(key), there.get(f"{key}_id")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            number = number[0] if isinstance(number, list) and number else number
        else:
            number = known.token_to_id(str(token))  # of an added token, else of any
            require(number is not None, f"{folder}/tokenizer_config.json names the {key} {token!r}, which "
                                        "tokenizer.json does not have: download both again")
        ids[f"{key}_id"] = number
    require(ids["eos_token_id"] in known.get_vocab().values(), f"{folder} names no token that ends a text: "
            "give eos_token in tokenizer_config.json, as the model was trained")
    return {"name": data.HuggingFaceTokenizer.name, "tokenizer": tokenizer, "config": settings, "ids": ids}


def write_import(source, folder):
    """Writes a Hugging Face folder as a run's folder: returns what to print."""
    cfg, there = read_config(source)
    is_pico = there["model_type"] == "pico_decoder"
    tokenizer = data.HuggingFaceTokenizer(read_tokenizer(source, there, is_pico))
    require(tokenizer.n_vocab <= cfg.vocab_size, f"the tokenizer of {source} has {tokenizer.n_vocab} ids, "
            f"the model {cfg.vocab_size}: put the model's own there")
    weights = as_llama(read_weights(source), cfg, is_pico, there.get("tie_word_embeddings", False))
    others = differences(weights, cfg)
    require(not others, f"the weights in {source} are not those that its config.json says: {others}")
    folder = make_folder(folder)
    settings = {"out_dir": str(folder), "data": "unknown", "imported_from": str(source)} | asdict(cfg)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    data.save_tokenizer(tokenizer, folder)
    state = {"step": 0, "tokens": 0, "model": weights, "config": settings, "optimizers": []}
    checkpoint.save(folder, state, keep=1)  # without optimizers a resume would call it damaged
    parameters = sum(p.numel() for p in weights.values())
    return f"{parameters:,} parameters; for eval_ner.py, probes.py --data, sample.py, train.py --init_from"


def main(argv):
    given, flags = config.operands(argv)
    cfg = config.load(Config, flags, __doc__)
    require(len(given) == 1, "name one run, checkpoint or Hugging Face folder, for instance out/demo; got "
                             f"{', '.join(given) or 'none'}")
    require(cfg.to, "name the folder to write, --to=FOLDER")
    source = Path(given[0])
    is_run = source.is_file() or bool(checkpoint.paths(source))
    require(is_run or (source / "config.json").exists(),
            f"{source} is no run (ckpt_*.pt), no checkpoint and no Hugging Face folder (config.json)")
    try:
        print(f"{cfg.to}: {(write_export if is_run else write_import)(source, cfg.to)}", flush=True)
    except OSError as error:
        raise UserError(f"cannot write to --to={cfg.to}: {error.strerror}") from None


if __name__ == "__main__":
    config.run(main)
