"""Remembers that someone asked us to stop; imports nothing heavy, so that handlers stand before the libraries load."""

import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Interrupt:
    """A flag that SIGTERM, SIGINT and SIGUSR2 set; every long loop polls it.

    The handler does nothing but set the flag: it runs between two bytecodes of whatever is under way, a save included,
    and so a second signal cannot break a save either.
    """

    def __init__(self) -> None:
        self._signal: int | None = None

    def install(self) -> None:
        """Set the handlers; call it first of all, on the main thread."""
        for number in _STOP_SIGNALS:
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """The exit code is decided: a signal while the interpreter ends must not replace it by its own."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def __call__(self) -> bool:
        """Whether someone asked us to stop."""
        return self._signal is not None

    @property
    def reason(self) -> str | None:
        """The name of the signal that asked, if one did."""
        return None if self._signal is None else signal.Signals(self._signal).name
