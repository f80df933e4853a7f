"""The options of `export`."""

from collections.abc import Callable
from typing import Any, get_args

import click

from job.core.reports.onto import Onto
from job.options import device_option, outcome_option, workdir_option


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the merged model goes, and what it is made of; each also by JOB_ and its name in the environment."""
    for option in (
        click.option(
            "--to",
            envvar="JOB_TO",
            required=True,
            metavar="PLACE",
            help="A local folder, or s3://bucket/folder; nothing stands there before it is whole and proved.",
        ),
        click.option(
            "--onto",
            envvar="JOB_ONTO",
            type=click.Choice(get_args(Onto)),
            default="weights",
            show_default=True,
            help="Merge onto the base's own weights, or onto those that the adapter was trained on: quantised to 4 "
            "bits and dequantised again.",
        ),
        click.option(
            "--proof-examples",
            envvar="JOB_PROOF_EXAMPLES",
            type=click.IntRange(min=1),
            metavar="N",
            help="Prove it on N of the held-out examples, evenly from all; without it on all of them.",
        ),
        workdir_option,
        device_option,
        outcome_option,
    )[::-1]:
        command = option(command)
    return click.argument("run_uri")(command)
