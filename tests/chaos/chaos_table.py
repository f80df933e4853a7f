"""What was done to the attempts and what came of it, as a table: phases x kills x outcomes."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

RANDOM_KILL, POINT_KILL, STOP = "SIGKILL at random", "SIGKILL at a crash point", "SIGTERM"
DEEDS = (RANDOM_KILL, POINT_KILL, STOP)
RESUMED, ANEW, DONE, AGAIN = "went on", "began anew", "was done", "struck again"
OUTCOMES = (RESUMED, ANEW, DONE, AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attempt that was struck."""

    phase: str
    """In which it was struck."""
    deed: str
    code: int
    """What the process ended with: -9, or the table's codes after a request to stop."""
    cold: bool
    outcome: str
    """Of the attempt after it."""


class Ledger:
    """Rows from any thread."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._lock = threading.Lock()
        self.attempts: Counter[int] = Counter()
        """All of them, by exit code."""
        self.runs = 0

    def add(self, row: Row) -> None:
        with self._lock:
            self._rows.append(row)

    def ended(self, code: int) -> None:
        with self._lock:
            self.attempts[code] += 1

    def run_done(self) -> None:
        with self._lock:
            self.runs += 1

    def count(self, *, phase: str | None = None, deed: str | None = None, cold: bool | None = None) -> int:
        with self._lock:
            return sum(
                phase in (None, row.phase) and deed in (None, row.deed) and cold in (None, row.cold)
                for row in self._rows
            )

    def codes(self, deed: str) -> set[int]:
        with self._lock:
            return {row.code for row in self._rows if row.deed == deed}

    def markdown(self, phases: Sequence[str]) -> list[str]:
        """The table; phases in the order of a run."""
        with self._lock:
            rows = [*self._rows]
        names = [*phases, *sorted({row.phase for row in rows} - {*phases})]
        head = ["phase", *DEEDS, *OUTCOMES]
        lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
        for name in [*names, None]:
            here = [row for row in rows if name in (None, row.phase)]
            counts = [sum(row.deed == deed for row in here) for deed in DEEDS]
            counts += [sum(row.outcome == outcome for row in here) for outcome in OUTCOMES]
            lines.append(f"| {name or 'all'} | {' | '.join(map(str, counts))} |")
        return lines
