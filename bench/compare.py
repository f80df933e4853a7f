"""Ours beside its rivals, in one run and on one device, with what the device sustains measured first.

    python -m bench.random_base llama2-7b BASE --tokenizer FOLDER
    python -m bench.compare COMPARISON --base BASE --train GSM8K.jsonl [--only NAME]... [--results bench/RESULTS.md]

COMPARISON is one of `bench.comparisons`: all, long, batch16, batch2, dropout, memory40, mistral, qwen3, generic. Ours
runs by `entrypoint.py run`, rivals by `bench.rivals`, each in a process of its own that is killed after --limit
seconds. The rivals need packages that the project does not: bench/README.md. --rivals-python names another interpreter
that has them.

The table is printed and written after each contestant. Rates are medians over the steps after the warm-up, and count
real tokens only; a share of the ceiling is the rate times `bench.flops` a token, by what large products sustain.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import flops, long_documents, ours, rival
from bench.comparisons import COMPARISONS, LONG, Ours
from bench.measured import Measured
from bench.options import parser_of
from bench.processes import NoResultError, run
from bench.results import table, write_section
from bench.training import documents_of, recipe_of
from job.core.plan.memory import GIB, ModelShape
from job.tune.model.config import load_tokenizer, read_config, shape_of

_HEADER = (
    *("", "real tok/s", "the first / this", "of the ceiling", "slowest to fastest", "steps"),
    *("real tokens a step", "of all tokens", "peak GiB", "loss"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What everyone trains on."""

    base: Path
    train: Path
    text: str
    max_length: int
    shape: ModelShape
    lengths: np.ndarray
    """Tokens of each example."""


def data_of(comparison, options, folder):
    """The data of a comparison; long documents are made from the texts of the file."""
    base, train, text = options.base.resolve(), options.train.resolve(), options.text
    tokenizer, shape = load_tokenizer(base), shape_of(read_config(base))
    if comparison.long_documents:
        train = folder / "long.jsonl"
        long_documents.write(options.train, text, tokenizer, train)
        text = LONG
    limit = min(comparison.max_length, shape.positions)
    recipe = recipe_of(base, train, text=text, max_length=limit)
    lengths = documents_of(recipe, tokenizer, shape.positions, folder / "lengths").lengths
    return Data(base=base, train=train, text=text, max_length=limit, shape=shape, lengths=lengths)


def compare(comparison, options, folder, *, write: Callable[[str], None]):
    """Measure one contestant after another; `write` gets the text of the section each time."""
    data, wanted = data_of(comparison, options, folder), comparison.contestants
    if options.only:
        wanted = tuple(each for each in wanted if each.name in options.only)
    rates = json.loads(run([sys.executable, "-m", "bench.ceiling"], limit_seconds=120, log=folder / "ceiling"))
    found = {}
    for contestant in wanted:
        print(f"{contestant.name} ...", file=sys.stderr, flush=True)
        try:
            found[contestant.name] = _measure(contestant, data, options, folder)
        except NoResultError as error:
            found[contestant.name] = str(error)
        write(section(wanted, found, data, rates))


def _measure(contestant, data, options, folder):
    own = {"data": data, "limit_seconds": options.limit, "folder": folder / contestant.name}
    if isinstance(contestant, Ours):
        return ours.measure(contestant, device=options.device, **own)
    return rival.measure(contestant, python=options.rivals_python, **own)


def section(wanted, found, data, rates):
    """Table, how each was set up, and what each ran with."""
    first = found.get(wanted[0].name)
    best = first.rate if isinstance(first, Measured) else None
    rows = [_row(name, result, data, rates, best) for name, result in found.items()]
    about = [f"- {each.name}: {_about(each, found[each.name])}" for each in wanted if each.name in found]
    measured = [result for result in found.values() if isinstance(result, Measured)]
    versions = {name: version for result in measured for name, version in result.versions.items()}
    ran_with = ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "nothing"
    ceiling = (
        f"{data.base.name}, {len(data.lengths):,} examples of {data.lengths.mean():.0f} tokens on average (at most "
        f"{data.max_length:,}). Ceiling, measured in the same run: {rates['gemm_flops'] / 1e12:.1f} TFLOP/s, sustained "
        f"by bf16 products of {rates['product']}."
    )
    return "\n\n".join([rates["about"], ceiling, table(_HEADER, rows), "\n".join(about), f"Ran with {ran_with}."])


def _row(name, result, data, rates, best):
    if not isinstance(result, Measured):
        return (name, "no result", *[""] * (len(_HEADER) - 2))
    work = flops.per_token(data.shape, data.lengths, result.adapter_parameters)
    return (
        name,
        f"{result.rate:,.0f}",
        "" if best is None else f"{best / result.rate:.2f}",
        f"{result.rate * work / rates['gemm_flops']:.3f}",
        f"{min(result.rates):,.0f} to {max(result.rates):,.0f}",
        result.steps,
        f"{result.tokens_per_step:,.0f}",
        f"{result.real_share:.0%}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / GIB:.1f}",
        f"{result.losses[0]:.3f} to {result.losses[1]:.3f}",
    )


def _about(contestant, result):
    if not isinstance(result, Measured):
        return f"{contestant.about}. No result: {result}"
    return f"{contestant.about}; {result.about}" if result.about else contestant.about


def arguments(names):
    """Parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("comparison", choices=names)
    parser.add_argument("--only", action="append", metavar="NAME", help="of the contestants; may be repeated")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of each contestant")
    parser.add_argument("--rivals-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the output and the files of each there")
    return parser


def main(arguments_given=None, comparisons=COMPARISONS):
    options = arguments(list(comparisons)).parse_args(arguments_given)
    comparison = comparisons[options.comparison]
    # By default the signal would leave the contestants behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = f"    python -m bench.compare {options.comparison} --base FOLDER --train TRAIN.jsonl"

    def write(text):
        text = f"## {comparison.title}\n\n{command}\n\n{text}"
        write_section(options.results, f"compare-{options.comparison}", text)
        print(text, flush=True)

    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{options.comparison}-", dir=options.logs)).resolve()
    try:
        compare(comparison, options, folder, write=write)
    finally:
        if options.logs is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
