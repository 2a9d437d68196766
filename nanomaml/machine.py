"""The machine a script runs on: its device, the precision of matrix products, its clock and its speed.

    device, dtype = machine.pick_device("auto", "auto")
    with machine.autocast(device, dtype): ...
"""
import time
from typing import Literal

import torch

from nanomaml.config import UserError, one_line, require
from nanomaml.ranks import local_rank, rank_and_world

Dtype = Literal["auto", "bfloat16", "float32"]
PEAK_FLOPS = {  # dense bfloat16 FLOP/s by data sheet
    "H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
}


def pick_device(name, dtype):
    """(torch.device, torch.dtype) of the settings; each rank takes its GPU. UserError if it is not there."""
    is_alone = rank_and_world()[1] == 1
    if name == "auto":  # gloo, the only backend for several ranks on a Mac, does not know MPS
        has_mps = torch.backends.mps.is_available() and is_alone
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    require(is_alone or name in ("cuda", "cpu"),
            f"device = {name!r} with several ranks: give cuda (each rank takes a GPU) or cpu")
    require(name.startswith(("cuda", "mps", "cpu")), f"device must be auto, cuda, mps or cpu, got {name!r}")
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError: whatever the backend raises
        raise UserError(f"device {name} is not available here: {one_line(error, 200)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dtype != "auto":
        return device, getattr(torch, dtype)
    if device.type == "cpu":  # without these instructions bfloat16 is emulated, a hundred times slower
        is_fast = any(map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16", "bf16")))
    else:
        is_fast = device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if is_fast else torch.float32


def autocast(device, dtype):
    """The context where matrix products run in `dtype`; parameters and the residual stream stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def synchronize(device):
    """Waits until the device has done what it was given, so that the clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def describe(device, dtype):
    """For instance "cpu, bfloat16, 1 rank of 2 threads"."""
    world = rank_and_world()[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f" of {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{name}, {str(dtype).removeprefix('torch.')}, {world} rank{'s' * (world > 1)}{threads}"


def peak_flops(device, dtype):
    """FLOP/s that MFU is measured against: the GPU's data sheet or, elsewhere, a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=dtype)
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - start))
    return max(rates)
