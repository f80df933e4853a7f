"""Front door: arguments and environment in, exit code out. Owner of the environment and the terminal."""

import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import structlog

from job import __version__
from job.channel_command import channel, show_channel
from job.core.errors import NotFoundError, UsageError
from job.core.given import as_records, set_lines
from job.core.library_settings import LIBRARY_SETTINGS
from job.core.lines import colours_wanted
from job.edge.host.interrupt import Interrupt
from job.edge.host.output import lasting_output, say_passing, terminal_width
from job.ending import Session, log_finished
from job.export_options import export_options
from job.launch.launched import leave, sit_down
from job.options import (
    device_option,
    engine_option,
    leave_ending,
    make_attempt,
    make_phases,
    news_options,
    recipe_argument,
    shared_options,
    time_options,
    workdir_option,
)
from job.saying import say as _say
from job.showing import plan_options, preview_options, report_options, try_options
from job.together import arm_crash_point, run_with_others, team_options

log = structlog.get_logger(__name__)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS?$|^JOB_NOTIFY_URL$", re.IGNORECASE)


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

    session.hide = configure(
        secrets=_secrets(os.environ),
        json=session.as_json,
        colours=colours_wanted(os.environ, terminal=sys.stdout.isatty()),
        in_place=not _is_dumb(),
    )
    session.hub_token = os.environ.get("HF_TOKEN", "").strip() or None
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.umask(os.umask(0) | stat.S_IWOTH)  # what we leave is used again as ours: nobody else may change it


@cli.command()
@recipe_argument
@shared_options
@engine_option
@time_options
@news_options
@team_options
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
    leave_ending(session, recipe, options)
    attempt = make_attempt(session, recipe, options)
    # Compiled code is loaded from there, and by itself torch takes a folder in /tmp whose name anybody can guess.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(attempt.worker.workdir / "cache" / "inductor"))
    arm_crash_point(session, options["crash_at"])
    if run_with_others(session, attempt, options, os.environ):
        return
    for override in as_records(attempt.overrides):
        log.info("override", **override)
    from job.commands.run import run as carry_out
    from job.render.report_text import report_lines

    report = carry_out(attempt, session.seat)
    log_finished(report)
    if not session.as_json:
        _say(session, "", *report_lines(report), "", f"report: {report.run_uri}/report.json")


@cli.command()
@recipe_argument
@click.option(
    "--quick",
    envvar="JOB_QUICK",
    is_flag=True,
    help="Leave out what needs torch: whether the base takes the adapter, and whether lengths were counted as training "
    "does.",
)
@shared_options
@click.pass_obj
def check(session: Session, /, recipe: Path, quick: bool, **options: Any) -> None:  # noqa: FBT001 a click option
    """Refuse now what would fail later: recipe, credentials, inputs, output, base model, data. Needs no GPU."""
    attempt = make_attempt(session, recipe, options)
    from job.edge.host.logs import only_warnings

    only_warnings()  # the table is what is asked for
    from job.commands.check import Row
    from job.commands.check import check as look

    def show(row: Row) -> None:
        first, *rest = row.found.splitlines()
        mark = "!! " if row.advice else "ok " if row.error is None else "NO "
        _say(session, f"{mark} {row.name:<11} {first}")
        for line in rest:
            _say(session, f"{'':<16}{line}")

    found = f"{recipe}: run would write to {attempt.worker.recipe.output}"
    show(Row(name="recipe", found="\n".join([found, *set_lines(attempt.overrides)])))
    session.failure = look(
        attempt.worker,
        run_id=attempt.run_id,
        phases=attempt.phases,
        quick=quick,
        for_a_person=sys.stdout.isatty(),
        chosen_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        on_look=lambda name: say_passing(f"... {name}", dumb=_is_dumb()),
        on_row=show,
    )


