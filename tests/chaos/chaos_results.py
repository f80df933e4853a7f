"""The section of bench/RESULTS.md that the chaos writes: what was done, how often, and what came of it."""

import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from chaos_runs import processors
from chaos_table import POINT_KILL, RANDOM_KILL, STOP, Ledger

from job import __version__

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "boto3", "ministack")
_CASES = {
    "started at once": (
        "**Started twice.** {} times two or eight processes began the same run at once, on S3 and in a folder: one "
        "worked, the others ended with 84 and named it."
    ),
    "frozen": (
        "**Frozen.** {} times the owner was stopped by SIGSTOP, right before its manifest, latest.json, adapter and "
        "report and at random moments; another one took the run over and the first one woke: it ended with 84 (with 0 "
        "when its report stood already). latest.json, adapter and report are the other's, and the numbers are the same."
    ),
    "damaged": (
        "**Damaged.** {} times something in the store was changed: one byte of each file of the newest checkpoint, its "
        "manifest cut short, gone, or naming keys with `..`, absolute and foreign ones or sizes that cannot be, "
        "latest.json wrong or gone. The run went on from the newest checkpoint that verifies, log and report say which "
        "were passed over, and the numbers are the same."
    ),
    "deleted while resumed": (
        "**Deleted while it is resumed.** {} times the newest checkpoint was deleted while an attempt read it, after "
        "each of its files, on S3 and in a folder: the one before was gone on from, and the report says so."
    ),
    "away": (
        "**A store that is away for too long.** {} times the store went away as an attempt entered a phase, each phase "
        "in its turn, for longer than the attempt's patience (shortened to a second): it ended with 69, and the next "
        "one brought the run to its end with the same numbers."
    ),
    "disk full": (
        "**A disk that fills.** {} times the attempt's disk, a tmpfs, was filled to the last byte as it entered a "
        "phase, each in its turn: it ended with 74 (with 0 where nothing more was to be written there), and the next "
        "one, on a disk with room, brought the run to its end with the same numbers."
    ),
    "slept": (
        "**An owner that sleeps.** {} times an attempt was stopped by SIGSTOP in a phase and woke with its clock ten "
        "minutes further (simulated), its lease over, its connections dead, and nobody in its place: it went on and "
        "ended with 0."
    ),
    "several processes": (
        "**Several processes.** {} times one of two or three processes of a run, their launcher or supervisor was "
        "killed, asked to stop, frozen or made to fail, at crash points and at random moments, the disk filled or the "
        "store went away: the command ended with the code of the table and left no process, and the run went on to the "
        "bits of two processes that nothing had happened to."
    ),
    "policies": (
        "**Forbidden, full, late, wrong.** {} runs met a policy or an odd store: pictures, card or hint denied, "
        "deleting denied later, no room (507 and 403 QuotaExceeded), listings eight seconds behind or without sizes or "
        "ETags, redirects to nowhere, pages instead of answers, a clock twenty minutes off for a while and for good, a "
        "bucket with versions. What is not needed cost a note in the report, no room ended with 74 and the clock that "
        "stayed wrong with 82 until they were mended; every run ended with the same numbers."
    ),
}
LEAST_STRIKES = 300
"""Of all kinds together, in a run of the whole suite."""


class Results:
    """Paragraphs, in the order in which they come."""

    def __init__(self, seed: str, engine: str) -> None:
        self._seed = seed
        self._engine = engine
        self._began = time.monotonic()
        self._paragraphs: list[str] = []
        self._killed_or_stopped = 0
        self._cases: Counter[str] = Counter()

    def add(self, paragraph: str) -> None:
        self._paragraphs.append(paragraph)

    def kills(self, ledger: Ledger, phases: Sequence[str], server) -> None:
        """The table, and what stands beside it."""
        self._killed_or_stopped += ledger.count()
        points, stops = ledger.count(deed=POINT_KILL), ledger.count(deed=STOP)
        random, cold = ledger.count(deed=RANDOM_KILL), ledger.count(deed=RANDOM_KILL, cold=True)
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(ledger.attempts.items()))
        self.add(
            f"**Killed at any moment.** {ledger.runs} runs of 12 steps on S3 with {sum(ledger.attempts.values())} "
            f"attempts: {random} killed at moments drawn from the seed ({cold} of them started by the real command, "
            f"the others forked from a process that had loaded the libraries), {points} killed at crash points, "
            f"{stops} asked to stop. Meanwhile the server was killed {server.deaths} "
            f"times and came back with its data, after {server.longest_away_seconds:.1f} s at most. Every run reached "
            "its end; the adapter's sha256 and every number of curve, evaluations, answers and proof are those of the "
            "undisturbed run. No attempt went on from anything but the newest committed checkpoint, and no report was "
            "written twice."
        )
        self.add("\n".join(ledger.markdown(phases)))
        self.add(f"How the attempts ended (exit code: attempts; -9 is SIGKILL): {codes}.")

    def case(self, kind: str) -> None:
        """One more of a kind in `_CASES` went well."""
        assert kind in _CASES
        self._cases[kind] += 1

    @property
    def strikes(self) -> int:
        """What was done to attempts and stores, each deed once; requests that a proxy injured are not among them."""
        return self._killed_or_stopped + self._cases.total()

    def text(self) -> str:
        libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
        head = (
            f"Seed {self._seed}, {time.monotonic() - self._began:.0f} s on {processors()} processors; qlora-job "
            f"{__version__}, Python {platform.python_version()}, {libraries}. {self.strikes} strikes in all."
        )
        told = [text.format(self._cases[kind]) for kind, text in _CASES.items() if self._cases[kind]]
        title, command = "## Killed, stopped, starved, started twice", "    make chaos"
        if self._engine != "auto":
            title, command = f"{title}: `--engine {self._engine}`", f"    CHAOS_ENGINE={self._engine} make chaos"
        return "\n\n".join([title, command, head, *self._paragraphs, *told])


def say(text: str) -> None:
    """Show how far it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_block(path: Path, name: str, text: str) -> None:
    """Replace the block of this name in a file, or put one at its end."""
    content, begin, end = path.read_text(encoding="utf-8"), f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n\n{text.strip()}\n\n{end}"
    if begin in content:
        content = re.sub(f"{begin}.*{end}", lambda _: block, content, flags=re.DOTALL)
    else:
        content = f"{content.rstrip()}\n\n{block}\n"
    path.write_text(content, encoding="utf-8")
