"""The thread that ends what does not move or hear: decisions on a scripted clock, the ending on real processes."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from job.edge.host.watchdog import Stopping, Watchdog, stacks

ROOT = Path(__file__).parents[3]
PATIENCE = 60
"""Seconds that no test takes, unless what it claims is wrong."""


class Watched:
    """A watchdog whose clock moves by half a second with each of its looks, whatever the machine does."""

    def __init__(self, *, allowed=10.0, grace=30.0, on_stalled=None, on_deaf=None, report_seconds=PATIENCE):
        self.now = 0.0
        self.looks = 0
        self.at_look = {}
        self.told = []
        self.codes = []
        self.asked = False
        self._ended = threading.Event()
        self.dog = Watchdog(
            allowed_seconds=lambda _phase: allowed,
            on_stalled=on_stalled or (lambda *said: self.told.append(said)),
            stopping=Stopping(
                asked=self._look,
                grace_seconds=grace,
                deaf_phases=frozenset({"load_model"}),
                on_deaf=on_deaf or self.told.append,
            ),
            clock=lambda: self.now,
            end_process=self._end,
            pause_seconds=0.001,
            report_seconds=report_seconds,
        )

    def _look(self):
        self.looks += 1
        self.now += 0.5
        self.at_look.pop(self.looks, lambda: None)()
        return self.asked

    def _end(self, code):
        self.codes.append(code)
        self._ended.set()

    def run(self):
        """Start, and wait for the end; the seconds on its clock."""
        self.dog.start()
        assert self._ended.wait(PATIENCE)
        self.dog.stop()
        return self.now


# --- silence ---------------------------------------------------------------------------------------------------------


def test_a_silent_phase_ends_the_process_with_83():
    watched = Watched(allowed=10.0)
    watched.dog.phase("train")

    assert watched.run() == pytest.approx(10, abs=1.1)
    assert watched.codes == [83]
    assert [(phase, round(seconds)) for phase, seconds, _ in watched.told] == [("train", 10)]


def test_a_beat_and_a_phase_begin_the_silence_anew():
    watched = Watched(allowed=10.0)
    watched.at_look = {15: watched.dog.beat, 30: lambda: watched.dog.phase("evaluate")}

    assert watched.run() == pytest.approx(15 + 10, abs=1.6)
    assert watched.told[0][0] == "evaluate"


def test_going_back_to_the_outer_phase_is_a_beat_even_between_two_looks():
    watched = Watched(allowed=10.0)
    assert watched.dog.phase("train") == "start"
    watched.at_look = {15: lambda: watched.dog.phase(watched.dog.phase("evaluate"))}

    assert watched.run() == pytest.approx(7.5 + 10, abs=1.6)
    assert watched.told[0][0] == "train"


def test_what_is_allowed_is_asked_again_at_each_look():
    """The longest step is known only later."""
    longest = 5.0
    watched = Watched(allowed=10.0)
    watched.dog._allowed_seconds = lambda phase: {"train": 4 * longest}[phase]
    watched.dog.phase("train")

    assert watched.run() == pytest.approx(20, abs=1.1)


def test_nothing_fires_once_it_is_stopped():
    watched = Watched(allowed=1e9)
    seen = threading.Event()
    watched.at_look = {3: seen.set}
    watched.dog.start()
    assert seen.wait(PATIENCE)

    watched.dog.stop()

    looks = watched.looks
    watched.now = 1e12
    watched.asked = True
    assert (looks, watched.codes, watched.told) == (watched.looks, [], [])
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_one_that_was_never_started_can_be_stopped():
    Watched().dog.stop()


# --- requests to stop ------------------------------------------------------------------------------------------------


def test_a_phase_that_cannot_hear_ends_the_process_with_75_soon():
    watched = Watched(allowed=900.0)
    watched.dog.phase("load_model")
    watched.asked = True

    assert watched.run() == pytest.approx(2.5, abs=0.6)
    assert watched.codes == [75]
    assert watched.told == ["load_model"]


def test_any_phase_ends_with_75_before_the_kill():
    watched = Watched(allowed=900.0, grace=30.0)
    watched.dog.phase("train")
    watched.asked = True

    assert watched.run() == pytest.approx(29.5, abs=0.6)
    assert watched.codes == [75]
    assert watched.told == ["train"]


# --- telling is bounded ----------------------------------------------------------------------------------------------


def never_ends(*_said):
    threading.Event().wait()


def test_a_store_that_hangs_cannot_hold_the_end():
    watched = Watched(on_stalled=never_ends, report_seconds=0.05)

    watched.run()

    assert watched.codes == [83]


def test_telling_of_a_stop_takes_no_longer_than_the_grace():
    """Half a second is left of it, and the five minutes are not waited for."""
    watched = Watched(allowed=900.0, grace=30.0, on_deaf=never_ends, report_seconds=300.0)
    watched.asked = True

    watched.run()

    assert watched.codes == [75]


def test_what_hangs_after_the_telling_does_not_change_the_exit_code():
    watched = Watched(on_deaf=lambda _phase: 83)
    known = []
    watched.dog._on_reported = lambda: known.append(watched.dog._code)
    watched.dog.phase("load_model")
    watched.asked = True

    watched.run()

    assert (known, watched.codes) == ([83], [83])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_while_telling_ends_the_process_all_the_same():
    def fails(*_said):
        raise OSError("no space left on device")

    watched = Watched(on_stalled=fails)

    watched.run()

    assert watched.codes == [83]


def test_the_stacks_name_every_thread_and_where_it_stands():
    begun, done = threading.Event(), threading.Event()

    def uploads_a_part():
        begun.set()
        done.wait()

    thread = threading.Thread(target=uploads_a_part, name="publisher")
    thread.start()
    begun.wait()

    told, without = stacks(), stacks(leave_out=[thread])
    done.set()

    assert "Thread 'publisher':" in told
    assert "in uploads_a_part\n    done.wait()" in told
    assert "Thread 'MainThread':" in told
    assert "in test_the_stacks_name_every_thread_and_where_it_stands" in told
    assert "publisher" not in without
    assert "MainThread" in without


# --- real processes --------------------------------------------------------------------------------------------------

HANG = """
import hashlib, sys, threading, time
from job.edge.host.watchdog import Watchdog

