"""What each part of an engine is worth: the product's step with one part after another switched off.

    python -m bench.attribution --base FOLDER --train TRAIN.jsonl [--engine fast] [--batch 128] [--tokens 4096]
        [--steps 8] [--warm-up 3] [--results bench/RESULTS.md]

`--tokens` is the most of a micro-batch; without it the memory plan decides. Every step has the same examples. A part
that is off is done as it would be without us: by torch's own operations, by bitsandbytes, by PEFT, or not at all. Where
memory then runs out the cut gets smaller, as in a run, and the row says so.
"""

import contextlib
import gc
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit

from bench.options import parser_of
from bench.results import device_and_versions, table, write_section
from bench.training import SameBatch, load, recipe_of
from job.core.plan.memory import GIB, NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels import reference
from job.kernels.attention import Attention
from job.kernels.decoder import Saving
from job.kernels.ops import Ops
from job.kernels.which_ops import ops_of
from job.tune.device.compute_dtype import dtype_of
from job.tune.device.device import choose_device
from job.tune.engines.attention_choice import AttentionChoice
from job.tune.engines.handwritten import HandwrittenEngine
from job.tune.loop.optimizer import make_optimizer
from job.tune.loop.step import go_on
from job.tune.model.adapter import trainable

_OPS = [name for name in vars(Ops) if not name.startswith("_")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """An engine with one part switched off or replaced."""

    name: str
    cut: dict[str, Any] = field(default_factory=dict)
    """What differs from the planned cut."""
    engine: Callable[[Any], Any] | None = None
    """Makes the engine from what is loaded; None: the one that was chosen."""
    meanwhile: Callable[[Any], AbstractContextManager[Any]] = lambda _loaded: nullcontext()
    """Around the steps."""
    optimizer: Callable[[Any], Any] | None = None
    """Makes the optimizer; None: over the flat adapter, as in a run."""
    look: Callable[[], bool] = go_on
    """Called after each micro-batch; true would drop the step."""


class ByDocument(Attention):
    """Each document through scaled_dot_product_attention, with autograd's backward."""

    def forward(self, query, key, value, documents):
        """See `Attention`."""
        with torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in (query, key, value)]
            out = self._plain(*inputs, documents)
        return out.detach(), (inputs, out)

    def backward(self, grad, _query, _key, _value, _out, kept, _documents, **_room):
        """See `Attention`."""
        inputs, out = kept
        return torch.autograd.grad(out, inputs, grad)


def dequantise_by_bitsandbytes(weight, out):
    """See `reference.dequantise`: through a matrix of its own, as bitsandbytes gives it."""
    state = QuantState(
        absmax=weight.scales,
        shape=torch.Size((weight.height, weight.width)),
        code=weight.code,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=out.dtype,
        offset=weight.offset,
        state2=QuantState(
            absmax=weight.outer_scales, code=weight.scales_code, blocksize=NF4_OUTER_BLOCK, dtype=torch.float32
        ),
    )
    out.copy_(dequantize_4bit(weight.packed[:, None], state))


def _with(**ops):
    """Makes a fast engine with these ops instead of its own."""

    def make(loaded):
        own = ops_of(loaded.device)
        parts = SimpleNamespace(**{name: getattr(own, name) for name in _OPS} | ops)
        saving = Saving(kept_layers=0, recomputed_layers=0)
        return HandwrittenEngine(loaded.model, parts, dtype=dtype_of(loaded.model.model), saving=saving)

    return make


def _by_torch(*names):
    return _with(**{name: getattr(reference, name) for name in names})


def _attention_by_document(loaded):
    with patch("job.tune.engines.families.Attention", ByDocument):
        return _with()(loaded)


def _by_torch_s_attention(loaded):
    with _torch_s_attention(loaded):
        return _with()(loaded)


def _torch_s_attention(loaded):
    return patch.object(loaded.model, "attention", AttentionChoice(own=False, reason="switched off"))


def _without_graphs(_loaded):
    return patch("job.tune.engines.handwritten.Replay", lambda step, *_, **__: step)


def _tensor_by_tensor(loaded):
    return make_optimizer(trainable(loaded.model), loaded.recipe.train)


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return False


def _not_compiled(loaded):
    loaded.model.layers.stop_compiling()
    return patch.object(type(loaded.model.layers), "compile", lambda *_: None)


@contextlib.contextmanager
def _peft(loaded):
    with _not_compiled(loaded), loaded.model.linears.as_peft_has_them():
        yield


