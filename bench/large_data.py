"""A large dataset: how fast lines are read and encoded beside the bare tokenizer, and what memory that takes.

    python -m bench.large_data [--tokenizer FOLDER] [--records 1000000] [--files 20000] [--results bench/RESULTS.md]

Records are generated, about 540 bytes each. In turns, each in a process of its own: `check`'s reading of lines; the
bare tokenizer (tokenizers, batches of 1,000 of the same texts, all cores, nothing kept); the product from files to the
micro-batches of every step of an epoch. Then the product with a quarter of the records, again with data that the work
folder holds encoded, and with a prefix of many small files.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

from bench.processes import run
from bench.results import RESULTS, device_and_versions, table, write_section
from job.core.data.packing import pack_evenly
from job.core.data.records import Tally, checked_lines
from job.core.plan.course import course_of
from job.core.recipe.schema import Recipe
from job.edge.dataset_files import DataFile, read_lines
from job.edge.host.outcome import Outcome
from job.edge.store.objects import StoredObject
from job.stages.attempt import Phases, Worker
from job.stages.data.data_objects import list_data

ROOT = Path(__file__).parents[1]
BATCH = 32
MICRO_BATCH_TOKENS = 8192
TEXTS_AT_ONCE = 1000
LOOK_SECONDS = 0.05


def write_records(path, count, *, first=0):
    """JSON lines with a question and a longer answer, of words as unevenly frequent as a language's."""
    draw, pool = random.Random(first), _pool()
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + count):
            at, question, answer = draw.randrange(len(pool) - 200), draw.randint(8, 30), draw.randint(25, 105)
            record = {
                "id": number,
                "question": " ".join(pool[at : at + question]),
                "answer": " ".join(pool[at + question : at + question + answer]),
            }
            file.write(json.dumps(record) + "\n")


@cache
def _pool():
    syllables = ["ba", "ke", "lo", "mi", "ru", "ten", "sha", "ver", "ing", "tion", "al", "or", "pre", "con", "st", "ed"]
    draw = random.Random(0)
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 2, 3, 4)))) for _ in range(30_000)]
    return draw.choices(words, [1 / (rank + 3) for rank in range(len(words))], k=200_000)


def recipe_of(uri):
    """What is done with such records."""
    data = {"train": uri, "prompt": "### Question: {question}\n### Answer:", "completion": " {answer}"}
    train = {"epochs": 1, "batch_size": BATCH, "learning_rate": 1e-4}
    return Recipe.model_validate({"model": {"base": "./none"}, "data": data, "train": train, "output": "./none"})


def data_file(path):
    """As it is when it was fetched."""
    source = StoredObject(uri=f"file://{path}", key=path.name, size=path.stat().st_size, etag="", version=None)
    return DataFile(name=path.name, path=path, source=source, sha256="")


def audit(path, **_):
    """What `check` does with each line."""
    data, tally = recipe_of(f"file://{path}").data, Tally()
    for _example in checked_lines(read_lines([data_file(path)], max_record=data.max_record), data, tally=tally):
        pass
    return {"records": tally.good}


