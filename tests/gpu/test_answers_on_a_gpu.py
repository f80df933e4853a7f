"""Answers token by token on a real GPU: recorded, replayed, dropped and out of memory; elsewhere these are skipped.

python -m pytest tests/gpu -s -rs
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from tiny import ARCHITECTURES, attach_lora, config_of, load_base, targets_of, write_base

from job.core.recipe.schema import LoraSection
from job.kernels.recorded import Recorder
from job.tune.data.micro_batch import MicroBatch
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.answers import greedy
from job.tune.loop.answers.greedy import greedy_tokens
from job.tune.model.adapter import trainable

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from job_process import Job, call, records, write_lines
from run_material import make_base
from tiny_families import write_family

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

CUDA = torch.device("cuda", 0)
LENGTHS = (9, 33, 5, 60, 14, 40, 7, 90, 21, 3, 55, 12)
LONGEST = 70
NEARLY = 0.25
"""Of a logit in bf16, whose values lie up to 0.06 apart at ten: what another size of group may round."""


def model_of(tmp_path, architecture):
    base = write_base(tmp_path / architecture, config_of(architecture))
    lora = LoraSection(r=8, alpha=16, targets=targets_of(architecture))
    loaded = load_base(base, device=CUDA, dtype=torch.bfloat16)
    model = PackedModel(attach_lora(loaded, lora, source="tiny", revision=None, seed=0)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.05)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture
def llama(tmp_path):
    return model_of(tmp_path, "llama")


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(5)
    return [torch.randint(3, 200, (length,)).tolist() for length in LENGTHS]


def answered(model, prompts, *, ends=(), longest=LONGEST):
    return greedy_tokens(
        model, prompts, [frozenset({2, *ends})] * len(prompts), max_new_tokens=longest, should_stop=lambda: False
    )


def ends_of(answers):
    """Tokens by which some answers end early, and not all."""
    return {answers[0][5], answers[3][11], answers[6][1]}


@torch.no_grad()
def short_of_the_first(model, prompt, answer):
    """How much less likely each token was than the likeliest, in logits, by the attention that trains."""
    ids = torch.tensor([*prompt, *answer])
    places = torch.arange(len(prompt) - 1, len(ids) - 1)
    batch = MicroBatch(
        input_ids=ids[None],
        position_ids=torch.arange(len(ids))[None],
        document_lengths=(len(ids),),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        target_places=places,
        target_ids=ids[places + 1],
        target_counts=(len(places),),
        documents=(0,),
    ).to(CUDA)
    logits = model.head.logits(model.hidden(batch))
    return logits.max(dim=-1).values - logits.gather(1, batch.target_ids[:, None])[:, 0]


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_each_token_is_the_likeliest_by_the_attention_that_trains(model, prompts, which):
    with model.model.disable_adapter() if which == "base" else nullcontext():
        answers = answered(model, prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert float(short_of_the_first(model, prompt, answer).max()) < NEARLY
    assert max(map(len, answers)) == LONGEST


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_of_a_mixture_too_each_token_is_the_likeliest_and_nothing_is_recorded(family, prompts, tmp_path):
    """With sinks and windows in one of them; which expert computes is decided on the device, token by token."""
    base = load_base(write_family(tmp_path / "base", family), device=CUDA, dtype=torch.bfloat16)
    lora = LoraSection(r=8, alpha=16, targets=("all-linear", "experts"))
    model = PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.02)
    with capture_logs() as logs:
        answers = answered(model, prompts)
    assert not [each for each in logs if each["event"] in {"no_cuda_graphs", "answers_differ"}]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert float(short_of_the_first(model, prompt, answer).max()) < NEARLY


def test_what_is_replayed_is_what_was_recorded_to_the_bit(model, prompts, monkeypatch):
    kept, replays = [], []
    run = Recorder.run

    def watched(self, kind, work):
        replays.append(kind in self._graphs)
        kept.append(len(self._graphs))
        run(self, kind, work)

    monkeypatch.setattr(Recorder, "run", watched)
    with capture_logs() as logs:
        ends = ends_of(answered(model, prompts))
        replayed = answered(model, prompts, ends=ends)
    assert not [each for each in logs if each["event"] == "no_cuda_graphs"]
    assert sum(replays) > len(replays) / 2
    assert max(kept) > 1

    monkeypatch.setattr(Recorder, "run", lambda _self, _kind, work: work())
    assert answered(model, prompts, ends=ends) == replayed
    assert len({len(answer) for answer in replayed}) > 2


def test_groups_one_after_the_other_use_the_same_recordings(llama, prompts, monkeypatch):
    recorded, record = [], Recorder._recorded

    def watched(self, work):
        recorded.append(1)
        return record(self, work)

    monkeypatch.setattr(Recorder, "_recorded", watched)
    answered(llama, prompts)
    once = len(recorded)
    monkeypatch.setattr(greedy, "_MOST_ROWS_GPU", 4)
    answers = answered(llama, prompts)
    assert len(recorded) - once <= 2 * once
    for prompt, answer in zip(prompts, answers, strict=True):
        assert float(short_of_the_first(llama, prompt, answer).max()) < NEARLY


def test_where_nothing_can_be_recorded_the_answers_are_the_same(llama, prompts, monkeypatch):
    expected = answered(llama, prompts)

    def fails(*_arguments, **_options):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fails)
    with capture_logs() as logs:
        assert answered(llama, prompts) == expected
    assert [each["reason"] for each in logs if each["event"] == "no_cuda_graphs"] == ["RuntimeError: no graphs here"]


def test_weights_kept_meanwhile_are_given_back(llama, prompts):
    answered(llama, prompts)  # what libraries keep for good is there now
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert not llama.linears.keeps_dequantised
    answered(llama, prompts)
    assert not llama.linears.keeps_dequantised
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_training_goes_on_as_if_nobody_had_answered(llama, prompts):
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    llama.train()
    answered(llama, prompts)
    assert llama.training
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert llama.model.get_base_model().config._attn_implementation == "per_document"


def test_what_runs_out_of_memory_is_answered_in_smaller_groups(llama, prompts):
    """The plan sees memory that this process may not take."""
    answered(llama, prompts, longest=4)
    many = (prompts * 11)[:128]
    expected = answered(llama, prompts)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 48 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with capture_logs() as logs:
            # 128 rows of 4,096 places would take 134 MB.
            answers = greedy_tokens(
                llama, many, [frozenset({*range(3, 300)})] * len(many), max_new_tokens=4000, should_stop=lambda: False
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [each["during"] for each in logs if each["event"] == "out_of_memory"]
    same = [answer[0] == expected[n % len(prompts)][0] for n, answer in enumerate(answers)]
    assert sum(same) > 0.9 * len(same)


def test_a_run_on_the_gpu_judges_its_answers(tmp_path):
    job = Job(tmp_path, make_base(tmp_path / "base"))
    write_lines(job.data / "validation.jsonl", records(40, seed=1))
    job.recipe["evaluate"] |= {"answers": 40, "metric": "rouge_l", "max_new_tokens": 8}
    options = [*job.command("run")[2:], "--device", "cuda"]
    ended = call(*options, outcome_file=job.outcome_file)

    assert ended.code == 0, ended.stdout[-2000:]
    assert not ended.named("no_cuda_graphs")
    metric = job.report()["metric"]
    assert (metric["name"], metric["scores"]["examples"]) == ("rouge_l", 40)
    assert metric["scores"]["low"] <= metric["scores"]["gain"] <= metric["scores"]["high"]
