"""Predicted beside measured peak of GPU memory, for cuts of our choice.

    python -m bench.peak_memory --base FOLDER [--base FOLDER]... --train TRAIN.jsonl [--tokens 4096,8192,16384,32768]
        [--recomputed none,half,all] [--engine fast] [--results bench/RESULTS.md]

Each point: the base in 4 bits, three steps of one micro-batch that is full to the last token or nearly, and the most
that torch had allocated meanwhile. The prediction is that of `job.core.plan.memory` for the tokens that were in it.
Each base is loaded once, in a process of its own; points that run out of memory say so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.options import parser_of
from bench.results import device_and_versions, table, write_section
from bench.training import SameBatch, filling, load, recipe_of
from job.core.plan.memory import GIB
from job.tune.device.device import choose_device

STEPS = 3
"""The optimizer's state is made in the first."""
_SHARES = {"none": 0.0, "half": 0.5, "all": 1.0}
"""Share of the layers that recompute their activations."""


def peak_of(loaded, cut, members):
    """Most bytes that were allocated in the steps; None where nobody counts them; `out of memory` where it ran out."""
    on_gpu = loaded.device.type == "cuda"
    state = loaded.state(cut)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for record in loaded.steps(state, SameBatch(members=tuple(members), steps=STEPS)):
        if record.setbacks.cuts:
            return "out of memory"
    return torch.cuda.max_memory_allocated() if on_gpu else None


def points_of(loaded, budgets, shares):
    """Predicted and measured, for each budget and share of recomputed layers."""
    layers = loaded.shape.layers
    for share in shares:  # in this order: the least memory last
        recomputed = round(_SHARES[share] * layers)
        for budget in budgets:
            members = filling(loaded.documents, budget)
            tokens = int(loaded.documents.lengths[members].sum())
            cut = loaded.cut(tokens=budget, recomputed=recomputed)
            predicted = loaded.parts.peak(layers=layers, tokens=tokens, kept_layers=0, recomputed_layers=recomputed)
            measured = peak_of(loaded, cut, members)
            yield {"tokens": tokens, "recomputed": recomputed, "predicted": predicted, "measured": measured}


def measure_base(options):
    """All points of one base, one JSON line each."""
    recipe = recipe_of(options.base[-1], options.train, text=options.text)
    with tempfile.TemporaryDirectory(prefix="peak-memory-") as folder:
        loaded = load(recipe, options.engine, choose_device(options.device), Path(folder))
        for point in points_of(loaded, options.tokens, options.recomputed):
            print(json.dumps({"base": options.base[-1].name, "layers": loaded.shape.layers} | point), flush=True)


def row_of(point):
    """A row of the table."""
    predicted, measured = point["predicted"], point["measured"]
    known = isinstance(measured, int)
    return (
        point["base"],
        f"{point['tokens']:,}",
        f"{point['recomputed']} of {point['layers']}",
        f"{predicted / GIB:.2f}",
        f"{measured / GIB:.2f}" if known else measured or "not counted here",
        f"{predicted / measured - 1:+.1%}" if known else "",
    )


def main():
    parser = parser_of(__doc__, several_bases=True)
    parser.add_argument("--tokens", type=_whole, default=[4096, 8192, 16384, 32768], metavar="N,...")
    parser.add_argument("--recomputed", type=lambda text: text.split(","), default=["none", "all"], metavar="SHARE,...")
    parser.add_argument("--engine", choices=["fast", "generic"], default="fast")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        measure_base(options)
        return
    points = [point for base in options.base for point in _in_own_process(base)]
    header = ("base", "tokens", "layers recomputed", "predicted GiB", "measured GiB", "difference")
    text = table(header, [row_of(point) for point in points])
    print(text)
    command = "    python -m bench.peak_memory --base FOLDER... --train TRAIN.jsonl"
    heading = f"## Predicted and measured memory, {options.engine} engine"
    name = f"peak-memory-{options.engine}"
    write_section(options.results, name, f"{heading}\n\n{command}\n\n{device_and_versions()}\n\n{text}")


def _in_own_process(base):
    """Points of one base, from a process of its own."""
    command = [sys.executable, "-m", "bench.peak_memory", *sys.argv[1:], "--in-this-process", "--base", str(base)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{base}: ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _whole(text):
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    main()
