"""export.py: transformers reads what goes out and computes the same; so do we with what comes in."""
import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, TOY, refuses

import adaptation
import data
import eval_ner
import export
import prepare
import probes
import sample
import train
from model import Decoder, ModelConfig
from nanomaml import checkpoint, files
from nanomaml.tokenizer import load_tokenizer, read_spec, save_tokenizer

transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
st = pytest.importorskip("safetensors.torch")
TEXT = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("docs/*.md"))]
MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=640, context=64,
                    rope_theta=500.0, norm_eps=1e-5)


def sharpen(model, factor):
    """Attention far from uniform, and greedy text without near ties."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    return model.eval()


def write_run(folder, tokenizer, cfg):
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    model = sharpen(Decoder(cfg, torch.Generator().manual_seed(1)), 8).state_dict()
    state = {"step": 7, "tokens": 96, "model": model, "config": vars(cfg) | {"lr": 0.125, "data": "unknown"}}
    checkpoint.save(folder, state, keep=1)
    for step, loss in ((5, 4.5), (7, 4.25), (9, 1.0)):
        files.append(folder / "log.jsonl", {"step": step, "val/loss": loss})
    return folder


def convert(source, to):
    export.main([str(source), f"--to={to}"])
    return to


@torch.no_grad()
def assert_same(decoder, logits_of, n_ids=640):
    """The logits of two models on random ids are equal to 1e-5 of the largest."""
    ids = torch.randint(0, n_ids, (3, 64))
    logits = logits_of(ids)
    assert logits.std() > 0.5 and (decoder(ids) - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.fixture(scope="module")
def trained():
    return prepare.train_tokenizer(TEXT, 600)


@pytest.fixture(scope="module", params=["trained", pytest.param("gpt2", marks=pytest.mark.slow)])
def exported(request, trained, tmp_path_factory):
    """(run, tiktoken Encoding, Hugging Face folder) for a tokenizer that prepare.py trained, and GPT-2's."""
    folder, tokenizer, cfg = tmp_path_factory.mktemp(request.param), trained, MODEL
    if request.param == "gpt2":
        if not (SHARED / "tiktoken_cache").exists():
            pytest.skip("needs GPT-2's tokenizer")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
            tokenizer, cfg = load_tokenizer("gpt2"), dataclasses.replace(MODEL, vocab_size=50304)
    run = write_run(folder / "run", tokenizer, cfg)
    return run, tokenizer, convert(run, folder / "hf")


def strings():
    """200 texts: English, code, digits, blanks, scripts, emoji, marks, special tokens, random ones."""
    rng = random.Random(0)
    texts = [
        "", " ", "  ", "   x", "x   ", "\n", "\n\n \t x", "\r\n", "a  b\u00a0c", "\u3000d", " \n  \n   end",
        "don't we'll I'M they'Ve", "x" * 100, "1234567 12 3.14159e-10", " 0x7fff",
        "def f(x):\n    return x  # y", "Été, naïve, Übergröße, Łódź", "日本語のテキスト、漢字", "Привет мир",
        "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
        "e\u0301 a\u0308 \u0301", "👩‍👩‍👧‍👦 👍🏽 🇩🇰",
        "co\u00adop a\u200cb a\u200db", "\x00\x01\x7f", "\ufffd", "½ ² Ⅷ ٣", "ß ﬁ ŉ", "<|endoftext|>",
        "a<|mask|>b", " <|endoftext|> <|mask|>\n", "<|endoftext|><|endoftext|>x", "<|endof", "<| mask |>",
        *(text[:400] for text in TEXT),
    ]
    alphabet = [*"abc  \n'.,19é日ß\u0301👍", "<|mask|>", " the", "\t"]
    return texts + ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(200 - len(texts))]


# ---- out ----


