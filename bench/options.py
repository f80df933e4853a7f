"""Options that measurements have in common."""

import argparse
from pathlib import Path

from bench.results import RESULTS

GSM8K = "### Question: {question}\n ### Answer: {answer}"
"""What an example of it is made of."""


def parser_of(doc, *, several_bases=False):
    """A parser with what is trained, on what, and where the results go.

    Args:
        doc: the module's; its first line describes the program.
        several_bases: whether `--base` may be repeated.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--base", type=Path, action="append" if several_bases else "store", required=True, metavar="FOLDER"
    )
    parser.add_argument("--train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", default=GSM8K, help="template over the fields of a record")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of ours")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser
