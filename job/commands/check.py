"""Everything that can be refused without a GPU, as a table: what was looked at, and what came of it.

What needs torch comes last: loading it takes longer than all the rest.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from job.core.base.servers import refusals, unreadable_base
from job.core.data.mixture import portions
from job.core.data.report_data import DataReport
from job.core.errors import JobError
from job.core.nightly.channel import name_in_use
from job.core.plan import advice
from job.core.plan.course import course_of, evaluation_count
from job.core.plan.memory import ModelShape
from job.core.recipe.schema import Recipe, is_hub_id
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel
from job.edge.host.gpu import look_at_links
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.edge.remembered import remembered
from job.edge.store.objects import StoredObject
from job.edge.store.opening import credentials_source
from job.edge.store.patience import Patience
from job.render.preview_text import example_lines
from job.render.report_text import histogram_lines
from job.render.sources_text import source_rows
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import Run, find_run, probe_output
from job.stages.data.data_objects import Sides, list_data
from job.stages.data.sources import count_lines, fetch_sources
from job.stages.nightly.channel_changes import refuse_other_base

T = TypeVar("T")


FOR_A_PERSON = Patience(attempts=2, first_pause_seconds=0.5, longest_pause_seconds=0.5, answer_seconds=4.0)
"""With a hub that does not answer while somebody waits: ten seconds in all."""


_SHOWN = 2
"""Examples that are shown as they are learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    name: str
    found: str
    error: JobError | None = None
    advice: bool = False
    """Nothing is refused for it, but it should be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The dataset, and what its lengths depend on."""

    tokenizer: Any
    positions: int
    report: DataReport
    notes: Sequence[str]
    """What should be looked at."""


@dataclass(slots=True, kw_only=True)
class _Table:
    """The rows, each handed on as it comes; a failure does not hide the ones after it."""

    on_look: Callable[[str], None]
    on_row: Callable[[Row], None]
    failures: dict[str, JobError] = field(default_factory=dict)
    """By the row's name."""

    def look(self, name: str, action: Callable[[], tuple[str, T]]) -> T | None:
        """The action's value; None when it failed."""
        self.on_look(name)
        try:
            found, value = action()
        except JobError as error:
            self.failures[name] = error
            self.on_row(Row(name=name, found=str(error), error=error))
            return None
        self.on_row(Row(name=name, found=found))
        return value

    def advise(self, found: Sequence[str], *, name: str = "learning") -> None:
        """A row for each."""
        for each in found:
            self.on_row(Row(name=name, found=each, advice=True))


def check(
    worker: Worker,
    *,
    run_id: str | None,
    phases: Phases,
    quick: bool,
    for_a_person: bool,
    chosen_gpus: str | None = None,
    on_look: Callable[[str], None],
    on_row: Callable[[Row], None],
) -> JobError | None:
    """Look at the output, the base model, the inputs and the data; a failure does not hide the ones after it.

    Args:
        worker: with a recipe that was read already.
        run_id: as asked for; None: the run's identity gives it.
        phases: the clock.
        quick: leave out what needs torch.
        for_a_person: who waits: a hub that is away is not waited for.
        chosen_gpus: CUDA_VISIBLE_DEVICES, of a machine that has GPUs.
        on_look: gets the name of each row before it is known.
        on_row: gets each row as it comes.

    Returns:
        The first failure, if there was one.

    Raises:
        DeniedError: the work folder holds what others put there.
    """
    refuse_planted(worker.workdir)
    table = _Table(on_look=on_look, on_row=on_row)
    table.look("credentials", lambda: _credentials(worker.recipe))
    table.look("output", lambda: _output(worker))
    if worker.device != "cpu" and (links := look_at_links(chosen_gpus)) is not None:
        table.look("gpus", lambda: (str(links), None))
    if worker.recipe.output_hub is not None:
        table.look("hub", lambda: _hub(worker, phases))
    base = table.look("base model", lambda: _base(worker, FOR_A_PERSON if for_a_person else None))
    run = table.look("input", lambda: _inputs(worker, run_id, base))
    if run is not None and worker.recipe.promote.channel is not None:
        table.look("channel", lambda: _channel(worker, run))
        table.advise([f"left out, not whole yet: {each}" for each in run.sides.late], name="input")
    table.advise(advice.of_recipe(worker.recipe))
    counted = None
    if run is not None and base is not None:
        counted = _look_at_data(table, worker, phases, run, base)
    elif base is None:
        table.look("data", lambda: _lines(worker, phases, because="the base model"))
    if base is not None and not quick:
        _look_at_model(table, worker, phases, run, base, counted)
        if "model" not in table.failures:
            table.look("weights", lambda: _weights(worker, base, FOR_A_PERSON if for_a_person else None))
            table.look("self-test", lambda: _self_test(worker, base))
    return next(iter(table.failures.values()), None)


