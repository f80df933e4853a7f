"""Holds a GPU's memory but for some GiB, as another job on it does, until its input is closed.

    python -m bench.memory_hog GIB

The product plans with what is free when it starts: this is how it is given less, and nothing in it knows of the bench.
"""

import contextlib
import subprocess
import sys

import torch

from bench.processes import NoResultError

_PIECE_BYTES = 2**28


def hold_all_but(gib):
    """Take memory in pieces while more than this would be left free; returns what holds it."""
    held = []
    while torch.cuda.mem_get_info()[0] - _PIECE_BYTES >= gib * 2**30:
        held.append(torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cuda"))
    return held


@contextlib.contextmanager
def only_free(gib):
    """Meanwhile no more of the GPU's memory is free; None: nothing is held.

    Raises:
        NoResultError: it cannot be held.
    """
    if gib is None:
        yield
        return
    command = [sys.executable, "-m", "bench.memory_hog", str(gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        if not hog.stdout.readline():
            raise NoResultError("the GPU's memory cannot be held")
        try:
            yield
        finally:
            hog.stdin.close()


if __name__ == "__main__":
    pieces = hold_all_but(float(sys.argv[1]))
    print(f"{len(pieces) * _PIECE_BYTES / 2**30:.1f} GiB held", flush=True)
    sys.stdin.read()
