"""nanomaml/machine.py, and nanomaml/ranks.py in one process: devices, dtypes and locks."""
import errno
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import refuses

from nanomaml import machine, ranks


def test_a_device_that_is_not_there_or_cannot_be_shared_is_refused(monkeypatch):
    refuses(lambda: machine.pick_device("cuda:77", "auto"), "device cuda:77 is not available here")
    refuses(lambda: machine.pick_device("meta", "auto"), "device must be auto, cuda, mps or cpu, got 'meta'")
    for name, value in zip(ranks.LAUNCHER, ("0", "2", "0", "127.0.0.1", "1")):
        monkeypatch.setenv(name, value)
    refuses(lambda: machine.pick_device("cuda:1", "auto"), "'cuda:1' with several ranks: give cuda", "or cpu")
    assert machine.pick_device("cpu", "float32") == (torch.device("cpu"), torch.float32)
    assert machine.describe(torch.device("cpu"), torch.float32).startswith("cpu, float32, 2 ranks of ")


def test_a_launcher_that_is_gone_or_a_port_that_is_taken_is_one_line(monkeypatch):
    for name, value in zip(ranks.LAUNCHER, ("1", "2", "1", "127.0.0.1", "29500")):
        monkeypatch.setenv(name, value)

    def init_process_group(*args, **options):
        raise torch.distributed.DistNetworkError("address\nalready in use")

    monkeypatch.setattr(ranks.dist, "init_process_group", init_process_group)
    refuses(lambda: ranks.connected(torch.device("cpu")).__enter__(),
            "rank 1 finds no other rank at 127.0.0.1:29500: address already in use")


def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch):
    """Emulated, it is a hundred times slower than float32."""
    for instructions, dtype in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict(instructions).copy)
        assert machine.pick_device("cpu", "auto")[1] == dtype


def test_one_writer_holds_a_folder_until_it_is_killed(tmp_path):
    """Two processes are never both let in; who holds it is named, and a kill lets go of it."""
    path = tmp_path / "lock"
    code = ("import sys, time\nfrom nanomaml import ranks\nwith ranks.only_writer(sys.argv[1], 'out/a'):\n"
            "    print('held', flush=True)\n    time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1],
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    refuses(lambda: ranks.only_writer(path, "out/a").__enter__(),
            f"out/a is being written by process {other.pid} on ")
    other.kill()
    other.wait()
    with ranks.only_writer(path, "out/a", wait=True):
        assert str(os.getpid()) in Path(f"{path}.holder").read_text()
    assert not Path(f"{path}.holder").exists()


def test_a_link_to_nothing_is_refused_and_a_lack_of_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    """Lustre and NFS may be mounted without locks: that is no reason to stop a run."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refuses(lambda: ranks.only_writer(tmp_path / "link" / "lock", "out/a").__enter__(),
            f"cannot write out/a (a link to {tmp_path}/nothing)")

    def acquire(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ranks.FileLock, "acquire", acquire)
    with ranks.only_writer(tmp_path / "lock", "out/a"):
        pass
    assert "no locks (No locks available): let no other process write out/a" in capsys.readouterr().err
