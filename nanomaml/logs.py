"""What a run writes while it goes: log.jsonl and probes.jsonl, a JSON object a line; run.json; and wandb."""
import json
from pathlib import Path

from nanomaml import files, record
from nanomaml.config import UserError
from nanomaml.wandb_logs import start_wandb

NAMES = ("log.jsonl", "probes.jsonl")


class RunLog:
    """Writes the lines of a run to its .jsonl files and to wandb, only on the first rank.

    A line that cannot be written waits in progress.unlogged, which a checkpoint holds; `failure` says why.
    """

    def __init__(self, cfg, progress, rank, facts):
        self.folder, self.waiting, self.is_first = Path(cfg.out_dir), progress.unlogged, rank == 0
        self.failure = None  # the UserError of the first line that could not be written
        self.send, self.finish_wandb = (lambda line: None), (lambda: None)
        self.facts, path = facts, self.folder / "run.json"
        self.is_idle = progress.resumed_at is not None and progress.resumed_at >= cfg.max_steps
        if self.is_first:
            if progress.resumed_at is not None:
                before = files.parse(path.read_bytes()) or {} if path.exists() else {}
                old, lengths = progress.old_max_steps, before.get("lengths")
                lengths = lengths if isinstance(lengths, list) else []
                facts["lengths"] = lengths + [old] * (old != cfg.max_steps)  # its earlier max_steps
                facts["started"] = before.get("started", facts["started"])
            if not self.is_idle:
                self.write_facts("running")
            self.write_waiting()
            start = start_wandb(cfg, self.folder.name, cfg.out_dir, progress.run_id, facts)
            self.send, self.finish_wandb = start

    def write(self, name, line):
        if self.is_first:
            line = files.finite(line)
            self.waiting.append([name, line])
            self.write_waiting()
            self.send(line)

    def write_facts(self, state):
        content = {"state": state, "updated": record.now()} | self.facts
        files.replace(self.folder / "run.json", json.dumps(content, indent=1) + "\n")

    def finish(self, state):
        """The last call: the run is "finished" or "stopped"."""
        if self.is_first and not self.is_idle:
            self.write_facts(state)
        self.finish_wandb()

    def write_waiting(self):
        try:
            while self.waiting:
                name, line = self.waiting[0]
                files.append(self.folder / name, line)
                del self.waiting[0]
        except UserError as error:
            self.failure = self.failure or error


def truncate(folder, step):
    """Drops the lines after `step`, which a resumed run writes again, and damaged ones with a warning."""
    for path in (Path(folder, name) for name in NAMES):
        lines = files.read_jsonl(path, "step", skip_damaged=True)
        if path.exists():
            kept = (json.dumps(line) + "\n" for line in lines if line["step"] <= step)
            files.replace(path, "".join(kept))
