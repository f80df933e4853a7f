"""Training state <-> a local folder: safetensors and JSON only, so that nothing from a bucket can run code."""

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from job.core.crash_points import crash_point
from job.core.judging.verdict import Evaluation
from job.core.plan.cut import Cut
from job.tune.device.random_state import random_state, restore_random_state
from job.tune.loop.optimizer import set_schedule, state_after_a_step
from job.tune.loop.saved_state import (
    ADAPTER,
    ADAPTER_CONFIG,
    EVALUATIONS,
    FORMAT,
    OPTIMIZER,
    RANDOM,
    STATE,
    Expected,
    read_adapter,
    read_saved_state,
)
from job.tune.model.adapter import name_for_whole
from job.tune.model.wrappers import Wrapper

ADAPTER_FILES = (ADAPTER, ADAPTER_CONFIG)
"""What PEFT and vLLM read."""
FILES = (*ADAPTER_FILES, OPTIMIZER, RANDOM, EVALUATIONS, STATE)
"""What a checkpoint is made of."""


_OF_PEFT = "base_model.model."
"""Before each name of the model that PEFT put an adapter on."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands: everything that is not in the model, the optimizer or the random generators."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, in nats a target token."""
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    source_losses: list[list[float | None]] = field(default_factory=list)
    """Of each step the training loss of each source, None for one that it has nothing of; empty where there is one."""
    tokens: int = 0
    """Real tokens trained on."""
    seconds: float = 0.0
    """Time spent in training steps, over all attempts."""
    ranks: int = 1
    """How many processes make each step: whose gradients are summed is a matter of it, and so is rounding."""
    nodes_that_sum: int = 1
    """See `Seat`: of that too."""
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
    tensors, plain = flatten(state.optimizer.state_dict())
    save_file(tensors, folder / OPTIMIZER)
    crash_point("save.middle")
    save_file(random_state(), folder / RANDOM)
    save_file(_evaluation_tensors(state.progress.evaluations), folder / EVALUATIONS)
    progress = {
        f.name: getattr(state.progress, f.name) for f in fields(Progress) if f.name not in {"evaluations", "cut"}
    }
    if not state.progress.source_losses:  # what a run of one source saves, earlier versions read as well
        del progress["source_losses"]
    content = {
        "format": FORMAT,
        "progress": progress | {"cut": asdict(state.progress.cut)},
        "correct": {str(step): e.correct for step, e in state.progress.evaluations.items()},
        "optimizer": plain,  # its groups and the schedule are for earlier versions: they follow from recipe and step
        "scheduler": _plain_schedule(state.scheduler.state_dict()),
        "python_random": random.getstate(),
        "numpy_random": _plain_numpy_state(),
    }
    (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def _order_targets(config: Path) -> None:
    """Sort the targets: PEFT keeps them in a set, whose order, and so the file's hash, each process draws anew."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for targets in ("target_modules", "target_parameters"):
        if isinstance(content[targets], list):
            content[targets].sort()
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a checkpoint says about itself, beside the state that it restored."""

    is_of_format_1: bool
    """Whether its dropout drew from the generators' state, and compiled layers had code for each padded size."""


def load(state: State, folder: Path, *, step: int, layers: int, targets: NDArray[np.int64], sources: int = 1) -> Loaded:
    """Restore model, optimizer, schedule, progress and random generators; nothing is touched before all is read.

    Args:
        state: of a run with the same recipe; its cut is the one planned now.
        folder: a whole checkpoint, of this version of the job or of an earlier one.
        step: the one that its name says.
        layers: number of the decoder's layers.
        targets: target tokens of each held-out document.
        sources: of the training side.

    Raises:
        DamagedStateError: it is not what this run writes.
        DataError: a newer version of the job wrote it.
    """
    expected = Expected(
        adapter=adapter_form(state.model),
        optimizer=state_after_a_step(state.optimizer),
        cut=state.progress.cut,
        layers=layers,
        targets=targets,
        sources=sources,
    )
    saved = read_saved_state(folder, expected, step=step)
    set_peft_model_state_dict(state.model, dict(saved.adapter))
    # What the optimizer is, and its rate at this step, the recipe says; only what it has gathered comes from the file.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": dict(saved.optimizer), "param_groups": groups})
    set_schedule(state.scheduler, state.optimizer, step=step)
    for name, value in saved.progress.items():
        setattr(state.progress, name, value)
    restore_random_state(saved.random)
    random.setstate(saved.python_random)
    np.random.set_state(saved.numpy_random)  # noqa: NPY002 - as in _plain_numpy_state
    return Loaded(is_of_format_1=saved.format == 1)


def adapter_form(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names that they are saved under: shapes and types alone."""
    return {name: t.to("meta") for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def load_adapter(model: PeftModel, folder: Path, wrapper: Wrapper | None) -> None:
    """Put the adapter of a folder into the model; every tensor must find its place.

    Args:
        model: base and adapter.
        folder: with a published adapter.
        wrapper: the multimodal model that the base is the decoder of.

    Raises:
        DamagedStateError: it is damaged, or another model's.
    """
    form = adapter_form(model)
    names = _published_names(form, wrapper)
    tensors = read_adapter(folder / ADAPTER, {names[name]: tensor for name, tensor in form.items()})
    set_peft_model_state_dict(model, {name: tensors[names[name]] for name in form})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterToPublish:
    """What our adapter looks like, whoever saved its weights."""

    form: Mapping[str, Tensor]
    names: Mapping[str, str]
    """What its tensors are called when they are published."""
    config: str
    """adapter_config.json."""

    def write(self, weights: Path, folder: Path) -> None:
        """Write both files anew, from weights that come from a store.

        Raises:
            DamagedStateError: they are not those of this adapter.
        """
        tensors = read_adapter(weights, self.form)
        folder.mkdir(parents=True, exist_ok=True)
        named = {self.names[name]: tensor for name, tensor in tensors.items()}
        save_file(named, folder / ADAPTER, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(self.config, encoding="utf-8")


def adapter_to_publish(model: PeftModel, wrapper: Wrapper | None) -> AdapterToPublish:
    """What is published of this model once its weights are chosen.

    Args:
        model: base and adapter.
        wrapper: the multimodal model that the base is the decoder of: then names and targets are those of the whole.
    """
    ours: Any = model.peft_config["default"]
    config = type(ours)(**ours.to_dict() | {"inference_mode": True})
    if wrapper is not None:
        name_for_whole(config, model, wrapper)
    form = adapter_form(model)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        _order_targets(Path(folder) / ADAPTER_CONFIG)
        written = (Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")
    return AdapterToPublish(form=form, names=_published_names(form, wrapper), config=written)


def _published_names(form: Mapping[str, Tensor], wrapper: Wrapper | None) -> dict[str, str]:
    """A tensor's name on the decoder -> on the model that was published."""
    if wrapper is None:
        return {name: name for name in form}
    return {name: f"{_OF_PEFT}{wrapper.outside(name.removeprefix(_OF_PEFT))}" for name in form}


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        # LambdaLR asks for the key; its functions are made anew from the recipe.
        "lr_lambdas": [None for _ in state.get("lr_lambdas", [])]
    }


def _plain_numpy_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries draw from
    return [kind, np.asarray(keys).tolist(), *rest]


def _evaluation_tensors(evaluations: Mapping[int, Evaluation]) -> dict[str, Tensor]:
    tensors = {f"nll.{step}": torch.from_numpy(e.nll) for step, e in evaluations.items()}
    if evaluations:
        tensors["tokens"] = torch.from_numpy(next(iter(evaluations.values())).tokens)
    return tensors
