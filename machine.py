"""The machine a script runs on: its device, the precision of matrix products, the ranks of a distributed run.

    device, dtype = machine.pick_device("auto", "auto")
    with machine.autocast(device, dtype): ...

train.py, eval_ner.py and bench.py share it.
"""
import errno
import gc
import os
import re
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from config import UserError

DTYPES = ("auto", "bfloat16", "float32")
PEAK_FLOPS = {  # dense bfloat16 FLOP/s by data sheet
    "H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
}

TIMEOUT = timedelta(minutes=10)  # of a collective, for a rank that hangs or whose machine is gone
LAST_WORDS = 10  # seconds in which ranks tell each other why they end; torchrun kills them after 30


def rank_and_world():
    """(number of this process, number of processes), as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first_on_node():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextmanager
def only_writer(path, what, wait=False):
    """Keeps other processes from writing `what` while the context lasts, by a lock on the file `path`.

    The kernel lets go of it when the process dies, however it does. Where another process holds it, raises a
    UserError that names it, or, with `wait`, says so and waits. Makes the folder of `path` where needed.
    """
    lock, holder = FileLock(path), Path(f"{path}.holder")
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        name = "another process"
        with suppress(OSError):  # it may be letting go just now
            name = holder.read_text()
        if not wait:
            raise UserError(f"{what} is being written by {name}: wait for it, stop it or write elsewhere; if "
                            f"there is no such process any more, remove {path}") from None
        print(f"waiting for {name}, which writes {what}", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            folder, reason = holder.parent, error.strerror
            if folder.is_symlink():
                reason = f"it is a link to {folder.resolve()}, which does not exist"
            elif isinstance(error, FileExistsError | NotADirectoryError):
                reason = "a file is in the way"
            raise UserError(f"cannot write, {reason}: {what}") from None
        print(f"warning: this file system has no locks ({error.strerror}): let no other process write {what}",
              file=sys.stderr, flush=True)
    try:
        with suppress(OSError):  # it only serves the other's message
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def pick_device(name, dtype):
    """(torch.device, torch.dtype) for the settings `device` and `dtype`; each rank takes a GPU.

    Raises UserError where the device is unknown, not there, or cannot be shared by several ranks.
    """
    given, is_alone = name, rank_and_world()[1] == 1
    if name == "auto":  # gloo, the only backend for several ranks on a Mac, does not know MPS
        has_mps = torch.backends.mps.is_available() and is_alone
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not is_alone and name not in ("cuda", "cpu"):
        raise UserError(f"device = {given!r} with several ranks: give cuda (each rank takes a GPU) or cpu")
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"device must be auto, cuda, mps or cpu, got {name!r}")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError: whatever the backend raises
        raise UserError(f"device {name} is not available here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dtype != "auto":
        return device, getattr(torch, dtype)
    if device.type == "cpu":  # without these instructions bfloat16 is emulated, a hundred times slower
        has = torch.cpu.get_capabilities()
        is_fast = has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16")
    else:
        is_fast = device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if is_fast else torch.float32


@contextmanager
def ranks(device):
    """Connects the processes that torchrun started, while the context lasts; nothing to do for one alone.

    Where a rank fails or dies, the others end in their next collective, at the latest after TIMEOUT, and one
    of them names it. What uses the group (DistributedDataParallel) must be gone when the context ends.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which has seen the other rank's end
        with suppress(OSError):
            sys.stdout.flush()
            print(last_words(error, rank, world), end="", file=sys.stderr, flush=True)
        # Threads of the group may wait for a dead rank, or for the interpreter that ends.
        os._exit(error.code if isinstance(error, UserError) else 1)
    # Gloo's threads need the GIL to drop their last tensors. It is let go of here, while they are joined. As
    # long as DDP was the last to hold the group, it was not: a run hung at its end, or was aborted. Where DDP
    # is part of a cycle, only a collection frees it.
    gc.collect()
    dist.destroy_process_group()


def last_words(error, rank, world):
    """What a rank that fails with `error` prints: one line, with a traceback where it is no UserError.

    Ranks whose collectives failed, since another one ended, name that: the first of them speaks. Of ranks
    that fail alike, the first one speaks.
    """
    is_lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(
        "gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE)
    reason = str(error) if isinstance(error, UserError) else (
        f"{type(error).__name__}: {error}".splitlines()[0])
    ends = {rank: "lost" if is_lost else reason}
    # A rank that fails on its own is brief, since the others wait for it.
    deadline = time.monotonic() + (LAST_WORDS if is_lost else LAST_WORDS / 5)
    waits_for = range(world) if is_lost else range(rank) if isinstance(error, UserError) else ()
    try:  # the store outlives a rank, since torchrun holds it
        store = dist.group.WORLD.get_group_store()
        store.set(f"end/{rank}", ends[rank])
        while missing := [r for r in waits_for if r not in ends]:
            ends |= {r: store.get(f"end/{r}").decode() for r in missing if store.check([f"end/{r}"])}
            if time.monotonic() > deadline or not is_lost and reason in list(ends.values())[1:]:
                break
            time.sleep(0.05)
    except dist.DistError:
        if is_lost:
            return f"error: rank {rank}: another rank has ended, and the store of torchrun with it\n"
    if not is_lost:
        is_said = reason in [ends[r] for r in ends if r < rank]
        is_plain = isinstance(error, UserError | KeyboardInterrupt)
        text = "" if is_plain else "".join(traceback.format_exception(error))
        return "" if is_said else f"{text}error: rank {rank}: {reason}\n"
    if rank != min(r for r, end in ends.items() if end == "lost"):
        return ""
    for r in range(world):
        if ends.get(r) != "lost":
            how = ends.get(r, "without a word: killed, hanging, or its machine is gone")
            return (f"error: rank {r} has ended ({how}), so all do; the same command resumes from the newest "
                    "checkpoint\n")
    return f"error: the ranks lost each other ({reason})\n"


def require_same_on_ranks(facts):
    """Ends all ranks where `facts`, {what: value}, differ between them: each has a command line, files and
    maybe a machine of its own.
    """
    if not dist.is_initialized():
        return
    everyone = [None] * rank_and_world()[1]
    dist.all_gather_object(everyone, facts)
    differences = [f"{what} = {everyone[0].get(what)!r} on rank 0, {theirs.get(what)!r} on rank {rank}"
                   for what in everyone[0] for rank, theirs in enumerate(everyone)
                   if theirs.get(what) != everyone[0][what]]
    if differences:
        raise UserError(f"the ranks do not run the same: {'; '.join(differences[:4])}: start them "
                        "with the same command, code and data")


def on_first_rank(call):
    """Calls it on rank 0 alone; its UserError is raised on all ranks."""
    rank, world = rank_and_world()
    error = [None, 0]
    if rank == 0:
        try:
            call()
        except UserError as raised:
            error = [str(raised), raised.code]
    if world > 1:
        dist.broadcast_object_list(error)
    if error[0] is not None:
        raise UserError(*error)


def any_rank(flag):
    """Whether `flag` is true on any rank."""
    if not dist.is_initialized():
        return bool(flag)
    flags = torch.tensor([int(bool(flag))])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


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
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    threads = f" of {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{name}, {str(dtype).removeprefix('torch.')}, {ranks}{threads}"


def peak_flops(device, dtype):
    """FLOP/s that MFU is measured against: the GPU's data sheet, else what a large matrix product reaches."""
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
