"""Runs of the product that are spread over GPUs of one host: how, their commands, and what they leave."""

import json
import os
import statistics
import sys
from dataclasses import dataclass

from bench import ours
from bench.comparisons import Ours
from bench.processes import run
from bench.results import device_and_versions
from bench.workload import workload_of
from job.edge.host.gpu import look_at_links
from job.tune.model.config import read_config, shape_of

_MAX_LENGTH = 512
_EXAMPLES = 1000
"""Of all steps of a run for its rate, about: a batch of 256 makes 10 steps, as where one GPU is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a run is spread."""

    gpus: int
    placement: str | None = None

    @property
    def name(self):
        """In a table."""
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        return gpus if self.placement is None else f"{gpus}, {self.placement}"

    @property
    def options(self):
        """Of the command line."""
        placement = [] if self.placement is None else ["--base-placement", self.placement]
        return ["--gpus", str(self.gpus), *placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A run that has ended well."""

    report: dict
    rates: tuple[float, ...]
    """Real tokens a second of each step."""
    in_use: tuple[int, ...] = ()
    """Bytes of each GPU, at most; empty where there is none, or nobody looks."""
    steps: dict
    """What each rank says of each step; empty: it was not watched."""


class Runs:
    """Runs of one call, in a folder: each has a name of its own, and all have one work folder."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.prepared = 0
        """How many."""
        self.max_length = min(_MAX_LENGTH, shape_of(read_config(options.base)).positions)

    def prepare(self, *, batch, steps, every_steps=None):
        """Folder and command of a new run, without how it is spread."""
        self.prepared += 1
        folder = self.folder / f"{self.prepared:02d}"
        folder.mkdir()
        contestant, options = Ours(name=_run_id(folder), about="", batch=batch, steps=steps), self.options
        content = ours.recipe_content(
            contestant,
            base=options.base,
            train=options.train,
            text=options.text,
            max_length=self.max_length,
            folder=folder,
        )
        if every_steps is not None:
            content["checkpoint"]["every_steps"] = every_steps
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(content))
        # One work folder for all: encoded data and the base in 4 bits are made once.
        work = ["--workdir", str(self.folder / "work")]
        return folder, [*ours.command_of(contestant, recipe, options.device, folder), *work]

    def work(self, *, batch, steps):
        """What is to be done, as the plan's formulas count it."""
        options, folder = self.options, self.folder / f"lengths-{batch}"
        given = {"text": options.text, "batch": batch, "steps": steps, "max_length": self.max_length}
        return workload_of(options.base, options.train, folder, **given)

    def steps_for_rate(self, batch):
        """Steps of a run for its rate, and how many of them do not count."""
        steps = self.options.steps or max(10, _EXAMPLES // batch)
        return steps, max(1, steps // 3) if self.options.warm_up is None else self.options.warm_up


def _run_id(folder):
    # Of two runs of one name at the same time, each would write what the other has in the work folder.
    return f"run-{folder.name}"


def report_in(folder):
    """What a run has left in its folder, once it has ended well."""
    return json.loads((folder / "store/runs" / _run_id(folder) / "report.json").read_text())


def rates_in(output):
    """Real tokens a second of each step that a log has."""
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return tuple(event["tokens_per_second"] for event in events if event.get("event") == "step")


def rate_of(carried, warm_up):
    """Real tokens a second: the median of the steps after the warm-up."""
    return statistics.median(carried.rates[warm_up:] or carried.rates)


def measured_on(device):
    """What it was measured on and with, and how the GPUs are joined."""
    links = look_at_links(os.environ.get("CUDA_VISIBLE_DEVICES")) if device != "cpu" else None
    return device_and_versions() + (f" {links}." if links is not None else "")


def measured_ceiling(folder):
    """Operations a second that large products sustain."""
    measured = run([sys.executable, "-m", "bench.ceiling"], limit_seconds=120, log=folder / "ceiling")
    return json.loads(measured)["gemm_flops"]
