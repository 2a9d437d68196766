"""What a run prints on the console: its setup, a line for each log and evaluation, its results."""
import math
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import numpy as np
import torch

from nanomaml import config

EXPECTED_MFU = 0.4


class Lasting(config.Visible):
    """A text stream whose failure, as of `| head`, is reported once, on stderr, then ignored."""

    def write(self, text):
        self.attempt(self.stream.write, text)  # unchanged: libraries' progress bars have control characters
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except OSError as error:
            with suppress(OSError):  # what is still buffered goes there too, at the latest when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
                print(f"warning: nothing more is printed ({error.strerror}); the run goes on",
                      file=sys.__stderr__, flush=True)


@contextmanager
def lasting_console():
    """While the context lasts, closed output streams do not end the process."""
    with redirect_stdout(Lasting(sys.stdout)) as out, redirect_stderr(Lasting(sys.stderr)):
        yield
        out.flush()


def clock(seconds):
    """Seconds as 1:02:03, 2:03 or 0:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_setup(cfg, schedule, corpus, validation, learner, adaptation, progress, update_seconds):
    """What the run is about to do. progress: where it stands, with `resumed_at` if it was resumed.

    update_seconds: what an update would take at the machine's peak.
    """
    held_out = sum(split.tokens for split in validation.values())
    sizes = [sum(p.numel() for p in module.parameters()) for module in (learner.decoder, learner.head)]
    print(f"data      {cfg.data}: {corpus.tokens:,} training tokens, {held_out:,} for validation; unigram "
          f"entropy {corpus.unigram_entropy():.3f} nats")
    print(f"model     {sizes[0]:,} parameters, and {sizes[1]:,} in the episode head; "
          f"{'compiled' if learner.decoder.is_compiled else 'eager'}")
    print(f"update    {cfg.global_batch_size} sequences x {cfg.context} tokens = "
          f"{cfg.global_batch_size * cfg.context:,}: {schedule.micro_steps} micro-steps x {cfg.batch_size} "
          f"sequences x {schedule.world} rank{'s' * (schedule.world > 1)}")
    if (schedule.kinds != "lm").any():
        print(f"episodes  {cfg.meta_share:.0%} of micro-steps from step {cfg.meta_start} on: {cfg.ways}-way "
              f"{cfg.shots}-shot, {cfg.queries} queries a word, {cfg.inner_steps} inner steps at "
              f"{cfg.inner_lr:g}")
    if cfg.eval_episodes > 0:
        print(f"adapting  on held-out text at each evaluation: {adaptation.describe()}")
    if progress.resumed_at is not None:
        print(f"resume    from {cfg.out_dir}/ckpt_{progress.resumed_at:06d}.pt"
              + ": the run is finished" * (progress.resumed_at >= cfg.max_steps))
    elif cfg.init_from:
        print(f"start     from the model of {cfg.init_from}")
    if cfg.warmup_steps >= cfg.max_steps > 0:
        print(f"note      max_steps = {cfg.max_steps} ends within warmup_steps = {cfg.warmup_steps}: "
              "a share such as --warmup_steps=0.1 fits every length")
    if left := cfg.max_steps - progress.step:
        one = update_seconds / EXPECTED_MFU
        print(f"time      about {f'{one:.2g} s' if one < 60 else clock(one)} an update, {clock(left * one)} "
              f"in all, by the counted FLOPs at {EXPECTED_MFU:.0%} MFU")


def numbered(step, last):
    return f"step {step:>{len(str(last))}}/{last}"


def training_line(progress, line, last):
    """`line` of log.jsonl for the console; last: max_steps."""
    interval, loss = progress.interval, f"{line['train/loss']:.4f}" if "train/loss" in line else "-"
    parts, each = [numbered(progress.step, last), f"loss {loss}"], interval["seconds"] / interval["steps"]
    if "meta/query_loss" in line:
        parts += [f"query {line['meta/query_loss']:.3f} acc {line.get('meta/query_acc', math.nan):.3f}"]
    parts += [f"lr {line['lr']:.1e}", f"grad {line['grad_norm']:.2f}",
              f"{1000 * each:.0f} ms", f"{line['tok_per_s']:,.0f} tok/s", f"MFU {line['mfu']:.0%}"]
    parts += [f"{kind} {line[f'share/{kind}']:.0%}" for kind in progress.micro_steps if kind != "lm"]
    parts += [f"skipped {line['skipped']}"] * (line["skipped"] > 0)
    parts += [f"waited for data {line['data_wait']:.0%}"] * (line["data_wait"] > 0.05)
    parts += [f"{clock((last - progress.step) * each)} left"] * (progress.step < last)
    return "  ".join(parts)


def evaluation_line(step, metrics, probe, last):
    """An evaluation for the console, and the last probe: {} before the first, otherwise with its "step".

    Losses of domains follow in lines of their own. last: max_steps.
    """
    parts = [numbered(step, last), f"val/loss {metrics['val/loss']:.4f}"]
    domains = [f"{name} {metrics[name]:.4f}" for name in metrics
               if name.startswith("val/") and name != "val/loss"]
    for name, label in (("adapt/query_acc", "query acc"), ("adapt/new_query_acc", "of new words")):
        parts += [f"{label} {metrics[name]:.3f}"] if name in metrics else []
    for prefix, label in (("rank/resid/", "rank"), ("entropy/", "entropy")):
        values = [value for name, value in probe.items() if name.startswith(prefix)]
        parts += [f"{label} {np.mean(values):.3g}"] if values else []
    if probe.get("step", step) != step:
        parts[-1] += f" (step {probe['step']})"
    indent = " " * (len(parts[0]) + 2)
    lines = ["  ".join(parts)]
    for i, domain in enumerate(domains):
        fits = i and len(lines[-1]) + len(domain) <= 118
        lines[-1:] = [f"{lines[-1]}  {domain}"] if fits else [lines[-1], indent + domain]
    return "\n".join(lines)


def print_results(cfg, corpus, learner, tokenizer, eval_batches, metrics):
    """The last lines of a finished run; `metrics`: from its last evaluation, {} if there was none.

    The sample goes on from the first tokens of `eval_batches`.
    """
    loss = f"validation loss {metrics['val/loss']:.3f}, where" if metrics else "not evaluated;"
    print(f"done      {loss} token frequencies alone give {corpus.unigram_entropy():.3f}")
    for kind, words in (("", "held-out text"), ("new_", "held-out words")):
        if f"final/mask_{kind}query_acc" in metrics:
            at, before = (f"{metrics[f'final/{place}_{kind}query_acc']:.3f} ± "
                          f"{metrics.get(f'final/{place}_{kind}query_acc_error', math.nan):.3f}"
                          for place in ("mask", "context"))
            print(f"          final query accuracy, {words}: {at} at the mask, {before} before the word; "
                  f"chance {1 / metrics[f'final/{kind}ways']:.3f}")
    if cfg.meta_share > 0:
        print("          what episodes bring: compare with the same command plus configs/vanilla.py "
              "--out_dir=...")
    if tokenizer is not None:
        device = learner.decoder.lm_head.weight.device
        prompt = next(iter(eval_batches.values())).ids[:1, :8].to(device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        with learner.decoder.eager():  # each length would be compiled separately
            ids = learner.decoder.generate(prompt, 40, 0.8, top_k=50, generator=generator)[0].tolist()
        print(f"sample    {tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])!r}")
