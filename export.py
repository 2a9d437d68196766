"""Writes and reads Hugging Face folders; the first argument decides which.

    python export.py out/demo --to=hf/demo             # a run (its newest checkpoint) or a checkpoint, out
    python export.py hf/pico-decoder-small --to=out/pico-small         # a Hugging Face folder, in

Out: a folder that AutoModelForCausalLM and AutoTokenizer of transformers 4.57 and 5 load without custom code,
with a model card. In: a model of Llama's architecture, pico-decoder or pico-maml-decoder, with its tokenizer
and its weights in one file, becomes a run's folder that eval_ner.py, probes.py --data=..., sample.py and
train.py --init_from read. Needs pip install safetensors.
"""
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from model import ModelConfig
from nanomaml import checkpoint, config, files
from nanomaml import tokenizer as tokenizers
from nanomaml.config import UserError, require

# ModelConfig's fields in a config.json of Llama and of pico-decoder (github.com/pico-lm/pico-train), and
# pico-decoder's modules in Llama.
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


@dataclass(frozen=True)
class Config(config.Settings):
    to: str = ""  # the folder to write, new or empty


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("weights are read and written with a package: pip install safetensors") from None
    return safetensors.torch


def llama_shapes(cfg):
    """{name: shape} of the weights of transformers' LlamaForCausalLM, whatever else model.py may have."""
    D, hidden, keys = cfg.d_model, cfg.d_hidden, cfg.n_kv_heads * (cfg.d_model // cfg.n_heads)
    layer = {
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
        "self_attn.q_proj": (D, D), "self_attn.k_proj": (keys, D), "self_attn.v_proj": (keys, D),
        "self_attn.o_proj": (D, D), "mlp.gate_proj": (hidden, D), "mlp.up_proj": (hidden, D),
        "mlp.down_proj": (D, hidden),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(cfg.n_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (cfg.vocab_size, D), "model.norm": (D,), "lm_head": (cfg.vocab_size, D)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def require_llama(weights, tokenizer, cfg, source):
    """Refuses weights that do not fit a Llama of this shape, and a tokenizer with more ids."""
    require(tokenizer.n_vocab <= cfg.vocab_size, f"the tokenizer of {source} has {tokenizer.n_vocab} ids, "
            f"the model {cfg.vocab_size}: put the model's own tokenizer.json there")
    others = llama_shapes(cfg).items() ^ {(name, tuple(p.shape)) for name, p in weights.items()}
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(others)[:4])
    require(not others, f"the weights of {source} do not fit a Llama with its settings: {listed}")


def last_merge(token, ranks):
    """The two tokens that `token` is merged from last, or None where merges do not lead to it.

    The tokens between two borders are merged as if they stood alone, unless a merge crosses a border; so it
    is always this pair, and no other way to split the token ever occurs.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == ranks[token]:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_files(tokenizer, context):
    """(tokenizer.json, tokenizer_config.json, {"bos_token_id": ..., "eos...", "pad..."}), as dicts."""
    if tokenizer.name == tokenizers.HuggingFaceTokenizer.name:
        return tokenizer.spec["tokenizer"], tokenizer.spec["config"], tokenizer.spec["ids"]
    ranks, characters = tokenizer._mergeable_ranks, tokenizers.byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = {"Regex": tokenizer._pat_str}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    end, mask = tokenizers.SPECIAL
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


def model_config(cfg, special_ids):
    """The content of config.json. Refuses a field of ModelConfig without a place there: a fork's own."""
    content = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model, "intermediate_size": cfg.d_hidden, "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_model // cfg.n_heads, "max_position_embeddings": cfg.context, "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps, "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False,
        "rope_theta": cfg.rope_theta,  # transformers 4 reads this one, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": False, "torch_dtype": "float32",
    } | special_ids
    for field in fields(ModelConfig):
        require(LLAMA_KEYS.get(field.name) in content, f"ModelConfig.{field.name} has no place in a Llama's "
                "config.json, so transformers would compute another model: map it in export.py")
    return content


def model_card(folder, state, parameters):
    """README.md: where the model is from, how to load it, and the settings of its run."""
    origin = "trained by nanoMAML"
    if "imported_from" in state["config"]:
        origin = f"imported from `{Path(state['config']['imported_from']).name}`, and not trained since"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {folder.resolve().name}

A decoder of Llama's architecture, {parameters:,} parameters, step {state["step"]:,}, {origin}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (auto.from_pretrained(".") for auto in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("The function returns", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

```json
{json.dumps(state["config"], indent=1)}
```
"""


def write_export(source, folder):
    """Writes a checkpoint as a Hugging Face folder. Returns what to print."""
    state, run = checkpoint.load(source), source if source.is_dir() else source.parent
    cfg, tokenizer = checkpoint.load_config(ModelConfig, state), tokenizers.load_tokenizer(run)
    require_llama(state["model"], tokenizer, cfg, run)
    *contents, special_ids = tokenizer_files(tokenizer, cfg.context)
    contents.append(model_config(cfg, special_ids))
    for name, content in zip(("tokenizer.json", "tokenizer_config.json", "config.json"), contents):
        files.replace(folder / name, json.dumps(content, ensure_ascii=False, indent=1))
    weights = {name: p.clone() for name, p in state["model"].items()}  # tied ones are written twice
    parameters = sum(p.numel() for p in weights.values())
    files.replace(folder / "README.md", model_card(run, state, parameters))
    files.replace(folder / "model.safetensors", safetensors().save(weights, metadata={"format": "pt"}))
    return f"{parameters:,} parameters after {state['step']:,} steps; AutoModelForCausalLM loads it"


def read_config(folder):
    """(ModelConfig, config.json) of a Hugging Face folder; refuses what this decoder cannot compute."""
    there = files.parse((folder / "config.json").read_bytes())
    require(there is not None, f"cannot read a JSON object from {folder / 'config.json'}")
    kind, act = there.get("model_type"), there.get("hidden_act", "silu")
    require(kind in ("llama", "pico_decoder"), f"{folder} holds a model of another type: {kind!r}")
    ropes = [there.get(key) or {} for key in ("rope_parameters", "rope_scaling")]  # transformers 5, and 4
    require(all(isinstance(rope, dict) for rope in ropes), f"{folder}: rope_scaling is not a JSON object")
    is_scaled = any(rope.get("rope_type", rope.get("type", "default")) != "default" for rope in ropes)
    is_partial = any(place.get("partial_rotary_factor", 1) != 1 for place in (there, *ropes))
    require(not is_scaled and not is_partial and act == "silu", f"{folder} holds a model with scaled or "
            f"partial rotary positions, or the activation {act} instead of silu: model.py has neither")
    there = {"rope_theta": ropes[0].get("rope_theta", 10000.0), "rms_norm_eps": 1e-6} | there
    if there.get("num_key_value_heads") is None:
        there["num_key_value_heads"] = there.get("num_attention_heads")
    keys = LLAMA_KEYS if kind == "llama" else PICO_KEYS
    return ModelConfig(**{ours: there.get(theirs) for ours, theirs in keys.items()}), there


def read_weights(folder):
    """{name: tensor} of model.safetensors or else pytorch_model.bin, whose code is not executed."""
    path, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    load = safetensors().load_file
    if not path.exists() and pickled.exists():
        path, load = pickled, lambda path: torch.load(path, map_location="cpu", weights_only=True)
    require(path.exists(), f"{path} is missing; save_pretrained(max_shard_size='99GB') makes it from shards")
    try:
        return {str(name): w for name, w in load(path).items()}
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not loaded, since it holds code") from None
    except Exception as error:  # safetensors raises its own
        raise UserError(f"cannot read {path} ({type(error).__name__})") from None


def as_llama(weights, cfg, there):
    """The weights under Llama's names, in float32, with q and k laid out for its rotation."""
    result = {}
    for name, w in weights.items():
        if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; rope_theta gives it
            continue
        require(torch.is_tensor(w) and w.is_floating_point() and w.element_size() > 1 and w.isfinite().all(),
                f"{name} is not a tensor of finite float32, float16 or bfloat16")
        if there["model_type"] == "pico_decoder":
            prefix = re.match(r"(?:pico_decoder\.)?(layers\.\d+\.)?", name)
            module, _, kind = name[prefix.end():].rpartition(".")
            name = f"{'model.' + prefix[1] if prefix[1] else ''}{PICO_MODULES.get(module, module)}.{kind}"
            channels = cfg.d_model // cfg.n_heads
            if module in ("attention.q_proj", "attention.k_proj") and len(w) % channels == 0:
                # pico-decoder rotates channels 2c and 2c + 1 of a head, Llama c and c + C / 2.
                w = w.unflatten(0, (-1, channels // 2, 2)).transpose(1, 2).flatten(0, 2)
        result[name] = w.float()
    # If there is an output matrix, it is used, as by pico's code and transformers 5 (4.57 would tie).
    if there.get("tie_word_embeddings") and "model.embed_tokens.weight" in result:
        result.setdefault("lm_head.weight", result["model.embed_tokens.weight"].clone())
    return result


def write_import(source, folder):
    """Writes a Hugging Face folder as a run's folder. Returns what to print."""
    cfg, there = read_config(source)
    tokenizer = tokenizers.HuggingFaceTokenizer(tokenizers.hugging_face_spec(source))
    weights = as_llama(read_weights(source), cfg, there)
    require_llama(weights, tokenizer, cfg, source)
    settings = {"data": "unknown", "imported_from": str(source)} | asdict(cfg)
    files.replace(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    tokenizers.save_tokenizer(tokenizer, folder)
    # Without optimizers a resume would call it damaged.
    state = {"step": 0, "tokens": 0, "model": weights, "config": settings, "optimizers": []}
    checkpoint.save(folder, state, keep=1)
    parameters = sum(p.numel() for p in weights.values())
    return f"{parameters:,} parameters; for eval_ner.py, probes.py --data, sample.py, train.py --init_from"


def main(argv):
    source, flags = config.one_operand(Config, argv, "one run, checkpoint or Hugging Face folder")
    cfg, source = config.load(Config, flags, __doc__), Path(source)
    require(cfg.to, "name the folder to write, --to=FOLDER")
    is_run, folder = source.is_file() or bool(checkpoint.paths(source)), Path(os.path.abspath(cfg.to))
    require(is_run or (source / "config.json").exists(),
            f"{source} is neither a run (ckpt_*.pt), a checkpoint nor a Hugging Face folder (config.json)")
    require(not os.path.lexists(folder) or folder.is_dir() and not any(folder.iterdir()),
            f"--to={folder} holds files already: name a new folder")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")  # whole or not at all
    try:
        partial.mkdir(parents=True)
        done = write_export(source, partial) if is_run else write_import(source, partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{cfg.to}: {done}", flush=True)


if __name__ == "__main__":
    config.run(main)
