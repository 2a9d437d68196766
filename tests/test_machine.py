"""machine.py: devices, dtypes and ranks."""

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