def _look_at_data(table: _Table, worker: Worker, phases: Phases, run: Run, base: BaseModel) -> _Counted | None:
    """Count with what the base's files name, where that is enough; None: it is not, or something was wrong."""
    from job.tune.model.tokenizer import named_positions, named_rows, named_tokenizer

    quiet_libraries()
    tokenizer, positions, rows = named_tokenizer(base.folder), named_positions(base.folder), named_rows(base.folder)
    if tokenizer is None or positions is None or rows is None:
        table.look("data", lambda: _lines(worker, phases, because="the model's own classes"))
        return None
    counted = table.look("data", lambda: _count(worker, phases, run, tokenizer, (positions, rows), base=base))
    if counted is not None:
        _judge(table, worker.recipe, counted)
    return counted


def _look_at_model(
    table: _Table, worker: Worker, phases: Phases, run: Run | None, base: BaseModel, counted: _Counted | None
) -> None:
    """What needs torch; where training's tokenizer is another one than was counted with, the lengths again."""
    from job.tune.model.tokenizer import base_file, encodes_alike

    model = table.look("model", lambda: _model(worker, base))
    if model is None:
        return
    tokenizer, shape, words = model
    table.advise(words, name="base")
    unread = unreadable_base(base_file(base.folder, "tokenizer_config.json"))
    table.advise([*refusals(worker.recipe.lora, rows=shape.vocabulary), *unread], name="serving")
    if run is None or "data" in table.failures:
        return
    positions, rows = shape.positions, shape.vocabulary
    if counted is not None and positions == counted.positions and encodes_alike(tokenizer, counted.tokenizer):
        return
    again = table.look("lengths", lambda: _count(worker, phases, run, tokenizer, (positions, rows), base=base))
    if again is not None:
        _judge(table, worker.recipe, again)


def _judge(table: _Table, recipe: Recipe, counted: _Counted) -> None:
    """What the run would do with the data, and what it would not learn well."""
    report = counted.report
    course = course_of(recipe.train, examples=portions(recipe.data, report.train.used_by_source))
    held_out = report.validation.used
    train = report.train
    by_source = [(source.tokens, source.used) for source in train.sources] or [(train.tokens, train.used)]
    mean = sum(course.mixture.share(place) * tokens / used for place, (tokens, used) in enumerate(by_source))
    tokens = {"training_tokens": round(mean * course.examples), "validation_tokens": report.validation.tokens}
    share = advice.evaluation_share(recipe, course, **tokens)
    evaluations = evaluation_count(course.steps, recipe.evaluate.every_steps)
    found = (
        f"{course.steps} steps of {course.batch_size} examples ({course.epochs:.3g} epochs); {evaluations} evaluations "
        f"of {held_out} examples, about {share:.0%} of the time"
    )
    table.look("plan", lambda: (found, None))
    for row in source_rows(report, course):
        table.look("source", lambda row=row: (row, None))  # type: ignore[misc]
    table.advise(counted.notes)
    table.advise(advice.of_data(recipe, course, held_out=held_out, **tokens))


def _credentials(recipe: Recipe) -> tuple[str, None]:
    sources = (*recipe.data.sources, *recipe.data.held_out_sources)
    data = [uri for source in sources for uri in source.uris]
    return credentials_source([recipe.output, recipe.model.base, *data]), None


def _output(worker: Worker) -> tuple[str, None]:
    found = probe_output(worker.recipe.output, worker.settings)
    return f"{worker.recipe.output}: write" + (
        " and conditional write work" if found.conditional else f" works, but {found.reason}"
    ), None


def _hub(worker: Worker, phases: Phases) -> tuple[str, None]:
    from job.stages.finishing.pushing import hub_of

    hub = hub_of(worker, phases)
    assert hub is not None, "the recipe names one"
    return f"{hub.name}: HF_TOKEN is of {hub.look()}, and can write", None


def _inputs(worker: Worker, run_id: str | None, base: BaseModel | None) -> tuple[str, Run | None]:
    if base is None:  # which run it is depends on the base; the data can be looked at all the same
        return _size(_listed(worker).every), None
    run = find_run(worker.recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop)
    state = "already done" if run.done else "unfinished, would be resumed" if run.begun else "new"
    return f"{_size(run.sides.every)}; run {run.artifacts.run_id} is {state}", run


def _channel(worker: Worker, run: Run) -> tuple[str, None]:
    """What is in use there, and whether this recipe's adapters can take its place."""
    name = worker.recipe.promote.channel
    assert name is not None, "it was asked for"
    channel = run.artifacts.channel(name, conditional=False)
    promoted, _ = channel.promoted()
    if promoted is not None:
        refuse_other_base(promoted, run.base, worker.recipe)
    state, _ = channel.state()
    nights = 0 if state is None else len(state.nights)
    since = "" if promoted is None else f" since {promoted.since}"
    return f"{name}: {name_in_use(promoted)} is in use{since}; {nights} nights are known", None


