"""The whole job on a processor that has no instructions for bf16: it computes in fp32, and says so."""

import json

import pytest
import torch
from job_process import call
from torch.utils._python_dispatch import TorchDispatchMode

from job.tune.device import compute_dtype

CONVERSIONS = {"aten::_to_copy", "aten::alias", "aten::clone", "aten::detach", "aten::view"}
"""What reading a base in bf16 and turning it into fp32 takes."""


class Bf16Ops(TorchDispatchMode):
    """Names the operations, our own and bitsandbytes' among them, that read or write bf16."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, results))
        if any(isinstance(t, torch.Tensor) and t.dtype is torch.bfloat16 and not t.is_meta for t in tensors):
            self.seen.add(func._schema.name)
        return results

    @property
    def computing(self):
        return self.seen - CONVERSIONS


@pytest.fixture
def processor(monkeypatch):
    """Gives this processor the instructions, or takes them away."""
    return lambda has_bf16: monkeypatch.setattr(compute_dtype, "processor_multiplies_bf16", lambda: has_bf16)


@pytest.fixture
def halved(base, tmp_path):
    """The base as most are published: its weights in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "bf16-base"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def run_watched(job, *options, **stop):
    with Bf16Ops() as ops:
        ended = job.call("run", *options, **stop)
    return ended, ops.computing


@pytest.mark.parametrize("engine", ["generic", "fast"])
def test_from_the_first_look_to_the_proof_nothing_is_computed_in_bf16(job, halved, processor, engine):
    processor(False)
    job.recipe["model"]["base"] = str(halved)
    ended, computing = run_watched(job, "--engine", engine)

    assert (ended.code, computing) == (0, set())
    (plan,), (device,) = ended.named("plan"), ended.named("device")
    assert (device["compute_dtype"], plan["compute_dtype"]) == ("fp32", "fp32")
    assert plan["reason"] == "on the CPU, in fp32: it has no instructions for bf16"
    report = job.report()
    assert report["plan"]["compute_dtype"] == "fp32"
    form = "NF4, double quantisation; 14 linear layers in 4 bits, 1 not (lm_head); fp32 compute"
    assert report["model"]["quantisation"] == form
    assert report["adapter"]["proven_loss"] == pytest.approx(report["adapter"]["reported_loss"], rel=1e-6)
    assert (report["resume_exact"], report["notes"]) == (True, [])


def test_a_second_start_reads_the_copy_in_4_bits_and_computes_in_fp32_too(job, processor):
    processor(False)
    job.call("run")
    ended, computing = run_watched(job, "--run-id", "again")

    assert (ended.code, computing) == (0, set())
    again = json.loads((job.store / "runs/again/report.json").read_text())
    assert again["model"]["loaded_from"] == "copy in 4 bits"
    assert again["plan"]["compute_dtype"] == "fp32"


def test_try_answers_in_fp32_there(job, processor):
    processor(False)
    job.call("run")
    with Bf16Ops() as ops:
        ended = call(
            "try",
            job.report()["run_uri"],
            "--prompt",
            "12 red hats\n",
            "--workdir",
            str(job.workdir),
            "--device",
            "cpu",
        )

    assert (ended.code, ops.computing) == (0, set())


def test_with_the_instructions_it_computes_in_bf16(job, processor):
    """And so the watch sees what is to be seen."""
    processor(True)
    ended, computing = run_watched(job)

    assert ended.code == 0
    assert {"aten::mm", "bitsandbytes::dequantize_4bit"} <= computing
    assert job.report()["plan"]["compute_dtype"] == "bf16"


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_run_that_goes_on_on_the_other_kind_of_processor_says_that_it_is_not_exact(job, processor, first, then):
    processor(first)
    assert job.call("run", stop_in="train").code == 75
    processor(then)
    ended = job.call("run")

    assert ended.code == 0
    report = job.report()
    names = {True: "bf16", False: "fp32"}
    assert report["resume_exact"] is False
    (note,) = [note for note in report["notes"] if "resumed" in note]
    assert f"threads in {names[then]} after CPU" in note
    assert f"threads in {names[first]}: equal within rounding, not to the bit" in note
    assert report["plan"]["compute_dtype"] == names[then]
