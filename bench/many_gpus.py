"""Several GPUs of one host beside one of them: how fast, with which losses, in which memory, and how a run ends.

    python -m bench.random_base llama2-7b BASE --tokenizer TOKENIZER
    python -m bench.many_gpus --base BASE --train GSM8K.jsonl [--gpus 2] [--part rates|losses|endings]...
        [--batch 256]... [--placement sharded] [--results bench/RESULTS.md]

Each run is the product's own, `entrypoint.py run --gpus N`, in processes of its own that are killed after --limit
seconds. Parts, each with a section of its own, which is written anew after every run, so that what was measured before
a limit is there:

rates     tokens a second of one GPU and of N, in turns (1, N, 1, N), for each --batch; time waited, bytes, memory
losses    the same steps on one GPU and on N, side by side
endings   SIGTERM; going on with one GPU and with N; a rank that is killed, and going on after it

Beside the rates stand the slow steps of the last run, with what each rank did meanwhile. --steps-folder keeps what each
rank says of each step, and with --profile a table of rank 0's last step but one; --ceiling says the share of what large
products sustain; --side-by-side runs on each GPU by itself at the same time, too; --free-gib leaves no more than so
much of each GPU free, as on a smaller one.

Most of a large base's run is its start: where a call has a limit, one part and one batch at a time. With --placement
the two that are compared are N GPUs with a replicated base and N with a sharded one.
"""

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench import flops
from bench.gpu_memory import memory_watched
from bench.memory_hog import only_free_of_each
from bench.options import parser_of
from bench.processes import NoResultError, begun, run, workers_of
from bench.results import table, write_section
from bench.spread_runs import Carried, Runs, Way, measured_ceiling, measured_on, rate_of, rates_in, report_in
from bench.steps import environment_to_watch, steps_in, steps_text
from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_called
from job.core.plan.memory import GIB
from job.core.plan.scaling import Cluster

PARTS = ("rates", "losses", "endings")
_SHOWN = (1, 2, 3, 5, 10, 20, 30, 40, 50)
_COMMITTED_EVERY, _STRUCK_AT = 20, 5
"""Steps."""
_NO_END = 100_000


class Bench:
    """What all runs of one call have in common."""

    def __init__(self, options, folder):
        self.options, self.folder, self.runs = options, folder, Runs(options, folder)
        self.ceiling = measured_ceiling(folder) if options.ceiling else None
        """Operations a second; None: nobody asks for it."""
        several = options.gpus
        if options.placement is None:
            self.ways = (Way(gpus=1), Way(gpus=several))
        else:
            self.ways = (Way(gpus=several, placement="replicated"), Way(gpus=several, placement=options.placement))

    def carry(self, way, *, batch, steps):
        """One run to its end.

        Raises:
            NoResultError: it failed, or took too long.
        """
        folder, command = self.runs.prepare(batch=batch, steps=steps)
        (watched := folder / "steps").mkdir()
        profiled = steps - 1 if self.options.profile else 0
        with only_free_of_each(self.options.free_gib, range(way.gpus)), memory_watched() as in_use:
            output = run(
                [*command, *way.options],
                limit_seconds=self.options.limit,
                log=folder / "process",
                environment=environment_to_watch(watched, profiled=profiled),
            )
        self._keep(watched, f"{batch}-{way.name.replace(', ', '-').replace(' ', '-')}-{self.runs.prepared:02d}")
        return Carried(report=report_in(folder), rates=rates_in(output), in_use=tuple(in_use), steps=steps_in(watched))

    def carry_side_by_side(self, *, batch, steps):
        """A run on each GPU by itself, all at the same time: the rates of each one's steps.

        Raises:
            NoResultError: one failed, or took too long.
        """

        def one(gpu, folder, command):
            own = ["--gpus", "1", "--workdir", str(folder / "work")]  # none begins beside another one's half-made copy
            environment = {"CUDA_VISIBLE_DEVICES": str(gpu)}
            limit = self.options.limit
            return rates_in(run([*command, *own], limit_seconds=limit, log=folder / "process", environment=environment))

        prepared = [(gpu, *self.runs.prepare(batch=batch, steps=steps)) for gpu in range(self.options.gpus)]
        with ThreadPoolExecutor(len(prepared)) as pool:
            return list(pool.map(lambda each: one(*each), prepared))

    def _keep(self, watched, name):
        """What the ranks have left of a run's steps, in one file, and its profile, where they are asked for."""
        kept = self.options.steps_folder
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            lines = "".join(path.read_text() for path in sorted(watched.glob("steps-r*.jsonl")))
            (kept / f"steps-{name}.jsonl").write_text(lines)
            for path in watched.glob("profile.*"):
                shutil.copy(path, kept / f"{name}-{path.name}")

    def write(self, part, title, text, *, own=""):
        """The part's section; `own` are its options on the command line."""
        options = self.options
        name = "-".join(["many-gpus", part, options.base.name, *([options.placement] if options.placement else [])])
        command = f"    python -m bench.many_gpus --base FOLDER --train TRAIN.jsonl --gpus {options.gpus} "
        command += f"--part {part.partition('-')[0]}{own}"
        head = f"## {title}: {options.base.name}\n\n{command}\n\n{measured_on(options.device)}"
        write_section(options.results, name, f"{head}\n\n{text}")
        print(f"{title}\n\n{text}\n", flush=True)


