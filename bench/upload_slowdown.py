"""How much uploads in the background slow training: the job's own steps beside the job's own publisher.

    python recipes/demo_base.py .demo/base
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
import numpy as np
import torch
from botocore.config import Config
from transformers import get_scheduler

from job.core.errors import StopRequestedError
from job.core.memory import AdapterShape, plan_memory
from job.core.plan import choose_max_length, plan_course
from job.core.recipe import CheckpointSection, EvaluateSection, TrackSection, load_recipe
from job.core.records import Tally, checked_lines
from job.core.verdict import Evaluation
from job.edge.artifacts import Artifacts, Checkpoint
from job.edge.publisher import Publisher
from job.edge.storage import StoreSettings, open_store
from job.tune import checkpoint as checkpoints
from job.tune import model as models
from job.tune.choice import choose_path
from job.tune.device import choose_device, device_memory, device_name
from job.tune.encode import encode, select_documents, token_rules
from job.tune.flat import FlatAdapter
from job.tune.track import make_accelerator
from job.tune.train import Hooks, Trainer

NO_END = 1_000_000
"""Steps: the rounds end it."""
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


def documents_of(recipe, tokenizer, positions, folder):
    """The training examples, as the stages encode and select them."""
    lines = ((p, n, line) for p in recipe.data.train for n, line in enumerate(Path(p).read_bytes().split(b"\n"), 1))
    encoded = encode(
        (("train", example) for example in checked_lines(lines, recipe.data, tally=Tally())),
        tokenizer,
        token_rules(tokenizer, recipe.data),
        folder=folder,
        should_stop=lambda: False,
        on_progress=lambda _done: None,
    )["train"]
    limit = choose_max_length(encoded.lengths, wanted=recipe.data.max_length, positions=positions)
    return select_documents(encoded, max_length=limit.tokens, too_long="truncate")


def trainer_of(recipe, engine, device, folder):
    """A trainer without hooks and the state that it moves, as the stages make them."""
    base = Path(recipe.model.base)
    shape, memory = models.shape_of(models.read_config(base)), device_memory(device)
    documents = documents_of(recipe, models.load_tokenizer(base), shape.positions, folder)
    loaded = models.load_base(base, device=device)
    model = models.PackedModel(
        models.attach_lora(loaded, recipe.lora, source=str(base), revision=None, seed=recipe.train.seed)
    )
    train = recipe.train
    accelerator = make_accelerator(TrackSection(), on_cpu=device.type == "cpu", folder=folder)
    choice = choose_path(model, engine, backward=accelerator.backward, on_stopped=print)
    course = plan_course(
        examples=len(documents), batch_size=train.batch_size, steps=NO_END, epochs=None, seed=train.seed
    )
    plan = plan_memory(
        shape,
        AdapterShape(parameters=models.parameter_counts(model)[0], rank=recipe.lora.r, optimizer=train.optimizer),
        path=choice.name,
        device=memory,
        max_length=documents.max_length,
        step_tokens=course.largest_step(documents.lengths),
    )
    facts = {"micro_batch_tokens": plan.micro_batch_tokens, "checkpointing": plan.checkpointing}
    facts |= {"kept_layers": plan.kept_layers, "recomputed_layers": plan.recomputed_layers}
    choice.path.adopt(facts)
    adapter = FlatAdapter(model)
    optimizer = models.make_optimizer(adapter.vectors, train)
    trained = checkpoints.Trained(
        model=model.model,
        optimizer=optimizer,
        scheduler=get_scheduler("constant", optimizer),
        progress=checkpoints.Progress(plan=facts | {"engine": choice.name, "device": device_name(device)}),
    )

    def trainer(hooks):
        model.train()
        return Trainer(
            path=choice.path,
            adapter=adapter,
            trained=trained,
            documents=documents,
            course=course,
            accelerator=accelerator,
            train=train,
            hooks=hooks,
        )

    return trainer, trained


class Rounds:
    """Begins the uploads, and sorts steps and looks at the memory by whether one is under way."""

    def __init__(self, trained, uri, folder, megabytes, wanted, least_steps):
        self.trained, self.folder, self.size, self.wanted = trained, folder, megabytes * 10**6, wanted
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
        return len(self.steps) > self.wanted and self.is_due(0)

    def is_due(self, _steps):
        """Whether the quiet half has as many steps as the other, so that the next round begins."""
        busy, quiet = (len(self.steps[-1][kind]) for kind in (True, False))
        return not self.publisher.under_way and quiet >= max(self.least_steps, busy)

    def begin(self):
        if self.steps and self.is_done():
            return
        self.steps.append({True: [], False: []})
        checkpoint = Checkpoint(step=self.trained.progress.step, attempt=1)
        place = self.folder / checkpoint.name
        checkpoints.save(self.trained, place)
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

    def tell(self):
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
    recipe = load_recipe(options.recipe.read_text(), source=str(options.recipe), overrides=options.overrides)
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="upload-slowdown-"))
    try:
        trainer, trained = trainer_of(recipe, options.engine, device, folder / "encoded")
        with bucket(folder, options.endpoint, options.link) as uri:
            rounds = Rounds(trained, uri, folder, options.megabytes, options.rounds, options.least_steps)
            hooks = Hooks(
                should_stop=rounds.is_done,
                evaluate=lambda step, _: Evaluation(step=step, nll=np.ones(1), tokens=np.ones(1), correct=0),
                on_step=rounds.add,
                on_evaluation=lambda _result: None,
                on_checkpoint=rounds.begin,
                is_commit_due=rounds.is_due,
                on_micro_batch=lambda: None,
                must_cut_step=lambda: False,
                on_out_of_memory=lambda _plan: None,
            )
            with contextlib.suppress(StopRequestedError):
                trainer(hooks).run(CheckpointSection(every_steps=NO_END), EvaluateSection(every_steps=NO_END))
            rounds.publisher.close()
            rounds.tell()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
