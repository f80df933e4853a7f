"""Killed at any moment, with a store that dies too: every run reaches its end, and the end is the same to the bit."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos_attempts import Attempt
from chaos_results import say
from chaos_runs import Run
from chaos_server import dying_at_random
from chaos_strikes import COLD_PHASES, EMPTY_DISK_PHASES, NEEDED, Durations, reach, where
from chaos_table import AGAIN, ANEW, DONE, POINT_KILL, RANDOM_KILL, RESUMED, STOP, Ledger, Row
from nightly_job import OF_CHANNELS

from job.core.crash_points import POINTS
from job.core.errors import StopRequestedError, UnavailableError

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
KILLED = -signal.SIGKILL
COLD_SHARE = 0.1
"""Of the attempts, by the real command."""
AT_ONCE = 3
"""Runs under way: one waits for a dead owner's lease while another computes."""
TWICE = (
    *("lock.renewed", "download.middle", "resume.middle", "step.middle", "step.before_update"),
    *("step.after_update", "evaluate.middle", "save.middle", "save.after", "checkpoint.before_file"),
    *("checkpoint.after_file", "checkpoint.before_manifest", "checkpoint.after_manifest", "checkpoint.before_latest"),
    *("checkpoint.after_latest", "retain.before_delete", "retain.after_manifest", "adapter.before_file"),
    "adapter.after_file",
)
"""Points that one attempt passes again and again."""
SHORT = ("evaluate.middle", "save.middle")
"""Points in phases of milliseconds: a request at a moment drawn from the seed mostly comes after them."""
LAST = ("sum_up", "report")
"""At the very end there is nothing left to stop."""
LATE = ("adapter.", "prove.", "pictures.", "report.")
"""Points after the last step: an attempt that is killed there has trained to the end."""


class Siege:
    """Runs that are attacked, and the ledger of it."""

    def __init__(self, folder: Path, server, place, recipe, image, undisturbed, *, seed: str) -> None:
        self.folder, self.server, self.place, self.recipe, self.image = folder, server, place, recipe, image
        self.undisturbed, attempt = undisturbed
        self.durations = Durations(attempt)
        self.ledger = Ledger()
        self.seed = seed

    def run(self, name: str) -> "Besieged":
        run = Run(self.folder / name, self.place.below(f"{self.folder.name}-{name}"), self.recipe, self.image)
        return Besieged(self, run, random.Random(f"{self.seed}/{name}"))


class Besieged:
    """One run, attempt after attempt."""

    def __init__(self, siege: Siege, run: Run, draw: random.Random) -> None:
        self.siege, self.run, self.draw = siege, run, draw
        self.done = False
        self._struck: Callable[[str], None] = lambda _outcome: None
        """Writes the last strike into the ledger, once its outcome is known."""

    def attempt(
        self,
        *options: str,
        deed: str | None = None,
        aim: Callable[[Attempt], bool] = lambda _attempt: True,
        strike: Callable[[Attempt], object] = lambda _attempt: None,
        cold: bool = False,
        fresh: bool = True,
    ) -> int:
        """One attempt, to its end.

        Args:
            options: of the command.
            deed: what is done to it, as the ledger calls it.
            aim: waits for the moment; False: it has ended before.
            strike: does it.
            cold: by the real command.
            fresh: on an empty disk.
        """
        self.siege.server.settle()  # the attempt before may have been killed right after it had sent a manifest
        before = self.run.committed()
        attempt = self.run.begin(*options, cold=cold, fresh=fresh)
        if not aim(attempt):
            deed = None
        phase = where(self.run, attempt)
        if deed is not None:
            strike(attempt)
        code = attempt.wait()
        self.run.look(attempt, before)
        self._struck(_outcome(attempt))
        self._struck = lambda _outcome: None
        self.siege.ledger.ended(code)
        self.done = code == 0
        if deed != STOP:
            phase = where(self.run, attempt)
        say(f"{attempt.folder.parent.name}/{attempt.folder.name}: {deed or 'none'}, {phase}, {code}")
        if deed is not None and (code == KILLED or deed == STOP):
            self._struck = lambda outcome: self.siege.ledger.add(
                Row(phase=phase, deed=deed, code=code, cold=cold, outcome=outcome)
            )
        else:
            # A store that is away for longer than the job's patience ends it with 69: that is for the next attempt.
            assert code in (0, UnavailableError.code), attempt.told()
        if code == StopRequestedError.code:
            told, newest = attempt.outcome.get("last_committed_step"), self.run.newest()
            assert told == newest or (told is None and not attempt.named("step")), attempt.told()
        return code

    def kill_at_random(self, phase: str | None) -> None:
        """At a moment of a phase; None: of the whole attempt."""
        self.attempt(
            deed=RANDOM_KILL,
            aim=lambda attempt: self._wait_for(attempt, phase),
            strike=Attempt.kill,
            cold=phase in COLD_PHASES or self.draw.random() < COLD_SHARE,
            fresh=phase in EMPTY_DISK_PHASES or self.draw.random() < 0.5,
        )

    def stop_at_random(self, phase: str) -> int:
        return self.attempt(
            deed=STOP,
            aim=lambda attempt: self._wait_for(attempt, phase),
            strike=lambda attempt: attempt.send(signal.SIGTERM),
            cold=phase in COLD_PHASES,
            fresh=phase in EMPTY_DISK_PHASES,
        )

    def kill_at_point(self, spec: str) -> bool:
        """False: it never came there, and the run is done."""
        fresh = spec.startswith(("fetch_base", "download", "encode"))
        while not self.done:
            if self.attempt("--crash-at", spec, deed=POINT_KILL, fresh=fresh) == KILLED:
                return True
        return False

    def stop_at_point(self, spec: str) -> bool:
        """Ask it to stop while it stands still there; False as above."""

        def strike(attempt: Attempt) -> None:
            attempt.send(signal.SIGTERM)
            attempt.send(signal.SIGCONT)

        while not self.done:
            code = self.attempt("--crash-at", f"{spec}=freeze", deed=STOP, aim=Attempt.until_frozen, strike=strike)
            if code == StopRequestedError.code:
                return True
        return False

    def finish(self) -> None:
        """Let it reach its end, and look at it there."""
        while not self.done:
            self.attempt()
        stood = self.run.content()
        attempt = self.run.begin()
        assert attempt.wait() == 0, attempt.told()
        assert attempt.named("already_done"), attempt.told()
        self._struck(DONE)
        assert self.run.content() == stood
        self.run.same_result(self.siege.undisturbed, attempt)
        self.siege.ledger.run_done()

    def _wait_for(self, attempt: Attempt, phase: str | None) -> bool:
        seconds = self.siege.durations.seconds
        if phase is None:
            time.sleep(self.draw.random() * sum(seconds.values()))
            return not attempt.ended
        if phase == "start":
            time.sleep(self.draw.random())
            return not attempt.ended
        return reach(self.run, attempt, phase, self.draw, seconds)


