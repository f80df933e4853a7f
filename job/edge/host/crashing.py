"""What happens at an armed crash point: the process is killed, frozen, ended, or sees an error. For tests."""

import os
import signal
import threading
from typing import assert_never

from job.core.crash_points import CrashOrder, parse_order, set_order

KILLED_CODE = 128 + signal.SIGKILL
"""What a shell reports for a killed process. The first process of a container cannot kill itself, but can exit so."""


class Panic(BaseException):
    """What a panic in Rust becomes: the bindings derive theirs from BaseException too."""


def arm(spec: str) -> CrashOrder:
    """Arm one crash point: `name[:n][=kill|freeze|exit|error|memory|panic]`, at its n-th passage.

    `kill` is SIGKILL and `freeze` SIGSTOP to this process, `exit` ends it without cleaning up; `error` raises, `memory`
    and `panic` as Python does without memory, and as a panic in a library's Rust does, which is no Exception.

    Raises:
        UsageError: there is no such point or deed.
    """
    order = parse_order(spec)
    set_order(order, _do)
    return order


def disarm() -> None:
    """Crash points do nothing again."""
    set_order(None, _do)


def _do(order: CrashOrder) -> None:
    # Sent to this very thread, and so to the whole process: sent to the process, another thread may be the first to
    # notice, and this one would run on past its point.
    here = threading.get_ident()
    match order.deed:
        case "kill":
            signal.pthread_kill(here, signal.SIGKILL)
        case "freeze":
            signal.pthread_kill(here, signal.SIGSTOP)
        case "exit":
            os._exit(KILLED_CODE)
        case "error":
            raise RuntimeError(f"crash point {order.name}")
        case "memory":
            raise MemoryError
        case "panic":
            raise Panic(f"crash point {order.name}")
        case _:
            assert_never(order.deed)
