"""Examples as they are learned, token by token, shown before there is a GPU: without weights, and without torch."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.core.data.preview import ExamplePreview, SourceTokens
from job.core.data.report_data import DataReport
from job.edge.base import fetching
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import find_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What was found out, for whoever shows it."""

    data: DataReport
    sources: tuple[SourceTokens, ...]
    """Those that are trained on, and what is held out."""
    examples: tuple[ExamplePreview, ...]


def preview(worker: Worker, *, run_id: str | None, phases: Phases, random: int, with_tokens: bool) -> Preview:
    """Read the data and the base's tokenizer, and look at some examples of each source.

    Args:
        worker: with a recipe that was read already.
        run_id: as asked for; None: the run's identity gives it.
        phases: the clock.
        random: examples of each source, besides the first, the longest and the shortest.
        with_tokens: whether to say what each token reads as by itself.

    Raises:
        JobError: as a run would, for what a run would refuse of the data; the base may be without weights.
    """
    from job.stages.data.dataset import prepare_dataset
    from job.tune.data.chats.picture import all_rows, by_source, pictures, source_tokens

    quiet_libraries()
    refuse_planted(worker.workdir)
    recipe = worker.recipe
    run = find_run(recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop, complete=False)
    base = fetching.fetch(
        run.base,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
        weights=False,
        complete=False,
    )
    tokenizer, positions, rows = _tokenizer_of(base.folder)
    worker.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=worker.workdir, prefix="preview-") as scratch:
        dataset = prepare_dataset(
            worker, run, tokenizer, positions=positions, rows=rows, folder=Path(scratch), phases=phases
        )
        sources = by_source(dataset.train, [source.name for source in recipe.data.sources])
        held_out = dataset.validation
        return Preview(
            data=dataset.report,
            sources=(
                *(source_tokens(dataset.train, source=name, rows=own) for name, own in sources),
                source_tokens(held_out, source="(held out)", rows=all_rows(held_out)),
            ),
            examples=tuple(
                each
                for name, own in sources
                for each in pictures(
                    dataset.train,
                    tokenizer,
                    source=name,
                    rows=own,
                    random=random,
                    seed=recipe.train.seed,
                    with_tokens=with_tokens,
                )
            ),
        )


def _tokenizer_of(folder: Path) -> tuple[Any, int, int]:
    """The base's tokenizer, positions and rows of embeddings, as its files name them; else as training loads them."""
    from job.tune.model.tokenizer import named_positions, named_rows, named_tokenizer

    tokenizer, positions, rows = named_tokenizer(folder), named_positions(folder), named_rows(folder)
    if tokenizer is not None and positions is not None and rows is not None:
        return tokenizer, positions, rows
    from job.tune.model.config import load_tokenizer, read_config, shape_of

    shape = shape_of(read_config(folder))
    return load_tokenizer(folder), shape.positions, shape.vocabulary
