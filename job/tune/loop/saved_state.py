"""Reads a checkpoint's folder into values, each checked against the run, before anything is restored from it.

Its files come from a bucket: their manifest says that they are whole, not who wrote them.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from job.core.attempt.run_record import first_mistake
from job.core.errors import DataError
from job.core.judging.verdict import Evaluation
from job.core.plan.cut import Cut
from job.core.section import NotNegative, Section, Whole
from job.tune.device.device import cuda_in_use

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, RANDOM, EVALUATIONS, STATE = (
    "optimizer.safetensors",
    "random.safetensors",
    "evaluations.safetensors",
    "state.json",
)
FORMAT = 4
"""Format of the state. The first had no number, held the cut as `plan`, and drew dropout from the generators' state;
the second's cut did not hold what is computed in; the third was always that of one process."""
_BEFORE_FORMAT_3 = {"compute_dtype": "bf16"}
"""What every cut was, on every device."""
_WITHOUT_ROWS = {"rows": "packed"}
"""What a cut that does not name its rows is taken for: where they are others now, the run is equal within rounding."""
_OTHER_BYTES = 2**20
"""Of each file beside its numbers: headers, names."""
_MOST_BYTES_A_STEP, _MOST_BYTES_A_SOURCE, _MOST_STATE_BYTES = 100, 30, 2**24
"""Of the state: its three numbers of a step and one more for each source, and the rest, of which the base's answers are
the most."""
_WORDS = 624
"""Of a Mersenne Twister's state."""
Form = Mapping[str, Tensor]
"""Tensors by name, on the meta device: shapes and types alone."""
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class DamagedStateError(DataError):
    """The folder is no checkpoint of this run, whoever made it so."""


class _Progress(Section):
    step: Whole
    losses: list[_Finite]
    grad_norms: list[_Finite]
    learning_rates: list[_Finite]
    source_losses: list[list[_Finite | None]] = Field(default_factory=list)
    tokens: Whole
    seconds: NotNegative
    ranks: Annotated[int, Field(strict=True, ge=1)] = 1
    nodes_that_sum: Annotated[int, Field(strict=True, ge=1)] = 1
    base_answers: list[str] | None = None
    changes: list[str] = Field(default_factory=list)
    cut: Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the run's own checkpoint must look like."""

    adapter: Form
    optimizer: Mapping[int, Mapping[str, Any]]
    """What the optimizer keeps for each vector from the first step on; tensors on the meta device."""
    cut: Cut
    """The one that is planned now."""
    layers: int
    """Of the decoder."""
    targets: NDArray[np.int64]
    """Target tokens of each held-out document."""
    sources: int
    """Of the training side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint's content."""

    format: int
    progress: Mapping[str, Any]
    """By the names of `Progress`."""
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[int, dict[str, Any]]
    random: Mapping[str, Tensor]
    """Of torch's generators."""
    python_random: tuple[Any, ...]
    numpy_random: tuple[Any, ...]


def read_saved_state(folder: Path, expected: Expected, *, step: int) -> SavedState:
    """The content of a checkpoint's folder.

    Args:
        folder: its files.
        expected: what this run's look like.
        step: the one that its name says.

    Raises:
        DamagedStateError: a file is damaged, of another kind, or of another run.
        DataError: a newer version of the job wrote it.
    """
    try:
        return _read(folder, expected, step)
    except ValidationError as error:
        raise DamagedStateError(f"{folder / STATE}: {first_mistake(error)}") from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        # What is wrong may show at any place, as any failure of the libraries that take it apart.
        raise DamagedStateError(f"{folder}: damaged ({type(error).__name__}: {error!s:.200})") from error


def read_adapter(path: Path, form: Form) -> dict[str, Tensor]:
    """The adapter's weights.

    Raises:
        DamagedStateError: they are damaged, not finite, or those of another model or recipe.
    """
    try:
        return _tensors(path, form)
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise DamagedStateError(
            f"{path}: the adapter is damaged, or belongs to another model or recipe ({error!s:.200})"
        ) from error


def _read(folder: Path, expected: Expected, step: int) -> SavedState:
    content = _json(folder / STATE, most_bytes=_most_bytes(step, expected.sources))
    version = content.get("format", 1)
    if type(version) is int and version > FORMAT:
        raise DataError(
            f"{folder}: its state has format {version}, and this version of the job reads up to {FORMAT}; start it "
            "with the image that wrote the checkpoint, or a newer one"
        )
    if version not in range(1, FORMAT + 1):
        raise ValueError(f"format is {version!r:.40}")
    progress = _progress(dict(content["progress"]), expected, version, step)
    evaluations = _evaluations(folder / EVALUATIONS, content["correct"], expected, step)
    form = {index: expected.optimizer[index] for index in expected.optimizer} if step else {}
    return SavedState(
        format=version,
        progress=progress | {"evaluations": evaluations},
        adapter=read_adapter(folder / ADAPTER, expected.adapter),
        optimizer=_optimizer(folder / OPTIMIZER, content["optimizer"]["state"], form, step),
        random=_generators(folder / RANDOM),
        python_random=_python_random(content["python_random"]),
        numpy_random=_numpy_random(content["numpy_random"]),
    )


def _most_bytes(step: int, sources: int) -> int:
    return _MOST_STATE_BYTES + (_MOST_BYTES_A_STEP + _MOST_BYTES_A_SOURCE * sources) * step


def _json(path: Path, *, most_bytes: int) -> dict[str, Any]:
    _refuse_large(path, most_bytes)
    content = json.loads(path.read_text(encoding="utf-8"))
    if type(content) is not dict:
        raise ValueError(f"{path.name} holds no object")
    return content


