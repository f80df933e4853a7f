"""Where a step of the product goes: its kernels by part, each beside the time that it could take.

    python -m bench.profile_step --base FOLDER --train TRAIN.jsonl [--batch 256] [--tokens 16384] [--engine fast]
        [--results bench/RESULTS.md]

`--tokens` is the most of a micro-batch; without it the memory plan decides. The ideal time of a product is its
operations at the rate that large products sustain here, or its bytes at the rate of a copy, whichever is longer; of
everything else its bytes alone (`bench.ideal`). Both rates are measured first, in the same process. Every step has the
same examples, so that what is made once for a size (kernels, CUDA graphs) is made before. Products inside a CUDA graph
do not show their shapes and stand in one row. Kernels of the update that torch has no name for (the copy that is kept
until an update has proved finite) count as elementwise.
"""

import itertools
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import ceiling
from bench.ideal import all_products_seconds, ideal_seconds
from bench.options import parser_of
from bench.results import device_and_versions, table, write_section
from bench.training import NO_END, SameBatch, load, recipe_of
from job.core.data.packing import pack_evenly
from job.tune.device.device import choose_device

WARM_UP = 4
"""Steps."""
LARGE, THIN, UNSORTED = "large products", "thin products", "products of unknown shape"
THIN_SIDE = 256
"""A product with a side of at most this is one of an adapter's ranks."""
_PARTS = {
    "dequantising": ("_dequantise", "dequantize"),
    "adapters under dropout": ("_masked_",),
    "attention": ("_attention_", "flash", "fmha", "scaled_dot_product"),
    "optimizer": ("adam", "optimizer", "multi_tensor", "lpnorm", "lion"),
    "elementwise": (
        *("_rms_", "_rotate_", "_swiglu_", "_cross_entropy", "_dropout", "triton", "elementwise", "vectorized"),
        *("reduce", "copy", "memcpy", "memset", "fill", "cat", "index", "gather", "softmax", "aten::"),
    ),
}
"""Words in the names of kernels; the first part that has one is it."""
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
"""torch's products: the place of their left side among the inputs."""
_PRODUCT_WORDS = ("gemm", "nvjet", "splitk", "cutlass", "aten::mm", "aten::addmm")


@dataclass(slots=True)
class Part:
    """Kernels of one kind in one step."""

    seconds: float = 0.0
    kernels: int = 0

    def add(self, microseconds, kernels=1):
        """One kernel more, or one less that is counted elsewhere."""
        self.seconds += microseconds / 1e6 * kernels
        self.kernels += kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """One step: its kernels, and its products by their shapes."""

    parts: dict[str, Part]
    products: Counter[tuple[int, int, int]]
    """How often each [rows, inner] x [inner, columns] came."""
    busy_seconds: float
    """While any kernel ran."""
    wall_seconds: float
    """From the first kernel's start to the last one's end."""


class OneStep:
    """Profiles the step after the warm-up."""

    def __init__(self, device):
        self._steps = 0
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self.profile = profile(activities=activities, record_shapes=True)

    def before_step(self):
        """To be called before each step; true once the profiled step is done."""
        if self._steps in {WARM_UP, WARM_UP + 1} and self._on_gpu:
            torch.cuda.synchronize()
        if self._steps == WARM_UP:
            self.profile.start()
        if self._steps == WARM_UP + 1:
            self.profile.stop()
        self._steps += 1
        return self._steps > WARM_UP + 1


def read(events, device):
    """Sort what the profiler saw. On the CPU the innermost operations stand for kernels."""
    on_gpu = device.type == "cuda"
    kernels = _on_device(events) if on_gpu else _innermost(events)
    parts, products = defaultdict(Part), Counter()
    for kernel in kernels:
        parts[part_of(kernel.name)].add(_microseconds(kernel, on_gpu))
    for event in events:
        if event.device_type == DeviceType.CPU and event.name in _PRODUCTS:
            own = [k.duration for k in event.kernels if part_of(k.name) == UNSORTED]
            for took in own if on_gpu else [_microseconds(event, on_gpu)]:
                parts[UNSORTED].add(took, kernels=-1)
                parts[_size_of(event)].add(took)
            products[_shape_of(event)] += 1 if own or not on_gpu else 0
    return Profiled(parts={n: p for n, p in parts.items() if p.kernels}, products=+products, **_times(kernels))


def _microseconds(event, on_gpu):
    return event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total


def _on_device(events):
    """Without the ranges that the host has named: they are shown there as well, over their kernels."""
    return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def _innermost(events):
    host = [e for e in events if e.device_type == DeviceType.CPU and e.self_cpu_time_total > 0]
    return [e for e in host if not e.cpu_children or e.name in _PRODUCTS]


def _shape_of(event):
    """Rows, inner side and columns of a product."""
    left, right = event.input_shapes[_PRODUCTS[event.name] :][:2]
    return left[0], left[1], right[1]


def _size_of(event):
    return THIN if min(_shape_of(event)) <= THIN_SIDE else LARGE