# --- rates -----------------------------------------------------------------------------------------------------------


def measure_rates(bench, batch):
    """In turns; whether each run gave a result."""
    options, found = bench.options, {way: [] for way in bench.ways}
    steps, warm_up = bench.runs.steps_for_rate(batch)
    (computed, work_of_a_token), failures = _of_the_work(bench, batch, steps), []
    for turn in range(1, options.turns + 1):
        for way in bench.ways:
            try:
                found[way].append(bench.carry(way, batch=batch, steps=steps))
            except NoResultError as error:
                failures.append(f"- turn {turn}, {way.name}: no result: {error}")
            title = f"{bench.ways[1].name} beside {bench.ways[0].name}, {batch} examples a step"
            own = f" --batch {batch} --turns {options.turns}"
            text = rates_text(found, warm_up, computed, failures)
            if work_of_a_token is not None:
                text += "\n\n" + ceiling_text(found, warm_up, bench.ceiling, work_of_a_token)
            bench.write(f"rates-{batch}", title, text, own=own)
    if options.side_by_side:
        try:
            text += "\n\n" + side_by_side_text(bench.carry_side_by_side(batch=batch, steps=steps), found, warm_up)
        except NoResultError as error:
            failures.append(f"side by side: {error}")
            text += f"\n\n{failures[-1]}"
        bench.write(f"rates-{batch}", title, text, own=own)
    return not failures


def side_by_side_text(rates, found, warm_up):
    """What GPUs that all work, but not together, make: no exchange and no share costs them anything."""
    each = [statistics.median(one[warm_up:] or one) for one in rates]
    said = ", ".join(f"{rate:,.0f}" for rate in each)
    text = f"Each GPU by itself, all at the same time: {said} real tokens a second."
    alone = next((runs for way, runs in found.items() if way.gpus == 1 and runs), None)
    if alone is None:
        return text
    times = min(each) * len(each) / statistics.median(rate_of(run, warm_up) for run in alone)
    return f"{text} A step that waits for the slowest of them could be {times:.3f} times as fast as that of one."


def _of_the_work(bench, batch, steps):
    """How many times as fast the plan's formula says that several GPUs are, and operations of a token, where asked for.

    None: the formula does not know this kind, or these are two placements; nobody asks for the share of the ceiling.
    """
    kind = gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    options = bench.options
    is_computed = kind is not None and options.placement is None
    if not is_computed and bench.ceiling is None:
        return None, None
    work = bench.runs.work(batch=batch, steps=steps)
    computed = forecast(work, kind, Cluster(gpus=options.gpus)).scaled.times_one if is_computed else None
    token = None if bench.ceiling is None else flops.per_token(work.shape, work.lengths, work.adapter.parameters)
    return computed, token


def ceiling_text(found, warm_up, ceiling, work_of_a_token):
    """What of a GPU's large products each way sustains."""
    shares = []
    for way, runs in found.items():
        if runs:
            rate = statistics.median(rate_of(each, warm_up) for each in runs) / way.gpus
            shares.append(f"{way.name} {rate * work_of_a_token / ceiling:.3f}")
    said = f"Of the ceiling of each GPU, {ceiling / 1e12:.1f} TFLOP/s of large bf16 products: {', '.join(shares)}"
    return f"{said} (a token takes {work_of_a_token / 1e9:.2f} GFLOP)."


def rates_text(found, warm_up, computed, failures):
    """Table, the ratio of each turn, and how each run went."""
    header = ("", "real tok/s", "of each", "waited s, of s in steps", "MB sent a step", "peak GiB", "planned GiB")
    header += ("planned / peak", "in use on each GPU, GiB", "loss")
    rows = [_rates_row(way, runs, warm_up) for way, runs in found.items() if runs]
    first, second = ([rate_of(each, warm_up) for each in runs] for runs in found.values())
    lines = [table(header, rows)]
    if first and second:
        turns = ", ".join(f"{two / one:.3f}" for one, two in zip(first, second, strict=False))
        by_the_plan = "" if computed is None else f"; by the plan's formula {computed:.3f}"
        ratio = statistics.median(second) / statistics.median(first)
        lines.append(f"The second is {ratio:.3f} times as fast as the first (turns: {turns}){by_the_plan}.")
        lines.append(apart_text(*(runs[-1].report for runs in found.values())))
    lines.append("Rates are medians of the turns; waiting, bytes, peak and losses are the last one's.")
    lines.append("\n".join([*_turns(found, warm_up), *failures]))
    last = next((runs[-1] for runs in [*found.values()][1:] if runs), None)
    if last is not None and last.steps:
        lines.append("\n".join(["The last run of the second, step by step:", "", *steps_text(last.steps, warm_up)]))
    return "\n\n".join(line for line in lines if line)


