"""How well features adapt where all parameters do: few-shot, at the mask, on words that are never classes.

    python results/whole.py out/books/last-lm-31 out/whole-10-0.01/last-lm-31 10 0.01    # inner steps, rate

Episodes are the first 32 of adaptation.py's final ones. Writes a run of no updates, as evidence.py reads it.
"""
import json
import math
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
def measure(cfg, decoder, dtype, episodes=32):
    """{metric: mean over episodes, or its standard error} after cfg.inner_steps of all parameters."""
    tokenizer = data.load_tokenizer(cfg.data, cfg.vocab_size)
    test = AdaptationTest(cfg, data.open_corpus(cfg.data)[1], tokenizer)
    pool = test.pools["new_"]  # (words, M, T + 1)
    words, places = test.draw(*pool.shape[:2], episodes)
    ways = words.shape[1]
    learner = Learner(decoder=decoder, head=Head(cfg.d_model, 1, 0, "zero", ways), adapted="all",
                      inner_steps=cfg.inner_steps, inner_lr=cfg.inner_lr, dtype=dtype)
    correct, losses = [], []
    for episode in pool.flatten(0, 1)[places]:  # (N, M, T + 1)
        support, query = episode.split([cfg.eval_shots, cfg.eval_queries], dim=1)
        logits = learner.adapt_any(support.flatten(0, 1), query.flatten(0, 1), ways)[0]
        target = labels(ways, logits[None])[0]
        correct.append((logits.argmax(-1) == target).float().mean().item())
        losses.append(F.cross_entropy(logits, target).item())
    key, correct, losses = "final/mask_new_query", torch.tensor(correct), torch.tensor(losses)
    return {f"{key}_acc": correct.mean().item(), f"{key}_loss": losses.mean().item(),
            f"{key}_acc_error": (correct.std() / math.sqrt(episodes)).item()}


def main(source, out_dir, steps, rate):
    state = checkpoint.load(source)
    cfg = SimpleNamespace(**state["config"] | {"inner_steps": int(steps), "inner_lr": float(rate),
                                               "adapt": "all", "max_steps": 0, "out_dir": out_dir})
    dtype = machine.pick_device("cpu", "auto")[1]
    line = {"step": 0, "tokens": 0, "flops": 0} | measure(cfg, checkpoint.load_model(state), dtype)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    Path(out_dir, "config.json").write_text(json.dumps(vars(cfg)))
    Path(out_dir, "log.jsonl").write_text(json.dumps(line) + "\n")
    print(json.dumps({"run": out_dir} | line))


if __name__ == "__main__":
    main(*sys.argv[1:])
