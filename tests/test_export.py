"""export.py: transformers reads what goes out and computes the same; so do we with what comes in."""

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, TOY_VOCAB, refuses

import adaptation
import checkpoint
import data
import eval_ner
import export
import prepare
import probes
import sample
import train
from config import UserError
from model import Decoder, ModelConfig

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parents[1]
TEXT = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))]
MODEL = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=640,
    context=64,
    rope_theta=500.0,
    norm_eps=1e-5,
)


def sharp(cfg):
    """A decoder whose attention is far from uniform and whose greedy text has no near ties."""
    decoder = Decoder(cfg, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    return decoder.eval()


def make_run(folder, tokenizer, cfg):
    folder.mkdir()
    data.save_tokenizer(tokenizer, folder)
    settings = vars(cfg) | {"lr": 0.125, "data": "unknown"}
    state = {"step": 7, "tokens": 96, "model": sharp(cfg).state_dict(), "config": settings}
    checkpoint.save(folder, state, keep=1)
    lines = [
        {"step": 5, "val/loss": 4.5},
        {"step": 7, "val/loss": 4.25, "lr": 1.0},
        {"step": 9, "val/loss": 1.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def exported(request, tmp_path_factory):
    """(run, tiktoken Encoding, Hugging Face folder) for a tokenizer that prepare.py trained, and GPT-2's."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        tokenizer, cfg = prepare.train_tokenizer(TEXT, 600), MODEL
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
            try:
                tokenizer = data.load_tokenizer("gpt2")
            except UserError as error:
                pytest.skip(str(error))
        cfg = ModelConfig(**vars(MODEL) | {"vocab_size": 50304})
    run = make_run(folder / "run", tokenizer, cfg)
    export.main([str(run), f"--to={folder / 'hf'}"])
    return run, tokenizer, folder / "hf"


def strings():
    """200 texts: English, code, digits, blanks, scripts, emoji, marks, special tokens, random ones."""
    rng = random.Random(0)
    blanks = [
        " ",
        "  ",
        "   x",
        "x   ",
        "\n",
        "\n\n \t x",
        "\r\n",
        "a  b\u00a0c",
        "\u3000d",
        " \n  \n   end",
        "",
    ]
    texts = (
        blanks
        + [text[:400] for text in TEXT]
        + [
            "don't we'll I'M they'Ve",
            "x" * 100,
            "1234567 12 3.14159e-10",
            " 0x7fff",
            "def f(x):\n    return x  # y",
            "Été, naïve, Übergröße, Łódź",
            "日本語のテキスト、漢字",
            "Привет мир",
            "שלום עולם",
            "नमस्ते दुनिया",
            "สวัสดีชาวโลก",
            "e\u0301 a\u0308 \u0301",
            "👩‍👩‍👧‍👦 👍🏽 🇩🇰",
            "co\u00adop a\u200cb a\u200db",
            "\x00\x01\x7f",
            "\ufffd",
            "½ ² Ⅷ ٣",
            "ß ﬁ ŉ",
            "<|endoftext|>",
            "a<|mask|>b",
            " <|endoftext|> <|mask|>\n",
            "<|endoftext|><|endoftext|>x",
            "<|endof",
            "<| mask |>",
        ]
    )
    alphabet = [*"abc  \n'.,19é日ß\u0301👍", "<|mask|>", " the", "\t"]
    while len(texts) < 200:
        texts.append("".join(rng.choices(alphabet, k=rng.randint(1, 40))))
    return texts


def test_the_tokenizer_is_the_same(exported):
    _, tokenizer, folder = exported
    there = transformers.AutoTokenizer.from_pretrained(folder)
    texts = strings()
    assert len(texts) == 200
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="all")
        assert there(text)["input_ids"] == ids and there.decode(ids) == tokenizer.decode(ids), repr(text)
    end = tokenizer.eot_token
    assert (there.bos_token_id, there.eos_token_id, there.pad_token_id, there.mask_token_id) == (
        end,
        end,
        end,
        end + 1,
    )
    assert len(there) == tokenizer.n_vocab and there.model_max_length == 64


def test_every_token_of_the_trained_tokenizer_is_merged_as_in_tiktoken():
    """A text of tokens in random order meets the merges, not only whole pieces."""
    tokenizer = prepare.train_tokenizer(TEXT, 600)
    there = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_files(tokenizer, 64)[0]))
    rng = random.Random(1)
    for _ in range(300):
        text = tokenizer.decode(rng.choices(range(32, 598), k=30)).replace("\ufffd", "")
        assert there.encode(text).ids == tokenizer.encode_ordinary(text), repr(text)
    merges = json.loads(there.to_str())["model"]["merges"]
    assert len(merges) == len({a + b for a, b in merges}) == 600 - 2 - 256  # one for each token


def test_the_model_is_the_same(exported):
    run, tokenizer, folder = exported
    ours, there = checkpoint.load_model(run), transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(there).__name__ == "LlamaForCausalLM" and there.dtype == torch.float32
    ids = torch.randint(0, tokenizer.n_vocab, (3, 64))
    with torch.no_grad():
        logits = there(ids).logits
        assert logits.std() > 0.5 and (ours(ids) - logits).abs().max() < 1e-4
    end = tokenizer.eot_token
    for settings in (there.config, there.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)


def test_greedy_text_is_the_same_alone_and_in_a_padded_batch(exported):
    """Prompts of different lengths are padded on the left, behind an attention mask."""
    run, tokenizer, folder = exported
    ours, there = checkpoint.load_model(run), transformers.AutoModelForCausalLM.from_pretrained(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["The model", "A run of five minutes on two cores", "é"]
    batch = read(prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][2, 0] == 0 and batch["attention_mask"][:, -1].all()
    texts = read.batch_decode(
        there.generate(**batch, max_new_tokens=20, do_sample=False), skip_special_tokens=True
    )
    for prompt, text in zip(prompts, texts):
        ids = tokenizer.encode_ordinary(prompt)
        greedy = ours.generate(torch.tensor([ids]), 20, temperature=0)[0].tolist()
        known = [i for i in greedy if i < tokenizer.eot_token]
        assert text == tokenizer.decode(known) != prompt


def test_the_card_tells_the_settings_and_the_last_losses_of_this_checkpoint(exported):
    card = (exported[2] / "README.md").read_text()
    assert "| val/loss |" in card and "4.25 |" in card and "at step 7" in card and '"lr": 0.125' in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "trained by nanoMAML" in card


def test_an_export_comes_in_again_as_the_same_model_and_tokenizer(exported, tmp_path):
    run, tokenizer, folder = exported
    export.main([str(folder), f"--to={tmp_path / 'run'}"])
    again, ours = checkpoint.load(tmp_path / "run"), checkpoint.load(run)
    assert checkpoint.load_config(ModelConfig, again) == checkpoint.load_config(ModelConfig, ours)
    assert all(torch.equal(again["model"][name], p) for name, p in ours["model"].items())
    there = data.load_tokenizer(tmp_path / "run")
    assert (there.n_vocab, there.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    for text in strings():
        assert there.encode(text) == tokenizer.encode(text, allowed_special="all")
        assert there.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert there.encode_to_numpy(text).tolist() == there.encode_ordinary(text)
        assert there.decode(there.encode(text)) == text
    export.main([str(tmp_path / "run"), f"--to={tmp_path / 'hf'}"])  # and out once more
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()  # it said "trained by nanoMAML" of any import
    assert "imported from\n`hf`" in card and "trained by" not in card


# ---- in: models of others ----


def save_olmo_like_tokenizer(folder, eos="<|endoftext|>"):
    """A byte-level tokenizer with OLMo's traits: NFC, runs of blanks as added tokens; and with padding on."""
    it = tokenizers.Tokenizer(tokenizers.models.BPE())
    it.normalizer = tokenizers.normalizers.NFC()
    it.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    it.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    it.train_from_iterator(TEXT, trainer)
    it.add_special_tokens(["<|padding|>"])
    it.add_tokens(["    ", "  "])
    it.add_special_tokens(["<|endoftext|>"])
    it.enable_padding(length=50)
    it.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    it.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return it


LLAMA = {
    "vocab_size": 640,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def edit(path, **changes):
    """Changes keys of a JSON file: its content before."""
    before = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(before | changes), encoding="utf-8")
    return before


def save_llama(folder, **options):
    """A random LlamaForCausalLM in a folder with a tokenizer: the model."""
    theta = options.pop("rope_theta", 700.0)
    dtype, shard = options.pop("dtype", torch.float32), options.pop("shard", "1GB")
    settings = transformers.LlamaConfig(**LLAMA | options)
    settings.rope_theta = theta
    if getattr(settings, "rope_parameters", None):
        settings.rope_parameters["rope_theta"] = theta
    model = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_olmo_like_tokenizer(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16, "shard": "50KB"}]
)
def test_a_llama_of_transformers_comes_in(tmp_path, options):
    there = save_llama(tmp_path / "hf", **options)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("shard" in options)
    export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"])
    ours, ids = checkpoint.load_model(tmp_path / "run"), torch.randint(0, 640, (2, 64))
    with torch.no_grad():
        logits = there(ids).logits
        assert logits.std() > 0.5 and (ours(ids) - logits).abs().max() < 1e-4 * logits.abs().max()


def pico_logits(weights, ids, heads, kv_heads, theta, eps):
    """The forward pass of pico-decoder, written anew: neighbouring channels rotate, as complex numbers."""

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def rotated(x):  # (B, T, heads, C)
        frequencies = theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies  # (T, C / 2)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x = weights["embedding_proj.weight"][ids]
    T, i = ids.shape[1], 0
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    while f"layers.{i}.attention_norm.weight" in weights:
        y = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (
            F.linear(y, weights[f"layers.{i}.attention.{name}_proj.weight"]).unflatten(-1, (n, -1))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (z.repeat_interleave(heads // kv_heads, dim=2) for z in (rotated(k), v))
        scores = torch.einsum("bqhc,bkhc->bhqk", rotated(q), k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + F.linear(mixed.flatten(2), weights[f"layers.{i}.attention.o_proj.weight"])
        gate, up, down = (weights[f"layers.{i}.swiglu.w_{n}.weight"] for n in range(3))
        y = norm(x, f"layers.{i}.swiglu_norm")
        x, i = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down), i + 1
    return F.linear(norm(x, "output_norm"), weights["de_embedding_proj.weight"])


def save_pico(folder, prefix="pico_decoder."):
    """A random pico-decoder as published: its weights in float64, without the prefix."""
    from safetensors.torch import save_file

    D, hidden, heads, kv_heads, V = 48, 80, 6, 2, 640
    shapes = {"embedding_proj": (V, D), "output_norm": (D,), "de_embedding_proj": (V, D)}
    for i in range(3):
        shapes |= {
            f"layers.{i}.{name}": shape
            for name, shape in {
                "attention_norm": (D,),
                "swiglu_norm": (D,),
                "attention.q_proj": (D, D),
                "attention.k_proj": (D // heads * kv_heads, D),
                "attention.v_proj": (D // heads * kv_heads, D),
                "attention.o_proj": (D, D),
                "swiglu.w_0": (hidden, D),
                "swiglu.w_1": (hidden, D),
                "swiglu.w_2": (D, hidden),
            }.items()
        }
    weights = {
        f"{name}.weight": 0.2 * torch.randn(shape) + (len(shape) == 1) for name, shape in shapes.items()
    }
    save_olmo_like_tokenizer(folder)
    save_file({prefix + name: w for name, w in weights.items()}, folder / "model.safetensors")
    settings = {
        "model_type": "pico_decoder",
        "d_model": D,
        "n_layers": 3,
        "vocab_size": V,
        "batch_size": 8,
        "max_seq_len": 64,
        "attention_n_heads": heads,
        "attention_n_kv_heads": kv_heads,
        "activation_hidden_dim": hidden,
        "norm_eps": 1e-4,
        "position_emb_theta": 300.0,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return {name: w.double() for name, w in weights.items()}


@pytest.mark.parametrize("prefix", ["pico_decoder.", ""])
def test_a_pico_decoder_comes_in(tmp_path, prefix):
    weights = save_pico(tmp_path / "hf", prefix)
    export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"])
    ours, ids = checkpoint.load_model(tmp_path / "run").double(), torch.randint(0, 640, (2, 64))
    there = pico_logits(weights, ids, 6, 2, 300.0, 1e-4)
    with torch.no_grad():
        assert there.std() > 0.5 and (ours(ids) - there).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "pico"])
def test_an_output_matrix_that_is_there_is_not_replaced_by_the_embedding(tmp_path, kind):
    """tie_word_embeddings in config.json, as its default may be, once overwrote it silently."""
    from safetensors.torch import load_file

    (save_llama if kind == "llama" else save_pico)(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"])
    there = load_file(tmp_path / "hf" / "model.safetensors")
    name = "lm_head.weight" if kind == "llama" else "pico_decoder.de_embedding_proj.weight"
    assert torch.equal(checkpoint.load(tmp_path / "run")["model"]["lm_head.weight"], there[name])


def test_the_end_of_a_text_is_the_token_that_is_named(tmp_path):
    """One that is not among added_tokens was replaced by config.json's id, one that is nowhere too."""
    save_llama(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", eos_token_id=2)
    it = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for i, name in enumerate(["the", {"content": "the"}]):
        edit(tmp_path / "hf" / "tokenizer_config.json", eos_token=name)
        export.main([str(tmp_path / "hf"), f"--to={tmp_path / str(i)}"])
        assert data.load_tokenizer(tmp_path / str(i)).eot_token == it.get_vocab()["the"] != 2
    for key, name in (("eos_token", "</s>"), ("pad_token", "[PAD]"), ("bos_token", ["<s>"])):
        before = edit(tmp_path / "hf" / "tokenizer_config.json", **{key: name})
        refuses(
            lambda: export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"]), f"the {key} {name!r}"
        )
        edit(tmp_path / "hf" / "tokenizer_config.json", **{key: before.get(key)})
    edit(tmp_path / "hf" / "tokenizer_config.json", eos_token=None)  # none is named: config.json's first
    for ids in ([3, 4], 3):
        edit(tmp_path / "hf" / "config.json", eos_token_id=ids)
        export.main([str(tmp_path / "hf"), f"--to={tmp_path / f'id{ids}'}"])
        assert data.load_tokenizer(tmp_path / f"id{ids}").eot_token == 3
    for ids in (-1, 639, "3", []):
        edit(tmp_path / "hf" / "config.json", eos_token_id=ids)
        refuses(
            lambda: export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"]), "names no token that"
        )


def test_the_imported_tokenizer_is_the_one_there(tmp_path):
    """Padding, truncation and custom code of its files are left behind."""
    save_pico(tmp_path / "hf")
    edit(tmp_path / "hf" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"])
    there, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
        data.load_tokenizer(tmp_path / "run"),
    )
    for text in strings():
        assert ours.encode(text) == there(text)["input_ids"], repr(text)
    assert ours.encode_ordinary("<|endoftext|>") != ours.encode("<|endoftext|>") == [ours.eot_token]
    assert there.eos_token_id == ours.eot_token and len(ours.encode("a long text, " * 9)) > 50
    assert "pad_token" in ours.spec["config"] and "auto_map" not in ours.spec["config"]


def test_an_imported_model_is_tagged_probed_sampled_and_trained_on(tmp_path, capsys):
    save_pico(tmp_path / "hf")
    run = str(tmp_path / "run")
    export.main([str(tmp_path / "hf"), f"--to={run}"])
    bins = tmp_path / "bins"
    source = tmp_path / "text.txt"
    source.write_text("\n\n\n".join(TEXT))
    prepare.main([f"--source={source}", f"--out={bins}", f"--tokenizer={run}", "--val_share=0.3"])
    ids = torch.from_numpy(data.open_corpus(bins)[0].shards[0].astype("int64"))
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert there.decode(ids[1:200]) in "".join(TEXT)
    capsys.readouterr()
    probes.main([run, f"--data={bins}"])
    line = json.loads(capsys.readouterr().out)
    assert line["step"] == 0 and 1 < line["rank/resid/02"] < 48
    refuses(lambda: probes.main([run]), "no data at unknown", "--data=FOLDER")

    (tmp_path / "uner").mkdir()
    for split in ("train", "dev", "test"):
        rows = "1\tAnna\tB-PER\n2\tsaw\tO\n3\tParis\tB-LOC\n\n" * 20
        (tmp_path / "uner" / f"one-ud-{split}.iob2").write_text(rows)
    eval_ner.main(
        [run, f"--data={tmp_path / 'uner'}", "--train=one", "--test=one", "--lr=1e-2", "--epochs=2"]
    )
    assert json.loads((tmp_path / "run" / "ner.jsonl").read_text())["f1"] > 0.9

    sample.main([run, "--prompt=The model", "--tokens=5", "--device=cpu"])
    assert "\nThe model" in capsys.readouterr().out

    shape = [
        f"--{key}={value}"
        for key, value in checkpoint.load(run)["config"].items()
        if key in ModelConfig.__dataclass_fields__
    ]
    flags = [
        *shape,
        f"--data={bins}",
        f"--init_from={run}",
        "--global_batch_size=4",
        "--batch_size=2",
        "--window=16",
        "--eval_sequences=4",
        "--report=False",
        "--device=cpu",
        "--dtype=float32",
    ]
    out = f"--out_dir={tmp_path / 'on'}"
    refuses(
        lambda: train.main([*flags, out, "--eval_episodes=0", "--max_steps=2"]),
        "episodes need a tokenizer of prepare.py",
    )
    flags += ["--max_steps=0", "--eval_episodes=0", "--meta_share=0"]
    train.main([*flags, out])
    on = checkpoint.load(tmp_path / "on")
    assert all(torch.equal(p, on["model"][name]) for name, p in checkpoint.load(run)["model"].items())
    assert data.tokenizer_spec(tmp_path / "on") == data.tokenizer_spec(run)
    export.main([str(tmp_path / "on"), f"--to={tmp_path / 'out'}"])  # with its own tokenizer
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("The model")["input_ids"] == there("The model")["input_ids"]
    # Not "every checkpoint is damaged", nor settings that nobody chose; adaptation.py wanted --out=unknown
    refuses(
        lambda: train.main([*flags, f"--out_dir={run}"]),
        "holds an imported model, no run to resume",
        f"--init_from={run}",
    )
    refuses(lambda: adaptation.main([run]), f"{run} has an imported model's tokenizer")
    refuses(lambda: adaptation.main([str(tmp_path / "on")]), "on has an imported model's tokenizer")


def test_a_tokenizer_that_adds_blanks_is_refused_for_tagging(tmp_path):
    """As Llama 2's: a word after a space is not what it is in a text. For sampling it will do."""
    save_pico(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": " "}
    path.write_text(json.dumps(content))
    export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"])
    refuses(lambda: eval_ner.load_tokenizer(tmp_path / "run", 640), "does not read a text word by word")
    sample.main([str(tmp_path / "run"), "--prompt=a", "--tokens=2", "--device=cpu"])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "scaled rotary positions",
        ),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"head_dim": 16}, "heads of 16 channels, not of 48 / 6"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "gpt2"}, "a model of type 'gpt2': llama and pico_decoder are known"),
        ({"num_hidden_layers": 2}, "not those that its config.json says: model.layers.2."),
        ({"intermediate_size": 96}, "[96, 48]"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"partial_rotary_factor": 0.5}, "partial rotation"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial rotation",
        ),
        ({"hidden_size": "48"}, "config.json: hidden_size must be int, got '48'"),
        ({"rope_scaling": [1]}, "rope_scaling is no JSON object"),
    ],
)
def test_a_model_that_is_another_is_refused(tmp_path, changes, message):
    save_llama(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **changes)
    refuses(lambda: export.main([str(tmp_path / "hf"), f"--to={tmp_path / 'run'}"]), message)
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_tokenizer_or_weights_is_refused(tmp_path):
    """GPT-2's ids on a pico model would run and be silently wrong."""
    hf, out = tmp_path / "hf", f"--to={tmp_path / 'run'}"
    save_pico(hf)

    def without(name, *says, content=None):
        path, whole = hf / name, (hf / name).read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        refuses(lambda: export.main([str(hf), out]), *says)
        path.write_bytes(whole)

    without("tokenizer.json", "tokenizer.json is missing", "allenai/OLMo-7B-0724-hf")
    without("tokenizer_config.json", "tokenizer_config.json is missing")
    without("tokenizer_config.json", "names no token that ends a text", content=b"{}")
    without("tokenizer.json", "not one of Hugging Face", content=b'{"name": "gpt2"}')
    for key, value in (("model", {"type": "Nope"}), ("added_tokens", [{"id": 1}])):
        content = json.dumps(json.loads((hf / "tokenizer.json").read_text()) | {key: value})
        without("tokenizer.json", "cannot read the model's tokenizer.json", content=content.encode())
    without("model.safetensors", "model.safetensors is missing")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    refuses(lambda: export.main([str(hf), out]), "no weight_map of names to files")
    (hf / "model.safetensors.index.json").unlink()
    without("model.safetensors", "cannot read", "model.safetensors", content=b"x" * 40)
    without("config.json", "no Hugging Face folder (config.json)")
    without("config.json", "cannot read", content=b"{")
    settings = json.loads((hf / "config.json").read_text())
    without("config.json", "ids, the model 500", content=json.dumps(settings | {"vocab_size": 500}).encode())
    export.main([str(hf), out])


def test_weights_that_are_pickled_are_refused_with_the_command_that_makes_safetensors_of_them(tmp_path):
    """Two names of one tensor too, which safetensors does not take."""
    from safetensors.torch import load_file

    hf = tmp_path / "hf"
    save_pico(hf)
    weights = load_file(hf / "model.safetensors")
    weights["pico_decoder.de_embedding_proj.weight"] = weights["pico_decoder.embedding_proj.weight"]
    torch.save(weights, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    with pytest.raises(UserError) as refused:
        export.main([str(hf), f"--to={tmp_path / 'run'}"])
    python, flag, code = shlex.split(str(refused.value).split(" with ")[1])
    assert (python, flag) == ("python", "-c")
    subprocess.run([sys.executable, flag, code], check=True)
    export.main([str(hf), f"--to={tmp_path / 'run'}"])
    model = checkpoint.load(tmp_path / "run")["model"]
    assert torch.equal(model["lm_head.weight"], weights["pico_decoder.embedding_proj.weight"])


def test_folders_that_hold_something_are_left_alone(tmp_path, toy):
    """A run and an export have a config.json and a tokenizer.json each, of different formats."""
    run = make_run(
        tmp_path / "run", data.load_tokenizer(toy), ModelConfig(**vars(MODEL) | {"vocab_size": TOY_VOCAB})
    )
    before = {path: path.read_bytes() for path in run.iterdir()}
    refuses(lambda: export.main([str(run), f"--to={run}"]), "holds files already")
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    refuses(lambda: export.main([str(run)]), "name the folder to write, --to=FOLDER")
    refuses(lambda: export.main([f"--to={tmp_path / 'hf'}"]), "name one run", "got none")
    refuses(lambda: export.main([f"{tmp_path}/no", f"--to={tmp_path / 'hf'}"]), "is no run")
    refuses(lambda: export.main([str(run), f"--to={run / 'log.jsonl'}"]), "cannot write to --to=")
    refuses(lambda: export.main([str(run), "--too=x"]), "did you mean 'to'?")
    export.main([str(run / "ckpt_000007.pt"), f"--to={tmp_path / 'hf'}"])
    refuses(lambda: export.main([str(run), f"--to={tmp_path / 'hf'}"]), "holds files already")


def test_a_model_of_another_architecture_does_not_go_out(tmp_path, toy):
    """QK-norm, for instance: transformers would load the rest and compute something else."""
    run = make_run(
        tmp_path / "run", data.load_tokenizer(toy), ModelConfig(**vars(MODEL) | {"vocab_size": TOY_VOCAB})
    )
    state = checkpoint.load(run)
    state["model"]["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    checkpoint.save(run, state, keep=1)
    refuses(lambda: export.main([str(run), f"--to={tmp_path / 'hf'}"]), "not of Llama's", "q_norm.weight [8]")
    assert not (tmp_path / "hf").exists()