def _rates_row(way, runs, warm_up):
    rate = statistics.median(rate_of(each, warm_up) for each in runs)
    report, throughput = runs[-1].report, runs[-1].report["throughput"]
    peak, planned = throughput["peak_memory_bytes"], report["plan"]["predicted_peak_bytes"]
    in_use = [max(sizes) for sizes in zip(*(each.in_use for each in runs), strict=True)]
    losses = report["curve"]["loss"]
    return (
        way.name,
        f"{rate:,.0f}",
        f"{rate / throughput['ranks']:,.0f}",
        f"{throughput['waited_seconds']:.2f} of {throughput['seconds']:.1f}",
        f"{throughput['bytes_a_step'] / 1e6:,.1f}",
        f"{peak / GIB:.2f}",
        f"{planned / GIB:.2f}" if planned else "",
        f"{planned / peak - 1:+.1%}" if planned else "",
        ", ".join(f"{size / GIB:.1f}" for size in in_use),
        f"{losses[0]:.3f} to {losses[-1]:.3f}",
    )


def _turns(found, warm_up):
    """A line for each run."""
    for way, runs in found.items():
        for turn, each in enumerate(runs, 1):
            timed, plan = each.rates[warm_up:] or each.rates, each.report["plan"]
            yield (
                f"- turn {turn}, {way.name}: {rate_of(each, warm_up):,.0f} real tokens a second, median of "
                f"{len(timed)} steps from {min(timed):,.0f} to {max(timed):,.0f}; {plan['engine']} engine "
                f"({plan['engine_reason']}), {plan['micro_batch_tokens']:,} tokens a micro-batch, "
                f"{plan['kept_layers']} layers with dequantised weights kept, {plan['recomputed_layers']} recomputed"
            )


# --- losses ----------------------------------------------------------------------------------------------------------


def compare_losses(bench):
    """Side by side; whether both runs gave a result."""
    options, title = bench.options, f"Losses of {bench.ways[1].name} beside those of {bench.ways[0].name}"
    own = f" --loss-steps {options.loss_steps} --loss-batch {options.loss_batch}"
    try:
        reports = [bench.carry(way, batch=options.loss_batch, steps=options.loss_steps).report for way in bench.ways]
    except NoResultError as error:
        bench.write("losses", title, f"No result: {error}", own=own)
        return False
    bench.write("losses", title, losses_text(bench.ways, *reports), own=own)
    return True


def losses_text(ways, first, second):
    """Some steps, and the largest differences of all."""
    one, two = (report["curve"]["loss"] for report in (first, second))
    shown = [step for step in _SHOWN if step < len(one)] + [len(one)]
    rows = [(step, *(f"{losses[step - 1]:.5f}" for losses in (one, two))) for step in dict.fromkeys(shown)]
    rows = [(*row, f"{two[row[0] - 1] - one[row[0] - 1]:+.5f}") for row in rows]
    return f"{table(('step', *(way.name for way in ways), 'difference'), rows)}\n\n{apart_text(first, second)}"


def apart_text(first, second):
    """The largest differences of two runs of the same steps, and those of their evaluations; of their reports."""
    one, two = (report["curve"]["loss"] for report in (first, second))
    apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
    norms = [abs(b / a - 1) for a, b in zip(*(r["curve"]["grad_norm"] for r in (first, second)), strict=True)]
    before, after = (abs(first["evaluations"][at]["loss"] - second["evaluations"][at]["loss"]) for at in (0, -1))
    return (
        f"Of {len(one)} steps the largest difference is {max(apart):.5f} nats a token (step "
        f"{apart.index(max(apart)) + 1}), {max(a / b for a, b in zip(apart, one, strict=True)):.3%} of the loss; "
        f"of gradient norms {max(norms):.2%}. The evaluation before the first step differs by {before:.2g}, that "
        f"after the last one by {after:.2g}."
    )


# --- endings ---------------------------------------------------------------------------------------------------------


