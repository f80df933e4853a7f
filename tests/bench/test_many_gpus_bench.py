"""Several processes beside one on the CPU; and how endings are judged, of a stub that ends right or wrong."""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import many_gpus, ours
from bench.many_gpus import Bench, Carried, Way, losses_text, rates_text, side_by_side_text
from bench.steps import steps_text
from bench.workload import workload_of
from job.core.plan.scaling import Cluster, sent_bytes

STUB = str(Path(__file__).parent / "stub_run.py")


@pytest.fixture
def bench(calls):
    return calls(many_gpus.main)


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.bench
def test_two_processes_are_measured_beside_one(bench, base, examples, tmp_path):
    given = {"text": "{t}", "batch": 4, "steps": 3, "max_length": 64}
    parameters = workload_of(base, examples, tmp_path / "lengths", **given).adapter.parameters
    kept = ["--steps-folder", str(tmp_path / "kept"), "--profile", "--ceiling"]
    code, text = bench("--part", "rates", "--batch", "4", "--steps", "3", "--turns", "1", *kept)

    assert code == 0, text
    assert "<!-- begin many-gpus-rates-4-tiny-llama -->" in text
    assert "## 2 GPUs beside 1 GPU, 4 examples a step: tiny-llama" in text
    one, two = cells(text, "1 GPU"), cells(text, "2 GPUs")
    assert float(one[1].replace(",", "")) > 0
    assert one[3].startswith("0.00 of ")
    assert one[4] == "0.0"
    assert float(two[4]) == pytest.approx(sent_bytes(parameters, Cluster(gpus=2)) / 1e6, abs=0.06)  # as the plan counts
    assert one[-1] == two[-1]  # the same losses
    assert re.search(r"The second is \d+\.\d{3} times as fast as the first \(turns: \d+\.\d{3}\)\.", text)
    assert "The last run of the second, step by step:" in text
    assert re.search(
        r"Of the ceiling of each GPU, \d\.\d TFLOP/s of large bf16 products: 1 GPU 0\.\d+, 2 GPUs 0\.", text
    )
    lines = [json.loads(line) for line in (tmp_path / "kept/steps-4-2-GPUs-02.jsonl").read_text().splitlines()]
    assert [(line["rank"], line["step"]) for line in lines] == [(rank, step) for rank in (0, 1) for step in (1, 2, 3)]
    assert all(line["tokens"] > 0 and 0 <= line["waited"] <= line["seconds"] for line in lines)
    assert "step 2, rank 0" in (tmp_path / "kept/4-2-GPUs-02-profile.txt").read_text()


def carried(rates, *, ranks=1, planned=None):
    throughput = {
        "ranks": ranks,
        "waited_seconds": 0.25,
        "seconds": 10.0,
        "bytes_a_step": 2_000_000,
        "peak_memory_bytes": 2**30,
    }
    plan = {
        "engine": "fast",
        "engine_reason": "agrees",
        "micro_batch_tokens": 4096,
        "kept_layers": 2,
        "recomputed_layers": 0,
    }
    report = {
        "throughput": throughput,
        "plan": plan | {"predicted_peak_bytes": planned},
        "curve": {"loss": [3.0, 2.0 + ranks / 1000], "grad_norm": [1.0, 1.0]},
        "evaluations": [{"loss": 5.0}],
    }
    return Carried(report=report, rates=rates, in_use=(2**30, ranks * 2**29) if planned else (), steps={})


def test_ratios_are_of_each_turn_and_of_the_medians_after_the_warm_up():
    found = {
        Way(gpus=1): [carried((1.0, 100.0, 110.0)), carried((1.0, 100.0, 90.0))],
        Way(gpus=2): [carried((1.0, 210.0), ranks=2, planned=2**30), carried((1.0, 190.0), ranks=2, planned=2**30)],
    }
    text = rates_text(found, 1, 1.99, ["- turn 3, 2 GPUs: no result: no result within 150 s"])

    assert "2.000 times as fast as the first (turns: 2.000, 2.000); by the plan's formula 1.990." in text
    assert cells(text, "2 GPUs")[1:] == [
        *("200", "100", "0.25 of 10.0", "2.0", "1.00", "1.00", "+0.0%", "1.0, 1.0", "3.000 to 2.002")
    ]
    assert "Of 2 steps the largest difference is 0.00100 nats a token (step 2), 0.050% of the loss" in text
    assert "- turn 2, 1 GPU: 95 real tokens a second, median of 2 steps from 90 to 100; fast engine" in text
    assert text.endswith("- turn 3, 2 GPUs: no result: no result within 150 s")


def of_ranks(step, *ranks):
    keys = ("seconds", "waited", "tokens", "recorded")
    return step, [
        {"step": step, "rank": number} | dict(zip(keys, each, strict=True)) for number, each in enumerate(ranks)
    ]


def test_slow_steps_are_named_with_what_each_rank_did():
    usual = [of_ranks(step, (0.1, 0.01, 800, []), (0.1, 0.0, 820, [])) for step in range(1, 10)]
    slow = of_ranks(10, (0.4, 0.3, 800, []), (0.39, 0.0, 900, [1024, 1152]))
    lines = steps_text(dict([*usual, slow]), 2)

    assert lines[0] == "- the usual step: 100.0 ms; without waiting, in ms: rank 0 90.0, rank 1 100.0"
    assert lines[1] == "- 1 of 8 steps took more than 1.5 times as long, 0.30 s more in all"
    said = "rank 0: 800 tokens, waited 300 ms; rank 1: 900 tokens, waited 0 ms, recorded 1,024, 1,152"
    assert lines[2:] == [f"  - step 10: 400 ms; {said}"]


