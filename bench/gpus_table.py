"""One table: QLoRA's throughput on 1, 2, 4 and more GPUs of one host, with the base whole on each and spread over all.

    python -m bench.random_base llama2-7b BASE --tokenizer TOKENIZER
    python -m bench.gpus_table --base BASE --train GSM8K.jsonl [--gpus 4] [--batch 256 --batch 32]
        [--placement replicated --placement sharded] [--results bench/RESULTS.md]

Each run is the product's own, `entrypoint.py run --gpus N`, in processes of its own that are killed after --limit
seconds. Runs that fit beside each other run at the same time, each on GPUs of its own; --one-by-one runs each alone.
Those on all GPUs come first and alone: the first one of them makes the encoded data and the base in 4 bits, which all
later ones take from their one work folder.

The section is written anew after every run, so that what was measured before a limit is there; a run that fails has a
line with its reason. Where the base does not fit one GPU, --fewest 2 leaves that number out. --ceiling says the share
of what large products sustain; --free-gib leaves no more than so much of each GPU free, as on a smaller one.
"""

import signal
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import flops
from bench.memory_hog import only_free_of_each, visible_gpu
from bench.options import parser_of
from bench.processes import NoResultError, begun
from bench.results import table, write_section
from bench.spread_runs import Carried, Runs, Way, measured_ceiling, measured_on, rate_of, rates_in, report_in
from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_called
from job.core.plan.memory import GIB
from job.core.plan.scaling import Cluster

