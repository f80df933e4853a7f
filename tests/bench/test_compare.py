import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_2_7b import LLAMA_2_7B

from bench import compare, flops
from bench.comparisons import COMPARISONS, Comparison, Ours, Rival
from bench.processes import NoResultError, run
from job.core.plan.memory import ExpertsShape

SMALL = Comparison(
    title="A small one",
    max_length=32,
    contestants=(
        Ours(name="ours", about="the product", batch=2, steps=3, warm_up=1),
        Rival(name="stub", about="a stub", module="stub_rival"),
        Rival(name="broken", about="a broken stub", module="stub_rival", arguments=("--break",)),
    ),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory, base, examples):
    folder = tmp_path_factory.mktemp("compare")
    options = ["small", "--base", str(base), "--train", str(examples), "--text", "{t}", "--device", "cpu"]
    options += ["--results", str(folder / "R.md"), "--logs", str(folder / "logs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        compare.main(options, {"small": SMALL})
    return (folder / "R.md").read_text()


def row(results, name):
    line = next(line for line in results.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ours_runs_through_the_entry_point(results):
    name, rate, ratio, *_, steps, _tokens, real, _peak, losses = row(results, "ours")

    assert (name, ratio, steps, real) == ("ours", "1.00", "2", "100%")
    assert float(rate.replace(",", "")) > 0
    assert "to" in losses
    assert "- ours: the product; generic engine, " in results


def test_a_rival_counts_by_the_median_of_its_real_tokens(results):
    cells = row(results, "stub")

    assert cells[1] == "200"
    assert cells[4:10] == ["100 to 400", "3", "83", "50%", "2.0", "4.000 to 3.500"]


def test_a_rival_that_cannot_run_is_a_row_with_its_reason(results):
    assert row(results, "broken")[1] == "no result"
    assert "- broken: a broken stub. No result: ended with 1: ValueError: it does not run here" in results


def test_what_it_ran_with_is_said(results):
    assert "stub 1.2" in results
    assert "torch 2." in results


def test_a_command_is_killed_at_its_limit_with_all_that_it_started(tmp_path):
    child = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
    with pytest.raises(NoResultError, match=r"no result within 1\.5 s"):
        run([sys.executable, "-c", parent], limit_seconds=1.5, log=tmp_path / "log")

    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child's child goes on")


def test_names_within_a_comparison_are_different():
    for comparison in COMPARISONS.values():
        names = [contestant.name for contestant in comparison.contestants]
        assert len(set(names)) == len(names)


def test_operations_of_a_token_are_those_of_llama_2_7b():
    of_one, of_201 = (flops.per_token(LLAMA_2_7B, np.array([tokens]), 0) for tokens in (1, 201))

    assert of_one == pytest.approx(4 * 6.607e9, rel=1e-3)
    assert of_201 - of_one == 12 * 32 * 4096 * 100


def test_operations_of_a_mixture_are_those_of_the_experts_that_a_token_goes_through():
    """Of a quarter of the experts a quarter: not of all that are in memory."""
    experts = ExpertsShape(parameters=8 * 10**9, sides=10**6, number=32, chosen=8, first=1024, inner=512, largest=10**8)
    dense, mixture = LLAMA_2_7B, replace(LLAMA_2_7B, experts=experts)
    more = flops.per_token(mixture, np.array([5]), 0) - flops.per_token(dense, np.array([5]), 0)

    assert more == 4 * 2 * 10**9
