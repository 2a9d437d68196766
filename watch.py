"""A live page of the training dynamics: losses, adaptation, rank and attention entropy while runs train.

    python watch.py out/demo out/demo-vanilla      # http://127.0.0.1:8000, or the next free port
    python watch.py out                            # every run below, also those that begin later
    python watch.py out/demo --save=demo.html      # the same page as one file, to send or to publish

Reads new bytes of what runs write; training knows nothing of it. The page is watch.html, where a metric of
any name gets its panel. The server listens on 127.0.0.1, and answers only GET of the paths in `Handler`.
"""
import base64
import getpass
import hashlib
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import plotly

from nanomaml import compare, config, files
from nanomaml.config import Natural, UserError, require
from nanomaml.follow import TITLES, Followed

SECURITY = ("default-src 'none'; script-src 'self' {}; style-src 'unsafe-inline'; img-src data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'")


@dataclass(frozen=True)
class Config(config.Settings):
    port: Natural = 8000  # port of the page; if taken, the next free one
    save: str = ""  # write the page to this file and exit; empty: serve it


class Watched:
    """All runs that the arguments name, followed."""

    def __init__(self, places):
        self.places, self.runs, self.lock, self.version = places, {}, threading.Lock(), 0
        self.session = os.urandom(4).hex()  # a page that another process served starts over
        self.update()
        require(self.runs, f"{', '.join(places)}: no run there (a folder with log.jsonl); start one first")

    def update(self):
        """Looks for runs and reads what is new. Returns whether all is read."""
        with self.lock:
            self.version += 1
            for folder in dict.fromkeys(map(Path, sum(map(compare.find_runs, self.places), []))):
                if (folder / "log.jsonl").exists() and folder not in self.runs:
                    self.runs[folder] = Followed(folder, len(self.runs))
            is_all = True
            for run in self.runs.values():
                with suppress(OSError):  # a run that is being removed, or may not be read
                    is_all &= run.update(self.version)
            return is_all

    def data(self, have):
        """What is new for a page that has these versions, {number: version}, of the runs that it shows."""
        with self.lock:
            followed = list(self.runs.values())
            return {"session": self.session, "titles": TITLES, "runs": [run.status() for run in followed],
                    "new": [run.since(have[run.number]) for run in followed
                            if run.number in have and run.version > have[run.number]]}

    def phases(self, number):
        with self.lock:
            return next((run.phases() for run in self.runs.values() if run.number == number), [])


def page(saved=None):
    """(watch.html, its Content-Security-Policy); saved: data that make it a standalone file."""
    text = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
    if saved is not None:
        content = json.dumps(saved).replace("<", "\\u003c")
        text = text.replace('<script src="/plotly.min.js">', f"<script>{library().decode()}")
        text = text.replace("const SAVED = null", f"const SAVED = {content}")
    scripts = [part.split("</script>")[0] for part in text.split("<script>")[1:]]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = SECURITY.format(" ".join(f"'sha256-{digest}'" for digest in hashes))
    return text.replace("POLICY", policy, 1), policy


def library():
    return Path(plotly.__file__).with_name("package_data").joinpath("plotly.min.js").read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version, watched = "HTTP/1.1", None

    def do_GET(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)  # a page of another host that resolves to this machine
        elif url.path == "/":
            text, policy = page()
            self.reply("text/html; charset=utf-8", text.encode(), {"Content-Security-Policy": policy})
        elif url.path == "/plotly.min.js":
            self.reply("text/javascript", library(), {"Cache-Control": "max-age=3600"})
        elif url.path == "/data":
            pairs = [pair.split(":") for pair in query.get("have", [""])[0].split(",") if ":" in pair]
            have = {int(a): int(b) for a, b in pairs if a.isdecimal() and b.isdecimal()}
            self.reply("application/json", json.dumps(self.watched.data(have)).encode())
        elif url.path == "/phases" and query.get("run", [""])[0].isdecimal():
            self.reply("application/json", json.dumps(self.watched.phases(int(query["run"][0]))).encode())
        else:
            self.send_error(404)

    def reply(self, kind, content, headers=None):
        self.send_response(200)
        always = {"Content-Type": kind, "Content-Length": len(content), "X-Content-Type-Options": "nosniff"}
        for name, value in (always | (headers or {"Cache-Control": "no-store"})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        pass  # a page that was closed while it was answered


def serve(watched, port):
    """A Server of the page on `port` or the next free one, which reads what is new twice a second."""
    Handler.watched = watched

    def follow():
        while True:
            time.sleep(0.5 if watched.update() else 0.02)  # in between, pages are answered

    for number in range(port, port + 100):
        with suppress(OSError, OverflowError):  # it is taken
            server = Server(("127.0.0.1", number), Handler)
            threading.Thread(target=follow, daemon=True).start()
            return server
    raise UserError(f"no port from {port} to {port + 99} is free: name another with --port=")


def main(argv):
    places, flags = config.operands(Config, argv)
    cfg = config.load(Config, flags, __doc__)
    require(places, "name the folders of runs, for instance out/demo; got none")
    watched = Watched(places)
    if cfg.save:
        while not watched.update():
            pass
        have = dict.fromkeys(range(len(watched.runs)), 0)
        saved = watched.data(have) | {"phases": {number: watched.phases(number) for number in have}}
        files.replace(cfg.save, page(saved)[0])
        print(f"{cfg.save}: {len(have)} run{'s' * (len(have) > 1)}; any browser opens it, without a network")
        return
    server = serve(watched, cfg.port)
    port = server.server_address[1]
    n_runs = len(watched.runs)
    print(f"watching  {n_runs} run{'s' * (n_runs > 1)}: http://127.0.0.1:{port}   (Ctrl-C ends it)\n"
          f"elsewhere ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}",
          flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nended")


if __name__ == "__main__":
    config.run(main)
