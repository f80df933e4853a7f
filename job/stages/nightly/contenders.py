"""How models do on a channel's exams: what is kept of the same model and exam, else judged anew by loading it."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

import job
from job.core.data.packing import Rows
from job.core.errors import DataError, PeerLostError
from job.core.nightly.channel import THE_BASE, AdapterInUse, Promoted
from job.core.nightly.exam_results import ExampleResults, GivenAnswers, name_of, results_of
from job.edge.run.channels import Channel
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.finishing.proving import as_judged, let_go, load_alone, load_from
from job.stages.nightly.answering import Asked, answers_of
from job.stages.nightly.channel_changes import BASE, model_name
from job.stages.nightly.exams import Exams, ExamSet
from job.tune.data.documents import Documents
from job.tune.device.compute_dtype import compute_dtype
from job.tune.device.device import device_name
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.loop.evaluate import evaluate
from job.tune.model.adapter import attach_lora, odd_settings
from job.tune.world import World

log = structlog.get_logger(__name__)
_DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose version decides the last digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A model that is judged: a run's published adapter, or the base alone."""

    run_id: str | None
    adapter: AdapterInUse | None

    @property
    def called(self) -> str:
        """In sentences."""
        return self.run_id or THE_BASE

    @property
    def kept_as(self) -> str:
        """What its results are kept under."""
        return self.run_id or BASE

    @property
    def model(self) -> str:
        """Names its weights."""
        return model_name(self.adapter)

    @property
    def files(self) -> dict[str, FileEntry]:
        """Of its adapter."""
        files = {} if self.adapter is None else self.adapter.files
        return {name: FileEntry(size=f.size, sha256=f.sha256) for name, f in files.items()}


def in_use(promoted: Promoted | None) -> Contender:
    """What a channel's entry puts in use."""
    if promoted is None:
        return Contender(run_id=None, adapter=None)
    return Contender(run_id=promoted.run_id, adapter=promoted.adapter)


