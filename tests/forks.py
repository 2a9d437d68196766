"""Runs of train.py as processes that start within a tenth of a second, since PyTorch is imported already.

A process of its own imports train.py once and forks each run. The store by which ranks meet outlives them.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist


class Forks:
    def __enter__(self):
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                                       stdout=subprocess.PIPE)
        return self

    def __exit__(self, *error):
        self.server.communicate()

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, argv, world=1, of_rank=(), deaths=(), patches=(), kill_all=False):
        """[(exit code, negative for a signal, and the text on stdout and stderr) of each rank].

        of_rank: a flag more for each. deaths: {rank: (function, n)}, SIGKILL in the n-th event (a call or a
        return) after the function's first call. patches: {rank: Python code that runs before train.main}.
        kill_all: when the first has ended that dies, or else rank 0, the others are killed.
        """
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pids, codes, deaths, patches = [], {}, dict(deaths), dict(patches)
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, str(rank)) for rank in range(world)]
            for rank, output in enumerate(outputs):
                output.touch()
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
                variables = {key: str(value) for key, value in ranks.items()} if world > 1 else {}
                pids.append(self.ask(argv=[*argv, *of_rank[rank:rank + 1]], variables=variables,
                                     die=deaths.get(rank), patch=patches.get(rank, ""), output=str(output)))
            first = min(deaths, default=0)
            for rank in (first, *(rank for rank in range(world) if rank != first)):
                if kill_all and codes:
                    os.kill(pids[rank], signal.SIGKILL)
                codes[rank] = self.ask(wait=pids[rank])
            return [(codes[rank], output.read_text()) for rank, output in enumerate(outputs)]


def die_after(function, n):
    is_counting, left = False, n

    def count(frame, event, arg):
        nonlocal is_counting, left
        is_counting |= frame.f_code.co_name == function and event == "call"
        left -= is_counting
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def serve():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train

    assert train.torch._dynamo  # which takes seconds to import, as the first optimizer would
    train.machine.peak_flops = functools.cache(train.machine.peak_flops)
    train.machine.peak_flops(train.torch.device("cpu"), train.torch.float32)
    train.ranks.TIMEOUT /= 10  # a rank that hangs fails its test sooner
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
        os._exit(0)  # nothing here is worth the seconds of a finalized PyTorch
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= request["variables"]
    sys.argv = ["train.py", *request["argv"]]
    exec(request["patch"], {})
    if request["die"]:
        die_after(*request["die"])
    train.config.run(train.main)


if __name__ == "__main__":
    serve()
