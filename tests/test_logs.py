"""nanomaml/logs.py, files.py and wandb_logs.py: JSON lines, and what wandb shows of them."""
import json
import math

import numpy as np
import pytest

from nanomaml import console, files, logs, wandb_logs
from nanomaml.resume import Progress


def test_lines_are_appended_without_numbers_that_are_not_finite(tmp_path):
    """JSON has no NaN: other readers than Python's would stop at it."""
    given = [{"step": 1, "a": math.nan, "b": 2.5, "c": "text", "d": {"e": 1}}, {"step": 2, "a": -math.inf}]
    for line in given:
        files.append(tmp_path / "log.jsonl", line)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "b": 2.5, "c": "text", "d": {"e": 1}}, {"step": 2}]


def test_logs_are_truncated_after_a_step(tmp_path):
    """Lines of a future that a resume gave up, and a line that a kill tore."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"no": 1}\n{"step": 2, "x')
    logs.truncate(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and list(tmp_path.iterdir()) == [path]


def test_heads_become_the_mean_of_their_layer_and_a_heatmap_of_layers_by_heads():
    def line(rising):  # entropies that rise from head to head in this layer, and are flat in the others
        return {f"entropy/0{i}/{h:02d}": h / 12 if i == rising else 0.5 for i in range(3) for h in range(12)}

    means = wandb_logs.layer_means(line(1) | {"rank/resid/00": 3.0, "entropy_nats/00/00": 9.0})
    assert means.pop("entropy/01") == pytest.approx(66 / 144)
    assert means == {"rank/resid/00": 3.0, "entropy_nats/00": 9.0, "entropy/00": 0.5, "entropy/02": 0.5}
    images = [wandb_logs.heatmap(line(rising) | {"rank/resid/00": 3.0}) for rising in (0, 1, 2, None)]
    assert images[0].dtype == np.uint8 and images[0].shape[2] == 4
    first, second, third = (np.flatnonzero((image != images[3]).any(axis=(1, 2))) for image in images[:3])
    assert first.max() < second.min() <= second.max() < third.min(), "rows of pixels that differ from flat"


def test_evaluations_fit_120_columns_with_six_domains_and_say_what_is_left():
    domains = ("brown", "movie_reviews", "news_abc", "state_union", "inaugural", "shakespeare")
    metrics = {"val/loss": 5.0, "adapt/query_acc": 0.25, "adapt/new_query_acc": 0.5}
    metrics |= {f"val/{name}": 5.0 for name in domains}
    probe = {"step": 99_900, "rank/resid/00": 81.25, "entropy/00/00": 0.5}
    lines = console.evaluation_line(100_000, metrics, probe, 100_000).splitlines()
    interval, kinds = {"steps": 10, "seconds": 7.0}, {"lm": 1, "episodes": 1}
    progress = Progress(step=99_990, interval=interval, micro_steps=kinds)
    line = {"train/loss": 4.5, "meta/query_loss": 2.5, "meta/query_acc": 0.25, "lr": 1e-3, "grad_norm": 0.5}
    line |= {"tok_per_s": 12_345, "mfu": 0.5, "share/episodes": 0.5, "skipped": 0, "data_wait": 0.01}
    lines.append(console.training_line(progress, line, 100_000))
    assert max(map(len, lines[:-1])) <= 120, lines
    assert all(f"val/{name} 5.0000" in "".join(lines) for name in domains)
    assert lines[-1].endswith("0:07 left") and [console.clock(x) for x in (59.6, 3600)] == ["1:00", "1:00:00"]
