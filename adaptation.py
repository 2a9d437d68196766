"""How well do a model's features adapt? Few-shot classification of words on held-out text, for any run.

    python adaptation.py out/hybrid out/vanilla    # newest checkpoints: JSON lines, with standard errors

The effect of meta-learning is hybrid against vanilla, not adapted against unadapted, so train.py measures
this at each evaluation, in vanilla runs too. A linear head that starts at zero learns N words from K windows
of validation text each, by the run's inner steps and rate, and classifies Q others. One pass gives both
read-outs of a window: the feature at a mask in the word's place, and the one before it, where a causal
language model predicts the word. Metrics; `new_` marks words that are never classes in training:

    adapt/query_acc, adapt/query_loss, adapt/new_query_acc, ...      at the run's read_out; also ..._unadapted
    adapt/mask_query_acc, adapt/context_query_acc, ...               at each read-out
    adapt/ways, adapt/new_ways                                       N, fewer than eval_ways on short text
    final/mask_query_acc, final/mask_query_acc_error, ...            at the end, on up to 4 times the words
    final/ways, final/words, ...                                    N and the number of words; chance is 1 / N

Shapes: E episodes, N ways, K shots, Q queries, M = K + Q windows of a word, T positions, D model width.
"""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from meta import Head, Learner, labels
from nanomaml import checkpoint, config, files, machine
from nanomaml.config import UserError, require