def part_of(name):
    """The part that a kernel belongs to by its name; products are sorted later, by their shapes."""
    lower = name.lower()
    for part, words in _PARTS.items():
        if part != "elementwise" and any(word in lower for word in words):
            return part
    if any(word in lower for word in _PRODUCT_WORDS):
        return UNSORTED
    return "elementwise" if any(word in lower for word in _PARTS["elementwise"]) else "other"


def _times(kernels):
    """Seconds in which any kernel ran, and from the first to the last."""
    spans = sorted((k.time_range.start, k.time_range.end) for k in kernels)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"busy_seconds": busy / 1e6, "wall_seconds": (reached - spans[0][0]) / 1e6}


def profile_step(loaded, cut):
    """One step, profiled after the warm-up."""
    step = OneStep(loaded.device)
    course = SameBatch(members=tuple(loaded.course.batch(1)), steps=NO_END)
    stepper = loaded.stepper(loaded.state(cut), course)
    for number in itertools.count(1):
        if step.before_step():
            break
        stepper.step(number)
    return read(step.profile.events(), loaded.device)


def summary(loaded, cut, profiled, rates):
    """The section's text: the numbers of the step, and a row for each part."""
    batch = loaded.course.batch(1)
    lengths = loaded.documents.lengths[batch]
    packs = pack_evenly(lengths.tolist(), most=max(cut.micro_batch_tokens, int(lengths.max())))
    work = {
        "lengths": lengths,
        "targets": int(loaded.documents.targets[batch].sum()),
        "micro_batches": len(packs),
        "cut": cut,
        "adapter_parameters": loaded.adapter_shape.parameters,
    }
    known = {part: _of_part(profiled.products, part) for part in (LARGE, THIN)}
    ideal = ideal_seconds(loaded.shape, rates, products=known, **work)
    if not profiled.products:
        ideal[UNSORTED] = all_products_seconds(loaded.shape, rates, **work)
    about = (
        f"{loaded.choice.name} engine: {len(batch)} examples, {int(lengths.sum()):,} real tokens in {len(packs)} "
        f"micro-batches of at most {cut.micro_batch_tokens:,}; {cut.recomputed_layers} of {loaded.shape.layers} "
        f"layers recomputed, {cut.kept_layers} with dequantised weights kept. {_summary(profiled)} Large products "
        f"sustain {rates['gemm_flops'] / 1e12:.1f} TFLOP/s here, a copy {rates['copy_bytes'] / 1e12:.2f} TB/s."
    )
    return about + "\n\n" + table(("part", "ms", "share", "kernels", "ideal ms", "ms / ideal"), _rows(profiled, ideal))


def _summary(profiled):
    kernels = sum(part.kernels for part in profiled.parts.values())
    busy, wall = profiled.busy_seconds, profiled.wall_seconds
    return f"{kernels:,} kernels, busy for {busy * 1e3:.1f} ms of {wall * 1e3:.1f} ms ({busy / wall:.0%})."


def _of_part(products, part):
    return {shape: n for shape, n in products.items() if (min(shape) <= THIN_SIDE) == (part == THIN)}


def _rows(profiled, ideal):
    total = sum(part.seconds for part in profiled.parts.values())
    for name, part in sorted(profiled.parts.items(), key=lambda item: -item[1].seconds):
        best = ideal.get(name)
        beside = ("", "") if not best else (f"{best * 1e3:.2f}", f"{part.seconds / best:.2f}")
        yield name, f"{part.seconds * 1e3:.2f}", f"{part.seconds / total:.1%}", f"{part.kernels:,}", *beside
    yield "all", f"{total * 1e3:.2f}", "", "", f"{sum(ideal.values()) * 1e3:.2f}", f"{total / sum(ideal.values()):.2f}"


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=256, help="examples of a step")
    parser.add_argument("--tokens", type=int, help="the most of a micro-batch; the plan's without it")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--engine", choices=["auto", "fast", "generic"], default="fast")
    options = parser.parse_args()
    device, rates = choose_device(options.device), ceiling.measure()
    torch.cuda.empty_cache()  # the plan counts what is free
    recipe = recipe_of(
        options.base, options.train, text=options.text, dropout=options.dropout, batch_size=options.batch
    )
    with tempfile.TemporaryDirectory(prefix="profile-step-") as folder:
        loaded = load(recipe, options.engine, device, Path(folder))
        cut = loaded.planned if options.tokens is None else loaded.cut(tokens=options.tokens)
        text = summary(loaded, cut, profile_step(loaded, cut), rates)
    print(text)
    command = f"    python -m bench.profile_step --base FOLDER --train TRAIN.jsonl --batch {options.batch}"
    command += "" if options.tokens is None else f" --tokens {options.tokens}"
    heading = f"## Where a step goes: {options.base.name}, {options.batch} examples, {loaded.choice.name} engine"
    name = f"profile-{options.base.name}-{options.batch}-{loaded.choice.name}"
    write_section(options.results, name, f"{heading}\n\n{command}\n\n{device_and_versions()}\n\n{text}")


if __name__ == "__main__":
    main()
