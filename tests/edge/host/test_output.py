"""A log that nobody reads any more does not end the job."""

import io
import subprocess
import sys
import threading
from pathlib import Path

from terminals import lines_seen

from job.edge.host.output import LastingOutput, PassingLine, terminal_width

ROOT = Path(__file__).parents[3]
WORK = """
import contextlib, sys
from job.edge.host.output import LastingOutput
with contextlib.redirect_stdout(LastingOutput(sys.stdout)):
    print("first", flush=True)
    sys.stdin.readline()
    for _ in range(10000):
        print("nobody reads this", flush=True)
    print("not flushed")
    sys.stderr.write("done " + str(sys.stdout.isatty()))
sys.exit(75)
"""


def test_a_closed_pipe_is_written_to_without_an_end():
    child = subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "first\n"
    child.stdout.close()
    child.stdin.write("\n")
    child.stdin.close()
    assert child.stderr.read() == "done False"
    assert child.wait(60) == 75


def both():
    """Standard output and error of one terminal."""
    seen, passing = io.StringIO(), PassingLine()
    return seen, LastingOutput(seen, passing), LastingOutput(seen, passing)


def test_a_passing_line_is_replaced_by_what_comes_next_on_either_stream():
    seen, out, err = both()
    out.write("first\n")
    out.write_passing("step 1 of 2, which is long")
    out.write_passing("step 2 of 2")
    err.write("careful\n")
    out.write("last\n")

    assert lines_seen(seen.getvalue()) == ["first", "careful", "last", ""]
    assert "step 2 of 2" in seen.getvalue()


def test_nothing_passing_is_left_at_the_end():
    seen, out, _err = both()
    out.write_passing("step 1 of 2")
    out.end()

    assert lines_seen(seen.getvalue()) == [""]


def test_a_stream_that_hangs_does_not_hold_the_other_one_up():
    """The watchdog's last words go to one while the other is read by nobody."""
    gone, said = threading.Event(), io.StringIO()

    class Hanging(io.StringIO):
        def write(self, text):
            gone.wait()
            return len(text)

    passing = PassingLine()
    out, err = LastingOutput(Hanging(), passing), LastingOutput(said, passing)
    writer = threading.Thread(target=out.write, args=("nobody reads this",))
    writer.start()
    err.write("stacks\n")
    gone.set()
    writer.join()

    assert said.getvalue() == "stacks\n"


def test_what_is_no_terminal_has_no_width(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert terminal_width(file) is None
    assert terminal_width(io.StringIO()) is None
