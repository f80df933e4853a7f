"""A finished run's adapter merged into its base, proved, and put where it was asked for."""

import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from job import __version__
from job.core.base.servers import readable_settings
from job.core.errors import DataError, UsageError
from job.core.recipe.schema import Recipe
from job.core.reports.export import Export, ExportLosses, limits_of, refusal
from job.core.reports.onto import Onto
from job.core.reports.report import AdapterFile, Report
from job.edge.base import fetching
from job.edge.base.fetching import BaseModelIdentity
from job.edge.base.files import present_files, small_files
from job.edge.exports import EXPORT_JSON, Aside, ExportPlace
from job.edge.relative_paths import located
from job.edge.run.artifacts import Artifacts
from job.edge.store.folder import FileEntry
from job.render.cards.merged import merged_card
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import frozen_run
from job.stages.base.base_source import refuse_changed_base
from job.stages.base.hardware import hardware_errors
from job.stages.data.dataset import Dataset, prepare_dataset
from job.stages.finishing.export_proof import Judging, proof_examples, prove_merged, refuse_other_examples
from job.tune.device.device import choose_device
from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.merging.files import merged_config
from job.tune.merging.preparing import Prepared, prepare_merge
from job.tune.model.base import is_quantised
from job.tune.model.config import CONFIG, load_tokenizer, read_config, shape_of
from job.tune.model.promises import hold_to_promises
from job.tune.model.serving import GENERATION_CONFIG, TOKENIZER_CONFIG, taught_stops, taught_template
from job.tune.model.stored.mxfp4 import is_published_in_mxfp4

log = structlog.get_logger(__name__)
_CARD = "README.md"
_TEMPLATE = "chat_template.jinja"
_NOT_COPIED = frozenset({CONFIG, GENERATION_CONFIG, _CARD, EXPORT_JSON, "model.safetensors.index.json", *ADAPTER_FILES})
"""Written anew, or of no use beside merged weights."""
_TEMPLATES = (_TEMPLATE, "chat_template.json", "additional_chat_templates/")
_ROOM_BESIDE = 2**28
"""Bytes for what is written beside the weights: tokenizers have tens of megabytes."""
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The run whose adapter is exported."""

    artifacts: Artifacts
    report: Report
    recipe: Recipe

    @property
    def base(self) -> BaseModelIdentity:
        """That it was trained on."""
        return BaseModelIdentity(source=self.report.model.base, revision=self.report.model.revision)


def export_run(
    run: Finished, worker: Worker, place: ExportPlace, phases: Phases, *, onto: Onto, most_examples: int | None
) -> Export:
    """Merge, prove, and put in its place; what stands there already is left as it is.

    Args:
        run: a finished one.
        worker: with the run's recipe.
        place: where the merged model goes.
        phases: the clock.
        onto: on what the adapter is merged.
        most_examples: held-out examples that the proof is on; None: all.

    Raises:
        JobError: refused; nothing stands in the place then.
    """
    with phases.phase("identify"):
        if (there := _already_there(run, place, onto)) is not None:
            return there
        device = choose_device(worker.device)
        refuse_changed_base(run.base, worker.settings)
        frozen = frozen_run(
            run.recipe, run.artifacts, run.base, settings=worker.settings, should_stop=worker.should_stop
        )
    with phases.phase("fetch_base"):
        small = _fetch(run, worker, phases, weights=False)
        hold_to_promises(small, _headers(run, worker), source=run.base.source)
    worker.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=worker.workdir, prefix="export-") as scratch:
        shape, tokenizer = shape_of(read_config(small)), load_tokenizer(small)
        dataset = prepare_dataset(
            worker,
            frozen,
            tokenizer,
            positions=shape.positions,
            rows=shape.vocabulary,
            folder=Path(scratch),
            phases=phases,
        )
        refuse_other_examples(run.report, dataset.validation)
        places = proof_examples(run.report, dataset.validation, most=most_examples)
        with phases.phase("fetch_weights"):
            base, adapter = _fetch(run, worker, phases, weights=True), worker.workdir / "adapters" / run.report.run_id
            _fetch_adapter(run, adapter, worker.should_stop)
        prepared = prepare_merge(base, *(adapter / name for name in ADAPTER_FILES), onto=onto, device=device)
        with hardware_errors(device), place.aside(needed_bytes=prepared.weights.bytes + _ROOM_BESIDE) as aside:
            with phases.phase("merge"):
                _write_weights(prepared, aside, base, phases)
                stops = _write_beside(run, dataset, tokenizer, prepared, aside, base)
            with phases.phase("prove"):
                judging = Judging(
                    report=run.report,
                    recipe=run.recipe,
                    validation=dataset.validation,
                    places=places,
                    device=device,
                    phases=phases,
                    should_stop=worker.should_stop,
                )
                losses = prove_merged(judging, base=base, adapter=adapter, merged=aside.path)
            if (reason := refusal(losses, onto)) is not None:
                raise UsageError(f"{run.report.run_uri}: {reason}")
            export = _export(run, base, prepared, aside, onto, stops, losses)
            _write(aside, _CARD, merged_card(export, run.report).encode())
            _write(aside, EXPORT_JSON, export.model_dump_json(indent=2).encode() + b"\n")
            with phases.phase("commit"):
                place.commit(aside, _facts(export), phases.fetched)
    return export


def _already_there(run: Finished, place: ExportPlace, onto: Onto) -> Export | None:
    content = place.whole()
    if content is None:
        return None
    try:
        there = Export.model_validate(content)
    except ValidationError as error:
        raise UsageError(
            f"--to {located(place.uri)}: is not empty, and its {EXPORT_JSON} is none of this job"
        ) from error
    wanted = (run.report.run_uri, _adapter_sha256(run.report), run.base.source, run.base.revision, onto)
    if (there.run_uri, there.adapter_sha256, there.base, there.revision, there.onto) != wanted:
        raise UsageError(
            f"--to {located(place.uri)}: holds the model of {there.run_uri}, onto {there.onto}; name another"
        )
    if not place.holds({name: file.size for name, file in there.files.items()}):
        raise UsageError(f"--to {located(place.uri)}: holds this model, but not all of its files; delete it first")
    log.info("already_there", message="this model stands there already; nothing was done now")
    return there


def _fetch(run: Finished, worker: Worker, phases: Phases, *, weights: bool) -> Path:
    """The base's folder: never a copy in 4 bits."""
    return fetching.fetch(
        run.base,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
        on_progress=phases.fetched,
        weights=weights,
    ).folder