def _outcome(attempt: Attempt) -> str:
    """What an attempt found of the one that was struck before it."""
    if attempt.named("already_done"):
        return DONE
    if attempt.named("resumed"):
        return RESUMED
    return ANEW if any(e["name"] in ("ask_base", "train") for e in attempt.named("phase")) else AGAIN


def least_hit(ledger: Ledger, phases, draw: random.Random, *, deed: str) -> str | None:
    """Steers: half of the strikes go where there were the fewest, a few anywhere in time, the rest to any phase."""
    kind = draw.random()
    if kind < 0.5:
        return min(phases, key=lambda phase: (ledger.count(phase=phase, deed=deed), draw.random()))
    return None if kind < 0.6 else draw.choice(phases)


def in_threads(works: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


def random_kills(siege: Siege, *, kills: int, least: int, at_once: int, in_one_run: int) -> None:
    """Runs with up to `in_one_run` kills each, until there were enough, and enough in each phase."""
    phases = ["start", *siege.durations.phases]
    numbers = iter(range(10_000))
    choosing = threading.Lock()

    def enough() -> bool:
        ledger = siege.ledger
        return ledger.count(deed=RANDOM_KILL) >= kills and all(
            ledger.count(phase=phase, deed=RANDOM_KILL) >= least for phase in NEEDED
        )

    def work() -> None:
        while not enough():
            with choosing:
                number = next(numbers)
            assert number < kills + 60, "no end of it: look at what each attempt ended with"
            besieged = siege.run(f"random-{number:03d}")
            for _kill in range(in_one_run):
                if besieged.done or enough():
                    break
                besieged.kill_at_random(least_hit(siege.ledger, phases, besieged.draw, deed=RANDOM_KILL))
            besieged.finish()

    in_threads([work] * at_once)


def stops_at_random(siege: Siege, *, at_once: int) -> None:
    """Ask it to stop in each phase until it has ended with 75 there; two stops in a run, for the third ends with 83."""
    left = [phase for phase in ["start", *siege.durations.phases] for _ in range(2)]
    random.Random(f"{siege.seed}/stops").shuffle(left)
    numbers = iter(range(10_000))
    choosing = threading.Lock()
    ended: dict[str, set[int]] = {}

    def work() -> None:
        while True:
            with choosing:
                number, phases = next(numbers), [left.pop() for _ in range(min(2, len(left)))]
            if not phases:
                return
            assert number < 60, f"no end of it: {ended}"
            besieged = siege.run(f"stop-{number:03d}")
            for phase in phases:
                code = None if besieged.done else besieged.stop_at_random(phase)
                ended.setdefault(phase, set()).add(code)
                stopped = StopRequestedError.code in ended[phase] or (phase in LAST and code == 0)
                # A short phase may be over when the signal arrives.
                hit = phase not in NEEDED or siege.ledger.count(phase=phase, deed=STOP)
                if not (stopped and hit):
                    left.insert(0, phase)
            besieged.finish()

    in_threads([work] * at_once)


def kills_at_points(siege: Siege, specs, *, name: str) -> list[str]:
    """Kill at each of them, as many in one run as it gives; returns those that no run came to."""
    left = sorted(specs, key=lambda spec: spec.startswith(LATE))
    missed: list[str] = []
    number = 0
    while left:
        besieged = siege.run(f"{name}-{number}")
        number += 1
        besieged.kill_at_point("checkpoint.after_latest")  # something to resume from
        first = left[0]
        while left and not besieged.done:
            if besieged.kill_at_point(left[0]):
                left.pop(0)
            elif left[0] == first:  # it had the whole run before it
                missed.append(left.pop(0))
        besieged.finish()
    return missed


@pytest.fixture
def siege(tmp_path_factory, server, s3_place, s3_recipe, warm, undisturbed, seed):
    return Siege(tmp_path_factory.mktemp("siege"), server, s3_place, s3_recipe, warm, undisturbed, seed=seed)


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(siege, server):
    """A short part of the chaos; `make chaos` does it in every phase and at every point."""

    def killed_at_random() -> None:
        besieged = siege.run("short-random")
        for phase in ("train", "upload"):
            if not besieged.done:
                besieged.kill_at_random(phase)
        besieged.finish()

    def killed_at_points() -> None:
        besieged = siege.run("short-points")
        for spec in ("checkpoint.before_manifest:2", "retain.after_manifest"):
            assert besieged.kill_at_point(spec), spec
        assert besieged.stop_at_point("step.middle")
        for spec in ("adapter.after_file:2", "report.before"):
            assert besieged.kill_at_point(spec), spec
        besieged.finish()

    with dying_at_random(server, random.Random(f"{siege.seed}/server"), between_seconds=(3.0, 8.0)):
        in_threads((killed_at_random, killed_at_points))


@pytest.mark.chaos
class TestAll:
    """One ledger for all of it."""

    @pytest.fixture(scope="class")
    def siege(self, tmp_path_factory, s3_place, s3_recipe, warm, undisturbed, seed, results, server):
        siege = Siege(tmp_path_factory.mktemp("all"), server, s3_place, s3_recipe, warm, undisturbed, seed=seed)
        say(f"seed {seed}")
        with dying_at_random(server, random.Random(f"{seed}/server"), between_seconds=(5.0, 20.0)):
            yield siege
        results.kills(siege.ledger, ["start", *siege.durations.phases], server)
        say("\n".join(siege.ledger.markdown(["start", *siege.durations.phases])))

    def test_the_real_command_gives_what_the_warm_image_gives(self, siege):
        run = siege.run("cold").run
        attempt = run.begin(cold=True)
        assert attempt.wait() == 0, attempt.told()
        run.same_result(siege.undisturbed, attempt)

    def test_kills_at_random_moments_of_every_phase(self, siege):
        random_kills(siege, kills=KILLS, least=3, at_once=AT_ONCE, in_one_run=12)
        assert siege.ledger.count(deed=RANDOM_KILL, cold=True) >= KILLS * COLD_SHARE / 2

    def test_a_kill_at_every_crash_point_and_at_its_second_passage(self, siege):
        passed = [name for name in POINTS if not name.startswith(OF_CHANNELS)]
        specs = [*passed, *(f"{name}:2" for name in TWICE)]
        random.Random(f"{siege.seed}/points").shuffle(specs)
        shares = [specs[n::AT_ONCE] for n in range(AT_ONCE)]
        missed: list[str] = []
        in_threads(
            [lambda n=n: missed.extend(kills_at_points(siege, shares[n], name=f"points-{n}")) for n in range(AT_ONCE)]
        )
        assert not missed

    def test_a_request_to_stop_in_every_phase(self, siege):
        stops_at_random(siege, at_once=AT_ONCE)
        for spec in SHORT:
            besieged = siege.run(f"stop-{spec}")
            assert besieged.stop_at_point(spec), spec
            besieged.finish()
        assert [phase for phase in NEEDED if not siege.ledger.count(phase=phase, deed=STOP)] == []
        assert siege.ledger.codes(STOP) <= {0, StopRequestedError.code, UnavailableError.code, -signal.SIGTERM}
