"""Remembers that someone asked us to stop; imports nothing heavy, so that handlers stand before the libraries load."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGXCPU,
)
"""Each ends a process that has no handler for it: a terminal that goes, a limit of CPU time, a scheduler's notice."""


class Interrupt:
    """A flag that a signal to stop sets; every long loop polls it.

    The handler does nothing but set the flag: it runs between two bytecodes of whatever is under way, a save included,
    and so a second signal cannot break a save either.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._asked: str | None = None
        self._news: int | None = None
        """Read end of a pipe with a byte for each signal."""

    def install(self) -> None:
        """Set the handlers; call it first of all, on the main thread."""
        for number in _STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup has started us, to go on without a terminal
            signal.signal(number, self._remember)
        # A handler runs only once the main thread is back from C code, which may take minutes. The byte that Python
        # writes here at the signal itself is seen at once by any other thread that asks.
        self._news, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # A worker is begun by a launcher from which they were kept, and so from whatever that has begun.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def ignore(self) -> None:
        """The exit code is decided: a signal while the interpreter ends must not replace it by its own."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def hear(self) -> None:
        """Another process of the same run got a signal to stop, and so the kill follows here too."""
        if not self.signalled:
            self._signal = signal.SIGTERM

    def ask(self, reason: str) -> None:
        """Ask from within the process, as a signal would: the deadline is near, the lock is lost."""
        self._asked = self._asked or reason

    def __call__(self) -> bool:
        """Whether someone asked us to stop."""
        return self.signalled or self._asked is not None

    @property
    def signalled(self) -> bool:
        """Whether it was a signal: then the kill follows, after the grace."""
        if self._signal is None and self._news is not None:
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._news, 64):
                    if number in _STOP_SIGNALS:
                        self._signal = number
        return self._signal is not None

    @property
    def reason(self) -> str | None:
        """The name of the signal that asked, or what within the process did."""
        return self._asked if self._signal is None else signal.Signals(self._signal).name


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are begun in this block never see a request to stop: what they are part of ends them in time.

    A terminal and some schedulers send it to every process of a job, and the new one has no handler yet. One that
    comes to this process meanwhile is seen at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
