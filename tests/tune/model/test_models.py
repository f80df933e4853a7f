"""The 4-bit base and its adapter: what is quantised, what is trained, in which dtype, and what is refused."""

import bitsandbytes as bnb
import pytest
import torch
from tiny import CPU, adapted, backward, gradients, head_of, micro_batch, targets_of, write_base
from tiny_families import config_of as config_of_family
from torch import nn
from transformers import CONFIG_MAPPING, T5Config

from job.core.errors import DataError, UsageError
from job.core.plan.memory import GIB, AdapterShape, memory_parts
from job.core.recipe.schema import LoraSection, TrainSection
from job.tune.engines.families import refuse_family
from job.tune.loop.optimizer import make_optimizer
from job.tune.model.adapter import attach_lora, parameter_counts, refuse_targets, trainable
from job.tune.model.base import load_base
from job.tune.model.config import empty_model, load_tokenizer, read_config, shape_of


@pytest.fixture(scope="module")
def real(bases):
    """As the job loads it: bf16."""
    return adapted(bases["llama"], LoraSection(r=8, targets=("q_proj", "down_proj", "lm_head")), dtype=torch.bfloat16)


def test_linear_layers_are_in_nf4_with_double_quantisation_and_the_head_is_not(real):
    causal_lm = real.model.get_base_model()
    quantised = [module for module in causal_lm.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(quantised) == 2 * 7  # q k v o gate up down of two layers
    for module in quantised:
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype is torch.bfloat16
    head = causal_lm.get_output_embeddings().base_layer
    assert type(head) is nn.Linear
    assert head.weight.dtype is torch.bfloat16


def test_only_the_adapter_is_trained_in_fp32_and_nothing_of_the_base_is_upcast(real):
    learning = {name for name, parameter in real.named_parameters() if parameter.requires_grad}
    assert learning
    for name, parameter in real.named_parameters():
        assert (name in learning) == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if name in learning else parameter.dtype)
        if name not in learning and not isinstance(parameter, bnb.nn.Params4bit):
            assert parameter.dtype is torch.bfloat16, name
    # q_proj (64 -> 64) and down_proj (128 -> 64) of two layers, and the head (64 -> 300), at rank 8.
    assert parameter_counts(real.model)[0] == 8 * (2 * (64 + 64) + 2 * (128 + 64) + 64 + 300)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_all_linear_leaves_the_head_out(architecture, bases):
    model = adapted(bases[architecture], LoraSection(r=2, targets="all-linear"))
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert not [name for name in names if name.endswith(head_of(architecture))]
    assert len(names) == sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) > 0


def test_an_adapter_on_the_head_gets_a_gradient(any_model, documents):
    any_model.train()
    any_model(micro_batch(documents, [0, 1])).sum().backward()
    found = {name: gradient for name, gradient in gradients(any_model).items() if "layers" not in name}
    assert len(found) == 2
    assert all(gradient.any() for gradient in found.values())


def test_a_tied_head_as_a_target_is_refused(tied_base):
    base = load_base(tied_base, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"tied.*leave lm_head out"):
        attach_lora(base, LoraSection(targets=("q_proj", "lm_head")), source="x", revision=None, seed=0)


def test_targets_are_refused_by_the_config_alone(bases, tied_base):
    unknown = LoraSection(targets=("c_attn",))
    with pytest.raises(UsageError, match="c_attn: no linear module"):
        refuse_targets(read_config(bases["llama"]), unknown)
    with pytest.raises(UsageError, match="tied"):
        refuse_targets(read_config(tied_base), LoraSection(targets=("lm_head",)))
    for architecture, folder in bases.items():
        refuse_targets(read_config(folder), LoraSection(targets=targets_of(architecture)))


def test_a_tied_base_without_its_head_as_a_target_learns(tied_base, documents):
    model = adapted(tied_base, LoraSection(r=4, targets=("q_proj",)), moved=True)
    assert all(gradient.any() for gradient in backward(model, [micro_batch(documents, [0])])[1].values())


def test_an_unknown_target_is_named_with_those_that_exist(bases):
    base = load_base(bases["llama"], device=CPU, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"c_attn: no linear module.*it has down_proj, gate_proj, k_proj, lm_head"):
        attach_lora(base, LoraSection(targets=("q_proj", "c_attn")), source="x", revision=None, seed=0)