class Endings:
    """One run, ended and gone on with again and again."""

    def __init__(self, bench):
        options = bench.options
        self._options = options
        self._folder, self._command = bench.runs.prepare(
            batch=options.loss_batch, steps=_NO_END, every_steps=_COMMITTED_EVERY
        )
        self._command += ["--grace-seconds", f"{options.grace:g}", "--lease-seconds", "10"]
        self._command += ["--outcome-file", str(self._folder / "outcome.json")]
        self._committed = None
        """By the attempt before; None: there was none."""
        self.rows = []
        self.good = True

    def attempt(self, way, what, *, code, rank=None):
        """One attempt that goes on where the last one ended, and what ends it.

        Args:
            way: how it is spread.
            what: in words.
            code: what it should end with.
            rank: which one is killed, once a checkpoint is committed; None: the run is asked to stop.
        """
        try:
            row, good = self._attempt(way, code=code, rank=rank)
        except NoResultError as error:
            row, good = (str(error), *[""] * 5), False
        self.rows.append((what, *row))
        self.good = self.good and good

    def _attempt(self, way, *, code, rank):
        before, log = self._committed or 0, self._folder / f"process-{len(self.rows)}"
        with begun([*self._command, *way.options], limit_seconds=self._options.limit, log=log) as running:
            first = 0
            if self._committed is not None:
                first = running.until(lambda event: event["event"] == "resumed")["step"]
            running.until(lambda event: event["event"] == "step" and event["step"] >= first + _STRUCK_AT)
            if rank is None:
                os.kill(running.pid, signal.SIGTERM)
            else:
                running.until(lambda event: event["event"] == "checkpoint" and event["step"] > first)
                os.kill(workers_of(running.pid)[rank], signal.SIGKILL)
            struck = time.monotonic()
            ended = running.end()
            seconds, left = time.monotonic() - struck, len(workers_of(running.pid))
        outcome = json.loads((self._folder / "outcome.json").read_text())
        self._committed = outcome["last_committed_step"]
        good = ended == code and first == before and self._committed > first and not left
        within = rank is not None or seconds <= self._options.grace
        row = (first, ended, f"{seconds:.1f}", self._committed, left, outcome["reason"])
        return row, good and within


def end_in_every_way(bench):
    """Whether each attempt ended as it should."""
    endings, options, several = Endings(bench), bench.options, bench.ways[1]
    title = f"How a run on {several.name} ends"
    attempts = [(several, f"{several.name}: SIGTERM", 75, None)]
    if options.placement is None:
        attempts.append((Way(gpus=1), "goes on with 1 GPU: SIGTERM", 75, None))
    attempts.append((several, f"goes on with {several.name}: rank {options.gpus - 1} killed", 70, options.gpus - 1))
    attempts.append((several, f"goes on with {several.name}: SIGTERM", 75, None))
    for way, what, code, rank in attempts:
        endings.attempt(way, what, code=code, rank=rank)
        bench.write(
            "endings", title, endings_text(endings, options, of=len(attempts)), own=f" --grace {options.grace:g}"
        )
    return endings.good


def endings_text(endings, options, *, of):
    """A row for each attempt so far."""
    header = ("", "goes on from step", "exit code", "seconds until it ended", "last committed step", "processes left")
    judged = f"{len(endings.rows)} of {of} attempts, "
    judged += "every one as it should be" if endings.good else "**not every one as it should be**"
    told = (
        f"{judged}: 75 within the grace of {options.grace:g} s, 70 where a rank is killed, going on from the last "
        "committed step, nothing left."
    )
    return f"{table((*header, 'reason'), endings.rows)}\n\n{told}"


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--part", action="append", choices=PARTS, help="all of them without it; may be repeated")
    parser.add_argument("--batch", type=int, action="append", help="of the rates; 256 and 16 without it")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of a run for its rate")
    parser.add_argument("--warm-up", type=int, help="steps of it that do not count")
    parser.add_argument("--loss-steps", type=int, default=50)
    parser.add_argument("--loss-batch", type=int, default=16, help="of losses and endings")
    parser.add_argument("--placement", choices=["sharded"], help="beside a replicated base")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--free-gib", type=float, metavar="GIB", help="leave no more than so much of each GPU free")
    parser.add_argument("--steps-folder", type=Path, metavar="FOLDER", help="keep each rank's figures of each step")
    parser.add_argument("--side-by-side", action="store_true", help="also a run on each GPU by itself, at once")
    parser.add_argument("--ceiling", action="store_true", help="measure it first, and say the share of it")
    parser.add_argument("--profile", action="store_true", help="rank 0's last step but one; kept in --steps-folder")
    parser.add_argument("--limit", type=float, default=200.0, metavar="SECONDS", help="of each run")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by default it would leave a run behind
    parts, good = options.part or PARTS, []
    with tempfile.TemporaryDirectory(prefix="many-gpus-") as scratch:
        bench = Bench(options, Path(scratch).resolve())
        if "rates" in parts:
            good += [measure_rates(bench, batch) for batch in options.batch or (256, 16)]
        if "losses" in parts:
            good.append(compare_losses(bench))
        if "endings" in parts:
            good.append(end_in_every_way(bench))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
