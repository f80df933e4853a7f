"""The options that commands share, and what they make of them: the attempt that the stages work with."""

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from job.core.attempt.seat import SUPERVISOR_SECONDS
from job.core.errors import UsageError
from job.core.given import Given
from job.core.plan.memory import WantedEngine
from job.ending import Session

if TYPE_CHECKING:
    from job.core.attempt.limits import Limits
    from job.stages.attempt import Attempt, Phases

DEFAULT_GRACE_SECONDS = 30.0
"""What schedulers give where nobody sets anything else."""
DEFAULT_LEASE_SECONDS = 60.0


class Lines(click.ParamType):  # type: ignore[type-arg] # generic only in newer clicks
    """Text whose environment variable holds one value a line."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Blank lines are none."""
        return [line for line in rv.splitlines() if line.strip()]


class AddedUp(click.Option):
    """A repeatable option: the lines of its variable come first, then what the command line gives; each a `Given`.

    click lets the command line replace the variable as a whole, and a site's values would be lost without a word.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        """As a click.Option of several texts."""
        super().__init__(*args, **attributes | {"multiple": True, "type": Lines()})

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        """From both, and where the last one came from."""
        value, source = super().consume_value(ctx, opts)
        by_variable = self.value_from_envvar(ctx) or []
        ctx.meta[f"{__name__}.{self.name}"] = len(by_variable)
        if source is click.core.ParameterSource.COMMANDLINE:
            value = [*by_variable, *value]
        return value, source

    def process_value(self, ctx: click.Context, value: Any) -> tuple[Given, ...]:
        """The texts, each with its source."""
        texts = super().process_value(ctx, value) or ()
        by_variable = ctx.meta[f"{__name__}.{self.name}"]
        sources = [str(self.envvar)] * by_variable + [self.opts[0]] * (len(texts) - by_variable)
        return tuple(Given(text=text, source=source) for text, source in zip(texts, sources, strict=True))


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
workdir_option = click.option(
    "--workdir",
    envvar="JOB_WORKDIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("work"),
    show_default=True,
    help="Folder for downloads, encoded data and checkpoints on their way.",
)
device_option = click.option(
    "--device",
    envvar="JOB_DEVICE",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="`cuda` ends with 82 when no GPU is visible, instead of training on the CPU.",
)
engine_option = click.option(
    "--engine",
    envvar="JOB_ENGINE",
    type=click.Choice(get_args(WantedEngine)),
    default="auto",
    show_default=True,
    help="How gradients are computed. `auto` takes the hand-written step (`fast`) for Llama, Mistral and Qwen on a "
    "GPU, where it gives what the generic engine gives; `fast` insists on it.",
)


def _open_outcome(context: click.Context, _param: click.Parameter, path: Path | None) -> None:
    session: Session = context.obj
    session.open_outcome(path)


def _open_metrics(context: click.Context, _param: click.Parameter, path: Path | None) -> None:
    session: Session = context.obj
    if path is not None:
        session.open_metrics(path)


def _open_notice(context: click.Context, _param: click.Parameter, url: str | None) -> None:
    session: Session = context.obj
    if url:
        from job.edge.host.notice import Notice

        session.notice = Notice(url)


outcome_option = click.option(
    "--outcome-file",
    envvar="JOB_OUTCOME_FILE",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,  # first: it is to say what is wrong with the others
    callback=_open_outcome,
    expose_value=False,
    help="One small JSON, kept current: phase, step, loss, ETA; at the end exit code, reason, what to do.",
)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command on a recipe takes; each also by JOB_ and its name in the environment."""
    for option in (
        click.option(
            "--output",
            envvar="JOB_OUTPUT",
            metavar="URI",
            help="Where runs/ is written; wins over the recipe's output.",
        ),
        click.option(
            "--run-id",
            envvar="JOB_RUN_ID",
            metavar="ID",
            help="Name of the run; without it the run's identity gives one.",
        ),
        click.option(
            "--set",
            "overrides",
            cls=AddedUp,
            envvar="JOB_SET",
            metavar="KEY=VALUE",
            help="Override one key of the recipe, e.g. lora.r=16.",
        ),
        workdir_option,
        device_option,
        outcome_option,
    ):
        command = option(command)
    return command