def test_a_target_that_looks_like_one_of_the_base_s_is_told(bases):
    config = read_config(bases["llama"])
    with pytest.raises(UsageError, match=r"did you mean q_proj for q_porj, gate_proj for gate\?$"):
        refuse_targets(config, LoraSection(targets=("q_porj", "v_proj", "gate")))
    with pytest.raises(UsageError, match=r"up_proj, v_proj$"):
        refuse_targets(config, LoraSection(targets=("xyz",)))


def test_the_seed_sets_the_first_values(bases):
    def first(seed):
        return trainable(adapted(bases["llama"], LoraSection(r=4, targets=("q_proj",)), seed=seed))[0]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_a_damaged_weights_file_is_named(bases, tmp_path):
    for file in bases["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"damaged.*fetch the base model again"):
        load_base(tmp_path, device=CPU, dtype=torch.bfloat16)


def test_a_folder_that_is_no_base_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(UsageError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(UsageError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_every_architecture_says_its_sizes(bases):
    for name, folder in bases.items():
        shape = shape_of(read_config(folder))
        assert (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary) == (2, 64, 128, 300), name
        assert shape.positions == 256
        assert shape.logits == ("capped" if name == "gemma2" else "plain"), name
        assert shape.norms == (4 if name in {"gemma2", "gemma3"} else 2), name


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 0.0625), ("logits_scaling", 8.0)])
def test_a_factor_on_the_logits_is_part_of_the_shape(bases, name, value):
    """Cohere's, and Granite's."""
    config = read_config(bases["llama"])
    setattr(config, name, value)

    assert shape_of(config).logits == "scaled"