def bare(path, *, tokenizer, **_):
    """The tokenizer alone; what it gets is made outside of the time."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    data = recipe_of(f"file://{path}").data
    lines = checked_lines(read_lines([data_file(path)], max_record=data.max_record), data, tally=Tally())
    seconds, cpu, texts = 0.0, 0.0, []

    def encode():
        nonlocal seconds, cpu
        began, used = time.monotonic(), time.process_time()
        for each in model.encode_batch(texts, add_special_tokens=False):
            each.ids  # noqa: B018 - what a caller takes
        seconds, cpu = seconds + time.monotonic() - began, cpu + time.process_time() - used
        texts.clear()

    for example in lines:
        texts.append(example.text)
        if len(texts) == TEXTS_AT_ONCE:
            encode()
    encode()
    return {"seconds": seconds, "cpu_seconds": cpu}


def whole(path, *, tokenizer, workdir):
    """From files to the micro-batches of every step."""
    from types import SimpleNamespace

    from job.stages.data.dataset import prepare_dataset
    from job.tune.model.tokenizer import named_tokenizer

    recipe = recipe_of(f"file://{path}" + "/" * path.is_dir())
    worker = Worker(recipe=recipe, workdir=workdir, device="cpu", engine="auto", should_stop=lambda: False)
    began = time.monotonic()
    phases = Phases(Outcome(None), began=began)
    sides = list_data(recipe.data, worker.settings, should_stop=worker.should_stop)
    listed = time.monotonic() - began
    found = prepare_dataset(
        worker,
        SimpleNamespace(sides=sides, train=sides.every, validation=()),
        named_tokenizer(tokenizer),
        positions=4096,
        rows=32000,
        folder=workdir / "run",
        phases=phases,
    )
    packing = time.monotonic()
    course, lengths = course_of(recipe.train, examples=len(found.train)), found.train.lengths
    packs = sum(
        len(pack_evenly(lengths[course.batch(step)].tolist(), most=MICRO_BATCH_TOKENS))
        for step in range(1, course.steps + 1)
    )
    return {
        "records": len(found.train) + len(found.validation),
        "micro_batches": packs,
        "list_seconds": listed,
        "fetch_seconds": phases.seconds.get("download", 0.0),
        "encode_seconds": phases.seconds.get("encode", 0.0),
        "pack_seconds": time.monotonic() - packing,
    }


PARTS = {"audit": audit, "bare": bare, "whole": whole}


class Memory:
    """What this process and those that it begins hold together, looked at again and again; shared pages count twice."""

    def __init__(self):
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while not self._ended.wait(LOOK_SECONDS):
            own = Path(f"/proc/{os.getpid()}")
            children = [pid for task in own.glob("task/*/children") for pid in task.read_text().split()]
            self.peak = max(self.peak, sum(map(resident_bytes, [own, *(Path("/proc", pid) for pid in children)])))


def resident_bytes(process):
    """Of one process; 0 when it has ended."""
    try:
        return int((process / "statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def in_a_process(part, path, options, workdir):
    """What a part found, in a process of its own."""
    command = [sys.executable, "-m", "bench.large_data", "--part", part, "--path", str(path)]
    command += ["--tokenizer", str(options.tokenizer), "--workdir", str(workdir)]
    result = json.loads(run(command, limit_seconds=10**5, log=workdir.parent / part).splitlines()[-1])
    print(part, path.name, json.dumps(result), flush=True)
    return result


def measure(options, folder):
    """All parts, by name."""
    few, many, files = folder / "few.jsonl", folder / "many.jsonl", folder / "files"
    write_records(few, options.records // 4)
    write_records(many, options.records)
    files.mkdir()
    for number in range(options.files):
        write_records(files / f"{number:05d}.jsonl", 1, first=number)
    for name in ("few", "many", "files"):
        (folder / f"work-{name}").mkdir()
    found = {"bytes": many.stat().st_size, "audit": in_a_process("audit", many, options, folder / "work-many")}
    # The tokenizer before and after: the machine may have other work meanwhile.
    found["bare"] = [in_a_process("bare", many, options, folder / "work-many")]
    found["many"] = in_a_process("whole", many, options, folder / "work-many")
    found["bare"].append(in_a_process("bare", many, options, folder / "work-many"))
    found["again"] = in_a_process("whole", many, options, folder / "work-many")
    found["few"] = in_a_process("whole", few, options, folder / "work-few")
    found["files"] = in_a_process("whole", files, options, folder / "work-files")
    return found


def report(found, options):
    """The section's text."""
    size, many, few = found["bytes"], found["many"], found["few"]
    bare_seconds = sum(each["seconds"] for each in found["bare"]) / len(found["bare"])
    bare_cpu = sum(each["cpu_seconds"] for each in found["bare"]) / len(found["bare"])

    def row(name, result, of=size):
        rate = f"{of / result['seconds'] / 1e6:,.1f}"
        peak = f"{result['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in result else "-"
        return [name, f"{result['seconds']:,.1f}", rate, f"{result['cpu_seconds']:,.1f}", peak]

    rows = [
        row("`check`'s reading of lines", found["audit"]),
        row("the bare tokenizer", {"seconds": bare_seconds, "cpu_seconds": bare_cpu}),
        row("encode and pack", many),
        row("the same data again", found["again"]),
        row("a quarter of it", few, size / 4),
    ]
    files = found["files"]
    encode_and_pack = many["encode_seconds"] + many["pack_seconds"]
    speed = (
        f"Encode and pack are {bare_seconds / encode_and_pack:.2f} times as fast as the bare tokenizer "
        f"({bare_cpu / many['cpu_seconds']:.2f} by CPU seconds, imports and fetching included). Four times the records "
        f"take {many['seconds'] / few['seconds']:.2f} times the time and "
        f"{many['peak_bytes'] / few['peak_bytes']:.2f} times the memory."
    )
    prefix = (
        f"A prefix of {options.files:,} files: listed in {files['list_seconds']:.1f} s, fetched in "
        f"{files['fetch_seconds']:.1f} s, encoded in {files['encode_seconds']:.1f} s, "
        f"{files['peak_bytes'] / 1e6:,.0f} MB."
    )
    of = f"{options.records:,} generated records, {size / 1e6:,.0f} MB" + f"; {options.note}" * bool(options.note)
    command = f"    python -m bench.large_data --records {options.records} --files {options.files}"
    header = ["", "seconds", "MB/s", "CPU seconds", "peak MB, all processes"]
    versions = device_and_versions(["tokenizers", "pyarrow"])
    return "\n\n".join(["## Large data", command, versions, f"{of}.", table(header, rows), speed, prefix])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "recipes" / "demo-base", metavar="FOLDER")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name in ("--part", "--path", "--workdir"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        began = time.monotonic()
        with Memory() as memory:
            result = PARTS[options.part](Path(options.path), tokenizer=options.tokenizer, workdir=Path(options.workdir))
        used = os.times()
        cpu = used.user + used.system + used.children_user + used.children_system
        print(json.dumps({"seconds": time.monotonic() - began, "cpu_seconds": cpu, "peak_bytes": memory.peak} | result))
        return
    with tempfile.TemporaryDirectory(prefix="large-data-") as folder:
        found = measure(options, Path(folder))
    text = report(found, options)
    print(text)
    write_section(options.results, "large-data", text)


if __name__ == "__main__":
    main()
