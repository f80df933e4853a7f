"""What a run needs and takes, reported before there is a GPU: no weight is downloaded."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.core.data.lengths import Candidate, Lengths
from job.core.data.mixture import portions
from job.core.data.report_data import DataReport
from job.core.errors import NotFoundError
from job.core.plan.course import course_of, evaluation_count
from job.core.plan.forecast import Forecast, Workload, forecast
from job.core.plan.gpus import Gpu
from job.core.plan.memory import AdapterShape, EngineName, ModelShape
from job.core.plan.scaling import ALONE, Cluster
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import find_run

if TYPE_CHECKING:  # loading it takes as long as torch does
    from job.stages.base.weights import Weights

_ROOT = Path(__file__).parents[2]
"""Where entrypoint.py lies, in a checkout and in the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found out, for whoever shows it."""

    data: DataReport
    candidates: Sequence[Candidate]
    work: Workload
    forecasts: Sequence[Forecast]
    words: Sequence[str]
    """On how this base trains, or why it does not."""


def plan(worker: Worker, gpus: Sequence[Gpu], *, cluster: Cluster = ALONE, run_id: str | None, phases: Phases) -> Plan:
    """Read the data, and the base's configuration and tokenizer; cut the batches for each kind of GPU.

    Args:
        worker: as a run's.
        gpus: the kinds.
        cluster: how many of a kind train together.
        run_id: as asked for.
        phases: the clock.

    Raises:
        JobError: as a run would, for what a run would refuse without a GPU; the base may be without weights.
    """
    from job.stages.data.dataset import prepare_dataset
    from job.tune.engines.families import words_on
    from job.tune.model.adapter import refuse_targets
    from job.tune.model.config import load_tokenizer, read_config, read_wrapper, shape_of

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
    config = read_config(base.folder)
    weights = _weights(worker, base)
    parameters = refuse_targets(config, recipe.lora)
    shape = shape_of(config, None if weights is None else weights.left)
    worker.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=worker.workdir, prefix="plan-") as scratch:
        dataset = prepare_dataset(
            worker,
            run,
            load_tokenizer(base.folder),
            positions=shape.positions,
            rows=shape.vocabulary,
            folder=Path(scratch),
            phases=phases,
        )
        trained = dataset.train.lengths[:]
        validation_tokens = int(dataset.validation.lengths.sum())
    work = _workload(
        worker,
        config,
        shape,
        dataset.report,
        trained,
        parameters=parameters,
        validation_tokens=validation_tokens,
        base_bytes=None if weights is None else weights.bytes,
    )
    return Plan(
        data=dataset.report,
        candidates=dataset.report.candidates,
        work=work,
        forecasts=[forecast(work, gpu, cluster) for gpu in gpus],
        words=[
            *([] if weights is None else [f"base: {weights}"]),
            *words_on(config, read_wrapper(base.folder)),
            *_words_on_shards(work, cluster),
        ],
    )


def _words_on_shards(work: Workload, cluster: Cluster) -> list[str]:
    if cluster.ranks == 1 or work.against_shards is None:
        return []
    return [f"each GPU holds the whole base, which cannot be sharded: {work.against_shards}"]


def _weights(worker: Worker, base: BaseModel) -> "Weights | None":
    """None: there are none yet, as where only the configuration was copied."""
    from job.stages.base.weights import look_at_weights

    try:
        return look_at_weights(worker, base, patience=None)
    except NotFoundError:
        return None


def _workload(
    worker: Worker,
    config: Any,
    shape: ModelShape,
    data: DataReport,
    lengths: Lengths,
    *,
    parameters: int,
    validation_tokens: int,
    base_bytes: int | None,
) -> Workload:
    from job.tune.engines.attention import reason_against_fused_attention
    from job.tune.engines.families import is_supported, rows_of
    from job.tune.model.config import empty_model
    from job.tune.model.sharded.layers import reason_against_sharding

    model = empty_model(config)
    rows = rows_of(model)
    recipe = worker.recipe
    course = course_of(recipe.train, examples=portions(recipe.data, data.train.used_by_source))
    engine: EngineName = "fast" if worker.engine != "generic" and is_supported(config) else "generic"
    return Workload(
        shape=shape,
        adapter=AdapterShape(
            parameters=parameters,
            rank=recipe.lora.r,
            optimizer=recipe.train.optimizer,
            on_experts=recipe.lora.on_experts,
        ),
        engine=engine,
        compiled=engine == "generic"
        and reason_against_fused_attention(config) is None
        and shape.experts is None
        and rows == "packed",
        rows=rows,
        course=course,
        lengths=lengths,
        targets=data.train.targets,
        validation_tokens=validation_tokens,
        evaluations=evaluation_count(course.steps, recipe.evaluate.every_steps),
        max_length=data.max_length,
        kept_checkpoints=recipe.checkpoint.keep,
        against_shards=reason_against_sharding(model, packed=rows == "packed"),
        base_bytes=base_bytes,
    )


def ask_templates() -> list[str]:
    """What to ask each scheduler for, to be filled in: the `ask.txt` of every folder beside entrypoint.py.

    Installed as a package, the job lies among folders of others, and has none.
    """
    if not (_ROOT / "entrypoint.py").is_file():
        return []
    return [path.read_text(encoding="utf-8") for path in sorted(_ROOT.glob("*/ask.txt"))]
