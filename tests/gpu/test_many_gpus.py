"""Two GPUs of one host make the steps that one makes, through NCCL; elsewhere these are skipped.

python -m pytest tests/gpu/test_many_gpus.py -s -rs
"""

import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
from job_process import Job, records, write_lines
from many_processes import nothing_is_left, strike
from run_material import make_base

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs and a torch with CUDA")
STEPS = 50
CLOSE = 2e-2
"""Relative: what bf16 makes of a loss when a batch is cut into other micro-batches."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Llama-2-7B's proportions, eight times as narrow, on the tokenizer of the tiny base."""
    folder = make_base(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def job_in(folder, base):
    job = Job(folder, base)
    write_lines(job.data / "train.jsonl", records(400))
    job.recipe["lora"] = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj", "lm_head"]}
    job.recipe["train"] = {"steps": STEPS, "batch_size": 16, "learning_rate": 1e-3}
    job.recipe["checkpoint"] = {"every_steps": 10, "keep": 2}
    job.recipe["evaluate"]["every_steps"] = 25
    return job


def carried(job, gpus, engine, *options):
    ended = job.start("run", "--device", "cuda", "--gpus", str(gpus), "--engine", engine, *options, cold=True)
    assert ended.code == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    return ended, job.report()


@pytest.mark.parametrize("engine", ["fast", "generic"])
def test_two_gpus_give_the_losses_of_one(tmp_path, base, engine):
    _, one = carried(job_in(tmp_path / "one", base), 1, engine)
    ended, two = carried(job_in(tmp_path / "two", base), 2, engine)

    assert two["plan"]["engine"] == one["plan"]["engine"] == engine
    assert (one["throughput"]["ranks"], two["throughput"]["ranks"]) == (1, 2)
    assert two["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=CLOSE)
    assert two["evaluations"][0]["loss"] == pytest.approx(one["evaluations"][0]["loss"], rel=1e-6)
    assert two["evaluations"][-1]["loss"] == pytest.approx(one["evaluations"][-1]["loss"], rel=CLOSE)
    assert two["throughput"]["bytes_a_step"] > 0
    assert len(ended.named("joined")) == 1

    again = carried(job_in(tmp_path / "again", base), 2, engine)[1]
    assert again["curve"] == two["curve"]  # the same GPUs give the same bits
    assert again["adapter"]["files"] | {"README.md": None} == two["adapter"]["files"] | {"README.md": None}


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_stop_ends_with_75_and_one_or_two_go_on(tmp_path, base, gpus):
    job = job_in(tmp_path / "stopped", base)
    job.recipe["train"]["steps"] = 2000
    with job.begun("run", "--device", "cuda", "--gpus", "2", "--grace-seconds", "30", cold=True) as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        supervisor = running.child.pid
        strike(supervisor, "supervisor", signal.SIGTERM)
        stopped = running.end()
    assert stopped.code == 75, stopped.stdout[-4000:]
    assert nothing_is_left(supervisor)
    committed = stopped.outcome["last_committed_step"]
    assert committed >= 5

    with job.begun("run", "--device", "cuda", "--gpus", str(gpus), cold=True) as running:
        running.until(lambda event: event["event"] == "resumed" and event["step"] == committed)
        running.until(lambda event: event["event"] == "step" and event["step"] == committed + 1)
        running.child.send_signal(signal.SIGTERM)
        assert running.end().code == 75


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_nothing_is_left(tmp_path, base, rank):
    """The other GPU waits for it in the midst of a sum."""
    job = job_in(tmp_path / "killed", base)
    job.recipe["train"]["steps"] = 2000
    with job.begun("run", "--device", "cuda", "--gpus", "2", "--grace-seconds", "30", cold=True) as running:
        running.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 10)
        supervisor = running.child.pid
        strike(supervisor, rank)
        ended = running.end()
    assert ended.code == 70, ended.stdout[-4000:]
    assert f"rank {rank} ended without a word" in ended.outcome["reason"]
    assert ended.outcome["last_committed_step"] >= 10
    assert nothing_is_left(supervisor)
    # The other one missed it by itself: 75 is what its watchdog ends it with once the grace is over.
    assert ended.named("workers")[0]["ended"][str(1 - rank)] == 70, ended.stdout[-4000:]
    # What it has saved is what it says, and is gone on from.
    with job.begun("run", "--device", "cuda", "--gpus", "2", "--grace-seconds", "30", cold=True) as running:
        resumed = running.until(lambda event: event["event"] == "resumed")
        strike(running.child.pid, 0, signal.SIGTERM)
        assert running.end().code == 75
    assert resumed["step"] == ended.outcome["last_committed_step"]


SHARDED = ("--base-placement", "sharded")


@pytest.mark.parametrize("engine", ["fast", "generic"])
def test_a_base_that_is_sharded_over_two_gpus_gives_the_bits_of_two_that_each_hold_it(tmp_path, base, engine):
    """Losses, evaluations, answers, the adapter, and the proof by PEFT's own forward, which ends the run."""
    _, whole = carried(job_in(tmp_path / "replicated", base), 2, engine)
    ended, sharded = carried(job_in(tmp_path / "sharded", base), 2, engine, *SHARDED)

    assert ended.named("placement")[0]["placement"] == "sharded"
    assert sharded["plan"]["engine"] == engine
    assert sharded["throughput"]["placement"] == "sharded"
    for key in ("curve", "evaluations", "answers", "sweet_spot"):
        assert sharded[key] == whole[key], key
    files = [{**each["adapter"]["files"], "README.md": None} for each in (sharded, whole)]
    assert files[0] == files[1]
    assert sharded["throughput"]["bytes_a_step"] > whole["throughput"]["bytes_a_step"]


def test_a_sharded_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, base):
    _, undisturbed = carried(job_in(tmp_path / "undisturbed", base), 2, "fast", *SHARDED)
    job = job_in(tmp_path / "stopped", base)
    with job.begun("run", "--device", "cuda", "--gpus", "2", *SHARDED, "--grace-seconds", "30", cold=True) as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        strike(running.child.pid, 1, signal.SIGTERM)
        assert running.end().code == 75

    _, report = carried(job, 2, "fast", *SHARDED)
    assert report["resume_exact"]
    assert report["curve"] == undisturbed["curve"]


def test_a_rank_of_a_sharded_base_that_is_killed_ends_the_run_and_nothing_is_left(tmp_path, base):
    """The other GPU waits for its part of a layer."""
    job = job_in(tmp_path / "killed", base)
    job.recipe["train"]["steps"] = 2000
    with job.begun("run", "--device", "cuda", "--gpus", "2", *SHARDED, "--grace-seconds", "30", cold=True) as running:
        running.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 10)
        supervisor = running.child.pid
        strike(supervisor, 1)
        ended = running.end()
    assert ended.code == 70, ended.stdout[-4000:]
    assert ended.outcome["last_committed_step"] >= 10
    assert nothing_is_left(supervisor)
