"""What every process of a run does but the one that owns it: it computes what that one orders."""

import structlog
import torch

from job.core.errors import SickDeviceError, StopRequestedError
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs, load_placed
from job.stages.gathering import gather
from job.stages.preparing import Prepared, make_stepper, prepare, questions_of
from job.stages.ranks.company import Company
from job.stages.ranks.placing import place_base
from job.tune.device.device import release_memory
from job.tune.engines.engine import adopt_or_shrink, shrink
from job.tune.loop.evaluate import answer, evaluate
from job.tune.loop.sharing import share_state
from job.tune.loop.step import StepCutShortError, Stepper
from job.tune.ranks import Ranks
from job.tune.world import Order

log = structlog.get_logger(__name__)
_NO_ATTEMPT = 0
"""The run's attempt is rank 0's: this process writes nothing under its number."""


def obey(attempt: Attempt, company: Company, inputs: Inputs) -> None:
    """Obey until rank 0 has brought the run to its end.

    Raises:
        StopRequestedError: rank 0 was asked to stop, and has committed what there was.
        JobError: as for a process that works alone; what another one has ended with.
    """
    ready = _prepared(attempt, company, inputs)
    assert isinstance(company.world, Ranks), "who follows is not alone"
    follower = _Follower(attempt, inputs, ready, company.world)
    del ready  # the follower's own, who may have to let it go
    with attempt.phases.phase("follow"):
        follower.obey()
    del follower
    release_memory(inputs.device)  # another run may come, and its plan is made for what is free


def _prepared(attempt: Attempt, company: Company, inputs: Inputs) -> Prepared:
    """What rank 0 has, with its state."""
    _be_there_before_training(attempt, company, inputs)
    ready = prepare(attempt, inputs, on_loaded=company.loaded, world=company.world, ranks=company.size)
    torch.manual_seed(attempt.worker.recipe.train.seed)
    with attempt.phases.phase("join"):
        world = company.join(inputs.device)
        share_state(world, ready.state, ready.adapter)
    progress, engine = ready.state.progress, ready.planned.choice.engine
    if ready.planned.choice.name != progress.cut.engine:
        raise SickDeviceError(
            f"rank {world.rank}: the engine that computes right here is {ready.planned.choice.name}, and on rank 0 "
            f"{progress.cut.engine}; look at this device, or name one with --engine"
        )
    progress.cut = adopt_or_shrink(engine, progress.cut)
    engine.refresh()
    return ready


def obey_in_a_look(attempt: Attempt, company: Company, inputs: Inputs) -> None:
    """While rank 0 looks at a night: nobody waits for a copy of the base, and one that is sharded needs all of us."""
    company.loaded()
    _be_there_before_training(attempt, company, inputs)


def gather_as_others_did(attempt: Attempt, company: Company, run: Run) -> Inputs:
    """What training a run starts from that rank 0 has found.

    Raises:
        JobError: as `gather`; what another process has ended with.
    """
    return company.in_turn(lambda: place_base(attempt, gather(attempt, run, lambda: _NO_ATTEMPT), company))


def _be_there_before_training(attempt: Attempt, company: Company, inputs: Inputs) -> None:
    """A base of which each holds a part needs all of us to be loaded, for models that rank 0 judges as well."""
    if inputs.placement == "sharded":
        with attempt.phases.phase("join"):
            world = company.join(inputs.device)
        assert isinstance(world, Ranks), "who follows is not alone"
        with attempt.phases.phase("follow"):
            _keep_company(attempt, inputs, world)


def _keep_company(attempt: Attempt, inputs: Inputs, world: Ranks) -> None:
    """Send rank 0 our shards for each model that it judges alone, until it has judged the last one."""
    while world.obey()[0] is Order.PROVE:
        _send_shards(attempt, inputs, world)


def _send_shards(attempt: Attempt, inputs: Inputs, world: Ranks) -> None:
    """The base anew, for rank 0 alone, until it needs them no more."""
    release_memory(inputs.device)
    sharded = load_placed(inputs, world, attempt.phases.on_beat)[1]
    assert sharded is not None, "rank 0 needs us for a base that is sharded"
    world.agree(go=True)
    sharded.close()


class _Follower:
    """Carries out orders, one after another."""

    def __init__(self, attempt: Attempt, inputs: Inputs, ready: Prepared, world: Ranks) -> None:
        self._attempt, self._inputs, self._ready, self._world = attempt, inputs, ready, world
        self._stepper: Stepper | None = None

    def obey(self) -> None:
        while True:
            what, number, tokens = self._world.obey()
            match what:
                case Order.ANSWER:
                    self._answer()
                case Order.PREPARE:
                    self._stepper = make_stepper(self._attempt, self._inputs, self._ready, self._world)
                case Order.STEP:
                    self._step(number)
                case Order.EVALUATE:
                    self._finish()
                    self._evaluate(number, tokens)
                case Order.SETTLE:
                    self._finish().settle()
                case Order.PROVE:
                    self._let_go()
                    _send_shards(self._attempt, self._inputs, self._world)
                    _keep_company(self._attempt, self._inputs, self._world)
                    return
                case Order.STOP:
                    raise StopRequestedError("asked to stop; rank 0 has committed what there was")
                case Order.DONE:
                    return

    def _let_go(self) -> None:
        """The training is over."""
        assert self._ready.model.sharded is not None, "rank 0 needs us for a base that is sharded"
        self._ready.model.sharded.close()
        del self._ready
        self._stepper = None

    def _finish(self) -> Stepper:
        """Read the last step's numbers when rank 0 does, so that one that is not finite ends all of us alike."""
        assert self._stepper is not None, "rank 0 lets us prepare first"
        self._stepper.finish()
        return self._stepper

    def _step(self, number: int) -> None:
        assert self._stepper is not None, "as above"
        try:
            self._stepper.step(number)
        except StepCutShortError:
            log.info("step_dropped", step=number)

    def _evaluate(self, step: int, planned_tokens: int) -> None:
        """What was found is rank 0's to judge."""
        progress, validation = self._ready.state.progress, self._inputs.dataset.validation
        while True:
            try:
                evaluate(
                    self._ready.model,
                    validation,
                    step=step,
                    tokens_at_once=progress.cut.evaluation_tokens,
                    should_stop=self._attempt.worker.should_stop,
                    on_progress=lambda _done: None,
                    world=self._world,
                    planned_tokens=planned_tokens,
                )
            except StopRequestedError:
                return
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # its frames hold the activations that did not fit
                progress.cut = shrink(
                    self._ready.planned.choice.engine,
                    progress.cut,
                    "evaluation",
                    longest=validation.max_length,
                    layers=self._ready.planned.layers,
                    error=failure,
                )
            else:
                return

    def _answer(self) -> None:
        recipe, model = self._attempt.worker.recipe, self._ready.model
        try:
            with model.model.disable_adapter():
                answer(
                    model,
                    questions_of(self._inputs, recipe, should_stop=lambda: False),  # rank 0 waits for our answers
                    self._inputs.tokenizer,
                    max_new_tokens=recipe.evaluate.max_new_tokens,
                    seed=recipe.train.seed,
                    should_stop=self._attempt.moves_on,
                    world=self._world,
                )
        except StopRequestedError:
            return
