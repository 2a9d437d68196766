"""What only a long run would show: memory that creeps, open files, counters that round, steps of 7 digits."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOY, same

import checkpoint
import logs
import train
from progress import Progress


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's memory")
def test_two_thousand_updates_take_no_more_memory_and_no_more_files(toy, tmp_path, monkeypatch):
    """Resident memory, open files and threads at each log line, probes, evaluations and checkpoints included.

    A kept batch is 4 KiB an update, a kept graph far more. Over 4,000 updates the slope was 0.1 KiB at the
    end, half of it of the list that held the measurements; before, allocators settle.
    """
    seen, append = np.zeros((2000, 3), int), logs.append

    def spy(path, line):
        append(path, line)
        if "lr" in line:
            resident = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
            folders = "/proc/self/fd", "/proc/self/task"
            seen[line["step"] - 1] = int(resident), *(len(os.listdir(folder)) for folder in folders)

    monkeypatch.setattr(logs, "append", spy)
    flags = ["--max_steps=2000", "--global_batch_size=4", "--batch_size=2", "--probe_every=20"]
    flags += ["--eval_every=200", "--checkpoint_every=200", "--probe_gradients", "--eval_episodes=2"]
    train.main([*TOY, f"--data={toy}", f"--out_dir={tmp_path}", *flags])
    resident, files, threads = seen[1000:].T
    slope = np.polyfit(np.arange(1000), resident, 1)[0]
    assert slope < 1, f"{slope:.3f} KiB an update, {resident[0]} to {resident[-1]} KiB"
    assert np.ptp(files) == 0 and np.ptp(threads) == 0


def test_counters_are_exact_where_floats_would_round(tmp_path):
    """2^53 + 1 is no float. Seven days of eight GPUs count 10^21 FLOPs, more than 64 bits hold."""
    progress = Progress(tokens=2**53, flops=2**53)
    progress.count("lm", 1, 1, 2**70)
    progress.count("lm", 1, 0, 1)
    progress.add_seconds(1.0)
    logs.append(tmp_path / "log.jsonl", progress.axes() | progress.interval_metrics(1e12))
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["tokens"], line["flops"]) == (2**53 + 1, 2**70 + 2**53 + 1)
    state = {"step": 1, "model": {}, "config": {}, **vars(progress)}
    assert same(checkpoint.read(checkpoint.save(tmp_path, state, keep=1)), state)


def test_a_models_flops_are_whole_numbers(toy):
    cfg = train.config.load(train.Config, [*TOY, f"--data={toy}"])
    learner = train.build_learner(cfg, torch.float32)
    corpus, _, tokenizer = train.load_data(cfg, True, 0, 1)
    for kind, source in train.build_sources(cfg, {"lm", "episodes"}, corpus, tokenizer).items():
        batch = source.batches[range(source.size)]
        assert type(learner.flops(kind, batch)) is int and type(batch.tokens) is int
        assert type(batch.lm_tokens) is int


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path):
    """By name ckpt_1000000.pt comes before ckpt_999999.pt."""
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, {"step": step, "model": {}, "config": {}}, keep=3)
    assert list(map(checkpoint.step_of, checkpoint.paths(tmp_path))) == [999_999, 1_000_000, 1_000_001]
    assert checkpoint.newest(tmp_path)["step"] == 1_000_001
    (tmp_path / "log.jsonl").write_text('{"step": 999999}\n{"step": 1000000}\n{"step": 1000001}\n')
    logs.truncate_log(tmp_path / "log.jsonl", 1_000_000)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 999999}\n{"step": 1000000}\n'
