"""Bases that come in 4 bits of bitsandbytes are trained as what they are: against plain transformers and PEFT."""

import pytest
import torch
from layouts import bnb4_base, changed, config_with, tensors_of, without
from peft import LoraConfig, get_peft_model
from test_promises import held
from tiny import CPU, EVERY_LINEAR, backward, config_of, micro_batch, write_base
from tiny_families import write_family
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.tune.engines.choice import choose_engine
from job.tune.engines.families import reason_against
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base
from job.tune.model.config import read_config, shape_of
from job.tune.model.four_bit import form_of, left_whole

NF4 = {"bnb_4bit_quant_type": "nf4"}
DOUBLE = {"bnb_4bit_use_double_quant": True}
SKIPPED = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.up_proj"]
FORMS = {
    "nf4, double": (NF4 | DOUBLE, "NF4, double quantisation; 14 linear layers in 4 bits, 1 not (lm_head)"),
    "nf4, single": (NF4, "NF4, single quantisation; 14 linear layers in 4 bits, 1 not (lm_head)"),
    "fp4, double": (DOUBLE, "FP4, double quantisation; 14 linear layers in 4 bits, 1 not (lm_head)"),
    "fp4, single": ({}, "FP4, single quantisation; 14 linear layers in 4 bits, 1 not (lm_head)"),
    "for fp16": (
        NF4 | DOUBLE | {"bnb_4bit_compute_dtype": torch.float16},
        "NF4, double quantisation; 14 linear layers in 4 bits, 1 not (lm_head)",
    ),
    "modules skipped": (
        NF4 | DOUBLE | {"llm_int8_skip_modules": SKIPPED},
        "NF4, double quantisation; 9 linear layers in 4 bits, 6 not (q_proj, k_proj, v_proj, o_proj, up_proj, lm_head)",
    ),
    "the head as well": (
        NF4 | {"llm_int8_skip_modules": ["model.layers.0"]},
        f"NF4, single quantisation; 8 linear layers in 4 bits, 7 not ({', '.join(EVERY_LINEAR[:-1])})",
    ),
}
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK = 4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Form -> folder."""
    root = tmp_path_factory.mktemp("published")
    plain = write_base(root / "plain", config_of("llama"))
    return {form: bnb4_base(plain, root / form, **options) for form, (options, _said) in FORMS.items()} | {
        "plain": plain
    }


def moved(adapter):
    """lora_B is not zero, as it is after some steps; the same for both, by the parameters' names."""
    for name, parameter in sorted(adapter.named_parameters()):
        if parameter.requires_grad:
            seed = sum(map(ord, name.rpartition("base_model.")[2]))
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(values * 0.05)
    return adapter


def ours(folder):
    base = load_base(folder, device=CPU, dtype=torch.bfloat16)
    lora = LoraSection(r=RANK, alpha=8, targets=TARGETS)
    return PackedModel(moved(attach_lora(base, lora, source="a/b", revision=None, seed=0)))