def _refuse_large(path: Path, most_bytes: int) -> None:
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{path.name} has {size:,} bytes, and no more than {most_bytes:,} are written there")


def _tensors(path: Path, form: Form) -> dict[str, Tensor]:
    """Exactly the tensors of a form, and finite; a file of any other size is not read at all."""
    _refuse_large(path, _OTHER_BYTES + sum(t.numel() * t.element_size() for t in form.values()))
    with safe_open(path, framework="pt") as file:
        names = [*file.keys()]
        if other := sorted({*names} ^ form.keys()):
            raise ValueError(f"{path.name}: look at {', '.join(other[:6])}")
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (form[name].shape, form[name].dtype):
            raise ValueError(f"{path.name}: {name} is {tensor.dtype} {list(tensor.shape)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path.name}: {name} is not finite")
    return tensors


def _progress(content: dict[str, Any], expected: Expected, version: int, step: int) -> dict[str, Any]:
    if version == 1:
        content["cut"] = _cut_of_format_1(content.pop("plan"), expected.cut, expected.layers)
    elif not isinstance(content["cut"], Mapping):
        raise ValueError("cut is no object")
    else:
        content["cut"] = {**_BEFORE_FORMAT_3, **_WITHOUT_ROWS, **content["cut"]}
    read = _Progress.model_validate(content)
    cut, numbers = read.cut, (read.losses, read.grad_norms, read.learning_rates)
    if read.step != step or any(len(each) != step for each in numbers):
        raise ValueError(f"{STATE} is that of step {read.step}, with the numbers of {[*map(len, numbers)]} steps")
    by_source = [len(each) for each in read.source_losses]
    if by_source != ([expected.sources] * step if expected.sources > 1 else []):
        raise ValueError(f"{STATE} has the losses of other sources")
    layers = {cut.kept_layers, cut.recomputed_layers}
    if min(cut.micro_batch_tokens, cut.evaluation_tokens) < 1 or not layers <= {*range(expected.layers + 1)}:
        raise ValueError("the cut is impossible")
    return {name: getattr(read, name) for name in _Progress.model_fields}


def _cut_of_format_1(plan: Mapping[str, Any], planned: Cut, layers: int) -> Cut:
    """The cut in a state of format 1; what an even older version did not hold is as planned now."""
    known = {name: plan[name] for name in Cut.__slots__ if name in plan}
    if plan.get("checkpointing") and not plan.get("recomputed_layers"):
        known["recomputed_layers"] = layers  # autograd recomputes all or none, which only the switch recorded
    return replace(planned, **(_BEFORE_FORMAT_3 | _WITHOUT_ROWS | known))


def _evaluations(path: Path, correct: Any, expected: Expected, step: int) -> dict[int, Evaluation]:
    """Those up to a step, of just the documents that are held out now."""
    hits = TypeAdapter(dict[str, Whole]).validate_python(correct)
    targets = torch.from_numpy(expected.targets)
    nll = torch.empty(len(targets), dtype=torch.float64, device="meta")
    form = {f"nll.{at}": nll for at in hits} | ({"tokens": targets.to("meta")} if hits else {})
    if any(str(int(at)) != at or not 0 <= int(at) <= step for at in hits):
        raise ValueError(f"it was judged at {[*hits][:4]}")
    tensors = _tensors(path, form)
    if hits and not torch.equal(tensors["tokens"], targets):
        raise ValueError("it was judged on other examples than those that are held out")
    return {
        int(at): Evaluation(step=int(at), nll=tensors[f"nll.{at}"].numpy(), tokens=expected.targets, correct=count)
        for at, count in hits.items()
    }


def _optimizer(path: Path, plain: Any, form: Mapping[int, Mapping[str, Any]], step: int) -> dict[int, dict[str, Any]]:
    """For each vector the tensors of a form, and the number of steps that were made."""
    named = {f"{i}.{name}": t for i, kept in form.items() for name, t in kept.items() if isinstance(t, Tensor)}
    tensors = _tensors(path, named)
    counted = {str(i): {n: step for n, v in kept.items() if not isinstance(v, Tensor)} for i, kept in form.items()}
    made = {name: kept for name, kept in plain.items() if kept}
    if made != {name: kept for name, kept in counted.items() if kept} or any(
        tensor.item() != step for name, tensor in tensors.items() if name.endswith(".step")
    ):
        raise ValueError("the optimizer has made another number of steps")
    state: dict[int, dict[str, Any]] = {i: dict(counted[str(i)]) for i, kept in form.items() if kept}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor
    return state


def _generators(path: Path) -> dict[str, Tensor]:
    _refuse_large(path, _OTHER_BYTES)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    torch.Generator().set_state(tensors["torch"])  # refuses what is none
    if "cuda" in tensors and cuda_in_use():
        torch.Generator(device="cuda").set_state(tensors["cuda"])
    return tensors


def _python_random(state: Any) -> tuple[Any, ...]:
    version, internal, gauss = state
    read = (version, tuple(internal), gauss)
    random.Random().setstate(read)  # noqa: S311 - as above
    return read


def _numpy_random(state: Any) -> tuple[Any, ...]:
    kind, words, position, has_gauss, gauss = state
    read = (kind, np.array(words, dtype=np.uint32), int(position), int(has_gauss), float(gauss))
    if not 0 <= read[2] <= _WORDS:  # numpy would read beyond the words
        raise ValueError("numpy's generator is damaged")
    np.random.RandomState().set_state(read)  # as above
    return read