def variations_of(engine, layers):
    """The engine as it is, then with one part after another switched off or replaced."""
    as_it_is = Variation(name="as it is")
    if engine == "generic":
        return (
            as_it_is,
            Variation(name="no dequantised weights kept", cut={"kept_layers": 0}),
            Variation(name="attention by torch's variable-length kernels", meanwhile=_torch_s_attention),
            Variation(name="layers not compiled", meanwhile=_not_compiled),
            Variation(name="nor fused linear layers: PEFT's and bitsandbytes' own", meanwhile=_peft),
        )
    return (
        as_it_is,
        Variation(name="no dequantised weights kept", cut={"kept_layers": 0}),
        Variation(
            name="every layer recomputed",
            cut={"kept_layers": 0, "recomputed_layers": layers},
        ),
        Variation(name="micro-batches of 2,048 tokens", cut={"micro_batch_tokens": 2048}),
        Variation(name="attention by torch's variable-length kernels", engine=_by_torch_s_attention),
        Variation(name="attention by SDPA, document by document", engine=_attention_by_document),
        Variation(
            name="weights dequantised by bitsandbytes at each use",
            engine=_with(dequantise=dequantise_by_bitsandbytes),
            cut={"kept_layers": 0},
        ),
        Variation(name="norms by torch's operations", engine=_by_torch("rms_forward", "rms_backward_add")),
        Variation(name="rotation by torch's operations", engine=_by_torch("rotate_forward", "rotate_backward")),
        Variation(name="SwiGLU by torch's operations", engine=_by_torch("swiglu_forward", "swiglu_backward")),
        Variation(name="cross-entropy by torch's operations", engine=_by_torch("cross_entropy_in_place")),
        Variation(name="no CUDA graphs", meanwhile=_without_graphs),
        Variation(name="optimizer tensor by tensor", optimizer=_tensor_by_tensor),
        Variation(name="the host waits for each micro-batch", look=_wait),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Steps of one variation."""

    rate: float
    """Real tokens a second, median."""
    peak_bytes: int | None
    ran_out: dict[str, Any]
    """What changed in the cut when memory ran out."""
    loss: float
    """Loss of the last step, in nats a target: the same for all variations, but for rounding."""


def measure(loaded, variation, *, members, steps, warm_up):
    """Rate, peak and loss of some steps with this variation."""
    loaded.choice.engine.adopt(loaded.cut(tokens=loaded.planned.micro_batch_tokens))  # it keeps nothing meanwhile
    if variation.engine is not None:
        loaded = replace(loaded, choice=replace(loaded.choice, engine=variation.engine(loaded)))
    planned = replace(loaded.planned, **variation.cut)
    state = loaded.state(planned, variation.optimizer and variation.optimizer(loaded))
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with variation.meanwhile(loaded):
        records = [*loaded.steps(state, SameBatch(members=tuple(members), steps=steps), look=variation.look)]
    peak = torch.cuda.max_memory_allocated() if loaded.device.type == "cuda" else None
    rate = median(record.tokens / record.seconds for record in records[warm_up:])
    then = asdict(state.progress.cut)
    changed = {key: then[key] for key, value in asdict(planned).items() if then[key] != value}
    return Result(rate=rate, peak_bytes=peak, ran_out=changed, loss=records[-1].loss)


def section(results):
    """The table, one row a variation; `results` is in the order of measuring."""
    best = next(iter(results.values())).rate
    rows = [
        (
            name if not result.ran_out else f"{name} (memory ran out, then {_listed(result.ran_out)})",
            f"{result.rate:,.0f}",
            f"{result.rate / best - 1:+.1%}",
            "not counted here" if result.peak_bytes is None else f"{result.peak_bytes / GIB:.1f}",
            f"{result.loss:.4f}",
        )
        for name, result in results.items()
    ]
    return table(("", "real tok/s", "against the engine as it is", "peak GiB", "loss of the last step"), rows)


def _listed(change):
    return ", ".join(f"{key} {value}" for key, value in change.items())


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=128, help="examples of a step")
    parser.add_argument("--tokens", type=int, help="the most of a micro-batch; the plan's without it")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--engine", choices=["fast", "generic"], default="fast")
    options = parser.parse_args(arguments)
    recipe = recipe_of(options.base, options.train, text=options.text, batch_size=options.batch)
    results = {}
    with tempfile.TemporaryDirectory(prefix="attribution-") as folder:
        loaded = load(recipe, options.engine, choose_device(options.device), Path(folder))
        if options.tokens is not None:
            loaded = replace(loaded, planned=replace(loaded.planned, micro_batch_tokens=options.tokens))
        members = loaded.course.batch(1)
        first = [parameter.detach().clone() for parameter in trainable(loaded.model)]
        for variation in variations_of(options.engine, loaded.shape.layers):
            for parameter, value in zip(trainable(loaded.model), first, strict=True):
                parameter.data.copy_(value)
            results[variation.name] = measure(
                loaded, variation, members=members, steps=options.steps, warm_up=options.warm_up
            )
            _write(options, loaded, members, results)
    print(section(results))


def _write(options, loaded, members, results):
    """Written after each row: what is measured by then is kept when the rest fails."""
    command = (
        f"    python -m bench.attribution --base FOLDER --train TRAIN.jsonl --engine {options.engine} "
        f"--batch {options.batch} --steps {options.steps} --warm-up {options.warm_up}"
    )
    command += "" if options.tokens is None else f" --tokens {options.tokens}"
    cut = loaded.planned
    about = (
        f"{options.base.name}: {len(members)} examples a step, {int(loaded.documents.lengths[members].sum()):,} real "
        f"tokens, at most {cut.micro_batch_tokens:,} in a micro-batch; {cut.recomputed_layers} of "
        f"{loaded.shape.layers} layers recomputed, {cut.kept_layers} with dequantised weights kept."
    )
    heading = f"## What each part is worth: {options.engine} engine, {options.batch} examples"
    name = f"attribution-{options.engine}-{options.batch}"
    text = f"{heading}\n\n{command}\n\n{device_and_versions()}\n\n{about}\n\n{section(results)}"
    write_section(options.results, name, text)


if __name__ == "__main__":
    main()
