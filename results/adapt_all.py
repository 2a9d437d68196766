"""How well features adapt where all parameters do: few-shot, at the mask, on words that are never classes.

    python results/adapt_all.py out/books/last-lm-31 out/all-10-0.03/last-lm-31 10 0.03

The numbers are the inner steps and the backbone's inner rate; the head's is the run's. Episodes are the first
32 of adaptation.py's final ones. Writes a run of no updates, as evidence.py reads it.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
from adaptation import AdaptationTest  # noqa: E402
from meta import Head, Learner, labels  # noqa: E402
from nanomaml import checkpoint, machine  # noqa: E402


@torch.no_grad()
def measure(cfg, decoder, backbone_lr, dtype, episodes=32):
    """{metric: mean over episodes} after cfg.inner_steps, named as AdaptationTest.final names them."""
    tokenizer = data.load_tokenizer(cfg.data, cfg.vocab_size)
    test = AdaptationTest(cfg, data.open_corpus(cfg.data)[1], tokenizer)
    pool = test.pools["new_"]  # (words, M, T + 1)
    words, places = test.draw(*pool.shape[:2], 4 * cfg.eval_episodes)
    ways = words.shape[1]
    learner = Learner(decoder=decoder, head=Head(cfg.d_model, 1, 0, "zero", ways), adapted="all",
                      inner_steps=cfg.inner_steps, dtype=dtype)
    learner.inner_lr = {name: cfg.inner_lr if name.startswith("head.") else backbone_lr
                        for name in learner.adapted}
    correct, losses = [], []
    for episode in pool.flatten(0, 1)[places[:episodes]]:  # (N, M, T + 1)
        support, query = episode.split([cfg.eval_shots, cfg.eval_queries], dim=1)
        logits = learner.adapt_any(support.flatten(0, 1), query.flatten(0, 1), ways)[0]
        target = labels(ways, logits[None])[0]
        correct.append((logits.argmax(-1) == target).float().mean())
        losses.append(F.cross_entropy(logits, target))
    return {f"final/mask_new_query_{key}": torch.stack(values).mean().item()
            for key, values in (("acc", correct), ("loss", losses))}


def main(source, out_dir, steps, backbone_lr):
    state = checkpoint.load(source)
    settings = state["config"] | {"inner_steps": int(steps), "adapt": "all", "max_steps": 0,
                                  "out_dir": out_dir}
    dtype = machine.pick_device("cpu", "auto")[1]  # as the run's own measurement
    line = {"step": 0, "tokens": 0, "flops": 0} | measure(
        SimpleNamespace(**settings), checkpoint.load_model(state), float(backbone_lr), dtype)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    Path(out_dir, "config.json").write_text(json.dumps(settings))
    Path(out_dir, "log.jsonl").write_text(json.dumps(line) + "\n")
    print(json.dumps({"run": out_dir} | line))


if __name__ == "__main__":
    main(*sys.argv[1:])
