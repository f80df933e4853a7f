"""The proof of a merged model: its loss over held-out examples, beside that of the adapter it was made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from job.core.errors import DataError, SickDeviceError
from job.core.judging.held_out import MOST_DRAWN, drawn_examples
from job.core.recipe.schema import Recipe
from job.core.reports.export import ExportLosses
from job.core.reports.report import Report
from job.stages.attempt import Phases
from job.tune.data.documents import Documents
from job.tune.device.compute_dtype import compute_dtype
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import load_adapter
from job.tune.loop.evaluate import evaluate
from job.tune.merging.layered import Layered, give_memory
from job.tune.model.adapter import attach_lora
from job.tune.model.config import read_config, read_wrapper

_TOKENS_AT_ONCE = {"cuda": 16384, "cpu": 2048}
"""Of a forward: every layer is read anew for each of them, unless the GPU has room for all."""


def refuse_other_examples(report: Report, validation: Documents) -> None:
    """See that the held-out examples are those that the report speaks of.

    Raises:
        DataError: they are others.
    """
    tokens, reported = int(validation.targets.sum()), report.evaluations[0].tokens
    if (len(validation), tokens) != (report.data.validation.used, reported):
        raise DataError(
            f"{report.run_uri}: {len(validation)} held-out examples with {tokens:,} target tokens are made of the "
            f"data now, and the report was of {report.data.validation.used} with {reported:,}; export with the image "
            "that wrote the report"
        )


def proof_examples(report: Report, validation: Documents, *, most: int | None) -> list[int]:
    """Places of the held-out examples that the proof is on: all, or some, evenly from those with a loss in the report.

    Raises:
        DataError: fewer are asked for, and the report holds no loss of single examples.
    """
    if most is None or most >= len(validation):
        return [*range(len(validation))]
    if report.held_out is None:
        raise DataError(
            f"{report.run_uri}/report.json: an earlier version wrote it, without the loss of each example; leave "
            "--proof-examples out"
        )
    return drawn_examples(len(validation), most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """By what a merged model is judged."""

    report: Report
    recipe: Recipe
    """The run's."""
    validation: Documents
    """The run's held-out examples."""
    places: Sequence[int]
    """Of those that are judged."""
    device: torch.device
    phases: Phases
    should_stop: Callable[[], bool]


def prove_merged(judging: Judging, *, base: Path, adapter: Path, merged: Path) -> ExportLosses:
    """Judge the merged model as it stands in its files, and the adapter beside the base that it was merged into.

    Args:
        judging: by what.
        base: folder of the base.
        adapter: folder of the adapter.
        merged: folder of the merged model.

    Raises:
        SickDeviceError: a loss is not finite.
    """
    report, recipe, device = judging.report, judging.recipe, judging.device
    documents = _chosen(judging.validation, judging.places)
    layered = Layered(read_config(base), device=device, dtype=compute_dtype(device))
    adapted = attach_lora(
        layered.model,
        recipe.lora,
        source=report.model.base,
        revision=recipe.model.revision,
        seed=recipe.train.seed,
    )
    give_memory(adapted, device)
    load_adapter(adapted, adapter, read_wrapper(base))
    model = PackedModel(adapted).eval()
    model.linears.leave_to_peft()  # ours take the weights as they stand when the model is made

    def loss_of(folder: Path) -> float:
        layered.read_from(folder, not_finite=set())
        found = evaluate(
            model,
            documents,
            step=report.sweet_spot.step,
            tokens_at_once=_TOKENS_AT_ONCE[device.type],
            should_stop=judging.should_stop,
            on_progress=lambda done: judging.phases.progress(evaluated=done),
        ).loss
        if not np.isfinite(found):
            raise SickDeviceError(f"the validation loss of {folder} is {found} on this device; try another one")
        return found

    unmerged = loss_of(base)
    with adapted.disable_adapter():
        alone = loss_of(merged)
    return ExportLosses(
        examples=len(documents),
        of_examples=len(judging.validation),
        tokens=int(documents.targets.sum()),
        merged=alone,
        unmerged=unmerged,
        reported=_reported(report, judging.validation, judging.places),
        base=report.sweet_spot.base_loss,
    )


def _chosen(validation: Documents, places: Sequence[int]) -> Documents:
    if len(places) == len(validation):
        return validation
    some = np.asarray(places)
    return replace(
        validation, rows=validation.rows[some], lengths=validation.lengths[some], targets=validation.targets[some]
    )


def _reported(report: Report, validation: Documents, places: Sequence[int]) -> float:
    """The same examples' loss in the report."""
    if len(places) == len(validation) or report.held_out is None:
        return report.sweet_spot.loss
    drawn = {place: number for number, place in enumerate(drawn_examples(len(validation), most=MOST_DRAWN))}
    tokens = validation.targets[np.asarray(places)]
    losses = np.asarray([report.held_out.tuned[drawn[place]] for place in places])
    return float((losses * tokens).sum() / tokens.sum())
