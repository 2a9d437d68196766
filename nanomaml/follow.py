"""A run's logs, read while they are written: bounded series of points, and where the run stands.

    followed = Followed(Path("out/demo"), 0)
    followed.update(1)                              # reads only new bytes
    followed.since(0)["curves"]["val/loss"]         # {"items": [(step, tokens, flops, seconds, loss), ...]}
"""
import functools
import os
import time

from nanomaml import files, phases, runs

MOST, FRAMES = 2000, 400  # points of a curve, and of a heatmap
CHUNK = 2**20  # bytes that are read at once: a page opens before a log of a million lines is read
TITLES = {"val/loss": "validation loss", "train/loss": "training loss, episodes excluded", **runs.LABELS} | {
    f"adapt/{at}_{kind}query_acc": f"accuracy on {words}, {where}"
    for kind, words in runs.WORDS.items() for at, (where, _) in reversed(runs.READ_OUTS.items())}


class Series:
    """Items, each with the version of the data in which it came. halve: thins them out."""

    def __init__(self, halve, limit=MOST):
        self.items, self.halve, self.limit, self.renewed = [], halve, limit, 0

    def add(self, item, version):
        self.items.append((version, item))
        if len(self.items) > self.limit:
            self.items, self.renewed = self.halve(self.items), version

    def since(self, version):
        """{"items": those that came after `version`, "renew": do they replace all before}, or None."""
        renew = self.renewed > version or version == 0
        new = [item for at, item in self.items if renew or at > version]
        return {"items": new, "renew": renew} if new else None


def extremes(items):
    """Of each four points in a row the lowest and the highest, and the last of all."""
    pairs = []
    for i in range(0, len(items) - 1, 4):
        four = sorted(items[i:i + 4], key=lambda item: item[1][-1])
        pairs += sorted({four[0], four[-1]}, key=lambda item: item[1][0])
    return pairs + items[-1:]


@functools.cache
def place_of(key):
    """(the curve of a metric, "" without; the layer, if it is the entropy of one of its heads)."""
    layer = runs.LAYER.fullmatch(key)
    if key in runs.AXES or key.startswith("entropy_nats/"):  # which is `entropy` in other units
        return "", ""
    is_head = layer and layer[1] == "entropy" and layer[3]
    return f"{layer[1]}/{layer[2]}" if layer else key, layer[2] if is_head else ""


class Followed:
    """A run's folder, read as far as it has been written."""

    def __init__(self, folder, number, version=0):
        self.folder, self.number, self.read_to = folder, number, {}  # {file: (inode, bytes read)}
        self.version = self.begun = version  # of its newest change, and of the one that replaced all before
        self.curves, self.frames = {}, Series(lambda items: items[::2], FRAMES)
        self.last, self.pace = {}, []  # newest value of each metric; (step, seconds) of log lines

    def update(self, version):
        """Reads what is new, or all if a resume replaced or cut a log. Returns whether all is read."""
        is_all = True
        for path in filter(self.is_own, ("log.jsonl", "probes.jsonl")):
            path = self.folder / path
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                inode, place = self.read_to.get(path, (stat.st_ino, 0))
                if inode != stat.st_ino or stat.st_size < place:
                    self.__init__(self.folder, self.number, version)
                    return False
                file.seek(place)
                text = file.read(CHUNK)
            whole, newline, _ = text.rpartition(b"\n")
            if not newline and len(text) == CHUNK:  # no valid line is so long: it is skipped
                whole = text
            self.read_to[path] = inode, place + len(whole + newline)
            is_all &= self.read_to[path][1] + CHUNK > stat.st_size
            for line in filter(None, map(files.parse, whole.splitlines())):
                if type(line.get("step")) is int:
                    self.add(line, version)
        return is_all

    def is_own(self, name):
        """Is it a plain file of this folder, and not a link to elsewhere?"""
        path = self.folder / name
        return path.is_file() and path.resolve().parent == self.folder.resolve()

    def add(self, line, version):
        """Adds a line's metrics to their curves (of heads, each layer's mean), and a frame of all heads."""
        line = {key: value for key, value in line.items() if type(value) in (int, float)}
        at, values, heads = tuple(map(line.get, runs.AXES)), {}, {}
        for key, value in line.items():
            curve, layer = place_of(key)
            if curve:
                values.setdefault(curve, []).append(value)
                if layer:
                    heads.setdefault(layer, []).append(float(f"{value:.3g}"))
        for curve, found in values.items():
            if curve not in self.curves:
                self.curves[curve] = Series(extremes)
            self.curves[curve].add((*at, sum(x / len(found) for x in found)), version)
        if heads:
            self.frames.add({"step": line["step"], "z": [heads[layer] for layer in sorted(heads)]}, version)
        self.last |= line
        if "lr" in line:
            self.pace = [*self.pace, (line["step"], self.last.get("seconds", 0.0))][-8:]
        self.version = version

    def status(self):
        """Where the run stands, for the head of the page."""
        settings, record = (files.parse((self.folder / name).read_bytes()) or {} if self.is_own(name) else {}
                            for name in ("config.json", "run.json"))
        step, last = self.last.get("step", 0), settings.get("max_steps")
        is_known = type(last) is int
        steps, seconds = (b - a for a, b in zip(self.pace[0], self.pace[-1])) if self.pace else (0, 0.0)
        each = seconds / max(steps, 1)
        quiet = time.time() - max((path.stat().st_mtime for path in self.read_to if path.exists()), default=0)
        state = "finished" if is_known and step >= last else str(record.get("state", "running"))
        if state == "running" and quiet > max(60, 50 * each):
            state = f"no line for {quiet / 60:.0f} min"
        saved = [path.stem.removeprefix("ckpt_") for path in self.folder.glob("ckpt_*.pt")]
        return {"id": self.number, "name": str(self.folder), "state": state, "step": step,
                "max_steps": last if is_known else None, "left": each * (last - step) if is_known else None,
                "checkpoint": max(map(int, filter(str.isdecimal, saved)), default=None),
                **{key: self.last.get(key) for key in ("tok_per_s", "mfu", "skipped")},
                "chance": {kind: 1 / self.last[f"adapt/{kind}ways"] for kind in runs.WORDS
                           if self.last.get(f"adapt/{kind}ways")},
                "facts": {key: str(value) for key, value in record.items()}}

    def since(self, version):
        version = version if version >= self.begun else 0
        curves = {key: new for key, series in self.curves.items() if (new := series.since(version))}
        return {"id": self.number, "version": self.version, "renew": version == 0, "curves": curves,
                "frames": self.frames.since(version)}

    def phases(self):
        """[[kind, layer, phase], ...] of every curve of a layer, as far as the run has come."""
        found = []
        for key, series in self.curves.items():
            if layer := runs.LAYER.fullmatch(key):
                points = [item for _, item in series.items]
                kind = TITLES.get(layer[1], layer[1])
                found.append([kind, layer[2], phases.phase([p[0] for p in points], [p[-1] for p in points])])
        return sorted(found, key=lambda row: row[:2])
