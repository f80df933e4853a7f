"""Python loads this at the start of each process whose PYTHONPATH names its folder: it keeps what each step was.

For `bench.many_gpus`. Each rank writes a line a step into the folder BENCH_STEPS: seconds, and how many of them it
waited; tokens of its share; sizes of micro-batches that it recorded as CUDA graphs meanwhile. Rank 0 profiles step
BENCH_PROFILED. The product knows nothing of it.
"""

import importlib.abc
import json
import os
import sys
from pathlib import Path

_WATCHED = "job.tune.loop.step"


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the module be found as ever, and changes its class once it is loaded."""

    def find_spec(self, name, path, target=None):  # noqa: ARG002 - as finders are called
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_watch(module):
            load(module)
            watch(module.Stepper, Path(os.environ["BENCH_STEPS"]), int(os.environ.get("BENCH_PROFILED", "0")))

        spec.loader.exec_module = load_and_watch
        return spec


def watch(stepper, folder, profiled):
    """Every step of every stepper leaves a line."""
    step, finish = stepper.step, stepper.finish

    def watched_step(self, number, **options):
        before = _recorded(self)
        done = _profiled(self, number, options) if number == profiled and self._world.rank == 0 else None
        record = step(self, number, **options) if done is None else done[0]
        notes = notes_of(self)
        _write(self, notes, record)
        notes[number] = {
            "tokens": _own_tokens(self, number),
            "recorded": sorted({size.tokens for size in _recorded(self) - before}),
        }
        return record

    def watched_finish(self):
        record = finish(self)
        _write(self, notes_of(self), record)
        return record

    def _profiled(self, number, options):
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available() and self._accelerator.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as seen:
            record = step(self, number, **options)
            if on_gpu:
                torch.cuda.synchronize()
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
        (folder / "profile.txt").write_text(f"step {number}, rank 0\n\n{table}\n")
        if on_gpu:
            seen.export_chrome_trace(str(folder / "profile.json.gz"))
        return (record,)

    def _write(self, notes, record):
        if record is None:
            return
        waited, notes["waited"] = self._waited_seconds - notes["waited"], self._waited_seconds
        line = {"step": record.step, "rank": self._world.rank, "seconds": record.seconds, "waited": waited}
        with (folder / f"steps-r{self._world.rank:02d}.jsonl").open("a") as file:
            file.write(json.dumps(line | notes.pop(record.step)) + "\n")

    stepper.step, stepper.finish = watched_step, watched_finish


_notes = {}


def notes_of(stepper):
    """What is known so far of its steps whose numbers were not read yet."""
    return _notes.setdefault(id(stepper), {"waited": 0.0})


def _recorded(stepper):
    """Sizes that the engine holds recordings of; none where it makes none."""
    return set(getattr(getattr(stepper._engine, "_step", None), "_recordings", ()))  # noqa: SLF001 - what nobody else asks for


def _own_tokens(stepper, number):
    from job.core.plan.dealing import deal

    lengths = stepper._lengths[stepper._course.batch(number)].tolist()  # noqa: SLF001 - as above
    world = stepper._world  # noqa: SLF001 - as above
    return sum(lengths[i] for i in deal(lengths, shares=world.size)[world.rank])


if "BENCH_STEPS" in os.environ:
    import importlib.util

    sys.meta_path.insert(0, _Finder())
