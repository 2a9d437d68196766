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