def test_the_tokenizer_is_the_same(exported):
    _, tokenizer, folder = exported
    there, end = transformers.AutoTokenizer.from_pretrained(folder), tokenizer.eot_token
    for text in strings():
        ids = tokenizer.encode(text, allowed_special="all")
        assert there(text)["input_ids"] == ids and there.decode(ids) == tokenizer.decode(ids), repr(text)
    assert (there.bos_token_id, there.eos_token_id, there.pad_token_id) == (end, end, end)
    assert there.mask_token_id == end + 1
    assert len(there) == tokenizer.n_vocab and there.model_max_length == 64


def test_every_token_is_merged_as_in_tiktoken(trained, toy):
    """A text of tokens in random order meets the merges, not only whole pieces; to the toy's words no merges
    lead.
    """
    rng = random.Random(1)
    for tokenizer, ids in ((load_tokenizer(toy), range(256, 3256)), (trained, range(32, 598))):
        there = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_files(tokenizer, 64)[0]))
        for _ in range(300):
            text = tokenizer.decode(rng.choices(ids, k=30)).replace("\ufffd", "")
            assert there.encode(text).ids == tokenizer.encode_ordinary(text), repr(text)
    merges = json.loads(there.to_str())["model"]["merges"]
    assert len(merges) == len({a + b for a, b in merges}) == 600 - 2 - 256  # one for each token


def test_the_model_is_the_same_in_logits_and_in_greedy_text_alone_and_in_a_padded_batch(exported):
    """Prompts of different lengths are padded on the left, behind an attention mask."""
    run, tokenizer, folder = exported
    ours, there = checkpoint.load_model(run), transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(there).__name__ == "LlamaForCausalLM" and there.dtype == torch.float32
    assert_same(ours, lambda ids: there(ids).logits, tokenizer.n_vocab)
    for settings in (there.config, there.generation_config):
        ids = settings.bos_token_id, settings.eos_token_id, settings.pad_token_id
        assert set(ids) == {tokenizer.eot_token}
    read = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["The model", "A run of five minutes on two cores", "é"]
    batch = read(prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][2, 0] == 0 and batch["attention_mask"][:, -1].all()
    ids = there.generate(**batch, max_new_tokens=20, do_sample=False)
    for prompt, text in zip(prompts, read.batch_decode(ids, skip_special_tokens=True)):
        prompt = torch.tensor([tokenizer.encode_ordinary(prompt)])
        greedy = ours.generate(prompt, 20, temperature=0)[0].tolist()
        until_end = itertools.takewhile(lambda i: i != tokenizer.eot_token, greedy)
        assert text == tokenizer.decode([i for i in until_end if i < tokenizer.n_vocab])
    card = (folder / "README.md").read_text()
    assert "step 7, trained by nanoMAML" in card and '"lr": 0.125' in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_an_export_comes_in_again_as_the_same_model_and_tokenizer(exported, tmp_path):
    run, tokenizer, folder = exported
    convert(folder, tmp_path / "run")
    again, ours = checkpoint.load(tmp_path / "run"), checkpoint.load(run)
    assert checkpoint.load_config(ModelConfig, again) == checkpoint.load_config(ModelConfig, ours)
    assert all(torch.equal(again["model"][name], p) for name, p in ours["model"].items())
    there = load_tokenizer(tmp_path / "run")
    assert (there.n_vocab, there.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    for text in strings():
        assert there.encode(text) == tokenizer.encode(text, allowed_special="all")
        assert there.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert there.encode_to_numpy(text).tolist() == there.encode_ordinary(text)
        assert there.decode(there.encode(text)) == text
    convert(tmp_path / "run", tmp_path / "hf")  # and out once more
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()  # it said "trained by nanoMAML" of any import
    assert "imported from `hf`" in card and "trained by" not in card


def test_folders_that_hold_something_are_left_alone(tmp_path, trained, monkeypatch):
    """A run and an export have a config.json and a tokenizer.json each, of different formats."""
    run = write_run(tmp_path / "run", trained, MODEL)
    before = {path: path.read_bytes() for path in run.iterdir()}
    refuses(lambda: convert(run, run), "holds files already")
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    refuses(lambda: export.main([str(run)]), "name the folder to write, --to=FOLDER")
    refuses(lambda: export.main([f"--to={tmp_path / 'hf'}"]), "name one run", "got none")
    refuses(lambda: convert(tmp_path / "no", tmp_path / "hf"), "is neither a run")
    refuses(lambda: export.main([str(run), "--too=x"]), "did you mean 'to'?")
    with monkeypatch.context() as patch:  # a file-size limit left a cut file, which blocked the same command
        patch.setattr(export, "model_card", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(run, tmp_path / "hf")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "hf").mkdir()
    convert(run / "ckpt_000007.pt", tmp_path / "hf")
    refuses(lambda: convert(run, tmp_path / "hf"), "holds files already")


def test_a_model_of_another_architecture_does_not_go_out(tmp_path, trained, monkeypatch):
    """QK-norm, for instance, whether model.py has it or not: transformers would load the rest and compute
    something else. So would it with a field of a fork's ModelConfig, which no weight shows.
    """
    run = write_run(tmp_path / "run", trained, MODEL)
    fork = dataclasses.make_dataclass("ModelConfig", [("attention_window", int, 0)], bases=(ModelConfig,),
                                      frozen=True)
    with monkeypatch.context() as patch:
        patch.setattr(export, "ModelConfig", fork)
        refuses(lambda: convert(run, tmp_path / "hf"), "ModelConfig.attention_window")
        patch.setitem(export.LLAMA_KEYS, "attention_window", "sliding_window")  # not in config.json yet
        refuses(lambda: convert(run, tmp_path / "hf"), "ModelConfig.attention_window")
    state = checkpoint.load(run)
    state["model"]["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    checkpoint.save(run, state, keep=1)
    refuses(lambda: convert(run, tmp_path / "hf"), "do not fit a Llama", "q_norm.weight [8]")
    assert not (tmp_path / "hf").exists()  # nothing is left that would block the same command


# ---- in ----


def save_olmo_like_tokenizer(folder):
    """A byte-level tokenizer with OLMo's traits: NFC, runs of blanks as added tokens; and with padding on."""
    it, parts = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    it.normalizer, it.decoder = tokenizers.normalizers.NFC(), tokenizers.decoders.ByteLevel()
    it.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
    it.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False))
    it.add_special_tokens(["<|padding|>"])
    it.add_tokens(["    ", "  "])
    it.add_special_tokens(["<|endoftext|>"])
    it.enable_padding(length=50)
    it.enable_truncation(5)
    it.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|padding|>"}))


