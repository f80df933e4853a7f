"""How much uploads in the background slow training: the job's own steps beside the job's own publisher.

    python -m bench.upload_slowdown recipes/demo.yaml [--set KEY=VALUE]... [--device cuda] [--engine fast]
        [--endpoint URL]

Rounds of two halves: steps while a checkpoint is on its way to an S3 server (moto as a process of its own that takes
--link megabytes a second, or --endpoint with AWS credentials in the environment), then as many with nothing on its way.
A checkpoint is the run's own, filled up to --megabytes (490: Llama-2-7B, r 32, lm_head included). The first round warms
up and does not count. On the CPU torch gets one thread, so that a core is left to the upload as on a GPU's host. The
recipe's base and training data are local paths.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import boto3
import torch
from botocore.config import Config

from bench.training import NO_END, load
from job.core.recipe.text import load_recipe
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.publisher import Publisher
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.tune.device.device import choose_device
from job.tune.loop import checkpoint as checkpoints

SLOW_MOTO = """
import io, sys, threading, time
from moto import server
link, turn = float(sys.argv.pop(1)) * 1e6, threading.Lock()

class OverALink(server.DomainDispatcherApplication):
    def __call__(self, environ, start_response):
        left, body = int(environ.get("CONTENT_LENGTH") or 0), io.BytesIO()
        while left:
            with turn:  # one link for all connections
                piece = environ["wsgi.input"].read(min(left, 1 << 18))
                time.sleep(len(piece) / link)
            left -= body.write(piece) or left
        body.seek(0)
        return super().__call__(environ | {"wsgi.input": body}, start_response)

server.DomainDispatcherApplication = OverALink
server.main()
"""
"""Reads no faster than the link is, and so the sender cannot send faster."""


@contextlib.contextmanager
def bucket(folder, endpoint, link):
    """A new bucket on the endpoint, or on a moto of our own."""
    child = None
    if endpoint is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (folder / "server.log").open("wb") as log:
            command = [sys.executable, "-c", SLOW_MOTO, str(link), "-H", "127.0.0.1", "-p", str(port)]
            child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(folder)})
        endpoint = f"http://127.0.0.1:{port}"
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    name = f"bench-{os.getpid()}"
    try:
        patient = Config(retries={"total_max_attempts": 12})  # until the server is up
        boto3.client("s3", config=patient).create_bucket(Bucket=name)
        yield f"s3://{name}/upload-slowdown"
    finally:
        if child is not None:
            child.kill()
            child.wait()


class Rounds:
    """Begins the uploads, and sorts steps and looks at the memory by whether one is under way."""

    def __init__(self, state, uri, folder, megabytes, wanted, least_steps):
        self.state, self.folder, self.size, self.wanted = state, folder, megabytes * 10**6, wanted
        self.least_steps = least_steps
        self.steps, self.bytes_held, self.cpu = [], {True: [], False: []}, {True: [], False: []}
        self.uploads, self.cpu_before = [], time.thread_time()
        self.publisher = Publisher(
            Artifacts(open_store(uri, StoreSettings()), "bench"),
            keep=1,
            on_committed=lambda _checkpoint, seconds: self.uploads.append(seconds),
            should_stop=lambda: False,
        )
        self.seen = deque(maxlen=3)
        threading.Thread(target=self.watch_memory, daemon=True).start()

    def is_done(self):
        return len(self.steps) > self.wanted and self.is_due()

    def is_due(self):
        """Whether the quiet half has as many steps as the other, so that the next round begins."""
        busy, quiet = (len(self.steps[-1][kind]) for kind in (True, False))
        return not self.publisher.under_way and quiet >= max(self.least_steps, busy)

    def begin(self):
        if self.steps and self.is_done():
            return
        self.steps.append({True: [], False: []})
        checkpoint = Checkpoint(step=self.state.progress.step, attempt=1)
        place = self.folder / checkpoint.name
        checkpoints.save(self.state, place)
        missing = self.size - sum(path.stat().st_size for path in place.iterdir())
        (place / "filling").write_bytes(os.urandom(max(0, missing)))
        self.publisher.submit(place, checkpoint, candidates=())

    def add(self, record):
        """A step's numbers come within the next one: it counts where nothing began or ended around it."""
        self.seen.append(bool(self.publisher.under_way))
        cpu, self.cpu_before = time.thread_time() - self.cpu_before, time.thread_time()
        if len(set(self.seen)) == 1:
            self.steps[-1][self.seen[0]].append(record.seconds)
            if len(self.steps) > 1:
                self.cpu[self.seen[0]].append(cpu)

    def watch_memory(self):
        for _ in itertools.count():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes_held[bool(self.publisher.under_way)].append(pages * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(0.02)

    def report(self):
        medians = [[statistics.median(each[kind]) for kind in (True, False)] for each in self.steps[1:]]
        ratios = [busy / quiet for busy, quiet in medians]
        busy, quiet = (statistics.median(s for each in self.steps[1:] for s in each[kind]) for kind in (True, False))
        counts = [sum(len(each[kind]) for each in self.steps[1:]) for kind in (True, False)]
        extra = max(self.bytes_held[True]) - statistics.median(self.bytes_held[False])
        print(f"step beside an upload    {busy:.4f} s (median of {counts[0]})")
        print(f"step without             {quiet:.4f} s (median of {counts[1]})")
        print(f"ratio                    {busy / quiet:.4f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
        busy, quiet = (statistics.median(self.cpu[kind]) for kind in (True, False))
        print(f"of it the thread's CPU   {busy:.4f} s, {quiet:.4f} s without (ratio {busy / quiet:.4f})")
        print(f"upload                   {statistics.median(self.uploads[1:]):.1f} s for {self.size / 1e6:.0f} MB")
        print(f"extra host memory, peak  {extra / 1e6:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--engine", choices=["auto", "fast", "generic"], default="auto")
    parser.add_argument("--endpoint", metavar="URL")
    parser.add_argument("--link", type=float, default=100, metavar="MB/S", help="of the moto server")
    parser.add_argument("--megabytes", type=int, default=490)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least-steps", type=int, default=20, help="in each half of a round")
    options = parser.parse_args()
    endless = ["train.epochs=null", f"train.steps={NO_END}"]
    overrides = [*options.overrides, *endless]  # the rounds end it
    recipe = load_recipe(options.recipe.read_text(), source=str(options.recipe), overrides=overrides)
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="upload-slowdown-"))
    try:
        loaded = load(recipe, options.engine, device, folder / "encoded")
        state = loaded.state(loaded.planned)
        with bucket(folder, options.endpoint, options.link) as uri:
            rounds = Rounds(state, uri, folder, options.megabytes, options.rounds, options.least_steps)
            rounds.begin()
            for record in loaded.steps(state, loaded.course):
                rounds.add(record)
                if rounds.is_due():
                    rounds.begin()
                if rounds.is_done():
                    break
            rounds.publisher.close()
            rounds.report()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
