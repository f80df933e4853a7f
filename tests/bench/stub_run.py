"""Plays `entrypoint.py run --gpus N` as far as its endings go: steps, a commit now and then, a worker, signals.

What it does wrong is named by STUB: `hangs`, `leaves` a worker behind, ends with `0`, or `forgets` what is committed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--outcome-file", type=Path)
parser.add_argument("--gpus", type=int)
options, _ = parser.parse_known_args()
wrong = os.environ.get("STUB", "")
state = options.outcome_file.with_name("state")
step = committed = int(state.read_text()) if state.exists() and wrong != "forgets" else 0
worker = None
if options.gpus > 1:
    seat = {"JOB_SUPERVISOR_PID": str(os.getpid()), "RANK": "1"}
    worker = subprocess.Popen(["sleep", "60"], env=os.environ | seat)


def say(event, **facts):
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def end(code, reason, committed):
    if worker is not None and wrong != "leaves":
        worker.kill()
        worker.wait()
    state.write_text(str(committed))
    options.outcome_file.write_text(json.dumps({"last_committed_step": committed, "reason": reason}))
    sys.exit(code)


asked = []
signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
say("begun")
if state.exists():
    say("resumed", step=step)
while True:
    time.sleep(0.01)
    if asked and wrong != "hangs":
        end(0 if wrong == "0" else 75, f"asked to stop; step {step} is committed", step)
    step += 1
    say("step", step=step)
    if step % 10 == 0:
        committed = step
        say("checkpoint", step=step)
    if worker is not None and worker.poll() is not None:
        end(70, "rank 1 ended without a word", committed)
