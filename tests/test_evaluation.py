"""What docs/evaluation.md promises: other people's tools read an exported folder, and measure what we do."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY_VOCAB, random_run, rewrite, write_bin

import data
import eval_ner
import export
from model import ModelConfig
from nanomaml import checkpoint

pytestmark = pytest.mark.slow  # transformers and lm_eval take seconds to import
MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=TOY_VOCAB + 6, context=24)


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """The folder of a small random model whose logits are far from uniform."""
    out = random_run(toy, tmp_path_factory.mktemp("runs") / "run", MODEL)
    rewrite(out / "ckpt_000007.pt", lambda state: state["model"]["lm_head.weight"].mul_(20))
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("hf")
    export.main([str(run), f"--to={folder}"])
    return folder


def test_lm_eval_gives_the_bits_per_byte_of_our_validation_loss(toy, run, exported, tmp_path, monkeypatch):
    """The task is that of docs/evaluation.md. With a text of whole windows both read the same ones."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    Path("val.yaml").write_text(re.search(r"```yaml\n(.*?)```", document, re.S)[1])
    tokenizer = data.load_tokenizer(run)
    ids = data.open_corpus(toy)[0].shards[0][:7 * MODEL.context].clip(max=TOY_VOCAB - 3).tolist()
    text = tokenizer.decode(ids)
    assert tokenizer.encode_ordinary(text) == ids
    Path("val.jsonl").write_text(json.dumps({"text": text}) + "\n")

    results = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(exported), "dtype": "float32"}, tasks=["val"],
        task_manager=TaskManager(include_path=str(tmp_path)), device="cpu", batch_size=2)
    for name in ("train_000000", "val_000000"):
        write_bin(tmp_path / f"{name}.bin", [tokenizer.eot_token, *ids])
    batch = data.eval_sequences(data.open_corpus(tmp_path)[1]["val"], MODEL.context, 100)
    assert batch.ids.shape == (7, MODEL.context)
    with torch.no_grad():
        loss = checkpoint.load_model(run)(batch.ids, batch.targets).item()
    expected = loss * len(ids) / len(text.encode()) / math.log(2)
    assert results["results"]["val"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_ner_fine_tuning_equals_that_of_transformers(toy, run, exported):
    """Llama with a token classification head, the same start and the same batches: losses of 12 updates."""
    transformers = pytest.importorskip("transformers")
    tokenizer = data.load_tokenizer(toy)
    words = [tokenizer.decode([256 + i]).strip() for i in range(60)]
    tags = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    generator = torch.Generator().manual_seed(3)

    picked = [torch.randint(60, (2 + 7 * i % 28,), generator=generator).tolist() for i in range(48)]
    sentences = [([words[i] for i in places], [tags[i % 7] for i in places]) for places in picked]
    treebank = eval_ner.Treebank(sentences, tokenizer, MODEL.context, "first")
    cfg = eval_ner.Config(lr=3e-3, epochs=3, batch_size=16)
    lines = []
    eval_ner.fine_tune(checkpoint.load_model(run), treebank, treebank, cfg, 5, torch.float32, lines.append)
    ours = [line["ner/seed5/loss"] for line in lines]

    theirs = transformers.AutoModelForTokenClassification.from_pretrained(exported, num_labels=7)
    order = torch.Generator().manual_seed(5)
    theirs.score.weight.data = 0.02 * torch.randn(7, MODEL.d_model, generator=order)
    theirs.score.bias.data.zero_()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr, weight_decay=0.0)
    n_batches = math.ceil(len(treebank.windows) / cfg.batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 3 * n_batches)
    losses = []
    for _ in range(3):
        total = 0.0
        for batch in eval_ner.batches(treebank.windows, cfg.batch_size, order):
            longest = max(len(window.ids) for window in batch)
            ids, mask, labels = (torch.full((len(batch), longest), fill) for fill in (0, 0, -100))
            for row, window in enumerate(batch):
                n = len(window.ids)
                ids[row, :n], mask[row, :n] = torch.tensor(window.ids), 1
                labels[row, window.positions] = treebank.tags[window.words]
            loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        losses.append(total / n_batches)
    assert 3 * n_batches >= 9 and losses[0] - losses[2] > 0.05, "it learns"
    assert ours == pytest.approx(losses, abs=1e-4)
