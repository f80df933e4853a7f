"""Front door: arguments and environment in, exit code out. Owner of the environment and the terminal."""

import contextlib
import os
import re
import select
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast
from urllib.parse import unquote

import click
import structlog

from job import __version__
from job.core.errors import UsageError
from job.core.given import Given, as_records, set_lines
from job.core.visible import one_line
from job.edge.host.interrupt import Interrupt
from job.edge.host.output import LastingOutput
from job.ending import Session
from job.options import (
    AddedUp,
    device_option,
    engine_option,
    make_attempt,
    recipe_argument,
    shared_options,
    time_options,
    workdir_option,
)

if TYPE_CHECKING:
    from job.core.gpus import Gpu

log = structlog.get_logger(__name__)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS?$", re.IGNORECASE)


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
@click.pass_obj
def cli(session: Session, log_format: str) -> None:
    """Fine-tune a causal language model with 4-bit QLoRA: JSONL from object storage in, adapter and report back.

    Every option can also come from the environment: JOB_RUN_ID, JOB_WORKDIR, ... The exit code says whether starting
    the same job again helps; README.md has the table.
    """
    session.as_json = {"auto": not sys.stdout.isatty(), "json": True, "console": False}[log_format]
    from job.edge.host.logs import configure

    session.hide = configure(secrets=_secrets(os.environ), json=session.as_json)
    # Threads that wait by spinning make training eight times slower as soon as anything else wants a core, and eat a
    # container's CPU quota. It is read when torch is loaded, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.umask(os.umask(0) | stat.S_IWOTH)  # what we leave is used again as ours: nobody else may change it


@cli.command()
@recipe_argument
@shared_options
@engine_option
@time_options
@click.option(
    "--force",
    envvar="JOB_FORCE",
    is_flag=True,
    help="Work on the run although its last two attempts failed in the same way.",
)
@click.option("--crash-at", envvar="JOB_CRASH_AT", metavar="POINT", hidden=True, help="For tests: ends there.")
@click.pass_obj
def run(session: Session, /, recipe: Path, **options: Any) -> None:
    """Carry the recipe's run to its committed report; a finished run is left as it is, an unfinished one resumed."""
    attempt = make_attempt(session, recipe, options)
    # Compiled code is loaded from there, and by itself torch takes a folder in /tmp whose name anybody can guess.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(attempt.worker.workdir / "cache" / "inductor"))
    if options["crash_at"]:
        from job.edge.host.crashing import arm

        arm(options["crash_at"])
    for override in as_records(attempt.overrides):
        log.info("override", **override)
    from job.commands.run import run as carry_out
    from job.render.report_text import report_lines

    report = carry_out(attempt)
    log.info(
        "finished",
        base_loss=round(report.sweet_spot.base_loss, 4),
        tuned_loss=round(report.sweet_spot.loss, 4),
        chosen_step=report.sweet_spot.step,
        report=f"{report.run_uri}/report.json",
    )
    if not session.as_json:
        _say(session, "", *report_lines(report), "", f"report: {report.run_uri}/report.json")


@cli.command()
@recipe_argument
@shared_options
@click.pass_obj
def check(session: Session, /, recipe: Path, **options: Any) -> None:
    """Refuse now what would fail later: recipe, credentials, inputs, output, base model, data. Needs no GPU."""
    attempt = make_attempt(session, recipe, options)
    from job.edge.host.logs import only_warnings

    only_warnings()  # the table is what is asked for
    from job.commands.check import Row
    from job.commands.check import check as look

    def show(row: Row) -> None:
        first, *rest = row.found.splitlines()
        _say(session, f"{'ok ' if row.error is None else 'NO '} {row.name:<11} {first}")
        for line in rest:
            _say(session, f"{'':<16}{line}")

    found = f"{recipe}: run would write to {attempt.worker.recipe.output}"
    show(Row(name="recipe", found="\n".join([found, *set_lines(attempt.overrides)])))
    session.failure = look(attempt.worker, run_id=attempt.run_id, phases=attempt.phases, on_row=show)


