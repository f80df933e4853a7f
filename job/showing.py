"""The options of commands that show something and train nothing: `plan`, `preview`, `try`, `report`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from job.options import AddedUp


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which GPUs `plan` looks at, and how it shows what it found."""
    for option in (
        click.option(
            "--gpu",
            "gpus",
            cls=AddedUp,
            envvar="JOB_GPU",
            metavar="NAME",
            help="Kind of GPU: h200, h100, a100, a100-40, a10g, l4, ... Without it, all that are known.",
        ),
        click.option(
            "--gpu-memory",
            envvar="JOB_GPU_MEMORY",
            type=click.FloatRange(min=1),
            metavar="GIB",
            help="Memory of another GPU, or of the part of one that the job gets.",
        ),
        click.option(
            "--gpus",
            "gpus_a_node",
            envvar="JOB_GPUS",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="How many of a kind train together, as `run` takes it: of each node.",
        ),
        click.option(
            "--nodes",
            envvar="JOB_NODES",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="On how many nodes, with as many GPUs each.",
        ),
        click.option(
            "--network",
            envvar="JOB_NETWORK",
            type=click.FloatRange(min=1),
            default=100,
            show_default=True,
            metavar="GBIT",
            help="With several nodes: Gbit/s that the network of each carries each way, over all its ports.",
        ),
        click.option(
            "--usd-per-hour",
            envvar="JOB_USD_PER_HOUR",
            type=click.FloatRange(min=0),
            help="What one GPU costs; adds the cost of the run, on all of them.",
        ),
        click.option(
            "--json",
            "as_json",
            envvar="JOB_JSON",
            is_flag=True,
            help="Print one JSON object for scripts instead; warnings and errors then go to stderr.",
        ),
    )[::-1]:
        command = option(command)
    return command


def preview_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `preview` shows of the examples."""
    for option in (
        click.option(
            "--random",
            envvar="JOB_RANDOM",
            type=click.IntRange(min=0),
            default=2,
            show_default=True,
            metavar="N",
            help="Examples of each source, besides the first, the longest and the shortest.",
        ),
        click.option("--ids", envvar="JOB_IDS", is_flag=True, help="Show every token by itself, with its id."),
    )[::-1]:
        command = option(command)
    return command


def try_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `try` asks, and how long answers are."""
    for option in (
        click.option(
            "--prompt",
            "prompts",
            cls=AddedUp,
            envvar="JOB_PROMPT",
            metavar="TEXT",
            help="Prompt, taken as it is but for \\n, which is a line break. Without --prompt, --field and --record it "
            "asks on stdin.",
        ),
        click.option(
            "--field",
            "fields",
            cls=AddedUp,
            envvar="JOB_FIELD",
            metavar="NAME=VALUE",
            help="A field of a record; the run's template makes the prompt of all that are given.",
        ),
        click.option(
            "--record",
            "record_file",
            envvar="JOB_RECORD",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Records as JSON lines, or one JSON object; the run's template makes a prompt of each.",
        ),
        click.option(
            "--max-new-tokens",
            envvar="JOB_MAX_NEW_TOKENS",
            type=click.IntRange(min=1),
            help="Longest answer; as in the recipe without it.",
        ),
    )[::-1]:
        command = option(command)
    return command


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which runs `report` shows, and where besides the terminal."""
    for option in (
        click.option(
            "--last",
            envvar="JOB_LAST",
            type=click.IntRange(min=1),
            metavar="N",
            help="Of several runs only the N that were begun last.",
        ),
        click.option(
            "--html",
            envvar="JOB_HTML",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write it as a page for a browser as well: one file, which loads nothing. A run that is not finished "
            "has one too, of what is committed; several runs are laid over each other, and of a channel the nights are "
            "drawn.",
        ),
    )[::-1]:
        command = option(command)
    return command
