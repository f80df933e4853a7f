"""Where a run goes on: from the newest checkpoint that verifies, else from the seed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from job.core.crash_points import crash_point
from job.core.plan.cut import Cut, described, is_same_arithmetic
from job.core.recipe.schema import Recipe
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.checkpoint import State
from job.tune.loop.saved_state import DamagedStateError

log = structlog.get_logger(__name__)

_OTHER_MASKS = " (and dropout draws other masks)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where this attempt begins."""

    checkpoint: Checkpoint | None
    """None: at the start."""
    passed_over: tuple[dict[str, str], ...]
    """Newer checkpoints that did not verify, each with the reason."""


def resume(
    state: State,
    artifacts: Artifacts,
    recipe: Recipe,
    scratch: Path,
    *,
    layers: int,
    targets: NDArray[np.int64],
    sources: int,
    should_stop: Callable[[], bool],
) -> Resumed:
    """Bring the state to where the run stands.

    Args:
        state: fresh, with the cut that is planned for this device and how many processes make a step from here on.
        artifacts: the run.
        recipe: its seed and dropout.
        scratch: a folder for the checkpoint on its way.
        layers: of the decoder.
        targets: target tokens of each held-out document.
        sources: of the training side.
        should_stop: polled while files arrive.

    Raises:
        DataError: a checkpoint of a newer version of the job.
    """
    torch.manual_seed(recipe.train.seed)
    planned, now = state.progress.cut, _processes(state)
    loaded = checkpoints.Loaded(is_of_format_1=False)

    def refusal(checkpoint: Checkpoint, folder: Path) -> str | None:
        nonlocal loaded
        try:
            loaded = checkpoints.load(
                state, folder, step=checkpoint.step, layers=layers, targets=targets, sources=sources
            )
        except DamagedStateError as error:
            return str(error)
        return None

    newest, passed_over = artifacts.fetch_newest(
        scratch, should_stop=should_stop, only=checkpoints.FILES, refusal=refusal
    )
    if newest is None:
        return Resumed(checkpoint=None, passed_over=tuple(passed_over))
    shutil.rmtree(scratch / newest.name)
    crash_point("resume.after")
    dropout, before = recipe.lora.dropout > 0, _processes(state)
    state.progress.changes += _changes(newest, state.progress.cut, planned, loaded, dropout=dropout)
    if before != now:
        where = f"resumed at step {newest.step} in {_described(*now)} after {_described(*before)}"
        masks = _OTHER_MASKS if dropout else ""
        state.progress.changes.append(f"{where}: equal within rounding, not to the bit{masks}")
    state.progress.ranks, state.progress.nodes_that_sum = now
    if before != now or not is_same_arithmetic(state.progress.cut, planned):  # other shares are cut another way
        state.progress.cut = planned
    return Resumed(checkpoint=newest, passed_over=tuple(passed_over))


def _processes(state: checkpoints.State) -> tuple[int, int]:
    return state.progress.ranks, state.progress.nodes_that_sum


def _described(ranks: int, nodes: int) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}" + (f" of {nodes} nodes" if nodes > 1 else "")


def _changes(newest: Checkpoint, before: Cut, now: Cut, loaded: checkpoints.Loaded, *, dropout: bool) -> list[str]:
    """What makes the run another one than without the interruption, in sentences."""
    if not is_same_arithmetic(before, now):
        where = f"resumed at step {newest.step} on {described(now)} after {described(before)}"
        return [f"{where}: equal within rounding, not to the bit" + (_OTHER_MASKS if dropout else "")]
    if not loaded.is_of_format_1:
        return []
    others = [*["dropout draws other masks"] * dropout, *["layers are compiled otherwise"] * before.compiled]
    resumed = f"resumed at step {newest.step} from an earlier version's checkpoint"
    return [f"{resumed}: {' and '.join(others)}"] if others else []