PLACEMENTS = ("replicated", "sharded")
_HEADER = ("", "real tok/s", "a GPU", "times {fewest}", "efficiency", "by the formula, times", "measured / formula")
_HEADER += ("waited s, of s in steps", "MB sent a step", "peak GiB", "planned GiB", "planned / peak", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A run of the table."""

    batch: int
    """Examples of a step."""
    way: Way

    @property
    def name(self):
        """In a line."""
        return f"batch {self.batch}, {self.way.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is known of a batch before its runs."""

    steps: int
    warm_up: int
    """Steps that do not count."""
    computed: dict[int, float]
    """Number of GPUs -> times as fast as one by the plan's formula, where it knows that and the base is replicated."""
    token_flops: float | None = None
    """Operations of a token; None: nobody asks for the share of the ceiling."""


# --- what is run -----------------------------------------------------------------------------------------------------


def cells_of(batches, placements, *, fewest, gpus):
    """Each number of GPUs, doubled from the fewest to all, in each placement; a single GPU has none."""
    numbers = [2**power for power in range(gpus.bit_length()) if fewest <= 2**power <= gpus]
    return [
        Cell(batch=batch, way=Way(gpus=number, placement=placement))
        for batch in batches
        for number in numbers
        for placement in (placements if number > 1 else (None,))
    ]


def rounds_of(cells, gpus, *, one_by_one=False):
    """Cells that run at the same time, round by round: the largest first, each in the first round with GPUs left."""
    rounds = []
    for cell in sorted(cells, key=lambda each: -each.way.gpus):
        fitting = (each for each in rounds if sum(other.way.gpus for other in each) + cell.way.gpus <= gpus)
        beside = None if one_by_one else next(fitting, None)
        if beside is None:
            rounds.append([cell])
        else:
            beside.append(cell)
    return rounds


def gpus_of(cells):
    """The GPUs of each cell of a round, by their numbers."""
    first = 0
    for cell in cells:
        yield range(first, first + cell.way.gpus)
        first += cell.way.gpus


def carry_together(runs, cells, batches):
    """Each cell of a round beside what came of it: a run, or why there is none, in the order of the cells."""
    options = runs.options
    with ExitStack() as under_way:
        started = []
        for cell, gpus in zip(cells, gpus_of(cells), strict=True):
            folder, command = runs.prepare(batch=cell.batch, steps=batches[cell.batch].steps)
            seen = "" if options.device == "cpu" else ",".join(visible_gpu(gpu) for gpu in gpus)
            try:
                under_way.enter_context(only_free_of_each(options.free_gib, gpus))
            except NoResultError as error:
                yield cell, error
                continue
            running = under_way.enter_context(
                begun(
                    [*command, *cell.way.options],
                    limit_seconds=options.limit,
                    log=folder / "process",
                    environment={"CUDA_VISIBLE_DEVICES": seen},
                )
            )
            started.append((cell, folder, running))
        for cell, folder, running in started:
            try:
                output = running.output()
                yield cell, Carried(report=report_in(folder), rates=rates_in(output), steps={})
            except NoResultError as error:
                yield cell, error


def batch_of(runs, batch, numbers, ceiling):
    """Its steps, and what the plan's formulas say of them."""
    steps, warm_up = runs.steps_for_rate(batch)
    kind = gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if kind is None and ceiling is None:
        return Batch(steps=steps, warm_up=warm_up, computed={})
    work = runs.work(batch=batch, steps=steps)
    found = [forecast(work, kind, Cluster(gpus=number)) for number in numbers if number > 1] if kind is not None else []
    return Batch(
        steps=steps,
        warm_up=warm_up,
        computed={
            each.cluster.ranks: each.scaled.times_one
            for each in found
            if each.scaled is not None and each.placement == "replicated"
        },
        token_flops=None if ceiling is None else flops.per_token(work.shape, work.lengths, work.adapter.parameters),
    )


# --- what is written -------------------------------------------------------------------------------------------------


def batch_text(batch, about, found, *, fewest, ceiling=None):
    """A batch's table, and how far the losses of its runs are apart.

    Args:
        batch: examples of a step.
        about: the Batch.
        found: Way -> run, of those that gave a result.
        fewest: GPUs that efficiency is against.
        ceiling: operations a second of each GPU; None: nobody asks for the share of it.
    """
    against = next((way for way in found if way.gpus == fewest), None)
    header = [each.format(fewest=(against or Way(gpus=fewest)).name) for each in _HEADER]
    header += [] if ceiling is None else ["of the ceiling"]
    rows = [_row(way, run, about, found, against) for way, run in found.items()]
    if ceiling is not None:
        shares = (rate_of(run, about.warm_up) / way.gpus * about.token_flops / ceiling for way, run in found.items())
        rows = [(*row, f"{share:.3f}") for row, share in zip(rows, shares, strict=True)]
    return (
        f"**{batch} examples a step**, {about.steps} steps, of which the first {about.warm_up} do not count:\n\n"
        + table(header, rows)
    )


def _row(way, run, about, found, against):
    rate, throughput, losses = rate_of(run, about.warm_up), run.report["throughput"], run.report["curve"]["loss"]
    peak, planned = throughput["peak_memory_bytes"], run.report["plan"]["predicted_peak_bytes"]
    times = computed = None
    if against is not None:
        times = rate / rate_of(found[against], about.warm_up)
        if way.placement == "replicated" and against.gpus == 1:  # the formula's is beside one GPU
            computed = about.computed.get(way.gpus)
    return (
        way.name,
        f"{rate:,.0f}",
        f"{rate / way.gpus:,.0f}",
        "" if times is None else f"{times:.3f}",
        "" if times is None else f"{times * against.gpus / way.gpus:.1%}",
        "" if computed is None else f"{computed:.3f}",
        "" if computed is None else f"{times / computed:.3f}",
        f"{throughput['waited_seconds']:.2f} of {throughput['seconds']:.1f}",
        f"{throughput['bytes_a_step'] / 1e6:,.1f}",
        f"{peak / GIB:.2f}" if peak else "",
        f"{planned / GIB:.2f}" if planned else "",
        f"{planned / peak - 1:+.1%}" if planned and peak else "",
        f"{losses[0]:.3f} to {losses[-1]:.3f}",
    )


def losses_text(found, *, fewest, steps):
    """How far each run's first losses are at most from those of the fewest GPUs; empty: nothing can be compared."""
    against = next((way for way in found if way.gpus == fewest), None)
    if against is None or len(found) == 1:
        return ""
    lines = [f"The largest difference of a step's loss from that of {against.name}, in nats a token:", ""]
    for way, run in found.items():
        if way == against:
            continue
        pairs = [*zip(found[against].report["curve"]["loss"], run.report["curve"]["loss"], strict=False)][:steps]
        apart, share, step = max((abs(two - one), abs(two / one - 1), step) for step, (one, two) in enumerate(pairs, 1))
        lines.append(f"- {way.name}: {apart:.5f}, {share:.3%} of it (step {step}), in the first {len(pairs)} steps")
    return "\n".join(lines)


def runs_text(found):
    """A line for each run: how it was carried, and why so."""
    lines = ["How each run was carried:", ""] if found else []
    for cell, run in found.items():
        plan = run.report["plan"]
        lines.append(
            f"- {cell.name}: {plan['engine']} engine ({plan['engine_reason']}), {plan['micro_batch_tokens']:,} tokens "
            f"a micro-batch, {plan['kept_layers']} layers with dequantised weights kept, "
            f"{plan['recomputed_layers']} recomputed"
        )
    return "\n".join(lines)


def rounds_text(rounds):
    """Which of the runs are carried at the same time."""
    together = [" beside ".join(cell.name for cell in cells) for cells in rounds if len(cells) > 1]
    if not together:
        return "Each run alone on the host."
    lines = "\n".join(f"- {each}" for each in together)
    return f"At the same time, each on GPUs of its own (the host's processors and memory are shared):\n\n{lines}"


# --- the table -------------------------------------------------------------------------------------------------------


class Table:
    """The section, as far as it is measured."""

    def __init__(self, options, rounds, batches, ceiling):
        self._options, self._rounds, self._batches, self._ceiling = options, rounds, batches, ceiling
        self._found, self.failures = {}, []
        self._about = measured_on(options.device)

    def add(self, cell, result):
        """What came of a cell."""
        if isinstance(result, Carried):
            self._found[cell] = result
        else:
            self.failures.append(f"- {cell.name}: no result: {result}")

    def text(self):
        """All that is known."""
        options, parts = self._options, [self._about, self._of_efficiency()]
        for batch, about in self._batches.items():
            found = {cell.way: run for cell, run in self._found.items() if cell.batch == batch}
            found = dict(sorted(found.items(), key=lambda each: (each[0].gpus, each[0].placement or "")))
            if found:
                parts.append(batch_text(batch, about, found, fewest=options.fewest, ceiling=self._ceiling))
                parts.append(losses_text(found, fewest=options.fewest, steps=options.loss_steps))
        parts += [rounds_text(self._rounds), runs_text(self._found), "\n".join(self.failures)]
        return "\n\n".join(part for part in parts if part)

    def _of_efficiency(self):
        fewest = Way(gpus=self._options.fewest).name
        text = f"Efficiency is against {fewest}, the fewest of this call, with the same batch"
        if self._options.fewest > 1:
            text += ": what those lose beside a single one is not in it"
        if self._ceiling is not None:
            text += f". The ceiling of each GPU: {self._ceiling / 1e12:.1f} TFLOP/s of large bf16 products"
        return f"{text}."

    def write(self):
        """The section, anew."""
        options, batches = self._options, list(self._batches)
        numbers = f"{options.fewest}-to-{options.gpus}"
        free = [] if options.free_gib is None else [f"{options.free_gib:g}-gib-free"]
        placement = options.placement if len(options.placement) == 1 else []
        name = "-".join(["gpus-table", options.base.name, numbers, *map(str, batches), *placement, *free])
        title = f"## QLoRA on {options.fewest} to {options.gpus} GPUs of one host: {options.base.name}"
        command = f"    python -m bench.gpus_table --base FOLDER --train TRAIN.jsonl --gpus {options.gpus}"
        command += "".join(f" --batch {batch}" for batch in batches)
        command += "".join(f" --placement {placement}" for placement in options.placement)
        command += f" --fewest {options.fewest}" if options.fewest > 1 else ""
        command += f" --steps {options.steps}" if options.steps is not None else ""
        command += f" --warm-up {options.warm_up}" if options.warm_up is not None else ""
        command += " --one-by-one" if options.one_by_one else ""
        command += " --ceiling" if options.ceiling else ""
        command += f" --free-gib {options.free_gib:g}" if options.free_gib is not None else ""
        text = self.text()
        write_section(options.results, name, f"{title}\n\n{command}\n\n{text}")
        print(f"{text}\n", flush=True)


def _options_of(arguments):
    parser = parser_of(__doc__)
    parser.add_argument("--gpus", type=int, default=4, help="the most: a power of two")
    parser.add_argument("--fewest", type=int, default=1, metavar="GPUS", help="leave smaller numbers out")
    parser.add_argument("--batch", type=int, action="append", help="256 and 32 without it; may be repeated")
    parser.add_argument("--placement", action="append", choices=PLACEMENTS, help="both without it")
    parser.add_argument("--steps", type=int, help="of a run")
    parser.add_argument("--warm-up", type=int, help="steps of it that do not count")
    parser.add_argument("--loss-steps", type=int, default=30, help="first ones whose losses are compared")
    parser.add_argument("--free-gib", type=float, metavar="GIB", help="leave no more than so much of each GPU free")
    parser.add_argument("--one-by-one", action="store_true", help="no run beside another one")
    parser.add_argument("--ceiling", action="store_true", help="measure it first, and say the share of it")
    parser.add_argument("--limit", type=float, default=200.0, metavar="SECONDS", help="of each run")
    options = parser.parse_args(arguments)
    for name in ("gpus", "fewest"):
        if getattr(options, name).bit_count() != 1 or getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: not a power of two; the numbers in the table double")
    if options.fewest > options.gpus:
        parser.error(f"--fewest {options.fewest}: more than the {options.gpus} of --gpus")
    options.batch = [*dict.fromkeys(options.batch or (256, 32))]
    options.placement = [each for each in PLACEMENTS if each in (options.placement or PLACEMENTS)]
    return options


def main(arguments=None):
    options = _options_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by default it would leave runs behind
    cells = cells_of(options.batch, options.placement, fewest=options.fewest, gpus=options.gpus)
    rounds = rounds_of(cells, options.gpus, one_by_one=options.one_by_one)
    with tempfile.TemporaryDirectory(prefix="gpus-table-") as scratch:
        folder = Path(scratch).resolve()
        runs, ceiling = Runs(options, folder), measured_ceiling(folder) if options.ceiling else None
        numbers = sorted({cell.way.gpus for cell in cells})
        batches = {batch: batch_of(runs, batch, numbers, ceiling) for batch in options.batch}
        measured = Table(options, rounds, batches, ceiling)
        for together in rounds:
            with closing(carry_together(runs, together, batches)) as results:  # a signal leaves none of them behind
                for cell, result in results:
                    measured.add(cell, result)
                    measured.write()
    sys.exit(bool(measured.failures))


if __name__ == "__main__":
    main()