def test_gpus_that_work_by_themselves_at_the_same_time_show_what_could_be():
    found = {Way(gpus=1): [carried((1.0, 100.0, 100.0))], Way(gpus=2): [carried((1.0, 190.0), ranks=2)]}
    text = side_by_side_text([(1.0, 99.0, 99.0), (1.0, 97.0, 99.0, 97.0)], found, 1)

    assert text.startswith("Each GPU by itself, all at the same time: 99, 97 real tokens a second.")
    assert text.endswith("could be 1.940 times as fast as that of one.")


def test_each_gpu_has_a_run_of_its_own_that_sees_no_other(tmp_path, base, examples, monkeypatch):
    say = "import json, os; rate = float(os.environ['CUDA_VISIBLE_DEVICES'])"
    command = [sys.executable, "-c", f"{say}; print(json.dumps({{'event': 'step', 'tokens_per_second': rate}}))"]
    monkeypatch.setattr(ours, "command_of", lambda *_: command)
    options = SimpleNamespace(base=base, train=examples, text="{t}", device="cpu", gpus=2, placement=None, limit=60)
    options.ceiling = False

    assert Bench(options, tmp_path).carry_side_by_side(batch=4, steps=1) == [(0.0,), (1.0,)]


def test_of_each_gpu_no_more_is_left_free(bench, monkeypatch):
    asked = []

    @contextmanager
    def held(gib, gpus):
        asked.append((gib, gpus))
        yield

    monkeypatch.setattr(many_gpus, "only_free_of_each", held)
    bench("--part", "rates", "--batch", "4", "--steps", "1", "--turns", "1", "--free-gib", "79.2", "--limit", "0.1")
    assert asked == [(79.2, range(1)), (79.2, range(2))]


def test_a_run_that_fails_is_said_and_the_rest_is_measured(bench, monkeypatch):
    monkeypatch.setattr(ours, "command_of", lambda *_: [sys.executable, "-c", "raise ValueError('no GPU')"])
    code, text = bench("--part", "rates", "--batch", "4", "--turns", "1")

    assert code == 1
    assert "- turn 1, 1 GPU: no result: ended with 1: ValueError: no GPU" in text
    assert "- turn 1, 2 GPUs: no result" in text


def test_a_placement_compares_it_with_the_other_one(bench, monkeypatch):
    """And the options reach the command line."""
    echo = [sys.executable, "-c", "import sys; raise ValueError(' '.join(sys.argv[3:]))"]
    monkeypatch.setattr(ours, "command_of", lambda *_: echo)
    text = bench("--part", "rates", "--batch", "4", "--turns", "1", "--gpus", "4", "--placement", "sharded")[1]

    assert "<!-- begin many-gpus-rates-4-tiny-llama-sharded -->" in text
    for placement in ("replicated", "sharded"):
        assert (
            f"4 GPUs, {placement}: no result: ended with 1: ValueError: --gpus 4 --base-placement {placement}" in text
        )


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_stand_side_by_side_with_the_largest_differences():
    one = {"curve": {"loss": [4.0] * 50, "grad_norm": [2.0] * 50}, "evaluations": [{"loss": 5.0}, {"loss": 3.0}]}
    losses = [4.0] * 30 + [4.002] + [4.0] * 19
    two = {"curve": {"loss": losses, "grad_norm": [2.1] * 50}, "evaluations": [{"loss": 5.0}, {"loss": 3.01}]}
    text = losses_text((Way(gpus=1), Way(gpus=2)), one, two)

    assert cells(text, "30") == ["30", "4.00000", "4.00000", "+0.00000"]
    assert text.count("\n| 50 |") == 1
    assert "Of 50 steps the largest difference is 0.00200 nats a token (step 31), 0.050% of the loss" in text
    assert "of gradient norms 5.00%" in text
    assert "before the first step differs by 0, that after the last one by 0.01." in text


# --- endings ---------------------------------------------------------------------------------------------------------


def ended(bench, monkeypatch, wrong=""):
    monkeypatch.setattr(ours, "command_of", lambda *_: [sys.executable, STUB])
    monkeypatch.setenv("STUB", wrong)
    return bench("--part", "endings", "--limit", "60" if wrong != "hangs" else "1.5")


def test_a_run_that_ends_and_goes_on_as_it_should_is_found_right(bench, monkeypatch):
    code, text = ended(bench, monkeypatch)

    assert code == 0, text
    assert "4 of 4 attempts, every one as it should be" in text
    first, alone, killed, last = (
        cells(text, name)
        for name in (
            "2 GPUs: SIGTERM",
            "goes on with 1 GPU: SIGTERM",
            "goes on with 2 GPUs: rank 1 killed",
            "goes on with 2 GPUs: SIGTERM",
        )
    )
    assert (first[1], alone[1], killed[1], last[1]) == ("0", first[4], alone[4], killed[4])
    assert [row[2] for row in (first, alone, killed, last)] == ["75", "75", "70", "75"]
    assert killed[-1] == "rank 1 ended without a word"


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ("0", r"\| 2 GPUs: SIGTERM \| 0 \| 0 \|"),
        ("leaves", r"\| 2 GPUs: SIGTERM \| 0 \| 75 \| [\d.]+ \| \d+ \| 1 \|"),
        ("forgets", r"\| goes on with 1 GPU: SIGTERM \| 0 \| 75 \|"),
        ("hangs", r"\| 2 GPUs: SIGTERM \| (it did not end in its time|its time was over .*) \|"),
    ],
)
def test_what_is_wrong_is_seen(bench, monkeypatch, wrong, seen):
    code, text = ended(bench, monkeypatch, wrong)

    assert code == 1
    assert "4 of 4 attempts, **not every one as it should be**" in text
    assert re.search(seen, text)