class Examiner:
    """Asks models, in this process and on this device."""

    def __init__(
        self,
        attempt: Attempt,
        inputs: Inputs,
        channel: Channel,
        exams: Exams,
        *,
        left_to_peft: bool,
        rows: Rows | None,
        tokens_at_once: int,
        world: World,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            attempt: polled for a stop, and the clock.
            inputs: the base and the run.
            channel: keeps results.
            exams: what is asked.
            left_to_peft: whether linear layers are to be PEFT's own.
            rows: how documents stand in a forward; None: that is found by trying.
            tokens_at_once: of a forward, at most.
            world: the others, who have a base that is sharded with us.
        """
        self._attempt, self._inputs, self._channel, self.exams = attempt, inputs, channel, exams
        self._left_to_peft, self._rows, self._tokens = left_to_peft, rows, tokens_at_once
        self._world = world
        self._scratch = attempt.worker.run_folder(inputs.artifacts.run_id) / "contender"
        self.how = _how(inputs, left_to_peft=left_to_peft, rows=rows)
        for each in exams.every:
            channel.keep_exam(each.exam)

    def results(self, contender: Contender, *, with_answers: bool = False) -> dict[str, ExampleResults]:
        """By the exam's name; `with_answers`: on the frozen examples its answers too, where there are questions.

        Raises:
            NotFoundError: its adapter is gone from the store.
            DataError: its adapter is not what was promoted, or gives no finite loss.
        """
        found = {each.exam.name: self._kept(contender, each) for each in self.exams.every}
        frozen, asked = self.exams.frozen, self.exams.asked if with_answers else None
        missing = [each for each in self.exams.every if found[each.exam.name] is None]
        if missing or not _has_answered(found[frozen.exam.name], asked):
            log.info("judged_anew", model=contender.called, exams=len(missing))
            with self.loaded(contender) as model:
                for each in missing:
                    found[each.exam.name] = self.keep(contender, each, self.nll(contender, model, each.documents))
                on_frozen = found[frozen.exam.name]
                assert on_frozen is not None, "it was judged just now"
                if asked is not None and not _has_answered(on_frozen, asked):
                    log.info("asked_anew", model=contender.called, questions=len(asked.questions))
                    answers = answers_of(self._attempt, self._inputs, asked, model)
                    found[frozen.exam.name] = self.keep(contender, frozen, on_frozen.nll, answers=answers)
        if asked is None:
            found = {name: None if each is None else each.without_answers() for name, each in found.items()}
        return {name: results for name, results in found.items() if results is not None}

    def of_loaded(
        self,
        contender: Contender,
        model: PackedModel,
        *,
        known: Mapping[str, NDArray[np.float64]],
        answers: GivenAnswers | None = None,
    ) -> dict[str, ExampleResults]:
        """The same of a model that is loaded.

        Args:
            contender: the model.
            model: loaded.
            known: summed losses on exams that it was judged on just now.
            answers: what it answered just now.
        """
        found = {}
        for each in self.exams.every:
            name = each.exam.name
            nll = known[name] if name in known else self.nll(contender, model, each.documents)
            found[name] = self.keep(contender, each, nll, answers=answers if each is self.exams.frozen else None)
        return found

    def keep(
        self,
        contender: Contender,
        asked: ExamSet,
        nll: NDArray[np.float64] | Sequence[float],
        *,
        answers: GivenAnswers | None = None,
    ) -> ExampleResults:
        """Keep what a model made of an exam.

        Raises:
            PeerLostError: another rank is gone, and what a sharded base made of it since is of no use.
        """
        if self._world.broken_off:
            raise PeerLostError("another process of the run is gone, and what waited for it was broken off")
        results = results_of(nll, model=contender.model, exam=asked.exam.name, how=self.how, answers=answers)
        self._channel.keep_results(contender.kept_as, results)
        return results

    def nll(self, contender: Contender, model: PackedModel, documents: Documents) -> NDArray[np.float64]:
        """Summed loss of each document, in nats: [N]; in smaller forwards where memory runs out.

        Raises:
            DataError: a loss is not finite.
        """
        nll = self._evaluated(model, documents)
        if not np.isfinite(nll).all():
            worst = documents.where(int(np.argmin(np.isfinite(nll))))
            raise DataError(
                f"{worst}: {contender.called} has no finite loss on it, so that nothing can be compared; look at the "
                "record, or take it out"
            )
        return nll

    def _evaluated(self, model: PackedModel, documents: Documents) -> NDArray[np.float64]:
        while True:
            try:
                return evaluate(
                    model,
                    documents,
                    step=0,
                    tokens_at_once=self._tokens,
                    should_stop=self._attempt.worker.should_stop,
                    on_progress=lambda done: self._attempt.phases.progress(judged=done, of=len(documents)),
                ).nll
            except torch.OutOfMemoryError:
                if self._tokens <= documents.max_length:
                    raise
                self._tokens //= 2
            torch.cuda.empty_cache()

    @contextmanager
    def loaded(self, contender: Contender) -> Iterator[PackedModel]:
        """The model on a fresh 4-bit base, for the block."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        if contender.run_id is None:
            with self._attempt.phases.phase("load_model"):
                model = self._base()
            with self._until_let_go(model), model.model.disable_adapter():
                yield model
            return
        run = self._inputs.artifacts.other_run(contender.run_id)
        run.fetch_adapter(self._scratch, contender.files, should_stop=self._attempt.worker.should_stop)
        _refuse_odd(self._scratch / ADAPTER_FILES[1], contender)
        with self._attempt.phases.phase("load_model"):
            model = load_from(
                self._attempt,
                self._inputs,
                self._scratch,
                left_to_peft=self._left_to_peft,
                rows=self._rows,
                world=self._world,
            )
        with self._until_let_go(model):
            yield model
        shutil.rmtree(self._scratch, ignore_errors=True)

    @contextmanager
    def _until_let_go(self, model: PackedModel) -> Iterator[None]:
        """Also where it gave no finite loss: the others are to be free for the next one."""
        try:
            yield
        except DataError:
            let_go(model, self._world)
            raise
        let_go(model, self._world)

    def _base(self) -> PackedModel:
        """The base, with an adapter that is to be switched off."""
        inputs, recipe = self._inputs, self._attempt.worker.recipe
        base, sharded = load_alone(self._attempt, inputs, self._world)
        source, revision = inputs.base.identity.source, recipe.model.revision
        adapted = attach_lora(base, recipe.lora, source=source, revision=revision, seed=recipe.train.seed)
        return as_judged(PackedModel(adapted, sharded), inputs, left_to_peft=self._left_to_peft, rows=self._rows)

    def _kept(self, contender: Contender, asked: ExamSet) -> ExampleResults | None:
        kept = self._channel.results(contender.kept_as, exam=asked.exam.name, how=self.how, model=contender.model)
        return kept if kept is not None and len(kept.nll) == len(asked.documents) else None


def _has_answered(results: ExampleResults | None, asked: Asked | None) -> bool:
    """Whether it answered the same questions, judged in the same way, or none is asked."""
    return asked is None or (
        results is not None and results.answers is not None and results.answers.asked == asked.name
    )


def _refuse_odd(config: Path, contender: Contender) -> None:
    """What PEFT obeys is held to what this job writes: the hashes it was verified by stand in the same bucket."""
    try:
        odd = odd_settings(config)
    except (OSError, ValueError) as error:
        raise DataError(f"{contender.called}: its adapter_config.json cannot be read ({error})") from error
    if odd:
        raise DataError(
            f"{contender.called}: its adapter_config.json has settings that this job does not write "
            f"({', '.join(odd)}); look at who can write there"
        )


def _own_code() -> str:
    """Hash of this job's sources: its number stays while kernels change."""
    sha256 = hashlib.sha256()
    for source in sorted(Path(job.__path__[0]).rglob("*.py")):
        sha256.update(source.read_bytes())
    return sha256.hexdigest()


def _how(inputs: Inputs, *, left_to_peft: bool, rows: Rows | None) -> str:
    """Names what decides the numbers beside model and exam, by which alone results are compared.

    Of the engine a model that is judged has its linear layers, PEFT's own or ours, and its rows; the rest is gradients.
    """
    return name_of(
        {
            "code": _own_code(),
            "left_to_peft": left_to_peft,
            "rows": rows,
            "placement": inputs.placement,
            "base": inputs.base.identity.revision,
            "device": device_name(inputs.device),
            "dtype": str(compute_dtype(inputs.device)),
            "versions": {name: version(name) for name in _DECIDING},
        }
    )
