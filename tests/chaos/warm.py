"""A process that has loaded every library and starts attempts by fork: a line of JSON asks for one.

It answers with lines of JSON: `{"ready": true}`, then for each attempt its pid when it begins and its status when it
ends. What an attempt does after the fork is what entrypoint.py does, with the same arguments and environment.
"""

import ctypes
import functools
import gc
import json
import os
import random
import select
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1


def load() -> None:
    """Everything that an attempt imports on its way."""
    import accelerate
    import bitsandbytes
    import boto3
    import datasets
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import peft
    import transformers
    from botocore.loaders import JSONFileLoader

    import job.cli
    import job.commands.run
    import job.core.report
    import job.edge.host.logs
    import job.stages.dataset
    import job.stages.finish
    import job.stages.training

    # Each client reads botocore's tables of S3 anew, a fifth of a second; here they are read once.
    read = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda _self, path: read(path)
    boto3.session.Session().client(
        "s3", region_name="us-east-1", aws_access_key_id="nobody", aws_secret_access_key="nothing"
    )
    assert accelerate, (bitsandbytes, datasets, job, matplotlib, peft, transformers)
    threads = len([*Path("/proc/self/task").iterdir()])
    assert threads == 1, f"{threads} threads: a fork would leave the others and what they hold behind"


def serve() -> dict:
    """Fork for each order; returns, in the child, the order."""
    children: dict[int, int] = {}
    waiting = b""
    while True:
        ready, _, _ = select.select([0, *children], [], [])
        for descriptor in ready:
            if descriptor:
                pid = children.pop(descriptor)
                os.close(descriptor)
                tell(ended=pid, status=os.waitpid(pid, 0)[1])
                continue
            read = os.read(0, 1 << 16)
            if not read:
                os._exit(0)  # the children go with us
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if not pid:
                    for child in children:
                        os.close(child)
                    return order
                children[os.pidfd_open(pid)] = pid
                tell(begun=pid, order=order["order"])


def tell(**news: object) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def attempt(order: dict) -> int:
    """The process as entrypoint.py makes it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["entrypoint.py", *order["arguments"]]
    for name, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (order["stdout"], 1, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (order["stderr"], 2, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    random.seed()  # as in a process of its own: pauses between two requests differ from attempt to attempt
    from job.edge.host.interrupt import Interrupt

    interrupt = Interrupt()
    interrupt.install()
    from job.cli import main

    code = main(interrupt)
    interrupt.ignore()
    return code


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    load()
    gc.freeze()  # the collector would touch, and so copy, every page of the libraries in each child
    tell(ready=True)
    sys.exit(attempt(serve()))