def _headers(run: Finished, worker: Worker) -> Mapping[str, Any]:
    return fetching.read_headers(
        run.base, models_folder=worker.models_folder, settings=worker.settings, should_stop=worker.should_stop
    )


def _fetch_adapter(run: Finished, folder: Path, should_stop: Callable[[], bool]) -> None:
    known = run.report.adapter.files
    missing = [name for name in ADAPTER_FILES if name not in known]
    if missing:
        raise DataError(f"{run.report.run_uri}/report.json: names no {missing[0]}; start the run again")
    files = {name: FileEntry(size=known[name].size, sha256=known[name].sha256) for name in ADAPTER_FILES}
    run.artifacts.fetch_adapter(folder, files, should_stop=should_stop)


def _write_weights(prepared: Prepared, aside: Aside, base: Path, phases: Phases) -> None:
    done = 0
    for name, make in prepared.weights.files():
        aside.write(name, make(), lambda size, done=done: phases.fetched(done + size, prepared.weights.bytes))  # type: ignore[misc]
        done += aside.files[name].size
    if prepared.not_finite:
        raise DataError(f"{base}: NaN or infinity in {min(prepared.not_finite)}; copy the model again")


def _write_beside(
    run: Finished, dataset: Dataset, tokenizer: Any, prepared: Prepared, aside: Aside, base: Path
) -> tuple[int, ...]:
    """What a model is besides its weights; returns the tokens that it stops at."""
    template = taught_template(tokenizer, run.recipe.data)
    for name, content in _copied(base, own_template=template is not None):
        _write(aside, name, content)
    if template is not None:
        _write(aside, _TEMPLATE, template.encode())
    stops = tuple(taught_stops(base, tokenizer, ends=dataset.train.ends()))
    settings = {"bos_token_id": tokenizer.bos_token_id, **_json(base / GENERATION_CONFIG)}
    settings.pop("_from_model_config", None)  # else transformers may take the stops from config.json again
    if stops:
        settings["eos_token_id"] = stops[0] if len(stops) == 1 else [*stops]
    _write(aside, GENERATION_CONFIG, _text({name: value for name, value in settings.items() if value is not None}))
    dtype = _DTYPES.get(prepared.weights.dtype) if _is_in_few_bits(base) else None
    config = merged_config(_json(base / CONFIG), untied=prepared.untied, dtype=dtype)
    _write(aside, CONFIG, _text(config))
    return stops


def _is_in_few_bits(base: Path) -> bool:
    return is_quantised(base) or is_published_in_mxfp4(read_config(base))


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def _copied(base: Path, *, own_template: bool) -> Iterator[tuple[str, bytes]]:
    """Tokenizer, licence and what else is read before the weights."""
    for name in small_files(present_files(base)):
        if name in _NOT_COPIED or (own_template and name.startswith(_TEMPLATES)):
            continue
        content = (base / name).read_bytes()
        if name == TOKENIZER_CONFIG:
            own = _json(base / name)
            settings = {key: value for key, value in own.items() if not (own_template and key == "chat_template")}
            if (settings := readable_settings(settings)) != own:
                content = _text(settings)
        yield name, content


def _export(
    run: Finished,
    base: Path,
    prepared: Prepared,
    aside: Aside,
    onto: Onto,
    stops: tuple[int, ...],
    losses: ExportLosses,
) -> Export:
    versions = {"qlora-job": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONS}
    return Export(
        run_uri=run.report.run_uri,
        step=run.report.sweet_spot.step,
        adapter_sha256=_adapter_sha256(run.report),
        base=run.base.source,
        revision=run.base.revision,
        onto=onto,
        dtype=prepared.weights.dtype,
        quantised_base=_is_in_few_bits(base),
        untied=prepared.untied,
        eos_token_id=stops,
        losses=losses,
        limits=limits_of(losses, onto),
        files={name: AdapterFile(size=file.size, sha256=file.sha256) for name, file in sorted(aside.files.items())},
        versions=versions,
    )


def _adapter_sha256(report: Report) -> str:
    file = report.adapter.files.get(ADAPTER_FILES[0])
    return "" if file is None else file.sha256


def _facts(export: Export) -> dict[str, Any]:
    """What a folder in a store is, as its manifest says."""
    return {"export_of": export.run_uri, "adapter_sha256": export.adapter_sha256, "onto": export.onto}


def _write(aside: Aside, name: str, content: bytes) -> None:
    aside.write(name, [content], lambda _: None)


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error}); copy the base again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object; copy the base again")
    return content
