"""Training state <-> a local folder: safetensors and JSON only, so that nothing from a bucket can run code."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from job.core.crash_points import crash_point
from job.core.cut import Cut
from job.core.errors import DataError
from job.core.verdict import Evaluation
from job.tune.device.random_state import random_state, restore_random_state

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""What PEFT and vLLM read."""
_OPTIMIZER, _RANDOM, _EVALUATIONS, _STATE = (
    "optimizer.safetensors",
    "random.safetensors",
    "evaluations.safetensors",
    "state.json",
)
FILES = (*ADAPTER_FILES, _OPTIMIZER, _RANDOM, _EVALUATIONS, _STATE)
"""What a checkpoint is made of."""
_FORMAT = 3
"""Format of the state. The first had no number, held the cut as `plan`, and drew dropout from the generators' state;
the second's cut did not hold what is computed in."""
_BEFORE_FORMAT_3: dict[str, Any] = {"compute_dtype": "bf16"}
"""What every cut was, on every device."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands: everything that is not in the model, the optimizer or the random generators."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, in nats a target token."""
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    tokens: int = 0
    """Real tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all attempts."""
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    base_answers: list[str] | None = None
    """What the base answered before training; None: it was not asked yet."""
    cut: Cut
    """How batches are cut from here on."""
    changes: list[str] = field(default_factory=list)
    """What made this run differ from an undisturbed one, over all attempts, in sentences; empty: equal to the bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a checkpoint holds and restores."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: Any
    progress: Progress


def save(state: State, folder: Path) -> None:
    """Write the whole state into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # save_embedding_layers: with an adapter on lm_head PEFT would write the whole fp32 head, 524 MB for Llama-2-7B.
    state.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    _order_targets(folder / ADAPTER_FILES[1])
    tensors, plain = _flatten(state.optimizer.state_dict())
    save_file(tensors, folder / _OPTIMIZER)
    crash_point("save.middle")
    save_file(random_state(), folder / _RANDOM)
    save_file(_evaluation_tensors(state.progress.evaluations), folder / _EVALUATIONS)
    progress = {
        f.name: getattr(state.progress, f.name) for f in fields(Progress) if f.name not in {"evaluations", "cut"}
    }
    content = {
        "format": _FORMAT,
        "progress": progress | {"cut": asdict(state.progress.cut)},
        "correct": {str(step): e.correct for step, e in state.progress.evaluations.items()},
        "optimizer": plain,
        "scheduler": _plain_schedule(state.scheduler.state_dict()),
        "python_random": random.getstate(),
        "numpy_random": _plain_numpy_state(),
    }
    (folder / _STATE).write_text(json.dumps(content), encoding="utf-8")


def _order_targets(config: Path) -> None:
    """Sort the targets: PEFT keeps them in a set, whose order, and so the file's hash, each process draws anew."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(content["target_modules"], list):
        content["target_modules"].sort()
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a checkpoint says about itself, beside the state that it restored."""

    is_of_format_1: bool
    """Whether its dropout drew from the generators' state, and compiled layers had code for each padded size."""


def load(state: State, folder: Path, *, layers: int) -> Loaded:
    """Restore model, optimizer, scheduler, progress and random generators from a folder.

    Args:
        state: of a run with the same recipe; its cut is the one planned now.
        folder: a whole checkpoint, of this version of the job or of an earlier one.
        layers: number of the decoder's layers.

    Raises:
        DataError: it holds another kind of state, or that of another model.
    """
    content = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    version = content.get("format", 1)
    if version not in range(1, _FORMAT + 1):
        raise DataError(
            f"{folder}: its state has format {version}, and this version of the job reads up to {_FORMAT}; start it "
            "with the image that wrote the checkpoint, or a newer one"
        )
    progress = dict(content["progress"])
    if version == 1:
        cut = _cut_of_format_1(progress.pop("plan"), state.progress.cut, layers)
    else:
        cut = Cut(**(_BEFORE_FORMAT_3 | progress["cut"]))
    load_adapter(state.model, folder)
    state.optimizer.load_state_dict(_unflatten(load_file(folder / _OPTIMIZER), content["optimizer"]))
    state.scheduler.load_state_dict(content["scheduler"])
    for name, value in (progress | {"cut": cut}).items():
        setattr(state.progress, name, value)
    state.progress.evaluations = _evaluations(load_file(folder / _EVALUATIONS), content["correct"])
    _restore_random(load_file(folder / _RANDOM), content)
    return Loaded(is_of_format_1=version == 1)


def _cut_of_format_1(plan: Mapping[str, Any], planned: Cut, layers: int) -> Cut:
    """The cut in a state of format 1; what an even older version did not hold is as planned now."""
    known = {name: plan[name] for name in Cut.__slots__ if name in plan}
    if plan.get("checkpointing") and not plan.get("recomputed_layers"):
        known["recomputed_layers"] = layers  # autograd recomputes all or none, which only the switch recorded
    return replace(planned, **(_BEFORE_FORMAT_3 | known))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter of a folder into the model; every tensor must find its place.

    Raises:
        DataError: it is another model's.
    """
    weights = load_file(folder / ADAPTER_FILES[0])
    result = set_peft_model_state_dict(model, weights)
    missing = get_peft_model_state_dict(model, save_embedding_layers=False).keys() - weights.keys()
    if result.unexpected_keys or missing:
        names = [*result.unexpected_keys[:3], *sorted(missing)[:3]]
        raise DataError(f"{folder}: the adapter belongs to another model or recipe; look at {', '.join(names)}")


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state -> tensors for safetensors, and the rest for JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        plain[str(index)] = {}
        for name, value in _unwrapped(entries):
            if isinstance(value, Tensor):
                # Cloned: the quantisation maps of 8-bit states are one tensor shared by all parameters.
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                plain[str(index)][name] = value
    groups = [{k: v for k, v in group.items() if k != "lr_lambda"} for group in state["param_groups"]]
    return tensors, {"state": plain, "groups": groups}


def _unwrapped(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of one parameter; bitsandbytes saves its 8-bit tensors in an inner dict, and loads them without it."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": [_tupled(group) for group in plain["groups"]]}


def _tupled(group: Mapping[str, Any]) -> dict[str, Any]:
    # JSON knows no tuples; betas is one.
    return {name: tuple(value) if name == "betas" else value for name, value in group.items()}


def _plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        # LambdaLR asks for the key; its functions are made anew from the recipe.
        "lr_lambdas": [None for _ in state.get("lr_lambdas", [])]
    }


def _plain_numpy_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries draw from
    return [kind, np.asarray(keys).tolist(), *rest]


def _restore_random(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    restore_random_state(tensors)
    version, internal, gauss = state["python_random"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy_random"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - as above


def _evaluation_tensors(evaluations: Mapping[int, Evaluation]) -> dict[str, Tensor]:
    tensors = {f"nll.{step}": torch.from_numpy(e.nll) for step, e in evaluations.items()}
    if evaluations:
        tensors["tokens"] = torch.from_numpy(next(iter(evaluations.values())).tokens)
    return tensors


def _evaluations(tensors: Mapping[str, Tensor], correct: Mapping[str, int]) -> dict[int, Evaluation]:
    return {
        int(step): Evaluation(
            step=int(step), nll=tensors[f"nll.{step}"].numpy(), tokens=tensors["tokens"].numpy(), correct=hits
        )
        for step, hits in correct.items()
    }
