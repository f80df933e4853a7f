"""Holds a GPU's memory but for some GiB, as another job on it does, until its input is closed.

    python -m bench.memory_hog GIB [--below GIB]

It begins when it reads a line; with `--below` it then waits until less than that is free. The product plans with what
is free when it starts: this is how it is given less, and nothing in it knows of the bench.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time

import torch

from bench.processes import NoResultError

_PIECE_BYTES = 2**28
_LOOK_SECONDS = 0.005


def hold_all_but(gib):
    """Take memory in pieces while more than this would be left free; returns what holds it."""
    held = []
    while torch.cuda.mem_get_info()[0] - _PIECE_BYTES >= gib * 2**30:
        try:
            held.append(torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:  # somebody else took it first
            break
    return held


class Hog:
    """A hog in a process of its own, which holds nothing until `hold`."""

    def __init__(self, process):
        self._process = process

    def hold(self):
        """Hold the memory from now on, until the end."""
        self._process.stdin.write("now\n")
        self._process.stdin.flush()

    def wait(self):
        """Wait for its next line: that it is ready, or that it holds the memory.

        Raises:
            NoResultError: it cannot.
        """
        if not self._process.stdout.readline():
            raise NoResultError("the GPU's memory cannot be held")


@contextlib.contextmanager
def only_free_of_each(gib, gpus):
    """The same on each GPU of these numbers, by a hog each.

    Raises:
        NoResultError: it cannot be held.
    """
    with contextlib.ExitStack() as held:
        hogs = [held.enter_context(waiting_hog(gib, gpu=gpu)) for gpu in gpus] if gib is not None else []
        for hog in hogs:
            hog.hold()
        for hog in hogs:
            hog.wait()
        yield


@contextlib.contextmanager
def waiting_hog(gib, *, below=None, gpu=None):
    """A hog that has only the memory that any process on the GPU takes, and holds no more until `hold`."""
    command = [sys.executable, "-m", "bench.memory_hog", str(gib)]
    command += [] if below is None else ["--below", str(below)]
    environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": visible_gpu(gpu)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        hog = Hog(process)
        try:
            hog.wait()
            yield hog
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


@contextlib.contextmanager
def only_free(gib):
    """Meanwhile no more than `gib` of the GPU's memory are free; None: nothing is held.

    Raises:
        NoResultError: it cannot be held.
    """
    if gib is None:
        yield
        return
    with waiting_hog(gib) as hog:
        hog.hold()
        hog.wait()
        yield


def visible_gpu(gpu):
    """The GPU of this number among those that we see."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[gpu] if names else str(gpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gib", type=float)
    parser.add_argument("--below", type=float, metavar="GIB")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    while options.below is not None and torch.cuda.mem_get_info()[0] >= options.below * 2**30:
        time.sleep(_LOOK_SECONDS)
    pieces = hold_all_but(options.gib)
    print(f"{len(pieces) * _PIECE_BYTES / 2**30:.1f} GiB held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