def time_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How much time `run` has."""
    for option in (
        click.option(
            "--grace-seconds",
            envvar="JOB_GRACE_SECONDS",
            type=click.FloatRange(min=1),
            help="Time between a request to stop and the kill: a stop is fitted into it. Without it 30 are taken for "
            "likely.",
        ),
        click.option(
            "--deadline",
            envvar="JOB_DEADLINE",
            metavar="TIME",
            help="When the scheduler ends the job (ISO 8601 or Unix seconds); it saves and ends with 75 before.",
        ),
        click.option(
            "--lease-seconds",
            envvar="JOB_LEASE_SECONDS",
            type=click.FloatRange(min=1),
            default=DEFAULT_LEASE_SECONDS,
            show_default=True,
            help="How long another attempt at this run may be silent before it is taken for dead.",
        ),
        click.option(
            "--stall-seconds",
            envvar="JOB_STALL_SECONDS",
            type=click.FloatRange(min=1),
            help="End with 83 after so long without progress; without it each phase has its own time.",
        ),
    )[::-1]:  # click shows the last one that was added first
        command = option(command)
    return command


def news_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who else hears of `run`; nobody, unless it is asked for."""
    for option in (
        click.option(
            "--metrics-file",
            envvar="JOB_METRICS_FILE",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            is_eager=True,  # as the outcome file
            callback=_open_metrics,
            expose_value=False,
            help="Metrics in Prometheus' text format, replaced as a whole: step, loss, tokens per second, last commit, "
            "exit code.",
        ),
        click.option(
            "--notify-url",
            envvar="JOB_NOTIFY_URL",
            metavar="URL",
            is_eager=True,
            callback=_open_notice,
            expose_value=False,
            help="Gets one JSON by POST when the attempt has ended: exit code, reason, run. https, or http on this "
            "machine alone. A URL that holds a token belongs into the variable.",
        ),
    )[::-1]:
        command = option(command)
    return command


def leave_ending(session: Session, path: Path, options: Mapping[str, Any]) -> None:
    """From here on the end is written down in the output that the recipe names, be it right or wrong."""
    from job.core.recipe.text import named_output

    text = ""
    with suppress(OSError, UnicodeDecodeError):  # said by `make_attempt`
        text = path.read_text(encoding="utf-8-sig")
    session.output = named_output(text, (*options["overrides"], *_output(options["output"])))
    session.recipe = path.name


def make_phases(session: Session) -> "Phases":
    """The clock of a command that is no attempt at a run."""
    from job.edge.host.process import age_seconds
    from job.stages.attempt import Phases

    assert session.outcome is not None, "its option is eager"
    return Phases(session.outcome, began=time.monotonic() - age_seconds())


def make_attempt(session: Session, path: Path, options: Mapping[str, Any]) -> "Attempt":
    """Read the recipe and gather what the stages share; the session knows the attempt from here on.

    Raises:
        UsageError: the recipe or an option is wrong.
    """
    from job.core.recipe.text import load_recipe
    from job.edge.chat_template_files import with_template_texts
    from job.edge.relative_paths import located
    from job.stages.attempt import Attempt, Worker

    assert session.outcome is not None, "its option is eager"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{located(path)}: the recipe cannot be read ({error}); correct the path") from error
    overrides = (*options["overrides"], *_output(options["output"]))
    run_id = options["run_id"]
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", run_id):
        raise UsageError(f"--run-id {run_id}: use letters, digits, '.', '_' and '-', at most 64")
    recipe = load_recipe(text, source=str(path), overrides=overrides)
    worker = Worker(
        recipe=with_template_texts(recipe, beside=path.parent),
        workdir=options["workdir"].resolve(),
        device=options["device"],
        engine=options.get("engine", "auto"),
        placement=options.get("base_placement"),
        should_stop=session.interrupt,
        hub_token=session.hub_token,
    )
    session.attempt = Attempt(
        worker=worker,
        run_id=run_id,
        overrides=overrides,
        ask_to_stop=session.interrupt.ask,
        is_kill_near=lambda: session.interrupt.signalled,
        report_end=lambda error: session.end(error, shown=False),
        leave_word=session.leave_word,
        grace_seconds=_grace(session, options),
        limits=_limits(session, options),
        stall_seconds=options.get("stall_seconds"),
        lease_seconds=options.get("lease_seconds", DEFAULT_LEASE_SECONDS),
        force=options.get("force", False),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        hide=session.hide,
        outcome=session.outcome,
        phases=make_phases(session),
        step_events_seconds=0.0 if session.as_json else 1.0,
        hear_stop=session.interrupt.hear,
    )
    return session.attempt


def _output(uri: str | None) -> list[Given]:
    """The output as the last override: it wins over the recipe's, and over one that was set."""
    if not uri:
        return []
    by_variable = click.get_current_context().get_parameter_source("output") is click.core.ParameterSource.ENVIRONMENT
    source = "JOB_OUTPUT" if by_variable else "--output"
    return [Given(text=f"output={json.dumps(uri, ensure_ascii=False)}", source=source)]  # as YAML, whatever is in it


def _grace(session: Session, options: Mapping[str, Any]) -> float | None:
    """From a request to stop to the kill; a supervisor needs the end of it for itself."""
    given: float | None = options.get("grace_seconds")
    if given is None or session.seat is None:
        return given
    return given - min(SUPERVISOR_SECONDS, given / 4)


def _limits(session: Session, options: Mapping[str, Any]) -> "Limits":
    """The time that the attempt is given; the deadline on the monotonic clock, which nobody sets back."""
    from job.core.attempt.limits import Limits, parse_deadline

    given = options.get("deadline")
    deadline = None if given is None else time.monotonic() + parse_deadline(given) - time.time()
    return Limits(grace_seconds=_grace(session, options) or DEFAULT_GRACE_SECONDS, deadline=deadline)
