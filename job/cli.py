"""Front door: arguments and environment in, exit code out. Owner of click, the environment and the terminal."""

import contextlib
import json
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

import click

from job import __version__
from job.core.errors import JobError, LocalDiskError, StopRequestedError, UsageError, ending, exit_code
from job.edge.host.interrupt import Interrupt
from job.edge.host.output import LastingOutput

DEFAULT_GRACE_SECONDS = 30.0
"""What schedulers give where nobody sets anything else."""
DEFAULT_LEASE_SECONDS = 60.0
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS?$", re.IGNORECASE)


class _Lines(click.ParamType):  # type: ignore[type-arg] # generic only in newer clicks
    """Text whose environment variable holds one value a line."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [line for line in rv.splitlines() if line.strip()]


_workdir = click.option(
    "--workdir",
    envvar="JOB_WORKDIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("work"),
    show_default=True,
    help="Folder for downloads, encoded data and checkpoints on their way.",
)
_device = click.option(
    "--device",
    envvar="JOB_DEVICE",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="`cuda` ends with 82 when no GPU is visible, instead of training on the CPU.",
)
_engine = click.option(
    "--engine",
    envvar="JOB_ENGINE",
    type=click.Choice(["auto", "fast", "generic"]),
    default="auto",
    show_default=True,
    help="How gradients are computed. `auto` takes the hand-written step (`fast`) for Llama, Mistral and Qwen on a "
    "GPU, where it gives what the generic path gives; `fast` insists on it.",
)


def _open_outcome(context: click.Context, _param: click.Parameter, path: Path | None) -> None:
    from job.edge.host.outcome import Outcome

    context.obj["outcome"] = Outcome(path)


def _shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
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
            multiple=True,
            type=_Lines(),
            envvar="JOB_SET",
            metavar="KEY=VALUE",
            help="Override one key of the recipe, e.g. lora.r=16. In JOB_SET one to a line.",
        ),
        _workdir,
        _device,
        click.option(
            "--outcome-file",
            envvar="JOB_OUTCOME_FILE",
            type=click.Path(path_type=Path),
            metavar="FILE",
            is_eager=True,  # first: it is to tell what is wrong with the others
            callback=_open_outcome,
            expose_value=False,
            help="One small JSON, kept current: phase, step, loss, ETA; at the end exit code, reason, what to do.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--log-format",
    envvar="JOB_LOG_FORMAT",
    type=click.Choice(["auto", "json", "console"]),
    default="auto",
    show_default=True,
    help="JSON lines, or lines for people; `auto` is JSON unless this is a terminal.",
)
@click.version_option(__version__, prog_name="qlora-job")
@click.pass_context
def cli(context: click.Context, log_format: str) -> None:
    """Fine-tune a causal language model with 4-bit QLoRA: JSONL from object storage in, adapter and report back.

    Every option can also come from the environment: JOB_RUN_ID, JOB_WORKDIR, ... The exit code says whether starting
    the same job again helps; README.md has the table.
    """
    as_json = {"auto": not sys.stdout.isatty(), "json": True, "console": False}[log_format]
    context.obj["json"] = as_json
    from job.edge.host.logs import configure

    context.obj["hide"] = configure(secrets=_secrets(os.environ), json=as_json)
    # Threads that wait by spinning make training eight times slower as soon as anything else wants a core, and eat a
    # container's CPU quota. It is read when torch is loaded, so it is said before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_shared_options
@_engine
@click.option(
    "--grace-seconds",
    envvar="JOB_GRACE_SECONDS",
    type=click.FloatRange(min=1),
    help="Time between a request to stop and the kill: a stop is fitted into it. Without it 30 are taken for likely.",
)
@click.option(
    "--deadline",
    envvar="JOB_DEADLINE",
    metavar="TIME",
    help="When the scheduler ends the job (ISO 8601 or Unix seconds); it saves and ends with 75 before.",
)
@click.option(
    "--lease-seconds",
    envvar="JOB_LEASE_SECONDS",
    type=click.FloatRange(min=1),
    default=DEFAULT_LEASE_SECONDS,
    show_default=True,
    help="How long another attempt at this run may be silent before it is taken for dead.",
)
@click.option(
    "--stall-seconds",
    envvar="JOB_STALL_SECONDS",
    type=click.FloatRange(min=1),
    help="End with 83 after so long without progress; without it each phase has its own time.",
)
@click.option(
    "--force",
    envvar="JOB_FORCE",
    is_flag=True,
    help="Work on the run although its last two attempts failed in the same way.",
)
@click.option("--crash-at", envvar="JOB_CRASH_AT", metavar="POINT", hidden=True, help="For tests: ends there.")
@click.pass_context
def run(context: click.Context, /, recipe: Path, **options: Any) -> None:
    """Carry the recipe's run to its committed report; a finished run is left as it is, an unfinished one resumed."""
    attempt = _attempt(context, recipe, options)
    if options["crash_at"]:
        from job.edge.host.crashing import arm

        arm(options["crash_at"])
    from job.commands.run import run as carry_out
    from job.render.report_text import report_lines

    report = carry_out(attempt)
    _log().info(
        "finished",
        base_loss=round(report.sweet_spot.base_loss, 4),
        tuned_loss=round(report.sweet_spot.loss, 4),
        chosen_step=report.sweet_spot.step,
        report=f"{report.run_uri}/report.json",
    )
    if not context.obj["json"]:
        click.echo("\n" + "\n".join(report_lines(report)) + f"\n\nreport: {report.run_uri}/report.json")


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_shared_options
@click.pass_context
def check(context: click.Context, /, recipe: Path, **options: Any) -> None:
    """Refuse now what would fail later: recipe, credentials, inputs, output, base model, data. Needs no GPU."""
    attempt = _attempt(context, recipe, options)
    from job.edge.host.logs import only_warnings

    only_warnings()  # the table is what is asked for
    from job.commands.check import Row
    from job.commands.check import check as look

    def show(row: Row) -> None:
        first, *rest = context.obj["hide"](row.found).splitlines()
        click.echo(f"{'ok ' if row.error is None else 'NO '} {row.name:<11} {first}")
        for line in rest:
            click.echo(f"{'':<16}{line}")

    show(Row(name="recipe", found=f"{recipe}: run would write to {attempt.recipe.output}"))
    context.obj["failure"] = look(attempt, show)


