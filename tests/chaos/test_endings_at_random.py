"""Whatever ends an attempt, and when: a code of the table with its outcome, or a death that the next one corrects."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos_attempts import Attempt
from chaos_results import say
from chaos_runs import Run

from job.core.crash_points import POINTS
from job.core.errors import ENDINGS

STRIKES = int(os.environ.get("CHAOS_ENDINGS", "120"))
AT_ONCE = 2
MOST_ATTEMPTS = 30
"""At one run: beyond it something never ends."""
SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGXCPU", "SIGTERM", "SIGKILL")
DEATHS = ("stdout closed", "stdout full", "panic", "memory", *SIGNALS)
TABLE = {row.code for row in ENDINGS}
ALLOWED = {
    "stdout closed": {0},
    "stdout full": {0},
    "panic": {0, 70},
    "memory": {0, 70},
    "SIGKILL": {0, -signal.SIGKILL},
}
"""Code with which an attempt may end; 0 where it was over before it was struck. Of the other signals see `stopped`."""


def stopped(name: str) -> set[int]:
    """What a request to stop may end with; by the signal itself only before there is a handler for it."""
    return {0, 75, 83, -signal.Signals[name]}


class Sufferer:
    """One run, and one outcome file for all of its attempts."""

    def __init__(self, run: Run, draw: random.Random, events: int) -> None:
        self.run, self.draw, self._events = run, draw, events
        self.outcome_file = run.folder / "outcome.json"
        self.done = False
        self._seen: set[str] = set()
        self._force = False
        self._was_done = False

    def suffer(self, death: str) -> int:
        """One attempt, and what must hold after it."""
        options = ["--outcome-file", str(self.outcome_file), *(["--force"] if self._force else [])]
        if death in ("panic", "memory"):
            point = self.draw.choice([*POINTS])
            options += ["--crash-at", f"{point}:{self.draw.choice((1, 1, 2))}={death}"]
            attempt = self.run.begin(*options)
        elif death == "stdout full":
            attempt = self.run.begin(*options, stdout=Path("/dev/full"))
        elif death == "stdout closed":
            attempt = self._with_a_reader_that_goes(options)
        else:
            attempt = self.run.begin(*options)
            if death in SIGNALS:
                moment = self.draw.randrange(self._events)
                attempt.until(lambda: len(attempt.events()) >= moment)
                time.sleep(self.draw.random() * 0.05)
                attempt.send(signal.Signals[death])
        code = attempt.wait()
        self._look(death, code, attempt)
        return code

    def _with_a_reader_that_goes(self, options) -> Attempt:
        pipe = self.run.folder / "pipe"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            attempt = self.run.begin(*options, stdout=pipe)
            left = self.draw.randrange(self._events)
            while left > 0 and not attempt.ended:
                try:
                    left -= os.read(reader, 1 << 16).count(b"\n")
                except BlockingIOError:
                    time.sleep(0.002)
        finally:
            os.close(reader)
        return attempt

    def _look(self, death: str, code: int, attempt: Attempt) -> None:
        what = f"{self.run.folder.name}, {attempt.folder.name}: {death}, {code}\n{attempt.told()}"
        say(what.splitlines()[0])
        allowed = ALLOWED.get(death) or stopped(death)
        assert code in (allowed | {83} if self._force else allowed), what
        outcome = json.loads(self.outcome_file.read_text()) if self.outcome_file.exists() else {"state": "running"}
        if code >= 0:
            assert code in TABLE, what
            assert (outcome["state"], outcome["code"]) == ("ended", code), what
        new = self._new_endings()
        codes = [ended["code"] for ended in new if ended["code"] is not None]
        if code == 0 and not codes:  # all was done already, and only the one that did it could not say so
            outcome_uri = outcome["run_uri"].rpartition("/")[2]
            assert (self.run.place.folder / "runs" / outcome_uri / "report.json").exists(), what
            self._was_done = True
        else:
            assert codes == ([code] if code >= 0 else []), what
        self._force = outcome.get("again") == "no"
        self.done = code == 0

    def _new_endings(self) -> list[dict]:
        paths = {path.name: path for path in self.run.place.folder.glob("endings/*.json")}
        new, self._seen = paths.keys() - self._seen, paths.keys() | self._seen
        return [json.loads(paths[name].read_text()) for name in sorted(new)]

    def finish(self, reference: Run) -> None:
        """Undisturbed to its end: nothing says any more that it runs, and each attempt has its ending."""
        attempt = None
        while not self.done:
            options = ["--force"] if self._force else []
            attempt = self.run.begin("--outcome-file", str(self.outcome_file), *options)
            self._look("SIGKILL", attempt.wait(), attempt)
        outcome = json.loads(self.outcome_file.read_text())
        assert (outcome["state"], outcome["code"]) == ("ended", 0)
        begun = {path.name for path in self.run.stored.glob("attempts/*") if "-end" not in path.name}
        ended = {path.name.replace("-end", "") for path in self.run.stored.glob("attempts/*-end.json")}
        # Who was killed right after its report is in there as the one that finished.
        assert begun - ended <= ({max(begun)} if self._was_done else set())
        assert ended <= begun
        if attempt is not None:
            self.run.same_result(reference, attempt)


def carry(folder, place, recipe, image, undisturbed, *, seed: str, deaths) -> Counter[str]:
    """Runs that suffer one death after another; as many runs as it takes."""
    reference, first = undisturbed
    events, left, codes, number = len(first.events()), [*deaths], Counter(), 0
    while left:
        name = f"{seed.replace('/', '-')}-{number}"
        run = Run(folder / name, place.below(f"{folder.name}-{name}"), recipe, image)
        sufferer = Sufferer(run, random.Random(f"{seed}/{number}"), events)
        for _ in range(MOST_ATTEMPTS):
            if sufferer.done or not left:
                break
            death = left.pop()
            codes[f"{death}: {sufferer.suffer(death)}"] += 1
        sufferer.finish(reference)
        number += 1
    return codes


def shuffled(seed: str, count: int) -> list[str]:
    deaths = [DEATHS[number % len(DEATHS)] for number in range(count)]
    random.Random(seed).shuffle(deaths)
    return deaths


def test_every_ending_has_its_code_and_its_outcome(
    tmp_path, folder_place, folder_recipe, warm, undisturbed_in_a_folder, seed
):
    """Each of them once; `make chaos` does it again and again."""
    deaths = shuffled(f"{seed}/short", len(DEATHS))
    codes = carry(
        tmp_path, folder_place, folder_recipe, warm, undisturbed_in_a_folder, seed=f"{seed}/short", deaths=deaths
    )

    assert {told.partition(":")[0] for told in codes} == {*DEATHS}


@pytest.mark.chaos
def test_every_ending_at_many_moments(
    tmp_path, folder_place, folder_recipe, warm, undisturbed_in_a_folder, seed, results
):
    deaths = shuffled(f"{seed}/long", STRIKES)
    codes, adding = Counter(), threading.Lock()

    def work(number: int) -> None:
        found = carry(
            tmp_path,
            folder_place,
            folder_recipe,
            warm,
            undisturbed_in_a_folder,
            seed=f"{seed}/long-{number}",
            deaths=deaths[number::AT_ONCE],
        )
        with adding:
            codes.update(found)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in [pool.submit(work, number) for number in range(AT_ONCE)]:
            future.result()
    told = ", ".join(f"{what} {count} times" for what, count in sorted(codes.items()))
    results.add(
        f"**Every ending.** {codes.total()} attempts ended by one thing after another (its output's reader gone, its "
        "disk full, a panic in a library, memory that ran out, a signal), each at a moment drawn from the seed: every "
        "one ended with a code of the table that outcome file and store agree with, or by the signal itself, and then "
        f"the next attempt left word of it; the numbers are the same. What each came to: {told}."
    )