def save_llama(folder, dtype=torch.float32, **options):
    """A random LlamaForCausalLM with a tokenizer: the model's logits, as a function."""
    folder.mkdir(exist_ok=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=640, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=700.0, **options))
    sharpen(model, 6).to(dtype).save_pretrained(folder)
    save_olmo_like_tokenizer(folder)
    again = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lambda ids: again(ids).logits


PICO = {"model_type": "pico_decoder", "d_model": 48, "n_layers": 3, "vocab_size": 640, "batch_size": 8,
        "max_seq_len": 64, "attention_n_heads": 6, "attention_n_kv_heads": 2, "activation_hidden_dim": 80,
        "norm_eps": 1e-4, "position_emb_theta": 300.0}


def save_pico(folder, prefix="pico_decoder."):
    """A random pico-decoder as published: its weights without the prefix."""
    folder.mkdir(exist_ok=True)
    shapes = {"embedding_proj": (640, 48), "output_norm": (48,), "de_embedding_proj": (640, 48)}
    for i in range(3):
        layer = {"attention_norm": (48,), "swiglu_norm": (48,), "attention.q_proj": (48, 48),
                 "attention.k_proj": (16, 48), "attention.v_proj": (16, 48), "attention.o_proj": (48, 48),
                 "swiglu.w_0": (80, 48), "swiglu.w_1": (80, 48), "swiglu.w_2": (48, 80)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    weights = {f"{name}.weight": 0.2 * torch.randn(shape) + (len(shape) == 1)
               for name, shape in shapes.items()}
    save_olmo_like_tokenizer(folder)
    st.save_file({prefix + name: w for name, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(PICO))
    return weights


@pytest.fixture
def pico(tmp_path):
    save_pico(tmp_path / "hf")
    return tmp_path / "hf"


def refused(folder, name, content, *says):
    """Is refused, and leaves nothing, where this file has another content; a dict: other keys; None: none."""
    path, whole = folder / name, (folder / name).read_bytes()
    if isinstance(content, dict):
        edit(path, **content)
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    refuses(lambda: convert(folder, folder.parent / "run"), *says)
    assert not (folder.parent / "run").exists()
    path.write_bytes(whole)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}])
