"""Killed anywhere: a run that SIGKILL ends again and again equals one that was left alone, bit for bit."""
import random
import signal

import pytest
from conftest import TOY, results, same

PLACES = [("train", 600_000), ("optimizer_step", 200_000), ("save", 11_000), ("append", 300)]


@pytest.mark.parametrize("world, kills, steps", [
    (1, 3, 10), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 20, 24), (2, 8, 24)))])
def test_a_run_killed_again_and_again_equals_one_left_alone(forks, toy, tmp_path, world, kills, steps):
    """Moments are drawn anywhere in the run, in the writing of a checkpoint and in that of a log line. A run
    that outlives its moment is compared, and another one begins.
    """
    flags = [*TOY, f"--data={toy}", f"--max_steps={steps}", "--checkpoint_every=3", "--probe_every=5"]
    rng, killed, folders, is_running = random.Random(world), 0, 0, False
    whole = forks.run([*flags, f"--out_dir={tmp_path / 'whole'}"], world)
    assert [code for code, _ in whole] == [0] * world, whole
    expected = results(tmp_path / "whole")
    while killed < kills or is_running:
        out_dir, deaths = tmp_path / str(folders), {}
        if killed < kills:
            rank = rng.randrange(world)
            where, most = rng.choice(PLACES if rank == 0 else PLACES[:2])
            deaths = {rank: (where, rng.randrange(most if rank == 0 else most // 2))}
        kill_all = killed < kills and rng.random() < 0.5
        ended = forks.run([*flags, f"--out_dir={out_dir}"], world, deaths=deaths, kill_all=kill_all)
        is_running = any(code for code, _ in ended)
        if not is_running:
            assert same(results(out_dir), expected) and not list(out_dir.glob("*.partial"))
            folders += 1
            continue
        killed += 1
        assert -signal.SIGKILL in [code for code, _ in ended], ended
        for rank, (code, output) in enumerate(ended):
            if code not in (0, -signal.SIGKILL):  # 0: it had nothing left to do with the other
                assert code == 1 and f"error: rank {rank}: another rank has ended" in output, output
                assert "Traceback" not in output, output
    assert folders > 0
