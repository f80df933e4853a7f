"""A small random copy of a config tries what a run would do: supported families pass, others are refused by name."""

import pytest
import torch
from tiny_families import FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.tune.engines import packed_model
from job.tune.engines.attention import PER_DOCUMENT, per_document_attention, register
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.adapter import attach_lora
from job.tune.model.config import empty_model
from job.tune.model.shrunk import ORIGINAL, WINDOW, fewest_heads, shrunk
from job.tune.rehearsal import depends_on, rehearse

_LORA = LoraSection(r=4)
_PUBLISHED = {
    # As they are published, the sizes that matter here; all else is the class's default.
    "llama": {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8},
    "ministral3": {"sliding_window": 4096, "num_hidden_layers": 34},
    "gemma3_text": {"num_hidden_layers": 48, "sliding_window": 1024},
    "phi3": {
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 48,
            "long_factor": [6.0] * 48,
            "original_max_position_embeddings": 4096,
        },
    },
    "falcon_h1": {"lm_head_multiplier": 0.02},
    "lfm2": {},
    "mixtral": {},
}
_EACH_FAMILY = sorted({model_type for model_type, _ in FAMILIES.values()} - {"mamba", "mamba2", "falcon_mamba"})
_INCOMPLETE = {
    "codegen": "heads in fours of another width",
    "deepseek_v2": "the class's defaults lack topk_group",
    "dots1": "the class's defaults lack the experts",
    "hunyuan_v1_moe": "the class's defaults have one expert",
    "lfm2_moe": "the class's defaults lack the rotation",
}


def published(model_type):
    return CONFIG_MAPPING[model_type](**_PUBLISHED.get(model_type, {}))


@pytest.mark.parametrize("model_type", _PUBLISHED)
def test_a_published_config_is_tried_in_small(model_type):
    said = rehearse(published(model_type), _LORA)
    assert said.startswith(f"a random {model_type} of "), said
    assert "loss its own, documents apart, every adapter learns" in said


@pytest.mark.families
@pytest.mark.parametrize("model_type", [each for each in _EACH_FAMILY if each not in _INCOMPLETE])
def test_every_family_is_tried_in_small(model_type):
    assert rehearse(CONFIG_MAPPING[model_type](), _LORA).startswith(f"a random {model_type} of ")


def test_a_small_copy_has_a_layer_of_each_kind_and_short_limits():
    config = published("gemma3_text")
    small = shrunk(config, heads=fewest_heads(config))
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window == WINDOW
    assert sum(each.numel() for each in empty_model(small).parameters()) < 2e7
    config = published("phi3")
    small = shrunk(config, heads=fewest_heads(config))
    assert (small.original_max_position_embeddings, small.max_position_embeddings) == (ORIGINAL, 32 * ORIGINAL)


def test_a_window_that_is_lost_is_found_before_the_base_is_fetched(monkeypatch):
    """Its published window is longer than any document that a self-test on the base itself could afford."""
    from transformers import AttentionInterface

    def without_window(*arguments, sliding_window=None, **options):
        return per_document_attention(*arguments, **options)

    monkeypatch.setattr(packed_model, "register", lambda: AttentionInterface.register(PER_DOCUMENT, without_window))
    try:
        with pytest.raises(UsageError, match=r"tried as a small random ministral3: .*the loss of this job is"):
            rehearse(published("ministral3"), _LORA)
    finally:
        register()


def test_a_rotation_by_the_longest_document_is_found_before_the_base_is_fetched(monkeypatch):
    monkeypatch.setattr(packed_model, "rotate_by_document", lambda _model: None)
    with pytest.raises(UsageError, match=r"tried as a small random phi3: .*a document changes its neighbour"):
        rehearse(published("phi3"), _LORA)


def test_a_model_that_looks_ahead_is_refused():
    """transformers counts encoders among the causal language models."""
    bert = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 512}
    with pytest.raises(UsageError, match="tried as a small random bert: BertLMHeadModel: a token changes the losses"):
        rehearse(CONFIG_MAPPING["bert"](**bert), _LORA)


def test_code_that_does_not_run_is_refused_by_name(monkeypatch):
    config = CONFIG_MAPPING["olmo2"](hidden_size=256, num_attention_heads=4, num_key_value_heads=4)

    def broken(*_arguments, **_options):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("transformers.models.olmo2.modeling_olmo2.Olmo2MLP.forward", broken)
    with pytest.raises(UsageError, match=r"model\.base: olmo2: .*no such kernel.*use another base"):
        rehearse(config, _LORA)


def test_code_that_does_not_run_is_refused_at_the_start_of_a_run(bases, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model = PackedModel(attach_lora(base, _LORA, source="tiny", revision=None, seed=0))
    monkeypatch.setattr(type(base.model), "forward", lambda *_arguments, **_options: {}["nothing"])
    with pytest.raises(UsageError, match="LlamaForCausalLM: its code in transformers does not run on documents"):
        check_model(model)


def test_sizes_that_do_not_go_together_refuse_nothing():
    said = rehearse(CONFIG_MAPPING["codegen"](), _LORA)
    assert said.startswith("not tried: no small copy of this codegen works ")


def test_random_generators_are_left_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearse(published("lfm2"), _LORA)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_question_names_all_that_the_answer_depends_on():
    config = published("llama")
    asked = depends_on(config, _LORA)
    assert asked == depends_on(published("llama"), _LORA)
    assert asked != depends_on(config, LoraSection(r=8))
    config.rms_norm_eps = 1e-3
    assert asked != depends_on(config, _LORA)
    assert {"torch", "transformers", "peft", "bitsandbytes"} == {*asked["libraries"]}
