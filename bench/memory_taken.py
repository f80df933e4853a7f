"""Another process takes the GPU's memory while the product runs: does it end, and with the same losses?

    python -m bench.memory_taken --base FOLDER --train TRAIN.jsonl [--steps 8] [--batch 128] [--left 2]
        [--results bench/RESULTS.md]

One run undisturbed, then one for each moment of MOMENTS. The other process is there from the start, so that every run
plans with the same memory, and takes all but --left GiB of what is free when the moment comes.
"""

import json
import sys
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench import ours
from bench.comparisons import Ours
from bench.memory_hog import waiting_hog
from bench.options import parser_of
from bench.processes import NoResultError, run
from bench.results import device_and_versions, table, write_section

_LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When memory is taken."""

    name: str
    event: dict[str, object]
    """The line of the log that it begins with: these keys have these values."""
    below: float | None = None
    """GiB: it then waits until the product has taken all but this."""

    def has_come(self, lines):
        """Whether a line of the log says so."""
        events = (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}"))
        return any(self.event.items() <= event.items() for event in events)


MOMENTS = (
    Moment(name="once the plan is made", event={"event": "plan"}),
    Moment(name="in the evaluation before the first step", event={"event": "phase", "name": "evaluate"}),
    Moment(name="in the middle of the first step", event={"event": "phase", "name": "train"}, below=40),
    Moment(name="after step 4", event={"event": "step", "step": 4}),
)


def _watch(log, moment, hog, ended):
    while not ended.wait(_LOOK_SECONDS):
        if log.exists() and moment.has_come(log.read_text(errors="replace").splitlines()):
            hog.hold()
            return


def run_beside(moment, options, folder):
    """The report of one run; `moment` is None for the undisturbed one."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    contestant = Ours(name="run", about="", batch=options.batch, steps=options.steps)
    content = ours.recipe_content(
        contestant, base=options.base, train=options.train, text=options.text, max_length=512, folder=folder
    )
    recipe.write_text(json.dumps(content))
    log, ended = folder / "process", threading.Event()
    hog_there = nullcontext() if options.device == "cpu" else waiting_hog(options.left, below=moment and moment.below)
    with hog_there as hog:
        watcher = threading.Thread(target=_watch, args=(log.with_suffix(".out"), moment, hog, ended))
        if moment is not None and hog is not None:
            watcher.start()
        try:
            run(ours.command_of(contestant, recipe, options.device, folder), limit_seconds=options.limit, log=log)
        finally:
            ended.set()
    return json.loads((folder / "store/runs/run/report.json").read_text())


def row_of(name, report, undisturbed):
    """How this run went, beside the undisturbed one."""
    plan, first = report["plan"], undisturbed["plan"]
    changed = [f"{key} {first[key]} to {plan[key]}" for key in plan if plan[key] != first.get(key) and key != "reason"]
    last, best = (each["evaluations"][-1]["loss"] for each in (report, undisturbed))
    return (
        name,
        plan["out_of_memory"],
        "; ".join(each for each in changed if not each.startswith("out_of_memory")) or "nothing",
        len(report["curve"]["loss"]),
        f"{_apart(report, undisturbed, 'loss'):.5f}",
        f"{_apart(report, undisturbed, 'grad_norm'):.2%}",
        f"{last:.4f}, {last - best:+.4f}",
    )


def _apart(report, undisturbed, what):
    """Largest difference of a step; of gradient norms as a share."""
    pairs = list(zip(report["curve"][what], undisturbed["curve"][what], strict=True))
    return max(abs(one - other) / (other if what == "grad_norm" else 1) for one, other in pairs)


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128, help="examples of a step")
    parser.add_argument("--left", type=float, default=2.0, metavar="GIB", help="what is left free")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of each run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memory-taken-") as folder:
        undisturbed = run_beside(None, options, Path(folder) / "undisturbed")
        rows = [row_of("never", undisturbed, undisturbed)]
        for number, moment in enumerate(MOMENTS):
            try:
                report = run_beside(moment, options, Path(folder) / str(number))
                rows.append(row_of(moment.name, report, undisturbed))
            except NoResultError as error:
                rows.append((moment.name, str(error), *[""] * 5))
            _write(options, rows)
    sys.exit(any(row[-1] == "" for row in rows))


def _write(options, rows):
    header = ("memory is taken", "out of memory, times", "what changed in the plan", "steps")
    header += ("largest difference of a step's loss", "of its gradient norm", "loss at the end")
    command = (
        f"    python -m bench.memory_taken --base FOLDER --train TRAIN.jsonl --steps {options.steps} "
        f"--batch {options.batch} --left {options.left:g}"
    )
    text = f"{device_and_versions()}\n\n{options.base.name}, {options.batch} examples a step.\n\n{table(header, rows)}"
    print(text)
    write_section(options.results, "memory-taken", f"## Memory taken by another process\n\n{command}\n\n{text}")


if __name__ == "__main__":
    main()