@cli.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@_shared_options
@_engine
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    type=_Lines(),
    envvar="JOB_GPU",
    metavar="NAME",
    help="Kind of GPU: h200, h100, a100, a100-40, a10g, l4, ...; may be repeated. Without it, all that are known.",
)
@click.option(
    "--gpu-memory",
    envvar="JOB_GPU_MEMORY",
    type=click.FloatRange(min=1),
    metavar="GIB",
    help="Memory of another GPU, or of the part of one that the job gets.",
)
@click.option(
    "--usd-per-hour",
    envvar="JOB_USD_PER_HOUR",
    type=click.FloatRange(min=0),
    help="What the GPU costs; adds the cost of the run.",
)
@click.pass_context
def plan_run(context: click.Context, /, recipe: Path, **options: Any) -> None:
    """Tell what the run needs and takes: lengths, memory by part, time on each kind of GPU. Needs no GPU."""
    attempt = _attempt(context, recipe, options)
    from job.core.gpus import GPUS, Gpu, gpu_named
    from job.edge.host.logs import only_warnings

    only_warnings()
    memory = options["gpu_memory"]
    gpus = [gpu_named(name.strip(), memory_gib=memory) for name in options["gpus"]]
    if not gpus:
        gpus = [*GPUS] if memory is None else [Gpu(name="your GPU", memory_gib=memory, dense_tflops=None)]
    from job.commands.plan import plan
    from job.render.plan_text import plan_lines

    found = plan(attempt, gpus)
    lines = plan_lines(found.data, found.candidates, found.work, found.forecasts, usd_per_hour=options["usd_per_hour"])
    click.echo(context.obj["hide"]("\n".join(lines)))


