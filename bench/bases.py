"""One run of the product on each base: how fast, what share of the ceiling, and the peak of memory beside the plan's.

    python -m bench.bases --base FOLDER [--base FOLDER]... --train TRAIN.jsonl [--results bench/RESULTS.md]

Each through `entrypoint.py run` with a batch of 256 examples and an adapter on all linear layers, in a process of its
own. Rates are medians over the steps after the warm-up and count real tokens only; a share of the ceiling is the rate
times `bench.flops` a token, by what large products sustain, measured first. `--remove` takes each base from the disk
once it is measured.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import flops, ours
from bench.compare import data_of
from bench.comparisons import Comparison, Ours
from bench.measured import Measured
from bench.options import parser_of
from bench.processes import NoResultError, run
from bench.results import table, write_section
from job.core.plan.memory import GIB

_HEADER = (
    *("base", "engine", "real tok/s", "of the ceiling", "tokens a micro-batch", "planned GiB", "peak GiB"),
    *("planned / peak", "loss"),
)
_COMPARISON = Comparison(title="Bases of each kind", contestants=())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What `data_of` takes of one base."""

    base: Path
    train: Path
    text: str


def measure(base, options, folder):
    """Its data, and what was measured; or why nothing was, in words."""
    contestant = Ours(name="ours", about="", targets="all-linear", steps=options.steps, warm_up=options.warm_up)
    data = data_of(_COMPARISON, _Options(base=base, train=options.train, text=options.text), folder)
    try:
        result = ours.measure(
            contestant, data=data, device=options.device, limit_seconds=options.limit, folder=folder / "ours"
        )
    except NoResultError as error:
        return data, str(error)
    return data, result


def row_of(base, data, result, rates):
    """A row of the table."""
    if not isinstance(result, Measured):
        return (base.name, f"no result: {result}", *[""] * (len(_HEADER) - 2))
    plan, work = result.plan, flops.per_token(data.shape, data.lengths, result.adapter_parameters)
    peak, planned = result.peak_bytes, plan["predicted_peak_bytes"]
    return (
        base.name,
        plan["engine"],
        f"{result.rate:,.0f}",
        f"{result.rate * work / rates['gemm_flops']:.3f}",
        f"{plan['micro_batch_tokens']:,}",
        f"{planned / GIB:.1f}" if planned else "",
        f"{peak / GIB:.1f}" if peak else "",
        f"{planned / peak - 1:+.1%}" if planned and peak else "",
        f"{result.losses[0]:.3f} to {result.losses[1]:.3f}",
    )


def words_on(base, result):
    """How a base was run, and why so."""
    return f"- {base.name}: {result.about}; {result.plan['engine_reason']}."


def main(arguments_given=None):
    parser = parser_of(__doc__, several_bases=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of each base")
    parser.add_argument("--remove", action="store_true", help="each base, once it is measured")
    options = parser.parse_args(arguments_given)
    rows, words = [], []
    with tempfile.TemporaryDirectory(prefix="bases-") as scratch:
        rates = json.loads(
            run([sys.executable, "-m", "bench.ceiling"], limit_seconds=120, log=Path(scratch, "ceiling"))
        )
        for base in options.base:
            folder = Path(scratch, base.name)
            folder.mkdir()
            data, result = measure(base, options, folder)
            rows.append(row_of(base, data, result, rates))
            words += [words_on(base, result)] if isinstance(result, Measured) else []
            shutil.rmtree(folder)
            if options.remove:
                shutil.rmtree(base)
            ceiling = f"{rates['gemm_flops'] / 1e12:.1f} TFLOP/s, bf16 products of {rates['product']}"
            command = "    python -m bench.bases --base FOLDER... --train TRAIN.jsonl"
            first = f"{rates['about']} Ceiling, measured in the same run: {ceiling}."
            text = "\n\n".join([first, table(_HEADER, rows), "\n".join(words)])
            write_section(options.results, "bases", f"## {_COMPARISON.title}\n\n{command}\n\n{text}")
            print(text, flush=True)


if __name__ == "__main__":
    main()