def theirs(folder):
    """As anybody would load it who has only the folder."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=8, target_modules=[*TARGETS], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return moved(model)


def short(gradients):
    return {name.rpartition("base_model.model.")[2]: gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_plain_transformers_and_peft(form, published, documents):
    model, plain = ours(published[form]), theirs(published[form])
    batch = micro_batch(documents, [4])
    ids, places = torch.from_numpy(documents.token_ids(4)).long()[None], batch.target_places

    loss, gradients = backward(model, [batch])
    logits = plain(input_ids=ids).logits[0].float()
    their_loss = cross_entropy(logits[places], batch.target_ids, reduction="sum")
    their_loss.backward()

    assert loss == pytest.approx(float(their_loss), rel=0.01)
    their_gradients = short({n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
    our_gradients = short(gradients)
    assert our_gradients.keys() == their_gradients.keys()
    assert len(our_gradients) == 2 * 2 * len(TARGETS)
    for name, gradient in our_gradients.items():
        other = their_gradients[name].float()
        assert float((gradient - other).norm() / other.norm()) < 0.1, name


@pytest.mark.parametrize("form", FORMS)
def test_it_is_reported_as_what_it_is_and_an_engine_is_found(form, published):
    model = ours(published[form])

    assert form_of(model.model) == FORMS[form][1]
    choice = choose_engine(model, "auto", backward=torch.Tensor.backward)
    assert choice.name == "generic"
    assert "PEFT's own" not in choice.reason
    against = reason_against(model.model)
    if form in {"nf4, single", "the head as well"}:
        assert "has scales that are not quantised themselves" in against
    elif form.startswith("fp4"):
        assert "is in FP4, not NF4" in against
    else:
        assert against is None


def test_a_layer_that_the_files_have_in_16_bits_is_trained_so_whatever_the_config_says(published, tmp_path, documents):
    """Publishers choose layer by layer, and configs need not name them all."""
    name = "model.layers.1.mlp.up_proj.weight"
    values = tensors_of(published["plain"])[name].bfloat16()
    mixed = changed(published["nf4, double"], tmp_path / "mixed", lambda t: without(name)(t) | {name: values})

    base = load_base(mixed, device=CPU, dtype=torch.bfloat16)
    assert form_of(base) == "NF4, double quantisation; 13 linear layers in 4 bits, 2 not (up_proj, lm_head)"
    assert torch.equal(base.get_parameter(name), values)
    assert torch.isfinite(ours(mixed)(micro_batch(documents, [0]))).all()


def test_layers_of_two_forms_are_each_what_they_are(published, tmp_path):
    part = "layers.1."
    mixed = changed(
        published["nf4, double"],
        tmp_path / "mixed",
        lambda t: without(part)(t) | {n: v for n, v in tensors_of(published["fp4, single"]).items() if part in n},
    )
    base = load_base(mixed, device=CPU, dtype=torch.bfloat16)
    assert form_of(base) == (
        "NF4, double quantisation (7) and FP4, single quantisation (7); 14 linear layers in 4 bits, 1 not (lm_head)"
    )


def test_a_layer_that_the_config_skips_and_the_files_have_in_4_bits_is_in_4_bits(published, tmp_path):
    folder = changed(published["nf4, double"], tmp_path / "base", dict)
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["model.layers.0"]}
    config_with(folder, quantization_config=section)

    assert held(folder) == ["lm_head"]
    assert form_of(load_base(folder, device=CPU, dtype=torch.bfloat16)) == FORMS["nf4, double"][1]


@pytest.mark.parametrize("lost", ["weight.absmax", "weight.quant_map", "weight.nested_absmax"])
def test_scales_that_are_lost_are_named(lost, published, tmp_path):
    folder = changed(published["nf4, double"], tmp_path / "base", without(f"layers.1.mlp.up_proj.{lost}"))

    with pytest.raises(
        DataError, match=rf"1 tensor of the model is not in the files \(model.layers.1.mlp.up_proj.{lost}"
    ):
        held(folder)


def test_scales_that_are_not_finite_are_named(published, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    folder = changed(
        published["nf4, single"], tmp_path / "base", lambda t: t | {name: torch.full_like(t[name], float("nan"))}
    )
    with pytest.raises(DataError, match=rf"NaN or infinity in {name}"):
        load_base(folder, device=CPU, dtype=torch.bfloat16)


def test_4_bits_without_the_section_that_says_so_are_refused(published, tmp_path):
    folder = config_with(changed(published["nf4, double"], tmp_path / "base", dict), quantization_config=None)

    with pytest.raises(DataError, match="scales are left over: the weights were quantised, and the config does not"):
        held(folder)


def test_sizes_are_those_of_what_is_in_4_bits_and_what_is_not(published):
    """The plan before there are weights, and the one of a run on what was loaded."""
    sizes = {}
    for form, folder in published.items():
        base = load_base(folder, device=CPU, dtype=torch.bfloat16)
        left = held(folder)
        shape = shape_of(read_config(folder), left)
        assert left is None or sorted(left) == sorted(left_whole(base))
        assert shape == shape_of(read_config(folder), left_whole(base))
        packed = [m for m in base.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
        assert shape.linear_parameters == sum(m.weight.quant_state.shape.numel() for m in packed)
        sizes[form] = shape.linear_parameters, shape.parameters
    assert sizes["modules skipped"][0] < sizes["plain"][0] == sizes["fp4, single"][0]
    assert len({parameters for _linear, parameters in sizes.values()}) == 1


@pytest.mark.parametrize("experts", ["as they are", "a module each"])
def test_a_mixture_of_which_transformers_makes_other_experts_is_refused_by_its_files(experts, tmp_path):
    """Plain transformers writes Llama 4's experts as they are, and looks for a module each when it reads them again."""
    plain = write_family(tmp_path / "plain", "llama4_text")
    folder = bnb4_base(plain, tmp_path / "base", **NF4, **DOUBLE)
    if experts == "a module each":
        folder = changed(folder, tmp_path / "each", _a_module_each)

    for opened in (held, lambda folder: load_base(folder, device=CPU, dtype=torch.bfloat16)):
        with pytest.raises(DataError, match=r"Llama4ForCausalLM is in 4 bits, .* other experts .* in 16 bits as model"):
            opened(folder)
    dense = write_family(tmp_path / "dense", "llama4_text, dense")
    assert held(bnb4_base(dense, tmp_path / "dense-4", **NF4, **DOUBLE)) == ["lm_head"]


def _a_module_each(tensors):
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, experts in tensors.items():
        if ".experts." in name:
            path, _, kind = name.rpartition(".")
            for number, expert in enumerate(experts):
                halves = zip(("gate_proj", "up_proj"), expert.t().chunk(2), strict=True)
                each = dict(halves) if kind == "gate_up_proj" else {kind: expert.t()}
                made |= {f"{path}.{number}.{own}.weight": matrix for own, matrix in each.items()}
    return made
