"""docs/slurm.sh, with stand-ins for Slurm's commands: two nodes on this machine, one process on each."""
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TOY

from nanomaml import checkpoint

STAND_INS = {
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": '[ "$1" = --cpus-per-task=4 ] || exit 64; shift; "$@" & a=$!; "$@" & b=$!; '
            'echo $a $b > "$CALLS/step"; wait $a; a=$?; wait $b; exit $((a + $?))',
    "scancel": 'echo scancel "$@" >> "$CALLS/log"; kill -TERM $(cat "$CALLS/step")',
    "scontrol": 'if [ $1 = show ]; then echo localhost; echo other; else echo "$@" >> "$CALLS/log"; fi',
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_a_job_whose_time_is_up_writes_a_checkpoint_and_comes_back_and_a_finished_one_does_not(toy, tmp_path):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost,other", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "4",
    }

    def submit(max_steps):
        command = ["bash", "docs/slurm.sh", *TOY, f"--data={toy}", f"--out_dir={tmp_path / 'run'}",
                   f"--max_steps={max_steps}", "--checkpoint_every=0"]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)

    with submit(1_000_000) as job:
        for line in job.stdout:
            if re.match("step +3/", line):
                os.kill(job.pid, signal.SIGUSR1)  # to the shell alone, as --signal=B:USR1 does
        assert job.wait(120) == 0
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls == [f"scancel --signal=TERM {os.getpid()}", f"requeue {os.getpid()}"]
    stopped = checkpoint.newest(tmp_path / "run")["step"]
    assert 3 <= stopped < 1_000_000

    with submit(stopped + 2) as job:
        output = job.stdout.read()
        assert job.wait(120) == 0, output
    assert f"resume    from {tmp_path / 'run'}/ckpt_{stopped:06d}.pt" in output and "2 ranks" in output
    assert checkpoint.newest(tmp_path / "run")["step"] == stopped + 2
    assert len((tmp_path / "log").read_text().splitlines()) == 2, "a finished job is not queued again"

    with submit(1) as job:  # fewer steps than it has done: refused
        assert "has done" in job.stdout.read() and job.wait(120) != 0
    assert len((tmp_path / "log").read_text().splitlines()) == 2, "nor is a failed one"