@cli.command(name="plan")
@recipe_argument
@shared_options
@engine_option
@plan_options
@click.pass_obj
def plan_run(session: Session, /, recipe: Path, **options: Any) -> None:
    """Show what the run needs and takes: lengths, memory by part, time on each kind of GPU. Needs no GPU."""
    from job.edge.host.logs import only_warnings, to_stderr

    only_warnings()
    if options["as_json"]:
        to_stderr()
    attempt = make_attempt(session, recipe, options)
    from job.commands.plan import ask_templates, plan
    from job.core.plan.gpus import gpus_of
    from job.core.plan.plan_json import plan_json
    from job.core.plan.scaling import cluster_of
    from job.render.plan_text import plan_lines

    named, usd_per_hour = [given.text.strip() for given in options["gpus"]], options["usd_per_hour"]
    gpus = gpus_of(named, memory_gib=options["gpu_memory"])
    cluster = cluster_of(gpus=options["gpus_a_node"], nodes=options["nodes"], gigabits=options["network"])
    found = plan(attempt.worker, gpus, cluster=cluster, run_id=attempt.run_id, phases=attempt.phases)
    facts = found.data, found.candidates, found.work, found.forecasts
    if options["as_json"]:
        lines = plan_json(*facts, usd_per_hour=usd_per_hour).model_dump_json(indent=2).splitlines()
    else:
        lines = plan_lines(*facts, words=found.words, templates=ask_templates(), usd_per_hour=usd_per_hour)
    _say(session, *lines)


@cli.command(name="preview")
@recipe_argument
@preview_options
@shared_options
@click.pass_obj
def preview_data(session: Session, /, recipe: Path, random: int, ids: bool, **options: Any) -> None:  # noqa: FBT001
    """Show examples as they are learned: what is given, what is learned, control tokens, cuts. Needs no GPU."""
    from job.edge.host.logs import only_warnings

    only_warnings()
    attempt = make_attempt(session, recipe, options)
    from job.commands.preview import preview
    from job.render.preview_text import preview_lines

    found = preview(attempt.worker, run_id=attempt.run_id, phases=attempt.phases, random=random, with_tokens=ids)
    width, colours = terminal_width(sys.stdout), colours_wanted(os.environ, terminal=sys.stdout.isatty())
    lines = preview_lines(found.examples, found.sources, width=width, colours=colours, ids=ids, hide=session.hide)
    click.echo("\n".join(lines), color=colours)  # what the records hold was made harmless with the colours


@cli.command(name="try")
@click.argument("run_uri")
@try_options
@workdir_option
@device_option
@click.pass_obj
def try_run(session: Session, /, run_uri: str, record_file: Path | None, **options: Any) -> None:
    """Prompt the adapter of a finished run and its base, side by side."""
    from job.commands.try_out import Asked, try_out, typed_prompts
    from job.core.data.asking import typed
    from job.edge.host.logs import only_warnings

    only_warnings()

    def show(prompt: str, base: str, tuned: str) -> None:
        for name, text in (("prompt", prompt), ("base", base), ("tuned", tuned)):
            first, *rest = text.split("\n")
            _say(session, f"{name:<7} {first}", *(f"{'':<7} {line}" if line else "" for line in rest))
        _say(session, "")

    written = [typed(prompt.text) for prompt in options.pop("prompts")]
    fields = [field.text for field in options.pop("fields")]
    asked = Asked(
        prompts=written if written or fields or record_file else map(typed, typed_prompts(session.interrupt)),
        fields=fields,
        record_file=record_file,
    )
    try_out(run_uri, asked, **options, should_stop=session.interrupt, on_answer=show)


