"""Memory and time of an export, part by part: a base of a known shape, a short run on it, and its export.

    python -m bench.export_memory SHAPE --tokenizer FOLDER [--folder SCRATCH] [--steps 20] [--onto weights|quantised]
        [--proof-examples 4] [--results bench/RESULTS.md]

The base has random weights (`bench.random_base`). The run, `entrypoint.py run` with rank 32 on all linear layers, makes
the adapter and the report; it learns to count, so that what it learned is more than 4 bits change. The export is the
product's own, whole, on the CPU, in a process of its own: the most memory is the kernel's (VmHWM of that process, set
back at the beginning of each part), so that neither the page cache nor a container's other processes count. SCRATCH
needs room for the base three times: as it is, merged, and a quarter of it in 4 bits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from bench.random_base import SHAPES, write_base
from bench.results import RESULTS, device_and_versions, table, write_section
from job.core.plan.memory import GIB
from job.core.reports.onto import Onto
from job.edge.host.outcome import Outcome
from job.stages.attempt import Phases

ROOT = Path(__file__).parents[1]
RANK, NUMBERS = 32, 16
_SET_BACK = "5"
"""Written to clear_refs: VmHWM begins anew."""


class PhasesWithPeaks(Phases):
    """The clock of an attempt that looks at the memory whenever the part changes."""

    def __init__(self, outcome, *, began):
        self.peaks = {}
        super().__init__(outcome, began=began)

    def _count_as(self, name):
        before = super()._count_as(name)
        self.peaks[before] = max(self.peaks.get(before, 0), peak_bytes())
        Path("/proc/self/clear_refs").write_text(_SET_BACK)
        return before


def peak_bytes():
    """The most that this process has held at once, by the kernel, since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def write_counting(path, firsts):
    """Records that count from each of these on."""
    texts = (" ".join(str((first + number) % 100) for number in range(NUMBERS)) for first in firsts)
    path.write_text("".join(json.dumps({"t": text}) + "\n" for text in texts))


def train(options, folder):
    """A finished run on a new base; its URI."""
    size = write_base(options.shape, folder / "base", options.tokenizer)
    write_counting(folder / "train.jsonl", range(0, 64, 2))
    write_counting(folder / "validation.jsonl", range(1, 2 * options.proof_examples + 1, 2))
    recipe = {
        "model": {"base": str(folder / "base")},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"), "text": "{t}"},
        "lora": {"r": RANK, "alpha": 2 * RANK, "targets": "all-linear"},
        "train": {"steps": options.steps, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1},
        "evaluate": {"every_steps": options.steps, "prompts": [], "answers": 0},
        "output": f"file://{folder / 'store'}",
    }
    # JSON is YAML.
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["run", str(folder / "recipe.yaml"), "--workdir", str(folder / "work"), "--device", "auto"]
    subprocess.run([sys.executable, str(ROOT / "entrypoint.py"), *words], check=True, stdout=subprocess.DEVNULL)
    [report] = (folder / "store" / "runs").glob("*/report.json")
    return f"file://{report.parent}", size


def export_here(run_uri, folder, onto):
    """The whole export in this process: seconds and most bytes by part."""
    from job.commands.export import export

    phases = PhasesWithPeaks(Outcome(None), began=time.monotonic())
    found, place = export(
        run_uri,
        str(folder / "merged"),
        onto=onto,
        proof_examples=None,
        workdir=folder / "work",
        device="cpu",
        phases=phases,
        should_stop=lambda: False,
    )
    seconds = phases.so_far()
    written = sum(file.size for file in found.files.values())
    return {"seconds": seconds, "peaks": phases.peaks, "place": place, "bytes": written}


def export_apart(run_uri, folder, onto):
    """The same in a process of its own, which has done nothing else."""
    command = [sys.executable, "-m", "bench.export_memory", "--in-this-process", run_uri, str(folder), onto]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def section(options, size, found):
    """What goes into RESULTS.md."""
    parts = sorted(found["seconds"], key=lambda part: -found["seconds"][part])
    rows = [
        (part.replace("_", " "), f"{found['seconds'][part]:.1f}", f"{found['peaks'].get(part, 0) / GIB:.2f}")
        for part in parts
    ]
    most = max(found["peaks"].values())
    about = (
        f"A base of {size / 1e9:.1f} GB in bf16, rank {RANK}, {os.cpu_count()} cores. It wrote "
        f"{found['bytes'] / 1e9:.1f} GB. At its peak the process held {most / GIB:.2f} GiB, libraries included, in "
        f"{sum(found['seconds'].values()):.0f} s."
    )
    heading = f"## Memory of an export: {options.shape}, onto {options.onto}"
    command = f"    python -m bench.export_memory {options.shape} --tokenizer TOKENIZER --onto {options.onto}"
    return "\n\n".join([heading, command, device_and_versions(), about, table(("part", "seconds", "most GiB"), rows)])


def main(words=None):
    """Measure, print and write."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--in-this-process"]:
        print(json.dumps(export_here(words[1], Path(words[2]), words[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, help="where base, run and model stand meanwhile")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--onto", choices=get_args(Onto), default="weights")
    parser.add_argument("--proof-examples", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="export-memory-") as folder:
        run_uri, size = train(options, Path(folder))
        text = section(options, size, export_apart(run_uri, Path(folder), options.onto))
    print(text)
    write_section(options.results, f"export-memory-{options.shape}-{options.onto}", text)


if __name__ == "__main__":
    main()
