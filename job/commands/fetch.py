"""Base model and data to a local folder beforehand, with a recipe that needs no network but its output."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from job.core.recipe.data_section import DataSource
from job.edge.base import fetching
from job.edge.dataset_files import fetch_files
from job.edge.store.listing import expand
from job.stages.attempt import Phases, Worker


def fetch(worker: Worker, phases: Phases, folder: Path) -> Path:
    """Fill the folder: models/, data/, and recipe.yaml that names them; a base in a local folder stays where it is.

    Returns:
        The recipe to run on a node without internet.
    """
    recipe = worker.recipe
    folder = folder.resolve()
    with phases.phase("fetch_base"):
        identity = fetching.identify(recipe.model.base, recipe.model.revision, settings=worker.settings)
        base = fetching.fetch(
            identity,
            models_folder=folder / "models",
            settings=worker.settings,
            should_stop=worker.should_stop,
            on_progress=phases.fetched,
        )
    local = recipe.model_dump(mode="json")
    local["model"] = {"base": str(base.folder.resolve())}
    with phases.phase("download"):
        for side, sources in (("train", recipe.data.sources), ("validation", recipe.data.held_out_sources)):
            if sources:
                local["data"][side] = _fetched(worker, phases, local["data"][side], sources, folder / "data" / side)
        if recipe.promote.regression is not None:
            kept = folder / "data" / "regression"
            local["promote"]["regression"] = _files(worker, phases, recipe.promote.regression, kept)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_without_nothing(local), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _fetched(
    worker: Worker,
    phases: Phases,
    written: Sequence[str | dict[str, object]],
    sources: Sequence[DataSource],
    folder: Path,
) -> Sequence[str | dict[str, object]]:
    """One side of the data as the recipe lists it, with the files' places here; a source keeps the name that it had."""
    if not isinstance(written[0], dict):
        return _files(worker, phases, sources[0].uris, folder)
    return [
        {**each, "name": source.name, "uri": _files(worker, phases, source.uris, folder / f"{place:03d}")}
        for place, (each, source) in enumerate(zip(written, sources, strict=True))
        if isinstance(each, dict)
    ]


def _files(worker: Worker, phases: Phases, uris: tuple[str, ...], folder: Path) -> list[str]:
    objects = expand(uris, worker.settings, should_stop=worker.should_stop)
    files = fetch_files(
        objects,
        folder,
        worker.settings,
        should_stop=worker.should_stop,
        on_progress=lambda done: phases.progress(bytes=done, of=sum(o.size for o in objects)),
    )
    return [str(file.path) for file in files]


def _without_nothing(content: dict[str, dict[str, object]]) -> dict[str, object]:
    """Keys without a value are left out, as a person would."""
    return {
        name: {k: v for k, v in section.items() if v is not None} if isinstance(section, dict) else section
        for name, section in content.items()
    }