def on_stalled(phase, seconds, stacks):
    print(f"stalled in {phase}\\n{stacks}")

begun = threading.Event()

def upload_for_ever():
    begun.set()
    threading.Event().wait()

def hang():
    if sys.argv[1] == "sleep":
        time.sleep(1e6)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def allowed_seconds(phase):  # however slow the machine is, it is not judged before it hangs
    return 0.3 if sys._current_frames()[threading.main_thread().ident].f_code is hang.__code__ else 1e6

threading.Thread(target=upload_for_ever, name="publisher").start()
begun.wait()
dog = Watchdog(allowed_seconds=allowed_seconds, on_stalled=on_stalled, pause_seconds=0.05)
dog.phase("train")
dog.start()
hang()
"""


@pytest.mark.parametrize("how", ["sleep", "c"])
def test_a_process_that_hangs_ends_with_83_and_all_its_stacks(how):
    """In a sleep, and in C code that no signal breaks; with another thread that would keep it alive."""
    done = subprocess.run(
        [sys.executable, "-c", HANG, how], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )

    assert (done.returncode, done.stderr) == (83, "")
    assert done.stdout.startswith("stalled in train\n")  # which stood in a buffer
    main, publisher = (done.stdout.split(f"Thread '{name}':\n")[1] for name in ("MainThread", "publisher"))
    assert "in <module>" in main
    assert "in hang" in main
    assert "in upload_for_ever" in publisher
    assert "watchdog" not in done.stdout.replace("job/edge/watchdog.py", "")


FREEZE = """
import sys, time
from job.edge.host.watchdog import Stopping, Watchdog

looks = 0

def look():
    global looks
    looks += 1
    return False

def on_stalled(phase, seconds, stacks):
    print("stalled", seconds, flush=True)

stopping = Stopping(asked=look, grace_seconds=30, deaf_phases=frozenset(), on_deaf=print)
# A second of the test is a day and more of the dog's, and a look counts for no more than one: it would take the dog
# three quarters of an hour to use up, awake, what it sleeps through in a second.
dog = Watchdog(
    allowed_seconds=lambda phase: 50_000.0,
    on_stalled=on_stalled,
    stopping=stopping,
    clock=lambda: 100_000 * time.monotonic(),
    pause_seconds=0.05,
)
dog.start()
while looks < 3:
    time.sleep(0.01)
print("ready", flush=True)
sys.stdin.readline()
seen = looks
while looks < seen + 3:
    time.sleep(0.01)
dog.stop()
print("awake", flush=True)
"""


def test_a_process_that_was_frozen_is_not_ended_when_it_wakes():
    """It slept through more than it was allowed, and no beat came since."""
    child = subprocess.Popen(
        [sys.executable, "-c", FREEZE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        child.send_signal(signal.SIGCONT)
        said, _ = child.communicate("\n", timeout=PATIENCE)
    finally:
        child.kill()

    assert (child.returncode, said) == (0, "awake\n")
