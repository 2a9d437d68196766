"""logs.py: JSON lines, the console, what wandb shows."""

import json
import math

import numpy as np

import logs


def test_lines_are_appended_without_numbers_that_are_not_finite(tmp_path):
    """JSON has no NaN: other readers than Python's would stop at it."""
    given = [{"step": 1, "a": math.nan, "b": 2.5, "c": "text", "d": {"e": 1}}, {"step": 2, "a": -math.inf}]
    for line in given:
        logs.append(tmp_path / "log.jsonl", line)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "b": 2.5, "c": "text", "d": {"e": 1}}, {"step": 2}]


def test_a_log_is_truncated_after_a_step(tmp_path):
    """Lines of a future that a resume gave up, and a line that a kill tore."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"no": 1}\n{"step": 2, "x')
    logs.truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    logs.truncate_log(tmp_path / "none.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_heads_become_the_mean_of_their_layer():
    line = {"step": 3, "rank/resid/00": 7.0}
    line |= {"entropy/00/00": 0.25, "entropy/00/01": 0.75, "entropy/11/00": 1.0}
    assert logs.layer_means(line) == {"step": 3, "rank/resid/00": 7.0, "entropy/00": 0.5, "entropy/11": 1.0}


def test_the_best_is_lowest_for_losses_and_highest_for_accuracies_and_f1():
    best = {}
    for line in ({"val/loss": 3.0, "val/news": 4.0, "val/mask_query_acc": 0.5, "ner/seed1/dev_f1": 0.25},
                 {"val/loss": 2.0, "val/news": 5.0, "val/mask_query_acc": 0.25, "ner/seed1/dev_f1": 0.5},
                 {"val/loss": 2.5, "val/mask_query_loss": 1.0, "val/mask_query_acc_error": 0.0}):
        assert logs.update_best(best, line)
    assert not logs.update_best(best, {"step": 7, "train/loss": 0.0, "ner/seed1/dev_loss": 0.0})
    assert best == {"best/val/loss": 2.0, "best/val/news": 4.0, "best/val/mask_query_acc": 0.5,
                    "best/val/mask_query_loss": 1.0, "best/ner/seed1/dev_f1": 0.5}


def test_the_heatmap_shows_layers_by_heads():
    """Entropies rise from head to head here, so colours must differ, and a layer alike in all heads must
    not.
    """
    metrics = {f"entropy/{i:02d}/{h:02d}": h / 12 if i else 0.5 for i in range(3) for h in range(12)}
    image = logs.heatmap(metrics | {"rank/resid/00": 3.0, "entropy_nats/00/00": 9.0})
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 4
    flat = logs.heatmap(dict.fromkeys(metrics, 0.5))
    assert image.shape == flat.shape and (image != flat).any()
    changed = np.flatnonzero((image != flat).any(axis=(1, 2)))  # rows of pixels
    height = image.shape[0]
    assert changed.min() > 0.25 * height, "the first layer is alike in both"