class AdaptationTest:
    """Fixed episodes from the validation corpora: the same for runs of the same data and eval_* settings.

    Each kind of word has a pool of words with M windows each. An episode draws N words of a pool and, for
    each word, which windows are support. If fewer than N words occur M times in the text, episodes have
    fewer ways; if fewer than two do, there is no pool.
    """

    def __init__(self, cfg, validation, tokenizer):
        self.cfg, self.pools = cfg, {}  # {prefix: windows (words, M, T + 1), which end at the mask}
        self.lacks = "eval_episodes = 0"  # why there are no pools
        if cfg.eval_episodes > 0:
            self.lacks = "the tokenizer of the data is not available"
        if tokenizer is None or cfg.eval_episodes == 0:
            return
        corpus = data.Corpus([path for split in validation.values() for path in split.paths])
        corpus.vocab_size = tokenizer.n_vocab
        count, window = cfg.eval_shots + cfg.eval_queries, min(cfg.eval_window, cfg.context - 1)
        for prefix, held_out in (("", False), ("new_", True)):
            series = data.Episodes(
                corpus, tokenizer, ways=cfg.eval_ways, shots=cfg.eval_shots, queries=cfg.eval_queries,
                window=window, seed=0, read_out="context", held_out=held_out, word_targets=cfg.word_targets,
                max_share=cfg.max_word_share)
            rng = np.random.default_rng(0)  # not the run's seed: runs of all seeds have the same test
            try:
                chunks = series.read_chunks(rng, data.CHUNKS << 4)
            except UserError:  # bins from elsewhere
                self.lacks = "the text holds ids that the tokenizer lacks"
                return
            words = itertools.islice(series.classes(rng, chunks, count), 4 * cfg.eval_ways)
            windows = [windows for _, windows in words]
            if prefix == "":
                self.lacks = f"too few of its words repeat: {series.lack(chunks)}"
            if len(windows) >= 2:
                text = np.array(windows)  # (words, M, T)
                masks = np.full((*text.shape[:2], 1), series.mask_id)
                self.pools[prefix] = torch.from_numpy(np.concatenate((text, masks), axis=2))

    def describe(self):
        kinds = {"": "other", "new_": "held-out"}
        parts = [f"{min(self.cfg.eval_ways, len(pool))}-way, {len(pool)} {kinds[prefix]} words"
                 for prefix, pool in self.pools.items()]
        return ", ".join(parts) or f"not measured, since {self.lacks}"

    @torch.no_grad()
    def episodes(self, decoder, dtype, every_word=False):
        """{(prefix, read_out, "adapted" or "unadapted"): (words (E, N), correct and losses (E, N * Q))}."""
        cfg, device, results = self.cfg, decoder.lm_head.weight.device, {}
        head = Head(decoder.cfg.d_model, 1, 0, "zero", cfg.eval_ways)
        learner = Learner(decoder=decoder, head=head, inner_steps=cfg.inner_steps, inner_lr=cfg.inner_lr)
        for prefix, pool in self.pools.items():
            pool = pool if every_word else pool[:cfg.eval_ways]
            words, places = self.draw(*pool.shape[:2], cfg.eval_episodes * (4 if every_word else 1))
            with machine.autocast(device, dtype), decoder.eager():
                parts = pool.flatten(0, 1).split(64)
                features = torch.cat([decoder.hidden(part.to(device))[:, -2:] for part in parts])
            # (E, N, K) and (E, N, Q)
            support, query = places.to(device).split([cfg.eval_shots, cfg.eval_queries], dim=2)
            for read_out, x in zip(("context", "mask"), features.unbind(1)):  # x (words * M, D)
                # From (E, N * K, D) and (E, N * Q, D)
                after, _, before = learner.adapt_heads(x[support.flatten(1)], x[query.flatten(1)],
                                                       words.shape[1])
                for name, logits in (("adapted", after), ("unadapted", before)):
                    target = labels(words.shape[1], logits)
                    loss = F.cross_entropy(logits.mT, target, reduction="none")
                    results[prefix, read_out, name] = words, logits.argmax(-1) == target, loss
        return results

    def draw(self, n_words, windows, episodes):
        """(words (E, N), places (E, N, M) in the flat (words * M) windows) of episodes, always the same."""
        rng, ways = np.random.default_rng(1), min(self.cfg.eval_ways, n_words)
        words = np.array([rng.permutation(n_words)[:ways] for _ in range(episodes)])
        order = np.argsort(rng.random((*words.shape, windows)))  # (E, N, M)
        return torch.from_numpy(words), torch.from_numpy(words[:, :, None] * windows + order)

    def measure(self, decoder, dtype, is_last=False):
        """{metric: float}; changes neither the model nor random numbers. is_last: final metrics too."""
        metrics = {}
        for (prefix, read_out, name), (words, correct, loss) in self.episodes(decoder, dtype).items():
            metrics[f"adapt/{prefix}ways"] = words.shape[1]
            means = {"acc": correct.float().mean().item(), "loss": loss.mean().item()}
            suffix = "" if name == "adapted" else "_unadapted"
            for key, mean in means.items():
                if read_out == self.cfg.read_out:
                    metrics[f"adapt/{prefix}query_{key}{suffix}"] = mean
                if name == "adapted":
                    metrics[f"adapt/{read_out}_{prefix}query_{key}"] = mean
        return metrics | (self.final(decoder, dtype) if is_last else {})

    def final(self, decoder, dtype):
        """Final metrics, on every word of the pools; errors are over words, as if other words were drawn."""
        metrics = {}
        for (prefix, read_out, name), (words, correct, loss) in self.episodes(decoder, dtype, True).items():
            if name == "adapted":
                key = f"final/{read_out}_{prefix}query"
                at = words.repeat_interleave(self.cfg.eval_queries, dim=1).flatten()
                right = correct.flatten().double().cpu()
                accuracies = torch.bincount(at, right) / torch.bincount(at)  # of each word
                metrics |= {f"{key}_acc": correct.float().mean().item(), f"{key}_loss": loss.mean().item(),
                            f"{key}_acc_error": accuracies.std().item() / math.sqrt(len(accuracies)),
                            f"final/{prefix}ways": words.shape[1], f"final/{prefix}words": len(accuracies)}
        return metrics


def main(argv):
    folders, flags = config.operands(config.Settings, argv)
    config.load(config.Settings, flags, __doc__)
    require(folders, "name the folders of runs, for instance out/demo; got none")
    for folder in folders:
        state = checkpoint.load(folder)
        require("eval_ways" in state["config"], f"{folder} holds no run of train.py")
        cfg = SimpleNamespace(**state["config"])
        run = Path(folder) if Path(folder).is_dir() else Path(folder).parent
        tokenizer = data.load_tokenizer(run, cfg.vocab_size)
        test = AdaptationTest(cfg, data.open_corpus(cfg.data)[1], tokenizer)
        line = {"run": folder, "step": state["step"]}
        line |= test.final(checkpoint.load_model(state), torch.float32)
        if "" not in test.pools:
            line["not_measured"] = test.lacks
        print(json.dumps(files.finite(line)), flush=True)


if __name__ == "__main__":
    config.run(main)
