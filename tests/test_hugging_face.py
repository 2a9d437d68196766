"""Hugging Face tokenizers of both common kinds: ids, words of episodes, the mask, and every command."""
import json
import random
import shutil
import sys
import types

import numpy as np
import pytest
import regex
from conftest import TOY, refuses, same

import adaptation
import data
import eval_ner
import export
import prepare
import sample
import train
from nanomaml import checkpoint
from nanomaml.tokenizer import load_tokenizer, token_bytes
from nanomaml.words import fold, word_tables

tokenizers = pytest.importorskip("tokenizers")
WORDS = ("the of and house river Garten naïve cafe\u0301 über год река भाषा שלום reading reads read tea "
         "steam don't x1 state-of-the-art 12 345 <|endoftext|> <|mask|> <pad> \u2581 👍 end. (end) \u00a0"
         ).split(" ")


def make_text(n, seed=0):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" "] * 12 + ["  ", "\n", ", ", "    "]) for _ in range(n))


def byte_level():
    """As OLMo's: NFC, runs of blanks as added tokens, special ones behind."""
    it, parts = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    it.normalizer, it.decoder = tokenizers.normalizers.NFC(), tokenizers.decoders.ByteLevel()
    it.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
    it.train_from_iterator([make_text(3000)], tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False))
    it.add_tokens(["    ", "  "])
    return it


