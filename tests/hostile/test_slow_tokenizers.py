"""A tokenizer whose expressions never come to an end."""

import json
import shutil

import pytest
from job_process import write_lines

NESTED = {"Regex": "(a|aa|a?a)+(a|aa)+(aa|a)+b$"}


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_an_expression_that_never_ends_is_ended_by_the_watchdog(job, place):
    """With its outcome: the library lets other threads run meanwhile."""
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    path = base / "tokenizer.json"
    split = {"type": "Split", "pattern": NESTED, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": NESTED, "content": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {place: split if place == "pre_tokenizer" else replace}))
    write_lines(job.data / "train.jsonl", [{"question": "a" * 20_000, "answer": "red"}] * 20)
    ended = job.attacked("run", "--stall-seconds", "3", mib=1024)
    assert ended.code == ended.outcome["code"] == 83, ended.stdout
    assert ended.outcome["phase"] == "encode"