@cli.command(name="plan")
@recipe_argument
@shared_options
@engine_option
@click.option(
    "--gpu",
    "gpus",
    cls=AddedUp,
    envvar="JOB_GPU",
    metavar="NAME",
    help="Kind of GPU: h200, h100, a100, a100-40, a10g, l4, ... Without it, all that are known.",
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
@click.option(
    "--json",
    "as_json",
    envvar="JOB_JSON",
    is_flag=True,
    help="Print one JSON object for scripts instead; warnings and errors then go to stderr.",
)
@click.pass_obj
def plan_run(session: Session, /, recipe: Path, **options: Any) -> None:
    """Show what the run needs and takes: lengths, memory by part, time on each kind of GPU. Needs no GPU."""
    from job.edge.host.logs import only_warnings, to_stderr

    only_warnings()
    if options["as_json"]:
        to_stderr()
    attempt = make_attempt(session, recipe, options)
    gpus, usd_per_hour = _gpus(options), options["usd_per_hour"]
    from job.commands.plan import ask_templates, plan
    from job.core.plan_json import plan_json
    from job.render.plan_text import plan_lines

    found = plan(attempt.worker, gpus, run_id=attempt.run_id, phases=attempt.phases)
    facts = found.data, found.candidates, found.work, found.forecasts
    if options["as_json"]:
        lines = plan_json(*facts, usd_per_hour=usd_per_hour).model_dump_json(indent=2).splitlines()
    else:
        lines = plan_lines(*facts, templates=ask_templates(), usd_per_hour=usd_per_hour)
    _say(session, *lines)


@cli.command(name="try")
@click.argument("run_uri")
@click.option(
    "--prompt",
    "prompts",
    cls=AddedUp,
    envvar="JOB_PROMPT",
    metavar="TEXT",
    help="Prompt, taken as it is but for \\n, which is a line break. Without --prompt, --field and --record it asks on "
    "stdin.",
)
@click.option(
    "--field",
    "fields",
    cls=AddedUp,
    envvar="JOB_FIELD",
    metavar="NAME=VALUE",
    help="A field of a record; the run's template makes the prompt of all that are given.",
)
@click.option(
    "--record",
    "record_file",
    envvar="JOB_RECORD",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Records as JSON lines, or one JSON object; the run's template makes a prompt of each.",
)
@click.option(
    "--max-new-tokens",
    envvar="JOB_MAX_NEW_TOKENS",
    type=click.IntRange(min=1),
    help="Longest answer; as in the recipe without it.",
)
@workdir_option
@device_option
@click.pass_obj
def try_run(
    session: Session,
    run_uri: str,
    prompts: tuple[Given, ...],
    fields: tuple[Given, ...],
    record_file: Path | None,
    max_new_tokens: int | None,
    workdir: Path,
    device: str,
) -> None:
    """Prompt the adapter of a finished run and its base, side by side."""
    from job.commands.try_out import Asked, try_out
    from job.core.asking import typed
    from job.edge.host.logs import only_warnings

    only_warnings()

    def show(prompt: str, base: str, tuned: str) -> None:
        for name, text in (("prompt", prompt), ("base", base), ("tuned", tuned)):
            first, *rest = text.split("\n")
            _say(session, f"{name:<7} {first}", *(f"{'':<7} {line}" if line else "" for line in rest))
        _say(session, "")

    written = [typed(prompt.text) for prompt in prompts]
    asked = Asked(
        prompts=written if written or fields or record_file else map(typed, _typed(session.interrupt)),
        fields=[field.text for field in fields],
        record_file=record_file,
    )
    try_out(
        run_uri,
        asked,
        workdir=workdir,
        device=device,
        max_new_tokens=max_new_tokens,
        should_stop=session.interrupt,
        on_answer=show,
    )


@cli.command(
    help="Show the report of a finished run and leave its pictures beside report.json; of several runs show a table: "
    "what differs in the recipes, the losses, which was best. It ends with 66 when one of them is not finished.\n\n"
    "RUN is a run's URI; {output}/runs for all of them (its last part may hold `*`); a file with one URI a line; or a "
    "recipe, for the run that it names now (only there the options mean something)."
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@shared_options
@click.pass_obj
def report(session: Session, /, runs: tuple[str, ...], **options: Any) -> None:
    """Show one report, or several runs side by side."""
    from job.commands.report import leave_pictures, look_at, open_run, run_of_recipe, run_uris, unfinished
    from job.render.report_text import report_lines
    from job.render.runs_table import runs_table

    if len(runs) == 1 and runs[0].endswith((".yaml", ".yml")):
        attempt = make_attempt(session, Path(runs[0]), options)
        artifacts, found = run_of_recipe(attempt.worker, attempt.run_id)
    else:
        uris = [uri for name in runs for uri in run_uris(name)]
        if tuple(uris) != runs or len(uris) > 1:
            rows = [look_at(uri) for uri in uris]
            _say(session, *runs_table(rows))
            session.failure = unfinished(rows)
            return
        artifacts, found = open_run(uris[0])
    _say(session, *report_lines(found), leave_pictures(artifacts, found))


@cli.command()
@recipe_argument
@click.option(
    "--to",
    "folder",
    envvar="JOB_TO",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to fill.",
)
@shared_options
@click.pass_obj
def fetch(session: Session, /, recipe: Path, folder: Path, **options: Any) -> None:
    """Bring base model and data to a folder beforehand, for nodes without internet."""
    attempt = make_attempt(session, recipe, options)
    from job.commands.fetch import fetch as bring

    path = bring(attempt.worker, attempt.phases, folder)
    _say(session, f"fetched; on the node without internet: python entrypoint.py run {path}")


def main(interrupt: Interrupt) -> int:
    """Run the command line; every way to end has a code of the table."""
    session = Session(interrupt=interrupt)
    with _lasting_output():
        try:
            cli.main(obj=session, standalone_mode=False)
        except click.ClickException as error:
            error.show()
            if session.outcome is None and (file := os.environ.get("JOB_OUTCOME_FILE")):
                from job.edge.host.outcome import Outcome  # the mistake came before the option was looked at

                session.outcome = Outcome(Path(file))
            return session.end(UsageError(error.format_message()), shown=True)
        except click.exceptions.Abort as error:
            # click's word for an EOFError, which here comes from a library: it is a failure like others.
            return session.end(error.__cause__ or error, shown=False)
        except BaseException as error:  # noqa: BLE001 - the one place where every failure gets its code
            # A panic in a library's Rust is no Exception, and nor is a library's own exit.
            return session.end(error, shown=False)
        return session.end(session.failure, shown=True)


def _say(session: Session, *lines: str) -> None:
    """Lines to standard output; records, answers and names in them are by strangers, who shall not begin new ones."""
    click.echo("\n".join(one_line(session.hide(line)) for line in lines))


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
    """Whoever reads what we write may go, and its disk may be full."""
    out, err = LastingOutput(sys.stdout), LastingOutput(sys.stderr)
    with contextlib.redirect_stdout(cast("TextIO", out)), contextlib.redirect_stderr(cast("TextIO", err)):
        try:
            yield
        finally:
            out.end()
            err.end()


def _gpus(options: Mapping[str, Any]) -> "list[Gpu]":
    """The named ones, one by its memory alone, or all that are known."""
    from job.core.gpus import GPUS, Gpu, gpu_named

    memory = options["gpu_memory"]
    names = dict.fromkeys(given.text.strip() for given in options["gpus"])
    named = [gpu_named(name, memory_gib=memory) for name in names]
    if named:
        return named
    return [*GPUS] if memory is None else [Gpu(name="your GPU", memory_gib=memory, dense_tflops=None)]


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
            yield line.rstrip("\n")


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values that must never be shown; those that a proxy's URL carries among them."""
    named = [value for name, value in environment.items() if value and _SECRET_NAME.search(name)]
    pairs = [found[1] for value in environment.values() for found in re.finditer(r"://([^/\s]+)@", value)]
    passwords = [password for pair in pairs if (password := pair.partition(":")[2])]
    return [*named, *pairs, *passwords, *map(unquote, passwords)]