def test_a_llama_of_transformers_comes_in(tmp_path, options):
    there = save_llama(tmp_path / "hf", **options)
    assert_same(checkpoint.load_model(convert(tmp_path / "hf", tmp_path / "run")), there)


def pico_logits(weights, ids):
    """The forward pass of pico-decoder, written anew: neighbouring channels rotate, as complex numbers."""
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * weights[f"{name}.weight"]

    def rotated(x):  # (B, T, heads, C)
        frequencies = 300.0 ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies  # (T, C / 2)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x, T = weights["embedding_proj.weight"][ids], ids.shape[1]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(3):
        y = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (F.linear(y, weights[f"layers.{i}.attention.{name}_proj.weight"]).unflatten(-1, (n, -1))
                   for name, n in (("q", 6), ("k", 2), ("v", 2)))
        k, v = (z.repeat_interleave(3, dim=2) for z in (rotated(k), v))
        scores = torch.einsum("bqhc,bkhc->bhqk", rotated(q), k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + F.linear(mixed.flatten(2), weights[f"layers.{i}.attention.o_proj.weight"])
        gate, up, down = (weights[f"layers.{i}.swiglu.w_{n}.weight"] for n in range(3))
        y = norm(x, f"layers.{i}.swiglu_norm")
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    return F.linear(norm(x, "output_norm"), weights["de_embedding_proj.weight"])


@pytest.mark.parametrize("prefix", ["pico_decoder.", ""])
def test_a_pico_decoder_comes_in(tmp_path, prefix):
    weights = {name: w.double() for name, w in save_pico(tmp_path / "hf", prefix).items()}
    ours = checkpoint.load_model(convert(tmp_path / "hf", tmp_path / "run")).double()
    assert_same(ours, lambda ids: pico_logits(weights, ids))


def test_an_output_matrix_that_is_there_is_not_replaced_by_the_embedding(tmp_path):
    """tie_word_embeddings in config.json, as its default may be, once overwrote it silently."""
    for save, name in ((save_llama, "lm_head"), (save_pico, "pico_decoder.de_embedding_proj")):
        hf = tmp_path / name
        save(hf)
        edit(hf / "config.json", tie_word_embeddings=True)
        model = checkpoint.load(convert(hf, tmp_path / f"{name}-run"))["model"]
        assert torch.equal(model["lm_head.weight"], st.load_file(hf / "model.safetensors")[f"{name}.weight"])


def test_the_end_of_a_text_is_the_token_that_is_named(pico, tmp_path):
    """One that is not among added_tokens was replaced by config.json's id, one that is nowhere too."""
    edit(pico / "config.json", eos_token_id=2)
    for key, name in (("eos_token", "</s>"), ("pad_token", "[PAD]"), ("bos_token", ["<s>"])):
        refused(pico, "tokenizer_config.json", {key: name}, f"the {key} {name!r}")
    the = tokenizers.Tokenizer.from_file(str(pico / "tokenizer.json")).get_vocab()["the"]
    for i, (name, ids, end) in enumerate((
        ("the", 2, the), ({"content": "the"}, 2, the), (None, [3, 4], 3), (None, 3, 3),
    )):
        edit(pico / "tokenizer_config.json", eos_token=name)
        edit(pico / "config.json", eos_token_id=ids)
        assert load_tokenizer(convert(pico, tmp_path / f"run{i}")).eot_token == end != 2
    for ids in (-1, 639, "3", []):
        refused(pico, "config.json", {"eos_token_id": ids}, "names no token that ends a text")


def test_the_imported_tokenizer_is_the_one_there(pico, tmp_path):
    """Padding, truncation and custom code of its files are left behind."""
    edit(pico / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    there = transformers.AutoTokenizer.from_pretrained(pico)
    ours = load_tokenizer(convert(pico, tmp_path / "run"))
    for text in strings():
        if "<|mask|>" not in text:  # it has none, and takes it for text
            assert ours.encode(text) == there(text)["input_ids"], repr(text)
    assert ours.encode_ordinary("<|endoftext|>") != ours.encode("<|endoftext|>") == [ours.eot_token]
    assert there.eos_token_id == ours.eot_token and len(ours.encode("a long text, " * 9)) > 50
    assert "pad_token" in ours.spec["config"] and "auto_map" not in ours.spec["config"]


@pytest.mark.slow
def test_an_imported_model_is_tagged_probed_sampled_and_trained_on(pico, tmp_path, capsys):
    run, bins, uner = str(convert(pico, tmp_path / "run")), tmp_path / "bins", tmp_path / "uner"
    (tmp_path / "text.txt").write_text("\n\n\n".join(TEXT))
    prepare.main([f"--source={tmp_path}/text.txt", f"--out={bins}", f"--tokenizer={run}", "--val_share=0.3"])
    ids = torch.from_numpy(data.open_corpus(bins)[0].shards[0].astype("int64"))
    there = transformers.AutoTokenizer.from_pretrained(pico)
    assert there.decode(ids[1:200]) in "".join(TEXT)
    capsys.readouterr()
    probes.main([run, f"--data={bins}"])
    line = json.loads(capsys.readouterr().out)
    assert line["step"] == 0 and 1 < line["rank/resid/02"] < 48
    refuses(lambda: probes.main([run]), "no data at unknown", "--data=FOLDER")

    uner.mkdir()
    for split in ("train", "dev", "test"):
        rows = "1\tAnna\tB-PER\n2\tsaw\tO\n3\tParis\tB-LOC\n\n" * 20
        (uner / f"one-ud-{split}.iob2").write_text(rows)
    eval_ner.main([run, f"--data={uner}", "--train=one", "--test=one", "--lr=1e-2", "--epochs=2"])
    assert json.loads((tmp_path / "run" / "ner.jsonl").read_text())["f1"] > 0.9

    sample.main([run, "--prompt=The model", "--tokens=5", "--device=cpu"])
    assert "\nThe model" in capsys.readouterr().out

    shape = {key: value for key, value in checkpoint.load(run)["config"].items() if hasattr(MODEL, key)}
    flags = [*TOY, *(f"--{key}={value}" for key, value in shape.items()), f"--data={bins}",
             f"--init_from={run}", "--window=16"]
    flags += ["--max_steps=0", "--eval_episodes=0", "--meta_share=0"]
    train.main([*flags, f"--out_dir={tmp_path}/on"])
    on = checkpoint.load(tmp_path / "on")
    assert all(torch.equal(p, on["model"][name]) for name, p in checkpoint.load(run)["model"].items())
    assert read_spec(tmp_path / "on") == read_spec(run)
    again = transformers.AutoTokenizer.from_pretrained(convert(tmp_path / "on", tmp_path / "out"))
    assert again("The model")["input_ids"] == there("The model")["input_ids"]  # out with its own tokenizer
    # Not "every checkpoint is damaged", nor settings that nobody chose; adaptation.py wanted --out=unknown
    refuses(lambda: train.main([*flags, f"--out_dir={run}"]), "imported model", f"--init_from={run}")
    refuses(lambda: adaptation.main([run]), "holds no run of train.py")


def test_a_tokenizer_whose_words_depend_on_their_place_is_refused_for_tagging(pico, tmp_path):
    """A word after a space is not what it is in a text. For sampling it will do."""
    edit(pico / "tokenizer.json", normalizer={"type": "Prepend", "prepend": "x"})
    run = convert(pico, tmp_path / "run")
    refuses(lambda: eval_ner.load_tokenizer(run, 640), "does not read a text word by word")
    sample.main([str(run), "--prompt=a", "--tokens=2", "--device=cpu"])


def test_a_model_that_is_another_is_refused(tmp_path):
    save_llama(tmp_path / "hf")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    for changes, says in (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled"),
        ({"rope_parameters": rope | {"rope_type": "yarn", "factor": 4.0}}, "scaled"),
        ({"rope_scaling": [1]}, "rope_scaling is not a JSON object"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rope_parameters": rope | {"partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"model_type": "gpt2"}, "a model of another type: 'gpt2'"),
        ({"num_hidden_layers": 2}, "do not fit a Llama with its settings: model.layers.2."),
        ({"intermediate_size": 96}, "[96, 48]"),
        ({"vocab_size": 500}, "ids, the model 500"),
        ({"num_hidden_layers": None}, "n_layers must be int, got None"),
        ({"hidden_size": "48"}, "d_model must be int, got '48'"),
    ):
        refused(tmp_path / "hf", "config.json", changes, says)
    weights = st.load_file(tmp_path / "hf" / "model.safetensors")
    for name, w in (("model.layers.1.self_attn.q_proj.bias", torch.zeros(48)),  # of attention_bias, mlp_bias
                    ("lm_head.weight", weights["lm_head.weight"].to(torch.int8))):  # quantized
        refused(tmp_path / "hf", "model.safetensors", st.save(weights | {name: w}), name)


def test_a_model_without_its_tokenizer_or_weights_is_refused(pico, tmp_path):
    """GPT-2's ids on a pico model would run and be silently wrong."""
    for name, content, *says in (
        ("tokenizer.json", None, "cannot read", "tokenizer.json", "allenai/OLMo-7B-0724-hf"),
        ("tokenizer_config.json", None, "names no token that ends a text"),
        ("tokenizer_config.json", b"{}", "names no token that ends a text"),
        ("tokenizer.json", b'{"name": "gpt2"}', "cannot read tokenizer.json"),
        ("tokenizer.json", {"model": {"type": "Nope"}}, "cannot read tokenizer.json"),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}, "cannot read tokenizer.json"),
        ("tokenizer.json", b"[]", "cannot read a JSON object"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"x" * 40, "cannot read", "model.safetensors"),
        ("config.json", None, "nor a Hugging Face folder (config.json)"),
        ("config.json", b"{", "cannot read"),
    ):
        refused(pico, name, content, *says)
    convert(pico, tmp_path / "run")


def test_weights_that_are_pickled_come_in_and_code_among_them_does_not_run(pico, tmp_path):
    """Two names of one tensor too, which safetensors does not take."""
    weights = st.load_file(pico / "model.safetensors")
    weights["pico_decoder.de_embedding_proj.weight"] = weights["pico_decoder.embedding_proj.weight"]
    (pico / "model.safetensors").unlink()
    for content, *says in (({"a": Path("x")}, "pytorch_model.bin is not loaded, since it holds code"),
                           ([1], "cannot read"), ({"a": 1}, "a is not a tensor"),
                           ({"a": torch.tensor(math.nan)}, "of finite")):
        torch.save(content, pico / "pytorch_model.bin")
        refuses(lambda: convert(pico, tmp_path / "run"), *says)
    torch.save(weights, pico / "pytorch_model.bin")
    model = checkpoint.load(convert(pico, tmp_path / "run"))["model"]
    assert torch.equal(model["lm_head.weight"], weights["pico_decoder.embedding_proj.weight"])
