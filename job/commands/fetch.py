"""Base model and data to a local folder beforehand, with a recipe that needs no network but its output."""

from pathlib import Path

import yaml

from job.core.data_section import Fraction
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
        local["data"]["train"] = _files(worker, phases, recipe.data.train, folder / "data" / "train")
        if not isinstance(recipe.data.validation, Fraction):
            local["data"]["validation"] = _files(worker, phases, recipe.data.validation, folder / "data" / "validation")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_without_nothing(local), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


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