def test_what_the_config_says_of_parameters_is_what_a_loaded_base_has(tmp_path):
    """Starcoder 2's MLP has two matrices, not three; BLOOM's config does not even name their width."""
    for name in ("starcoder2", "bloom", "gpt2"):
        config = config_of_family(name)
        shape = shape_of(config)
        base = load_base(write_base(tmp_path / name, config), device=CPU, dtype=torch.bfloat16)
        in_four_bits = [m.weight.quant_state.shape.numel() for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert shape.linear_parameters == sum(in_four_bits), name
        assert shape.parameters == sum(parameter.numel() for parameter in empty_model(config).parameters()), name


def test_matrices_that_stay_whole_in_the_layers_are_counted_apart(bases):
    """A base that is sharded keeps embedding, head and all norms as they are."""
    assert shape_of(read_config(bases["llama"])).layer_whole_parameters == 0
    assert shape_of(read_config(bases["gemma2"])).layer_whole_parameters == 0
    mixture = shape_of(config_of_family("mixtral"))
    assert 0 < mixture.layer_whole_parameters < mixture.whole_parameters


def test_a_config_of_no_decoder_is_refused():
    with pytest.raises(UsageError, match="t5 is no causal language model"):
        shape_of(T5Config())


def test_the_plan_for_a_large_mixture_counts_every_weight():
    """Mixtral 8x7B: 46.7 billion, 45 of them in experts, in 4 bits as all others; a token meets a quarter of those."""
    config = CONFIG_MAPPING["mixtral"](
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    shape = shape_of(config)

    assert shape.parameters == 46_702_792_704
    assert shape.linear_parameters == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert shape.whole_parameters - shape.layer_whole_parameters == (2 * 32000 + 65) * 4096  # but routers and experts
    assert refuse_targets(config, LoraSection(r=8)) == 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    assert shape.experts is not None
    assert shape.experts.parameters == 32 * 8 * 3 * 4096 * 14336
    assert shape.experts.sides == 32 * 8 * (4096 + 2 * 14336 + 14336 + 4096)
    assert shape.active_parameters == shape.linear_parameters + shape.experts.parameters / 4
    assert (shape.experts.first, shape.experts.inner, shape.experts.beside) == (2 * 14336, 14336, 0)
    on_all = LoraSection(r=8, targets=("all-linear", "experts"))
    assert refuse_targets(config, on_all) == refuse_targets(config, LoraSection(r=8)) + 8 * shape.experts.sides
    assert shape.whole_parameters == 2 * 32000 * 4096 + 32 * (2 * 4096 + 8 * 4096) + 4096
    refuse_family(config)


def test_a_large_mixture_whose_experts_cannot_be_in_4_bits_is_refused_with_their_size():
    """The shape of Llama 4 Scout."""
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 16384, "head_dim": 128}
    config = CONFIG_MAPPING["llama4_text"](
        hidden_size=5120,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        interleave_moe_layer_step=1,
        **sizes,
    )
    with pytest.raises(UsageError, match=r"llama4_text is a mixture of experts.*: 193 GB of its .* in 16 bits.*dense"):
        refuse_family(config)
    assert shape_of(config).experts is None


@pytest.mark.parametrize(
    ("model_type", "own", "billions", "active", "gib"),
    [
        (
            "qwen3_moe",  # Qwen3-30B-A3B
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
            30.5,
            2.7,
            18,
        ),
        (
            "gpt_oss",  # gpt-oss-20b
            {
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 24,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
            },
            20.9,
            3.0,
            14,
        ),
    ],
)
def test_shapes_of_today_s_mixtures_fit_one_gpu_by_the_plan(model_type, own, billions, active, gib):
    """Weights alone, and all that a step of 4,096 tokens takes where activations are recomputed."""
    config = CONFIG_MAPPING[model_type](**own)
    shape = shape_of(config)
    refuse_family(config)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.1)
    assert shape.active_parameters / 1e9 == pytest.approx(active, abs=0.1)
    adapter = AdapterShape(parameters=refuse_targets(config, LoraSection(r=16)), rank=16, optimizer="adamw_8bit")
    parts = memory_parts(shape, adapter, "generic", compiled=False)
    assert parts.weights + parts.embeddings < gib * GIB
    assert parts.workspace >= 2 * shape.experts.largest
    peak = parts.peak(layers=shape.layers, tokens=4096, kept_layers=0, recomputed_layers=shape.layers)
    assert gib * GIB / 2 < peak < 40 * GIB


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe", "llama4_text", "glm4_moe", "mixtral"])
def test_no_router_and_no_expert_gets_an_adapter(name, tmp_path):
    config = config_of_family(name)
    base = load_base(write_base(tmp_path, config), device=CPU, dtype=torch.bfloat16)
    model = attach_lora(base, LoraSection(r=4), source="tiny", revision=None, seed=0)
    adapted_ones = {n.partition(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}

    assert {"q_proj", "o_proj"} <= adapted_ones
    assert not {"gate", "router", "layer", "shared_expert_gate", "experts"} & adapted_ones
    assert parameter_counts(model)[0] == refuse_targets(config, LoraSection(r=4))


def test_a_target_that_peft_takes_for_experts_is_refused():
    with pytest.raises(UsageError, match=r"PEFT takes .*gate_proj.* for the experts"):
        refuse_targets(
            config_of_family("glm4_moe"), LoraSection(targets=("q_proj", "gate_proj", "up_proj", "down_proj"))
        )


def test_a_target_that_peft_refuses_is_refused_by_the_config_alone():
    with pytest.raises(UsageError, match=r"out_proj.*incompatible with Mamba"):
        refuse_targets(config_of_family("nemotron_h"), LoraSection(targets=("out_proj",)))


def test_checkpointing_activations_changes_no_gradient(bases, documents):
    lora = LoraSection(r=8, dropout=0.1, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
    model = adapted(bases["llama"], lora, moved=True)
    batch = micro_batch(documents, range(4))
    model.train()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(backward(model, [batch]))
        model.layers.recomputing = True
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))


def test_checkpointing_recomputes_the_layers_in_the_backward_pass(bases, documents):
    model = adapted(bases["llama"], LoraSection(r=2, targets=("q_proj",)))
    calls = []
    model.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    backward(model, [micro_batch(documents, [0])])
    assert len(calls) == 1
    model.layers.recomputing = True
    backward(model, [micro_batch(documents, [0])])
    assert len(calls) == 3


def test_every_optimizer_of_the_recipe_can_be_made(llama):
    for name in TrainSection.model_fields["optimizer"].annotation.__args__:
        train = TrainSection(steps=1, batch_size=1, learning_rate=1e-3, weight_decay=0.1, optimizer=name)
        group = make_optimizer(trainable(llama), train).param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1), name
        assert len(group["params"]) == len(trainable(llama))