def _listed(worker: Worker) -> Sides:
    return list_data(worker.recipe.data, worker.settings, should_stop=worker.should_stop)


def _size(objects: Sequence[StoredObject]) -> str:
    return f"{len(objects)} objects, {sum(o.size for o in objects):,} bytes"


def _base(worker: Worker, patience: Patience | None) -> tuple[str, BaseModel]:
    model = worker.recipe.model
    identity = fetching.identify(model.base, model.revision, settings=worker.settings)
    base = fetching.fetch(
        identity,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
        weights=False,
        patience=patience if is_hub_id(model.base) else None,
    )
    return f"{identity.source} ({identity.revision[:12]}), licence {base.licence or 'not known'}", base


def _model(worker: Worker, base: BaseModel) -> tuple[str, tuple[Any, ModelShape, list[str]]]:
    """Training's tokenizer, the base's sizes, how it trains; family, targets and trackers are refused here."""
    from job.tune.engines.families import refuse_family, words_on
    from job.tune.loop.track import refuse_trackers
    from job.tune.model.adapter import refuse_targets
    from job.tune.model.config import load_tokenizer, read_config, read_wrapper, shape_of

    quiet_libraries()
    config = read_config(base.folder)
    refuse_family(config)
    parameters = refuse_targets(config, worker.recipe.lora)
    refuse_trackers(worker.recipe.track)
    found = f"{config.model_type}: an adapter of {parameters:,} parameters on it"
    return found, (load_tokenizer(base.folder), shape_of(config), words_on(config, read_wrapper(base.folder)))


def _weights(worker: Worker, base: BaseModel, patience: Patience | None) -> tuple[str, None]:
    """Every tensor's name, shape and dtype, from the headers of the files."""
    from job.stages.base.weights import look_at_weights

    weights = look_at_weights(worker, base, patience=patience if is_hub_id(base.identity.source) else None)
    return f"as config.json promises: {weights}", None


def _self_test(worker: Worker, base: BaseModel) -> tuple[str, None]:
    """What a run does before its first step, on a small random copy; the same question is answered once."""
    from job.tune.model.config import read_config
    from job.tune.rehearsal import depends_on, rehearse

    config, lora = read_config(base.folder), worker.recipe.lora
    question = depends_on(config, lora)
    return remembered(worker.workdir / "self-tests", question, lambda: rehearse(config, lora)), None


def _count(
    worker: Worker, phases: Phases, run: Run, tokenizer: Any, sizes: tuple[int, int], *, base: BaseModel
) -> tuple[str, _Counted]:
    """With a base of these positions and rows of its embeddings."""
    from job.stages.data.dataset import prepare_dataset
    from job.stages.data.stops import stops_elsewhere

    with _scratch(worker) as folder:
        dataset = prepare_dataset(
            worker, run, tokenizer, positions=sizes[0], rows=sizes[1], folder=folder, phases=phases
        )
        report = dataset.report
        notes = [*dataset.notes, *stops_elsewhere(base.folder, tokenizer, dataset.train)]
    train = report.train
    counted = (
        f"{train.used} training and {report.validation.used} held-out examples; max_length {report.max_length} "
        f"({report.max_length_reason}); {report.bad_lines} wrong lines, {train.duplicates} duplicates, "
        f"{report.overlap} held out and trained on, {train.truncated} truncated, {train.dropped} dropped, "
        f"{train.without_target} with nothing to learn from, {train.empty} with an empty answer"
    )
    bars = histogram_lines(train.histogram.edges, train.histogram.counts, mark=report.max_length)
    examples = [line for each in report.preview[:_SHOWN] for line in example_lines(each, width=None, colours=False)]
    text = "\n".join([counted, "tokens of a training example:", *bars, "as they are learned:", *examples])
    return text, _Counted(tokenizer=tokenizer, positions=sizes[0], report=report, notes=notes)


def _lines(worker: Worker, phases: Phases, *, because: str) -> tuple[str, None]:
    """Without a tokenizer each line can be checked all the same."""
    with _scratch(worker) as folder:
        sides = _listed(worker)
        objects = (*sides.train, *sides.validation)
        files = fetch_sources(worker, objects, folder, on_progress=lambda done, of: phases.progress(bytes=done, of=of))
        tally = count_lines(worker.recipe.data, files)
    return f"{tally.good} right lines, {tally.bad} wrong ones; lengths need {because}", None


@contextmanager
def _scratch(worker: Worker) -> Iterator[Path]:
    worker.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=worker.workdir, prefix="check-") as folder:
        yield Path(folder)
