"""What can go wrong with a run while it trains, and what then happens: it stops between two updates."""
import math
import os
import signal
from shlex import quote

import torch

from nanomaml import checkpoint
from nanomaml.config import UserError, require
from nanomaml.ranks import any_rank, print0

MAX_SKIPPED = 10  # updates in a row that may be skipped for a gradient that is not finite


class Guard:
    """Watches a run: signals, data that cannot be read, logs that cannot be written, numbers not finite.

        with Guard(cfg, progress, log) as guard:            # log: a logs.RunLog
            micro_steps, waited = guard.next_of(updates)
            if guard.must_stop(): ...                       # write a checkpoint if it `is_sound`, then break
        guard.raise_failure()

    In the context SIGINT, SIGTERM and, except under nohup, SIGHUP of a closed terminal let the current step
    finish; a second Ctrl-C kills.
    """

    def __init__(self, cfg, progress, log):
        self.cfg, self.progress, self.log = cfg, progress, log
        self.signals, self.unreadable, self.is_suspect, self.rates = [], None, True, []

    def __enter__(self):
        def on_signal(number, frame):
            self.signals.append(number)
            os.write(2, b"finishing the step; a second Ctrl-C kills\n")  # print() may be running just now
            signal.signal(signal.SIGINT, signal.default_int_handler)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, on_signal) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def next_of(self, updates):
        """The next item of `schedule.read_ahead`, or ([], 0.0) after the last or if it cannot be read."""
        try:
            return next(updates, ([], 0.0))
        except UserError as error:
            self.unreadable = error
            return [], 0.0

    def must_stop(self):
        """One rank may have a signal, or a file that fails, before the others: they stop together."""
        return any_rank(self.signals or self.unreadable or self.log.failure)

    def raise_failure(self):
        """Raises the error that stopped the run, if any; writing its last lines may have failed too."""
        any_rank(False)  # waits until the first rank has written its checkpoint, which `resumption` names
        if failure := self.unreadable or self.log.failure:
            raise UserError(f"{failure}; fix that; the same command then {self.resumption()}", failure.code)

    def resumption(self):
        paths = checkpoint.paths(self.cfg.out_dir)
        return f"resumes from step {checkpoint.step_of(paths[-1])}" if paths else (
            "starts again once log.jsonl is removed, since there is no checkpoint")

    def require_finite(self):
        """Ends the run after MAX_SKIPPED bad updates in a row, or if all are; rarely waits for the device."""
        step, limit = self.progress.step, min(MAX_SKIPPED, self.cfg.max_steps)
        if self.is_suspect or step % MAX_SKIPPED == 0 or step == self.cfg.max_steps:
            in_a_row = int(self.progress.skipped[1])
            require(in_a_row < limit, f"the gradient was not finite in {in_a_row} updates in a row (step "
                                     f"{step}); they were skipped. {self.remedy()}")
            self.is_suspect = in_a_row > 0

    @torch.no_grad()
    def is_sound(self, learner, eval_batches, is_end):
        """Whether all parameters and buffers, and the loss on a few sequences, are finite on all ranks.

        If not, warns or, at max_steps, raises UserError. False within a row of bad updates, unless `is_end`.
        """
        batch, device = next(iter(eval_batches.values())), self.progress.skipped.device
        with learner.decoder.eager():  # another batch size would be compiled separately
            batch = type(batch)(*(part[:8].to(device) for part in batch))
            loss = learner("lm", batch)[0]["lm"]
        is_bad = not all(value.isfinite().all() for value in (loss, *learner.state_dict().values()))
        if not any_rank(is_bad or self.progress.skipped[1] > 0 and not is_end):
            return True
        message = f"a gradient, a parameter or the loss is not finite at step {self.progress.step}"
        require(self.progress.step < self.cfg.max_steps, f"{message}. {self.remedy()}")
        print0(f"warning: {message}: no checkpoint of it is written")
        return False

    def remedy(self):
        newest = checkpoint.paths(self.cfg.out_dir)[-1:]
        start = "".join(f", from the last good model with --init_from={quote(str(path))}" for path in newest)
        return (f"Start again in another --out_dir{start}, with a lower lr (here {self.cfg.lr:g}) or "
                f"inner_lr ({self.cfg.inner_lr:g})")

    def check(self, line):
        """Warns if, after warm-up, the query loss is at ln N in five log lines in a row, or if three lines in
        a row are less than half as fast as usual in this process.
        """
        self.rates = [*self.rates[-50:], line["tok_per_s"]]
        usual = sorted(self.rates)[len(self.rates) // 2]
        if len(self.rates) > 6 and 2 * max(self.rates[-3:]) < usual:
            print0(f"note      {self.rates[-1]:,.0f} tok/s, after {usual:,.0f}: "
                   "does another process use these cores? If so, OMP_NUM_THREADS=1 loses less")
            self.rates = []  # from here on this rate is the usual one
        if "meta/query_loss" in line and self.progress.step > self.cfg.warmup_steps:
            ln_n = math.log(line.get("meta/ways", self.cfg.ways))
            is_stuck = line["meta/query_loss"] > 0.99 * ln_n
            self.progress.stuck_logs = self.progress.stuck_logs + 1 if is_stuck else 0
            if self.progress.stuck_logs == 5:
                print0(f"warning: the adapted query loss stays at ln N = {ln_n:.3f}: the episodes teach "
                       "nothing; try head_start=zero, another inner_lr, a later meta_start, or fewer ways")
