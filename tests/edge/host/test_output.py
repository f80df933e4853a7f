"""A log that nobody reads any more does not end the job."""

import subprocess
import sys
from pathlib import Path

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