@cli.command(
    help="Show the report of a finished run and leave its pictures and its page beside report.json; of several runs "
    "show a table, the newest first: when, for how long, on what data, the losses, what differs in the recipes, which "
    "was best. It ends with 66 when one of them is not finished.\n\n"
    "RUN is a run's URI; {output} or {output}/runs for all of them, and how the last jobs there ended (the last part "
    "of {output}/runs/* is a pattern); a file with one URI a line; or a recipe, for the run that it names now (only "
    "there the options mean something). Of a channel, {output}/channels/NAME, it shows what `channel` shows, and draws "
    "its nights with --html."
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@report_options
@shared_options
@click.pass_obj
def report(session: Session, /, runs: tuple[str, ...], last: int | None, html: Path | None, **options: Any) -> None:
    """Show one report, or several runs side by side."""
    from job.commands import report as reports
    from job.commands.channel import is_channel
    from job.render.endings_text import endings_lines
    from job.render.report_text import report_lines
    from job.render.runs_table import newest_first, runs_table

    if any(map(is_channel, runs)):
        if len(runs) > 1:
            raise UsageError("report: a channel is shown by itself; name it alone")
        show_channel(session, runs[0], html)
        return
    if len(runs) == 1 and runs[0].endswith((".yaml", ".yml")):
        attempt = make_attempt(session, Path(runs[0]), options)
        artifacts, found = reports.run_of_recipe(attempt.worker, attempt.run_id)
        session.failure = reports.left_undone(attempt.worker, artifacts)
    else:
        ended = endings_lines(reports.last_endings(runs))
        try:
            uris = [uri for name in runs for uri in reports.run_uris(name, most=last)]
        except NotFoundError:
            if ended:  # also of what never became a run
                _say(session, *ended)
            raise
        if tuple(uris) != runs or len(uris) > 1:
            rows = newest_first([reports.look_at(uri) for uri in uris], most=last)
            page = reports.page_of_several(rows, html)
            _say(session, *runs_table(rows, width=terminal_width(sys.stdout)), *ended, *page)
            session.failure = reports.unfinished(rows)
            return
        if page := reports.page_of_unfinished(uris[0], html):
            _say(session, *page)
            return
        artifacts, found = reports.open_run(uris[0])
    beside = [*reports.leave_beside(artifacts, found), *reports.write_page(found, html)]
    _say(session, *report_lines(found), *beside, *([f"to do: {session.failure}"] if session.failure else []))


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


@cli.command(name="export")
@export_options
@click.pass_obj
def export_model(session: Session, /, **options: Any) -> None:
    """Merge the adapter of a finished run into its base, prove the result, and write it where asked."""
    from job.commands.export import export
    from job.render.export_text import export_lines

    exported, uri = export(**options, phases=make_phases(session), should_stop=session.interrupt)
    if not session.as_json:
        _say(session, "", *export_lines(exported, uri))


cli.add_command(channel)


def main(interrupt: Interrupt) -> int:
    """Run the command line; every way to end has a code of the table."""
    session = Session(interrupt=interrupt, seat=sit_down(os.environ))
    with lasting_output():
        error, shown = _carry_out(session)
        code = session.end(error, shown=shown)
        session.leave_word(error)
    if session.seat is not None:
        leave(code)
    return code


def _carry_out(session: Session) -> tuple[BaseException | None, bool]:
    """What the command ended with, and whether that was shown already."""
    try:
        cli.main(obj=session, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        session.open_rest(os.environ, is_run="run" in sys.argv)
        return UsageError(error.format_message()), True
    except click.exceptions.Abort as error:
        # click's word for an EOFError, which here comes from a library: it is a failure like others.
        return error.__cause__ or error, False
    except BaseException as error:  # noqa: BLE001 - the one place where every failure gets its code
        # A panic in a library's Rust is no Exception, and nor is a library's own exit.
        return error, False
    return session.failure, True


def _is_dumb() -> bool:
    """Whether the terminal cannot go back on its line."""
    return os.environ.get("TERM") == "dumb"


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values that must never be shown; those that a proxy's URL carries among them."""
    named = [value for name, value in environment.items() if value and _SECRET_NAME.search(name)]
    pairs = [found[1] for value in environment.values() for found in re.finditer(r"://([^/\s]+)@", value)]
    passwords = [password for pair in pairs if (password := pair.partition(":")[2])]
    return [*named, *pairs, *passwords, *map(unquote, passwords)]
