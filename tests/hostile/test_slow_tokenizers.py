"""A tokenizer whose expressions never come to an end."""

import json
import shutil

import pytest
from job_process import write_lines

NESTED = {"Regex": "(a|aa|a?a)+(a|aa)+(aa|a)+b$"}


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_an_expression_that_never_ends_ends_the_run_with_its_outcome(job, place):
    """By the library's own limit, or where that is farther away by the watchdog: other threads run meanwhile."""
    base = shutil.copytree(job.recipe["model"]["base"], job.folder / "own-base")
    job.recipe["model"]["base"] = str(base)
    path = base / "tokenizer.json"
    split = {"type": "Split", "pattern": NESTED, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": NESTED, "content": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {place: split if place == "pre_tokenizer" else replace}))
    write_lines(job.data / "train.jsonl", [{"question": "a" * 20_000, "answer": "red"}] * 20)
    ended = job.attacked("run", "--stall-seconds", "3", mib=1024)
    assert ended.code == ended.outcome["code"], ended.stdout
    assert ended.code in {65, 83}, ended.stdout
    assert ended.outcome["phase"] == "encode"
