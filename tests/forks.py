"""Runs of train.py as processes that start within a tenth of a second, since PyTorch is imported already.

    with Forks() as forks:
        pid = forks.start(["--out_dir=out/a", ...])
        code, output = forks.wait(pid)

A process of its own imports train.py once and forks each run. The store by which ranks meet lies here, as
with torchrun, so it outlives them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist


class Forks:
    """The runs of a test; those that are left are killed at the end."""

    def __enter__(self):
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                       stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.outputs = {}
        return self

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv, rank=0, world=1, die=None, patch=""):
        """Starts one rank, gives its process id. Ranks of one run are started one after another, from 0 on.

        die: (function, n): SIGKILL in the n-th event (a call or a return) after the function's first call.
        patch: Python code that runs before train.main.
        """
        if rank == 0:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        output = tempfile.TemporaryFile("w+")
        path = f"/proc/{os.getpid()}/fd/{output.fileno()}"
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        environment = {key: str(value) for key, value in ranks.items()} if world > 1 else {}
        pid = self.ask(argv=argv, environment=environment, die=die, patch=patch, output=path)
        self.outputs[pid] = output
        return pid

    def wait(self, pid):
        """(exit code, negative for a signal, and the text on stdout and stderr)."""
        code = self.ask(wait=pid)
        with self.outputs.pop(pid) as output:
            output.seek(0)
            return code, output.read()

    def __exit__(self, *error):
        for pid in self.outputs:
            os.kill(pid, signal.SIGKILL)
        self.server.communicate()


def die_after(function, n):
    left = None

    def count(frame, event, arg):
        nonlocal left
        if left is None:
            left = n if frame.f_code.co_name == function and event == "call" else None
        else:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def serve():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import config
    import train

    assert train.torch._dynamo  # which takes seconds to import, as the first optimizer would
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            break
        print(pid, flush=True)
    else:
        return
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= request["environment"]
    sys.argv = ["train.py", *request["argv"]]
    exec(request["patch"], {})
    if request["die"]:
        die_after(*request["die"])
    config.run(train.main)


if __name__ == "__main__":
    serve()
