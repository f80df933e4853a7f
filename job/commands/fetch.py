"""Base model and data to a local folder beforehand, with a recipe that needs no network but its output."""

from pathlib import Path

import yaml

from job.core.recipe import Fraction
from job.edge.base import fetching as base_model
from job.edge.dataset_files import fetch_files
from job.edge.store.listing import expand
from job.stages.attempt import Attempt


def fetch(attempt: Attempt, folder: Path) -> Path:
    """Fill the folder: models/, data/, and recipe.yaml that names them; a base in a local folder stays where it is.

    Returns:
        The recipe to run on a node without internet.
    """
    recipe = attempt.recipe
    folder = folder.resolve()
    with attempt.phases.phase("fetch_base"):
        identity = base_model.identify(recipe.model.base, recipe.model.revision, settings=attempt.settings)
        base = base_model.fetch(
            identity,
            models_folder=folder / "models",
            settings=attempt.settings,
            should_stop=attempt.should_stop,
            on_progress=lambda done, of: attempt.phases.progress(bytes=done, of=of),
        )
    local = recipe.model_dump(mode="json")
    local["model"] = {"base": str(base.folder.resolve())}
    with attempt.phases.phase("download"):
        local["data"]["train"] = _files(attempt, recipe.data.train, folder / "data" / "train")
        if not isinstance(recipe.data.validation, Fraction):
            local["data"]["validation"] = _files(attempt, recipe.data.validation, folder / "data" / "validation")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_without_nothing(local), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _files(attempt: Attempt, uris: tuple[str, ...], folder: Path) -> list[str]:
    objects = expand(uris, attempt.settings, should_stop=attempt.should_stop)
    files = fetch_files(
        objects,
        folder,
        attempt.settings,
        should_stop=attempt.should_stop,
        on_progress=lambda done: attempt.phases.progress(bytes=done, of=sum(o.size for o in objects)),
    )
    return [str(file.path) for file in files]


def _without_nothing(content: dict[str, dict[str, object]]) -> dict[str, object]:
    """Keys without a value are left out, as a person would."""
    return {
        name: {k: v for k, v in section.items() if v is not None} if isinstance(section, dict) else section
        for name, section in content.items()
    }
