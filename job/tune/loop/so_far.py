"""Reads of a checkpoint what people are shown of a run that is not finished: losses and evaluations, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from job.core.judging.verdict import Evaluation
from job.core.section import NotNegative, Whole
from job.tune.loop.saved_state import EVALUATIONS, FORMAT, STATE, DamagedStateError

FILES = (STATE, EVALUATIONS)
"""What is fetched of it."""
_MOST_BYTES = 2**28
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Progress(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    step: Whole
    losses: tuple[_Finite, ...]
    grad_norms: tuple[_Finite, ...]
    learning_rates: tuple[_Finite, ...]
    tokens: Whole
    seconds: NotNegative


class _State(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int = 1
    progress: _Progress
    correct: Mapping[int, Whole]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoFar:
    """What is committed of a run."""

    step: int
    losses: tuple[float, ...]
    """Of each step, as the next two."""
    grad_norms: tuple[float, ...]
    learning_rates: tuple[float, ...]
    tokens: int
    """Real tokens trained on."""
    seconds: float
    """In training steps, over all attempts."""
    evaluations: Mapping[int, Evaluation]
    """By step."""


def read_so_far(folder: Path, *, step: int) -> SoFar:
    """What a checkpoint's folder says of its run.

    Args:
        folder: with its `FILES`.
        step: the one that its name says.

    Raises:
        DamagedStateError: it is none of this job, or of a newer version.
    """
    try:
        state = _State.model_validate(_json(folder / STATE))
        evaluations = _evaluations(folder / EVALUATIONS, state.correct)
    except (ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise DamagedStateError(f"{folder}: damaged ({type(error).__name__}: {error!s:.200})") from error
    progress = state.progress
    numbers = progress.losses, progress.grad_norms, progress.learning_rates
    if state.format > FORMAT or progress.step != step or any(len(each) != step for each in numbers):
        raise DamagedStateError(f"{folder}: not the state of step {step} as this version of the job writes it")
    return SoFar(
        step=step,
        losses=progress.losses,
        grad_norms=progress.grad_norms,
        learning_rates=progress.learning_rates,
        tokens=progress.tokens,
        seconds=progress.seconds,
        evaluations=evaluations,
    )


def _json(path: Path) -> Any:
    _refuse_large(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _refuse_large(path: Path) -> None:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is larger than a run's state can be")


def _evaluations(path: Path, correct: Mapping[int, int]) -> dict[int, Evaluation]:
    if not correct:
        return {}
    _refuse_large(path)
    with safe_open(path, framework="np") as file:
        tokens = file.get_tensor("tokens")
        losses = {step: file.get_tensor(f"nll.{step}") for step in sorted(correct)}
    if tokens.dtype != np.int64 or tokens.ndim != 1 or not len(tokens) or tokens.min() < 1:
        raise ValueError(f"{path.name}: tokens are no counts")
    for each in losses.values():
        _refuse_other(each, tokens)
    return {at: Evaluation(step=at, nll=nll, tokens=tokens, correct=correct[at]) for at, nll in losses.items()}


def _refuse_other(nll: NDArray[Any], tokens: NDArray[np.int64]) -> None:
    if nll.dtype != np.float64 or nll.shape != tokens.shape or not np.isfinite(nll).all():
        raise ValueError("losses are no losses")
