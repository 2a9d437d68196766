"""The ranks of a distributed run: who they are, that they agree, that only one process writes a folder."""
import errno
import gc
import os
import re
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

from nanomaml.config import UserError, one_line, require

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=10)  # of a collective, for a rank that hangs or whose machine is gone


def rank_and_world():
    """(number of this process, number of processes), as torchrun sets them; (0, 1) without it.

    RANK by itself is a common variable elsewhere, and is ignored. UserError if they make no sense.
    """
    given = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if given.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    numbers = [int(text) for text in map(given.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
               if text and re.fullmatch(r"\d{1,9}", text)]
    require(len(given) == len(LAUNCHER) and len(numbers) == 3 and max(numbers[0], numbers[2]) < numbers[1],
            f"the environment has {', '.join(f'{name}={text!r}' for name, text in given.items())} and not "
            f"all of what torchrun sets ({', '.join(LAUNCHER)}): use torchrun, or unset WORLD_SIZE")
    return numbers[0], numbers[1]


def local_rank():
    """The number of this process on its node."""
    return int(os.environ["LOCAL_RANK"]) if rank_and_world()[1] > 1 else 0


def print0(text):
    """Prints on the first rank only."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


@contextmanager
def connected(device):
    """Connects the processes that torchrun started, while the context lasts; a single one needs nothing.

    If a rank fails or dies, the others end in their next collective, at the latest after TIMEOUT; torchrun
    names the first. What uses the group (DistributedDataParallel) must be gone when the context ends.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # the port is taken, or the launcher is gone
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"rank {rank} finds no other rank at {where}: {one_line(error, 300)}", 1) from None
    try:
        yield
    except BaseException as error:
        if is_mistake := isinstance(error, UserError):
            time.sleep(2 * (rank > 0))  # the first reports what fails on all ranks; torchrun ends the rest
        is_lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(
            "gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE)
        reason = one_line(error if is_mistake else f"{type(error).__name__}: {error}", 300)
        if is_lost:
            reason = f"another rank has ended ({reason}); the same command resumes from the newest checkpoint"
        with suppress(OSError):
            sys.stdout.flush()
            if not (is_lost or is_mistake or isinstance(error, KeyboardInterrupt)):
                traceback.print_exception(error)
            print(f"error: rank {rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(error.code if is_mistake else 1)  # threads of the group may wait for a dead rank
    # Gloo's threads need the GIL to drop their last tensors. destroy_process_group releases it while it joins
    # them. As long as DDP was the last to hold the group, nothing did: a run hung at its end, or was aborted.
    # If DDP is part of a cycle, only a garbage collection frees it.
    gc.collect()
    dist.destroy_process_group()


def require_same(facts):
    """Ends all ranks where `facts`, {what: value}, differ between them."""
    if not dist.is_initialized():
        return
    everyone = [None] * rank_and_world()[1]
    dist.all_gather_object(everyone, facts)
    differences = [f"{what} = {everyone[0].get(what)!r} on rank 0, {theirs.get(what)!r} on rank {rank}"
                   for what in everyone[0] for rank, theirs in enumerate(everyone)
                   if theirs.get(what) != everyone[0][what]]
    require(not differences, f"the ranks do not run the same: {'; '.join(differences[:4])}: start them with "
                             "the same command, code and data")


def on_first(call):
    """Calls it only on rank 0; its UserError is raised on all ranks."""
    error = [None, 0]
    if rank_and_world()[0] == 0:
        try:
            call()
        except UserError as raised:
            error = [str(raised), raised.code]
    if dist.is_initialized():
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


@contextmanager
def only_writer(path, what, wait=False):
    """Keeps other processes from writing `what` while the context lasts, by a lock on the file `path`.

    The kernel releases it when the process dies, however it dies. If another process holds it, raises a
    UserError that names the process or, with `wait`, says so and waits.
    """
    lock, holder = FileLock(path), Path(f"{path}.holder")
    for file in (Path(path), holder):
        require(not file.is_symlink(), f"{file} is a link: nothing is written through it; remove it")
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        name = "another process"
        with suppress(OSError):  # it may be releasing it just now
            name = holder.read_text()
        require(wait, f"{what} is being written by {name}: wait for it, stop it or write elsewhere; if that "
                      f"process no longer exists, remove {path}")
        print(f"waiting for {name}, which writes {what}", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            link = f" (a link to {holder.parent.resolve()})" if holder.parent.is_symlink() else ""
            raise UserError(f"cannot write {what}{link}: {error.strerror}") from None
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