@cli.command(name="try")
@click.argument("run_uri")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    type=_Lines(),
    envvar="JOB_PROMPT",
    help="Prompt, taken as it is; asks on stdin without it, where \\n stands for a line break.",
)
@click.option(
    "--max-new-tokens",
    envvar="JOB_MAX_NEW_TOKENS",
    type=click.IntRange(min=1),
    help="Longest answer; as in the recipe without it.",
)
@_workdir
@_device
@click.pass_context
def try_run(
    context: click.Context,
    run_uri: str,
    prompts: tuple[str, ...],
    max_new_tokens: int | None,
    workdir: Path,
    device: str,
) -> None:
    """Prompt the adapter of a finished run and its base, side by side."""
    from job.commands.try_out import ask
    from job.edge.host.logs import only_warnings

    only_warnings()

    def show(prompt: str, base: str, tuned: str) -> None:
        click.echo(f"prompt  {prompt}\nbase    {base}\ntuned   {tuned}\n")

    ask(
        run_uri,
        prompts or _typed(context.obj["interrupt"]),
        workdir=workdir,
        device=device,
        max_new_tokens=max_new_tokens,
        should_stop=context.obj["interrupt"],
        on_answer=show,
    )


@cli.command(
    help="Show the report of a finished run and leave its pictures beside report.json; of several runs show a table: "
    "what differs in the recipes, the losses, which was best. It ends with 66 when one of them is not finished.\n\n"
    "RUN is a run's URI; {output}/runs for all of them (its last part may hold `*`); a file with one URI a line; or a "
    "recipe, for the run that it names now (only there the options mean something)."
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@_shared_options
@click.pass_context
def report(context: click.Context, /, runs: tuple[str, ...], **options: Any) -> None:
    """Show one report, or several runs side by side."""
    from job.commands.report import leave_pictures, look_at, open_run, run_of_recipe, run_uris, unfinished
    from job.render.report_text import report_lines
    from job.render.runs_table import runs_table

    if len(runs) == 1 and runs[0].endswith((".yaml", ".yml")):
        artifacts, found = run_of_recipe(_attempt(context, Path(runs[0]), options))
    else:
        uris = [uri for name in runs for uri in run_uris(name)]
        if tuple(uris) != runs or len(uris) > 1:
            rows = [look_at(uri) for uri in uris]
            click.echo("\n".join(runs_table(rows)))
            context.obj["failure"] = unfinished(rows)
            return
        artifacts, found = open_run(uris[0])
    click.echo("\n".join(report_lines(found)))
    click.echo(leave_pictures(artifacts, found))


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "folder",
    envvar="JOB_TO",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to fill.",
)
@_shared_options
@click.pass_context
def fetch(context: click.Context, /, recipe: Path, folder: Path, **options: Any) -> None:
    """Bring base model and data to a folder beforehand, for nodes without internet."""
    attempt = _attempt(context, recipe, options)
    from job.commands.fetch import fetch as bring

    path = bring(attempt, folder)
    click.echo(f"fetched; on the node without internet: python entrypoint.py run {path}")


def main(interrupt: Interrupt) -> int:
    """Run the command line; every way to end has a code of the table."""
    state: dict[str, Any] = {"interrupt": interrupt, "json": True, "hide": str, "attempt": None, "failure": None}
    state["outcome"] = None
    with contextlib.redirect_stdout(cast("TextIO", LastingOutput(sys.stdout))):
        try:
            cli.main(obj=state, standalone_mode=False)
        except click.ClickException as error:
            error.show()
            if state["outcome"] is None and (file := os.environ.get("JOB_OUTCOME_FILE")):
                from job.edge.host.outcome import Outcome  # the mistake came before the option was looked at

                state["outcome"] = Outcome(Path(file))
            return _ended(state, UsageError(error.format_message()), shown=True)
        except click.exceptions.Abort as error:
            # click's word for an EOFError, which here comes from a library: it is a failure like others.
            return _ended(state, error.__cause__ or error, shown=False)
        except Exception as error:  # noqa: BLE001 - the one place where every failure gets its code
            return _ended(state, error, shown=False)
        return _ended(state, state["failure"], shown=True)


