"""The kind of each micro-step, and the sequences or episodes that each rank reads in it.

    schedule = Schedule(cfg, world)                                 # cfg: train.py's Config
    kind, numbers = schedule.micro_step(123, rank, {"lm": 16, "episodes": 1})  # "episodes", range(75, 76)

All of it is a pure function of the settings: the same on every rank, after a resume, and whatever ran before.
"""
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanomaml.config import require


def block_kinds(cfg):
    """(max_steps, blocks) names of kinds; a longer run continues the same series."""
    kinds = np.full((cfg.max_steps, cfg.meta_blocks if cfg.meta_share > 0 else 1), "lm", dtype=object)
    if cfg.meta_share > 0:
        uniform = np.random.default_rng([cfg.seed, 2]).random(kinds.shape)
        kinds[uniform < cfg.meta_share] = "episodes"
        kinds[:cfg.meta_start] = "lm"
    return kinds


class Schedule:
    """The plan of a run on `world` ranks.

    The batches of each kind are numbered separately, so a hybrid run sees the sequences of a vanilla one,
    in the same order. The micro-steps of an update come in blocks of one kind; a block, and so an update,
    covers the same sequences or episodes for any number of ranks.
    """

    def __init__(self, cfg, world):
        self.kinds, self.world = block_kinds(cfg), world
        self.names = {"lm", *self.kinds.flat}  # of the kinds that the run has
        # Micro-steps of an update on each rank
        self.micro_steps, rest = divmod(cfg.global_batch_size, cfg.batch_size * world)
        require(rest == 0 and self.micro_steps > 0, f"global_batch_size = {cfg.global_batch_size} must be a "
                f"multiple of batch_size x ranks = {cfg.batch_size} x {world}")
        require(self.micro_steps % self.kinds.shape[1] == 0, f"{self.micro_steps} micro-steps of an update "
                "(global_batch_size / (batch_size x ranks)) must be a multiple of meta_blocks = "
                f"{cfg.meta_blocks}: lower meta_blocks or batch_size")
        self.earlier = np.zeros(self.kinds.shape, np.int64)  # blocks of the same kind before this one
        for kind in set(self.kinds.flat):
            self.earlier[self.kinds == kind] = np.arange((self.kinds == kind).sum())

    def mean_flops(self, learner, sources):
        """FLOPs of an update over all ranks, on average over the run."""
        total = 0
        for kind in set(self.kinds.flat):
            batches, size = sources[kind]
            total += (self.kinds == kind).mean() * learner.flops(kind, batches[range(size)])
        return total * self.micro_steps * self.world

    def micro_step(self, number, rank, sizes):
        """(kind, range of numbers) of a micro-step; sizes: {kind: sequences or episodes on each rank}."""
        step, micro = divmod(number, self.micro_steps)
        per_block = self.micro_steps // self.kinds.shape[1]
        block, i = divmod(micro, per_block)
        kind = self.kinds[step, block]
        first = ((int(self.earlier[step, block]) * per_block + i) * self.world + rank) * sizes[kind]
        return kind, range(first, first + sizes[kind])


def read_ahead(schedule, sources, rank, device, first):
    """Yields ([(kind, batch) of each micro-step], seconds waited for them) of the updates from `first` on.

    A thread reads the batches of an update while the previous update trains. They come all at once: if a
    bin cannot be read, the error comes between two updates.
    """
    sizes = {kind: source.size for kind, source in sources.items()}

    def build(step):
        micro_steps = []
        for micro in range(schedule.micro_steps):
            kind, numbers = schedule.micro_step(step * schedule.micro_steps + micro, rank, sizes)
            batch = sources[kind].batches[numbers]
            if device.type == "cuda":
                batch = type(batch)(*(t.pin_memory() for t in batch))
            micro_steps.append((kind, batch))
        return micro_steps

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(build, first) if first < len(schedule.kinds) else None
        for step in range(first, len(schedule.kinds)):
            start = time.perf_counter()
            micro_steps = ahead.result()
            if step + 1 < len(schedule.kinds):
                ahead = pool.submit(build, step + 1)
            # A GPU that is still busy did not wait.
            is_busy = device.type == "cuda" and not torch.cuda.current_stream().query()
            yield micro_steps, 0.0 if is_busy else time.perf_counter() - start
