"""What a run needs and takes, told before there is a GPU: no weight is downloaded."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from job.core.course import plan_course
from job.core.forecast import Candidate, Forecast, Workload, candidates, forecast
from job.core.gpus import Gpu
from job.core.memory import AdapterShape, PathName
from job.core.report import DataReport
from job.edge.base import fetching as base_model
from job.edge.host.logs import quiet_libraries
from job.stages.attempt import Attempt
from job.stages.identity import find_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found out, for whoever shows it."""

    data: DataReport
    candidates: Sequence[Candidate]
    work: Workload
    forecasts: Sequence[Forecast]


def plan(attempt: Attempt, gpus: Sequence[Gpu]) -> Plan:
    """Read the data, and the base's configuration and tokenizer; cut the batches for each GPU.

    Raises:
        JobError: as a run would, for what a run would refuse without a GPU; the base may be without weights.
    """
    from job.stages.dataset import prepare_dataset
    from job.tune.engines.attention import reason_against_one_op
    from job.tune.engines.families import fits
    from job.tune.model.adapter import refuse_targets
    from job.tune.model.config import load_tokenizer, read_config, shape_of

    quiet_libraries()
    recipe = attempt.recipe
    run = find_run(attempt, complete=False)
    base = base_model.fetch(
        run.base,
        models_folder=attempt.models_folder,
        settings=attempt.settings,
        should_stop=attempt.should_stop,
        weights=False,
        complete=False,
    )
    config = read_config(base.folder)
    parameters, shape = refuse_targets(config, recipe.lora), shape_of(config)
    attempt.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=attempt.workdir, prefix="plan-") as scratch:
        dataset = prepare_dataset(
            attempt, run, load_tokenizer(base.folder), positions=shape.positions, workdir=Path(scratch)
        )
        every, trained = dataset.train.encoded.lengths[:], dataset.train.lengths[:]
        validation_tokens = int(dataset.validation.lengths.sum())
    course = plan_course(
        examples=len(trained),
        batch_size=recipe.train.batch_size,
        steps=recipe.train.steps,
        epochs=recipe.train.epochs,
        seed=recipe.train.seed,
    )
    path: PathName = "fast" if attempt.engine != "generic" and fits(config) else "generic"
    work = Workload(
        shape=shape,
        adapter=AdapterShape(parameters=parameters, rank=recipe.lora.r, optimizer=recipe.train.optimizer),
        path=path,
        compiled=path == "generic" and reason_against_one_op(config) is None,
        course=course,
        lengths=trained,
        targets=dataset.report.train.targets,
        validation_tokens=validation_tokens,
        evaluations=1 + -(-course.steps // recipe.evaluate.every_steps),
        max_length=dataset.report.max_length,
        kept_checkpoints=recipe.checkpoint.keep,
    )
    return Plan(
        data=dataset.report,
        candidates=candidates(every, chosen=dataset.report.max_length, positions=shape.positions),
        work=work,
        forecasts=[forecast(work, gpu) for gpu in gpus],
    )
