"""A process that has loaded every library and starts others by fork, each of them as a real one begins.

An order is a packet on the socket that is our standard input: JSON, and with it the new process's three standard
descriptors. The answers are packets of JSON: `{"ready": true}`, then for each process its pid when it begins and its
status when it ends. What a process does after the fork is what entrypoint.py does, with the same arguments, environment
and folder; or the code that the order brings.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
ORDER_BYTES = 1 << 18
STANDARD = 3
"""Input, output, error."""
FAILED_FLUSH = 120
"""Python's own exit code for it."""


def load() -> None:
    """Everything that an attempt imports on its way."""
    import accelerate
    import bitsandbytes
    import boto3
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import peft.tuners.lora.bnb
    import pyarrow as pa
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama
    from botocore_tables import read_once

    import job

    for module in pkgutil.walk_packages(job.__path__, "job."):
        with contextlib.suppress(ImportError):  # those for Triton load only where it is
            importlib.import_module(module.name)
    read_once()
    matplotlib.figure.Figure().savefig(io.BytesIO())  # it looks for its fonts
    boto3.session.Session().client(
        "s3", region_name="us-east-1", aws_access_key_id="nobody", aws_secret_access_key="nothing"
    )
    assert accelerate, (bitsandbytes, matplotlib, pa, peft, transformers)
    threads = len([*Path("/proc/self/task").iterdir()])
    assert threads == 1, f"{threads} threads: a fork would leave the others and what they hold behind"


def serve(orders: socket.socket) -> dict:
    """Fork for each order; returns, in the child, the order."""
    children: dict[int, int] = {}
    tell(orders, ready=True)
    while True:
        ready, _, _ = select.select([orders, *children], [], [])
        for descriptor in ready:
            if descriptor is not orders:
                pid = children.pop(descriptor)
                os.close(descriptor)
                tell(orders, ended=pid, status=os.waitpid(pid, 0)[1])
                continue
            packet, standard, _, _ = socket.recv_fds(orders, ORDER_BYTES, STANDARD)
            if not packet:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                os._exit(0)
            order = json.loads(packet)
            pid = os.fork()
            if not pid:
                for number, given in enumerate(standard):
                    os.dup2(given, number)
                for inherited in (*standard, *children):
                    os.close(inherited)
                return order
            for given in standard:
                os.close(given)
            children[os.pidfd_open(pid)] = pid
            tell(orders, begun=pid, order=order["order"])


def tell(orders: socket.socket, **news: object) -> None:
    orders.send(json.dumps(news).encode())


def begin(order: dict) -> None:
    """What a process has from its start: a user, a folder, an environment, and what Python makes of it."""
    if order["user"] is not None:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_DUMPABLE, 1)  # as after an exec: what /proc shows of us is our user's
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which may have started the tests, is inherited
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - as Python's own
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    random.seed()  # else pauses between two requests would be the same in each attempt
    tempfile.tempdir = None
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(1, folder)
        if (own := Path(folder, "sitecustomize.py")).exists():
            runpy.run_path(str(own))
    # What reads the environment at its import, or is another one there, is imported anew.
    for name in [name for name in sys.modules if name.split(".")[0] in order["forget"]]:
        del sys.modules[name]


def run_code(order: dict) -> int:
    """As `python -c` does."""
    sys.argv = ["-c", *order["arguments"]]
    exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
    return 0


def run_entrypoint(order: dict) -> int:
    sys.argv = ["entrypoint.py", *order["arguments"]]
    from job.edge.host.interrupt import Interrupt

    interrupt = Interrupt()
    interrupt.install()
    from job.cli import main

    code = main(interrupt)
    interrupt.ignore()
    return code


def end(code: int) -> None:
    """As the interpreter ends, but for taking every library apart: that would copy all their pages into each child."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:  # absl, which rouge-score brings, closes what it logged to
                stream.flush()
        except OSError:
            code = FAILED_FLUSH
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    load()
    gc.freeze()  # the collector would touch, and so copy, every page of the libraries in each child
    control = socket.socket(fileno=os.dup(0))
    order = serve(control)
    control.close()
    begin(order)
    end(run_entrypoint(order) if order["code"] is None else run_code(order))
