"""Killed anywhere: a run that SIGKILL ends again and again equals one that was left alone, bit for bit."""

import json
import os
import random
import signal

import pytest
from conftest import TOY, same
from forks import Forks

import checkpoint

CLOCK = {"seconds", "tok_per_s", "mfu", "data_wait"}
SHORTER = "import machine; machine.LAST_WORDS = 1"


def results(out_dir):
    """What a run leaves but for the clock: state and lines, in order."""
    state = checkpoint.newest(out_dir)
    counted = ("step", "tokens", "flops", "skipped")
    state = {key: state[key] for key in ("model", "learner", "optimizers", *counted)}
    for name in ("log.jsonl", "probes.jsonl"):
        lines = map(json.loads, (out_dir / name).read_text().splitlines())
        state[name] = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    return state


def ends(forks, flags, world, deaths=(), kill_all=False):
    """[(exit code, output) of each rank] of a run whose rank r dies as `deaths[r]` says, or is left alone."""
    pids = [forks.start(flags, rank, world, dict(deaths).get(rank), SHORTER) for rank in range(world)]
    first = min(dict(deaths), default=0)
    ended = {first: forks.wait(pids[first])}
    for rank, pid in enumerate(pids):
        if rank != first:
            if kill_all:
                os.kill(pid, signal.SIGKILL)
            ended[rank] = forks.wait(pid)
    return [ended[rank] for rank in range(world)]


def kill_again_and_again(toy, tmp_path, world, kills):
    """Moments are drawn anywhere in the run, in the writing of a checkpoint and in that of a log line."""
    flags = [*TOY, f"--data={toy}", "--max_steps=24", "--checkpoint_every=3", "--probe_every=5"]
    rng, killed, folders, is_running = random.Random(world), 0, 0, False
    with Forks() as forks:
        whole = ends(forks, [*flags, f"--out_dir={tmp_path / 'whole'}"], world)
        assert [code for code, _ in whole] == [0] * world, whole
        expected = results(tmp_path / "whole")
        while killed < kills or is_running:
            out_dir = tmp_path / str(folders)
            rank, kill_all = (rng.randrange(world), rng.random() < 0.5) if world > 1 else (0, False)
            where, most = rng.choice([("train", 60_000), ("save", 1200), ("append", 40)])
            death = {rank: (where if rank == 0 else "train", rng.randrange(most))} if killed < kills else {}
            codes = ends(forks, [*flags, f"--out_dir={out_dir}"], world, death, kill_all)
            is_running = any(code for code, _ in codes)
            if not is_running:
                assert same(results(out_dir), expected)
                assert not list(out_dir.glob("*.partial")) and [code for code, _ in codes] == [0] * world
                folders += 1
                continue
            killed += 1
            assert codes[rank][0] == -signal.SIGKILL, codes
            for other, (code, output) in enumerate(codes):
                if other != rank and not kill_all and code:  # 0: it had nothing left to do with the other
                    assert code == 1 and f"error: rank {rank} has ended (without a word" in output, output
                    assert "Traceback" not in output, output
    assert killed == kills and folders > 0


@pytest.mark.parametrize("world, kills", [(1, 3), (2, 2)])
def test_a_run_killed_a_few_times_equals_one_left_alone(toy, tmp_path, world, kills):
    kill_again_and_again(toy, tmp_path, world, kills)


@pytest.mark.slow
@pytest.mark.parametrize("world, kills", [(1, 20), (2, 8)])
def test_a_run_killed_many_times_equals_one_left_alone(toy, tmp_path, world, kills):
    kill_again_and_again(toy, tmp_path, world, kills)
