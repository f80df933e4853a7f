"""What servers refuse of an adapter, by name, and nothing else."""

import pytest

from job.core.base.servers import VLLM_HEAD_ROWS, readable_settings, refusals, unreadable_base, vllm_rank
from job.core.recipe.schema import LoraSection


@pytest.mark.parametrize(
    ("rank", "wanted"), [(1, 1), (2, 8), (8, 8), (24, 32), (257, 320), (321, 512), (512, 512), (513, None)]
)
def test_vllm_is_asked_for_the_smallest_rank_that_it_has(rank, wanted):
    assert vllm_rank(rank) == wanted


def test_an_adapter_that_all_take_is_refused_by_none():
    assert refusals(LoraSection(r=512), rows=VLLM_HEAD_ROWS + 1) == []
    assert refusals(LoraSection(targets=("q_proj", "lm_head")), rows=VLLM_HEAD_ROWS) == []


def test_a_head_of_a_large_vocabulary_and_a_large_rank_are_refused_by_name():
    head, rank = LoraSection(targets=("q_proj", "lm_head")), LoraSection(r=513)

    [said] = refusals(head, rows=262_144)
    assert said == (
        "vLLM refuses an adapter on lm_head of a vocabulary beyond 258,048, and this base has 262,144: leave lm_head "
        "out of lora.targets, or merge the adapter into the base (export) and serve that"
    )
    [said] = refusals(rank, rows=32_000)
    assert said == (
        "vLLM refuses adapters of a rank above 512, and lora.r is 513: lower it, or merge the adapter into the base "
        "(export) and serve that"
    )
    assert len(refusals(head.model_copy(update={"r": 513}), rows=262_144)) == 2


@pytest.mark.parametrize("targets", ["experts", ("all-linear", "experts"), ("q_proj", "experts")])
def test_adapters_on_experts_are_named_wherever_they_are_asked_for(targets):
    [said] = refusals(LoraSection(targets=targets), rows=32_000)
    assert said.startswith("vLLM is reported to pass over an adapter on a mixture's experts")
    assert said.endswith("merge the adapter into the base (export) and serve that")


@pytest.mark.parametrize(
    ("settings", "readable"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}),
        ({"extra_special_tokens": {"image_token": "<i>"}}, None),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}, None),
        ({"tokenizer_class": 5}, None),
        ({}, None),
    ],
)
def test_settings_that_version_5_of_transformers_wrote_are_put_into_words_of_both(settings, readable):
    """None: they are such words."""
    assert readable_settings(settings) == (settings if readable is None else readable)
    found = unreadable_base(settings)
    assert len(found) == (readable is not None)
    assert all("vLLM before 0.19.1" in each and "(export)" in each for each in found)