def sentencepiece_like():
    """As Llama 2's: a blank is \u2581, one begins every text, unknown characters fall back to bytes."""
    it, steps = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True)), tokenizers.normalizers
    it.normalizer = steps.Sequence([steps.NFC(), steps.Prepend("\u2581"), steps.Replace(" ", "\u2581")])
    it.pre_tokenizer = tokenizers.pre_tokenizers.Split("\u2581", "merged_with_next")
    it.train_from_iterator([make_text(3000).replace("👍", "")], tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=[f"<0x{i:02X}>" for i in range(256)], show_progress=False))
    content = json.loads(it.to_str())
    content["added_tokens"], content["pre_tokenizer"] = [], None
    it, parts = tokenizers.Tokenizer.from_str(json.dumps(content)), tokenizers.decoders
    it.decoder = parts.Sequence([parts.Replace("\u2581", " "), parts.ByteFallback(), parts.Fuse(),
                                 parts.Strip(" ", 1, 0)])
    return it


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like])
def hub(request, tmp_path_factory):
    """A folder as on the hub, of a tokenizer whose ids have gaps."""
    it, folder = request.param(), tmp_path_factory.mktemp("hub")
    it.add_special_tokens(["<pad>", "<|endoftext|>"])
    content = json.loads(it.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i + 200 * (i > 300) for token, i in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = vocabulary.get(token["content"], token["id"] + 200)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def prepared(hub, tmp_path_factory):
    """(folder of bins, text) with that tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [make_text(4000, seed) for seed in range(1, 9)] + [make_text(40_000, 9)]  # the last above 64 K
    for name, rows in (("a", texts), ("b", [make_text(4000, 10)])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    prepare.main([f"--source={folder}/a.jsonl", f"--val={folder}/b.jsonl", f"--out={folder}/bins",
                  f"--tokenizer={hub}"])
    return folder / "bins", texts


def test_the_ids_of_a_corpus_are_those_of_the_library(hub, prepared):
    """Documents come whole: a "\u2581" would begin each piece of 64 K characters."""
    bins, texts = prepared
    it = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    end = it.token_to_id("<|endoftext|>")
    it.encode_special_tokens = True  # text that spells one is text
    expected = [i for text in texts for i in [end, *it.encode(text, add_special_tokens=False).ids]]
    assert np.array_equal(data.open_corpus(bins)[0].shards[0], expected)


def test_the_words_of_episodes_are_those_that_decoding_finds(hub, prepared):
    tokenizer, text = load_tokenizer(prepared[0]), prepared[1][0]
    it = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    ids, tables = np.array(tokenizer.encode_ordinary(text)), word_tables(tokenizer)
    found = {i for i in range(1, len(ids) - 1) if tables.word[ids[i]] and not tables.continues[ids[i + 1]]}

    def is_word(i):
        before, until, after = (it.decode(ids[max(0, i - 20):end], skip_special_tokens=False)
                                for end in (i, i + 1, i + 2))
        following = after[len(until):] if after.startswith(until) else "\ufffd"
        return (until.startswith(before) and regex.fullmatch(r" \p{L}[\p{L}\p{M}]+", until[len(before):])
                and not regex.match(r"[\p{L}\p{M}\ufffd]", following))

    assert found == {i for i in range(1, len(ids) - 1) if is_word(i)} and len(found) > 300
    spelled = {fold(it.decode([ids[i]]).strip()) for i in found}
    assert {"the", "river", "garten", "naïve", "café", "год"} <= spelled


def test_every_token_is_the_bytes_that_it_decodes_to(hub):
    tokenizer = load_tokenizer(hub)
    it, special = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json")), {"<pad>", "<|endoftext|>"}
    a, known = it.encode("a").ids, token_bytes(tokenizer)
    assert {token for token, i in it.get_vocab().items() if i not in known} == special
    for i, token in known.items():
        if not (text := token.decode(errors="replace")).count("\ufffd"):
            assert it.decode([*a, i]) == "a" + text


def test_the_mask_is_the_first_free_id_or_the_token_of_that_name(hub, tmp_path):
    n = 1 + max(tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json")).get_vocab().values())
    tokenizer = load_tokenizer(hub, n + 1)
    assert tokenizer.n_vocab == tokenizer.encode_single_token("<|mask|>") == n
    the = tokenizer.encode_ordinary("the")
    assert tokenizer.decode([*the, n, *the]) == "the<|mask|>the"
    refuses(lambda: load_tokenizer(hub, n).encode_single_token("<|mask|>"),
            f"vocab_size = {n} leaves no row for <|mask|>", f"give at least {n + 1}")
    for path in hub.iterdir():
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            content["added_tokens"].append({**content["added_tokens"][-1], "id": n, "content": "<|mask|>"})
        (tmp_path / path.name).write_text(json.dumps(content), encoding="utf-8")
    named = load_tokenizer(tmp_path, n + 1)
    assert named.encode_single_token("<|mask|>") == named.special.token_to_id("<|mask|>")


def test_a_tokenizer_whose_tokens_are_no_text_is_refused_for_episodes(tmp_path):
    vocabulary = {"[UNK]": 0, "the": 1, "##s": 2}
    it = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    it.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[UNK]"}')
    refuses(lambda: word_tables(load_tokenizer(tmp_path)), "(WordPiece) is neither", "eval_episodes = 0")


def test_every_command_takes_it(hub, prepared, tmp_path, capsys):
    """Episodes, adaptation, NER, sampling, export and back, and episodes after that import."""
    bins, out = prepared[0], str(tmp_path / "run")
    flags = [*TOY, f"--data={bins}", "--max_steps=2", "--max_word_share=0.2", "--ways=4", "--eval_ways=4"]
    train.main([*flags, f"--out_dir={out}"])
    capsys.readouterr()
    state = checkpoint.newest(out)
    assert int(state["skipped"].sum()) == 0
    adaptation.main([out])
    assert "final/mask_query_acc" in json.loads(capsys.readouterr().out)

    sample.main([out, "--prompt=the river", "--tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the river")
    export.main([out, f"--to={tmp_path}/hf"])
    there = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert there.encode("the river").ids == load_tokenizer(hub).encode("the river")
    export.main([f"{tmp_path}/hf", f"--to={tmp_path}/again"])
    spec = json.loads((tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["config"]["padding_side"] = "left"  # it says nothing of the ids of a text
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert same(checkpoint.load(tmp_path / "again")["model"], state["model"])
    train.main([*flags, f"--out_dir={tmp_path}/on", f"--init_from={tmp_path}/again"])
    assert not same(checkpoint.newest(tmp_path / "on")["model"], state["model"])
    n = load_tokenizer(hub).n_vocab
    refuses(lambda: train.main([*flags, f"--out_dir={tmp_path}/few", f"--vocab_size={n}"]), "<|mask|>")

    for split in ("train", "dev", "test"):
        rows = "1\triver\tB-PER\n2\tthe\tO\n3\tGarten\tB-LOC\n\n" * 20
        (tmp_path / f"one-ud-{split}.iob2").write_text(rows)
    eval_ner.main([out, f"--data={tmp_path}", "--train=one", "--test=one", "--lr=1e-2", "--epochs=2"])
    assert json.loads((tmp_path / "run" / "ner.jsonl").read_text())["f1"] > 0.9


def test_a_word_has_the_sub_tokens_that_it_has_in_a_text(hub):
    """A "\u2581" begins every text, so that a blank before the word would be one too many."""
    it = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    words = "the river Garten naïve 👍 reading x1 год".split()
    (window,) = eval_ner.cut([(words, ["O"] * len(words))], load_tokenizer(hub), 200, "first")
    text = " " * isinstance(it.decoder, tokenizers.decoders.ByteLevel) + " ".join(words)
    whole = it.encode(text)
    assert window.ids == whole.ids
    blanks = [max(0, match.start() - 1) for match in regex.finditer(r"\S+", text)]
    assert window.positions == [next(i for i, (_, end) in enumerate(whole.offsets) if end > blank)
                                for blank in blanks]


def test_the_end_token_may_be_named_elsewhere_and_ids_must_fit_into_bins(hub, tmp_path):
    """Bug: of 70,000 ids the error spoke of a vocab_size = 65536, which nobody had set."""
    content = json.loads((hub / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refuses(lambda: load_tokenizer(tmp_path), "names no token that ends a text")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert load_tokenizer(tmp_path).eot_token == load_tokenizer(hub).eot_token
    content["model"]["vocab"]["the"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "a.txt").write_text("the river\n" * 200)
    refuses(lambda: prepare.main([f"--source={tmp_path}/a.txt", f"--out={tmp_path}/bins",
                                  f"--tokenizer={tmp_path}"]), "has 70001 ids; bins are uint16")


def test_a_prompt_keeps_what_begins_a_text_and_its_masks(hub, tmp_path):
    """Bugs: an end token that a post-processor adds ended the prompt; <|mask|> was ordinary text."""
    shutil.copytree(hub, tmp_path / "hub")
    path = tmp_path / "hub" / "tokenizer.json"
    it = tokenizers.Tokenizer.from_file(str(path))
    begin, end = it.token_to_id("<pad>"), it.token_to_id("<|endoftext|>")
    it.post_processor = tokenizers.processors.TemplateProcessing(
        single="<pad> $A <|endoftext|>", special_tokens=[("<pad>", begin), ("<|endoftext|>", end)])
    it.save(str(path))
    tokenizer = load_tokenizer(tmp_path / "hub")
    the, house = (it.encode(text, add_special_tokens=False).ids for text in ("the", "house"))
    assert tokenizer.encode("the<|mask|>house") == [begin, *the, tokenizer.mask_id, *house]
    assert tokenizer.encode("the<|endoftext|>") == [begin, *the, end]
    assert tokenizer.encode_ordinary("the") == the


def test_a_name_is_looked_up_on_the_hub(hub, monkeypatch, tmp_path):
    """Bugs: without a tokenizer.json there, GPT-2's was taken; a local folder was looked up on the hub."""
    def snapshot_download(name, allow_patterns):
        if name == "openai/merges":
            return str(tmp_path)
        if name != "allenai/olmo":
            raise OSError(f"404: {name}")
        return str(hub)

    hub_package = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_package)
    (tmp_path / "a.txt").write_text("the river\n" * 200)
    args = [f"--source={tmp_path}/a.txt", f"--val={tmp_path}/b.txt", f"--out={tmp_path}/bins"]
    (tmp_path / "b.txt").write_text("the house\n" * 200)
    refuses(lambda: prepare.main([*args, "--tokenizer=allenai/none"]), "allenai/none", "404")
    refuses(lambda: prepare.main([*args, "--tokenizer=openai/merges"]), "there is no tokenizer.json in")
    refuses(lambda: prepare.main([*args, "--tokenizer=none"]), "neither train, gpt2, a folder")
    (tmp_path / "local" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuses(lambda: prepare.main([*args, "--tokenizer=local/llama"]), "no tokenizer.json in local/llama")
    prepare.main([*args, "--tokenizer=allenai/olmo"])
    assert load_tokenizer(tmp_path / "bins").n_vocab == load_tokenizer(hub).n_vocab
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(lambda: prepare.main([*args[:2], f"--out={tmp_path}/other", "--tokenizer=allenai/none"]),
            "pip install huggingface_hub")
