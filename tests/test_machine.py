"""machine.py: devices, dtypes and ranks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machine
from config import UserError


def test_a_device_that_is_not_there_is_refused_in_one_line():
    unknown = "device must be auto, cuda, mps or cpu, got 'warp'"
    for name, says in (("warp", unknown), ("cuda:77", "device cuda:77 is not available here")):
        with pytest.raises(UserError, match=says) as error:
            machine.pick_device(name, "auto")
        assert "\n" not in str(error.value)


def test_several_ranks_share_no_named_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device = 'cuda:1' with several ranks: give cuda .* or cpu"):
        machine.pick_device("cuda:1", "auto")
    assert machine.pick_device("cpu", "float32") == (torch.device("cpu"), torch.float32)
    assert machine.describe(torch.device("cpu"), torch.float32).startswith("cpu, float32, 2 ranks of ")


@pytest.mark.parametrize("instructions, dtype", [({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)])
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, instructions, dtype):
    """Emulated, it is a hundred times slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert machine.pick_device("cpu", "auto")[1] == dtype


def test_any_rank_of_one_process():
    assert machine.any_rank([15]) and not machine.any_rank([])


def test_one_writer_holds_a_folder_until_it_is_killed(tmp_path):
    """Two processes are never both let in; who holds it is named, and a kill lets go of it."""
    path = tmp_path / "lock"
    code = ("import machine, sys, time\nwith machine.only_writer(sys.argv[1], 'out/a'):\n"
            "    print('held', flush=True)\n    time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1],
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"out/a is being written by process {other.pid} on "):
        with machine.only_writer(path, "out/a"):
            raise AssertionError
    other.kill()
    other.wait()
    with machine.only_writer(path, "out/a", wait=True):
        assert str(os.getpid()) in Path(f"{path}.holder").read_text()
    assert not Path(f"{path}.holder").exists()


def test_a_file_in_the_way_is_refused_and_a_lack_of_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    """Lustre and NFS may be mounted without locks: that is no reason to stop a run."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="it is a link to .*nothing, which does not exist: out/a"):
        with machine.only_writer(tmp_path / "link" / "lock", "out/a"):
            raise AssertionError

    def acquire(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(machine.FileLock, "acquire", acquire)
    with machine.only_writer(tmp_path / "lock", "out/a"):
        pass
    assert "no locks (No locks available): let no other process write out/a" in capsys.readouterr().err