def _ended(state: Mapping[str, Any], error: BaseException | None, *, shown: bool) -> int:
    """Say how it ended, in the log and in the outcome file."""
    code = 0 if error is None else exit_code(error)
    if error is not None and code == LocalDiskError.code and not isinstance(error, JobError):
        error = LocalDiskError(f"{error}; give the work folder more room, or name another one with --workdir")
    attempt = state["attempt"]
    standing = attempt.standing if attempt else None
    row = ending(code)
    again = "no" if standing and standing.final else row.again.value
    if error is not None and not shown:
        facts = {
            "exit_code": code,
            "reason": str(error) or type(error).__name__,
            "again": again,
            "action": row.action,
            "signal": state["interrupt"].reason if code == StopRequestedError.code else None,
            "last_committed_step": standing.last_committed_step if standing else None,
            "run_uri": standing.run_uri if standing else None,
        }
        if code == JobError.code:
            facts["traceback"] = "".join(traceback.format_exception(error))
        tell = _log().warning if code == StopRequestedError.code else _log().error
        tell("ended", **{k: v for k, v in facts.items() if v is not None})
    if state["outcome"]:
        state["outcome"].end(
            code=code,
            again=again,
            reason="done" if error is None else state["hide"](str(error) or type(error).__name__),
            last_committed_step=standing.last_committed_step if standing else None,
            run_uri=standing.run_uri if standing else None,
            action=row.action,
        )
    return code


def _attempt(context: click.Context, path: Path, options: Mapping[str, Any]) -> Any:
    """Read the recipe and gather what every stage shares."""
    from job.core.recipe_text import load_recipe
    from job.edge.host.process import age_seconds
    from job.stages.attempt import Attempt, Phases

    outcome = context.obj["outcome"]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the recipe cannot be read ({error})") from error
    overrides = [*options["overrides"]]
    if options["output"]:
        overrides.append(f"output={json.dumps(options['output'], ensure_ascii=False)}")  # as YAML, whatever is in it
    run_id = options["run_id"]
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", run_id):
        raise UsageError(f"--run-id {run_id}: use letters, digits, '.', '_' and '-', at most 64")
    attempt = Attempt(
        recipe=load_recipe(text, source=str(path), overrides=overrides),
        workdir=options["workdir"].resolve(),
        device=options["device"],
        engine=options.get("engine", "auto"),
        run_id=run_id,
        should_stop=context.obj["interrupt"],
        ask_to_stop=context.obj["interrupt"].ask,
        is_kill_near=lambda: context.obj["interrupt"].signalled,
        tell_end=lambda error: _ended(context.obj, error, shown=False),
        grace_seconds=options.get("grace_seconds"),
        limits=_limits(options),
        stall_seconds=options.get("stall_seconds"),
        lease_seconds=options.get("lease_seconds", DEFAULT_LEASE_SECONDS),
        force=options.get("force", False),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        hide=context.obj["hide"],
        outcome=outcome,
        phases=Phases(outcome, began=time.monotonic() - age_seconds()),
        step_events_seconds=0.0 if context.obj["json"] else 1.0,
    )
    context.obj["attempt"] = attempt
    return attempt


def _limits(options: Mapping[str, Any]) -> Any:
    """The time that the attempt is given; the deadline on the monotonic clock, which nobody sets back."""
    from job.core.limits import Limits, parse_deadline

    said = options.get("deadline")
    deadline = None if said is None else time.monotonic() + parse_deadline(said) - time.time()
    return Limits(grace_seconds=options.get("grace_seconds") or DEFAULT_GRACE_SECONDS, deadline=deadline)


def _typed(should_stop: Callable[[], bool]) -> Iterator[str]:
    """Prompts from the keyboard or a pipe, until its end or Ctrl-C."""
    while True:
        click.echo("prompt> ", nl=False)
        # The signal only sets a flag, and reading a line would go on after it.
        while sys.stdin.isatty() and not select.select([sys.stdin], [], [], 0.2)[0]:
            if should_stop():
                return
        line = sys.stdin.readline()
        if not line:
            click.echo()
            return
        if line.strip():
            yield line.rstrip("\n").replace("\\n", "\n")


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values that must never be shown."""
    return [value for name, value in environment.items() if value and _SECRET_NAME.search(name)]


def _log() -> Any:
    import structlog

    return structlog.get_logger(__name__)
