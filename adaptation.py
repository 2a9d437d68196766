"""How well do a model's features adapt? Few-shot classification of words on held-out text, for any run.

    python adaptation.py out/hybrid out/vanilla    # their newest checkpoints, with errors, on more windows

The effect of meta-learning is hybrid against vanilla, not adapted against unadapted: any language model's
features can be told apart by a head. So train.py measures this at each evaluation, of vanilla runs too.
Fixed windows of validation text end at the mask of a word. A linear head that starts at zero learns N
words from K windows each, by the run's inner loop, and classifies Q others. One pass gives both
read-outs: the feature at the mask, and that at the position before it, where a causal language model
predicts the word. Metrics, of words that may be classes in training and, with `new_`, of held-out ones
that never are (data.is_held_out):

    val/query_acc, val/query_loss, val/new_query_acc, ...      at the run's read_out; also ..._unadapted
    val/mask_query_acc, val/context_query_acc, ...             at either

Shapes: E episodes, N ways, K shots, Q queries, M = K + Q windows of a word, T positions, D model width.
"""
import itertools
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import config
import data
import machine
from meta import Head, adapt, labels


class AdaptationTest:
    """Fixed episodes from the validation corpora: the same for every run with the same data, ways and shots.

    There is one pool of words with M windows each for each kind of word. An episode draws N words of a
    pool, and which of their windows are support. Where the text has fewer than N words that come M times,
    the episodes have fewer ways; with less than two there is no such pool.
    """

    def __init__(self, cfg, validation, tokenizer, words_per_way=1):
        self.cfg, self.pools = cfg, {}
        corpus = data.Corpus([path for split in validation.values() for path in split.paths])
        self.lacks = "too few of its words repeat"
        if max(map(data.largest_id, corpus.shards)) >= tokenizer.n_vocab:  # bins from elsewhere
            self.lacks = "it holds ids that the tokenizer lacks"
            return
        count, window = cfg.shots + cfg.queries, min(cfg.window, cfg.context)
        for prefix, held_out in (("", False), ("new_", True)):
            rng = np.random.default_rng(0)  # not the run's seed: runs of all seeds are measured alike
            series = data.Episodes(corpus, tokenizer, cfg.ways, cfg.shots, cfg.queries, window, 0,
                                   held_out=held_out)
            pieces = series.read_pieces(rng, data.PIECES << 4)
            found = list(itertools.islice(series.classes(rng, pieces, count), words_per_way * cfg.ways))
            if len(found) >= 2:
                windows = np.array([windows for _, windows in found])[:, :, 0]  # (words, M, T)
                ways = min(cfg.ways, len(found))
                words = np.array([rng.permutation(len(found))[:ways] for _ in range(cfg.eval_episodes)])
                order = np.argsort(rng.random((*words.shape, count)))  # (E, N, M) of the windows of a word
                places = words[:, :, None] * count + order  # (E, N, M) in the flat (words * M) windows
                self.pools[prefix] = torch.from_numpy(windows).flatten(0, 1), torch.from_numpy(places)

    def describe(self):
        parts = [f"{places.shape[1]}-way on {len(windows)} windows of {'new' if prefix else 'other'} words"
                 for prefix, (windows, places) in self.pools.items()]
        return ", ".join(parts) or f"not measured, since {self.lacks}"

    @torch.no_grad()
    def episodes(self, decoder, dtype):
        """{(prefix, read_out, "adapted" or "unadapted"): (accuracies (E,), losses (E,) in nats)}."""
        cfg, device, results = self.cfg, decoder.lm_head.weight.device, {}
        head = Head(decoder.cfg.d_model, 1, 0, "zero", cfg.ways)
        for prefix, (windows, places) in self.pools.items():
            with machine.autocast(device, dtype), decoder.eager():
                features = [decoder.hidden(part.to(device))[:, -2:] for part in windows.split(64)]
            context, mask = torch.cat(features).unbind(1)  # (words * M, D) each
            support, query = places.to(device).split([cfg.shots, cfg.queries], dim=2)  # (E, N, K), (E, N, Q)
            ways = places.shape[1]
            for read_out, x in (("mask", mask), ("context", context)):
                x, x_query = x[support.flatten(1)], x[query.flatten(1)]  # (E, N * K, D), (E, N * Q, D)
                start = {name: p.expand(len(x), *p.shape) for name, p in head.start(ways, x).items()}

                def support_loss(params, x=x, ways=ways):  # summed: heads do not meet
                    losses = F.cross_entropy(head(x, params).mT, labels(ways, x), reduction="none")
                    return losses.mean(1).sum()

                fast = adapt(support_loss, start, cfg.inner_steps, cfg.inner_lr)
                for name, params in (("adapted", fast), ("unadapted", start)):
                    logits, target = head(x_query, params), labels(ways, x_query)
                    loss = F.cross_entropy(logits.mT, target, reduction="none").mean(1)
                    results[prefix, read_out, name] = (logits.argmax(-1) == target).float().mean(1), loss
        return results

    def measure(self, decoder, dtype):
        """{metric: float}; leaves no trace in the model or the random numbers."""
        metrics = {}
        for (prefix, read_out, name), (accuracy, loss) in self.episodes(decoder, dtype).items():
            suffix = "" if name == "adapted" else "_unadapted"
            if read_out == self.cfg.read_out:
                metrics[f"val/{prefix}query_acc{suffix}"] = accuracy.mean().item()
                metrics[f"val/{prefix}query_loss{suffix}"] = loss.mean().item()
            if name == "adapted":
                metrics[f"val/{read_out}_{prefix}query_acc"] = accuracy.mean().item()
                metrics[f"val/{read_out}_{prefix}query_loss"] = loss.mean().item()
        return metrics


def main(argv):
    import train  # its Config reads that of the run

    folders, _ = config.operands(argv)
    config.require(folders, "name one or several runs' folders, for instance out/demo")
    for folder in folders:
        state = checkpoint.load(folder)
        cfg, decoder = checkpoint.load_config(train.Config, state), checkpoint.load_model(state)
        tokenizer = data.load_tokenizer(folder)
        test = AdaptationTest(cfg, data.open_corpus(cfg.data)[1], tokenizer, words_per_way=4)
        line = {"run": folder, "step": state["step"], "test": test.describe()}
        for (prefix, read_out, name), (accuracy, loss) in test.episodes(decoder, torch.float32).items():
            if name == "adapted":
                key = f"{read_out}_{prefix}query"
                line |= {f"{key}_acc": accuracy.mean().item(), f"{key}_loss": loss.mean().item(),
                         f"{key}_acc_error": accuracy.std().item() / math.sqrt(len(accuracy))}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    config.run(main)
