"""Every family that we know, tiny: the losses and gradients of plain transformers and PEFT, and packs to the bit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models_page import PAGE, page
from peft import PeftModel
from tiny import CPU, gradients
from tiny_families import FAMILIES, ORIGINAL, WINDOW, write_family
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.core.recipe.schema import LoraSection
from job.tune.data.micro_batch import MicroBatch
from job.tune.engines import families
from job.tune.engines.choice import choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.adapter import attach_lora, refuse_targets, trainable
from job.tune.model.base import can_be_kept, load_base, quantised_files
from job.tune.model.config import read_config, shape_of
from job.tune.model.experts import dequantised_experts
from job.tune.model.four_bit import form_of, left_whole
from job.tune.model.mixtures import experts_modules, weights_of_experts
from job.tune.model.recurrent import read_past_modules

_OF_EACH_KIND = (
    *("llama, rope dynamic", "ministral3", "phi3, longrope", "gemma3_text", "gpt2", "qwen2_moe, window", "mixtral"),
    *("qwen3_5_text", "lfm2", "nemotron_h", "falcon, alibi", "gpt_oss", "llama4_text"),
)
"""Enough for every start; the others are marked."""
_LENGTHS = (9, 33, 36, 40, 70, 72)
"""Tokens: the last three are longer than every limit in the configs. Ascending, as transformers keeps the frequencies
of the longest document that it has seen. Where rows are padded, three stand in one group and two in another."""
_LORA = LoraSection(r=4, alpha=8)


def choice_for(model):
    """The engine that would train it, in our own linear layers, with an adapter that has moved."""
    choice = choose_engine(model, "auto", backward=torch.autograd.backward)
    assert not choice.left_to_peft, choice.reason
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    choice.engine.refresh()
    model.eval()
    return choice


def accumulated(choice, model, documents):
    """Losses and gradients of documents in one row."""
    batch = micro_batch_of(documents)
    return choice.engine.accumulate(batch, targets=batch.targets, seed=0), gradients(model)


def micro_batch_of(documents) -> MicroBatch:
    """Every token but the first of each is a target."""
    lengths = [len(document) for document in documents]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    places = [torch.arange(start, start + length - 1) for start, length in zip(starts, lengths, strict=True)]
    return MicroBatch(
        input_ids=torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        document_lengths=tuple(lengths),
        cu_seqlens=torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        target_places=torch.cat(places),
        target_ids=torch.cat([document[1:] for document in documents]),
        target_counts=tuple(length - 1 for length in lengths),
        documents=tuple(range(len(lengths))),
    )


def plain(folder: Path, ours: PackedModel) -> PeftModel:
    """Base and the same adapter by transformers, bitsandbytes and PEFT alone."""
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=left_whole(ours.model.get_base_model()),
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}, quantization_config=form
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for path, module in experts_modules(base):  # transformers leaves them in 16 bits
        held = ours.model.get_base_model().get_submodule(path)
        for kind in weights_of_experts(module):
            getattr(module, kind).data = dequantised_experts(held, kind, dtype=torch.float32)
    model = attach_lora(base.requires_grad_(False), _LORA, source="tiny", revision=None, seed=0).eval()
    values = {name: parameter for name, parameter in ours.model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values.pop(name).detach())
    assert not values
    return model


def plain_losses(model: PeftModel, documents) -> torch.Tensor:
    """Loss of each target, a document at a time; gradients of their mean are added up."""
    targets, losses = sum(len(document) - 1 for document in documents), []
    for document in documents:
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1].float()
        losses.append(cross_entropy(logits, document[1:], reduction="none"))
        (losses[-1].sum() / targets).backward()
    return torch.cat(losses).detach()


each_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _OF_EACH_KIND else pytest.mark.families) for name in FAMILIES]
)


@each_family
def test_a_base_in_4_bits_is_read_again_to_the_bit(name, tmp_path):
    """Its copy in 4 bits is held to the config as the weights are, whatever they are called in the files.

    Llama 4's experts are other modules when they come in 4 bits: no copy of them is kept.
    """
    folder, copy = write_family(tmp_path / "base", name), tmp_path / "copy"
    base = load_base(folder, device=CPU, dtype=torch.float32)
    assert can_be_kept(base) == (name != "llama4_text")
    if not can_be_kept(base):
        return
    copy.mkdir()
    for file, content in quantised_files(base, folder):
        (copy / file).write_bytes(content())
    again = load_base(copy, device=CPU, dtype=torch.float32)
    before, after = base.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key
    assert form_of(base) == form_of(again)


@each_family
def test_in_4_bits_is_what_plain_transformers_puts_into_them(name, tmp_path):
    """To the bit, and nothing else: routers that are linear modules of a class of their own stay as they are.

    But for experts, which plain transformers leaves in 16 bits, and for weights that it multiplies past their modules.
    """
    folder = write_family(tmp_path / "base", name)
    ours = load_base(folder, device=CPU, dtype=torch.bfloat16)
    past = read_past_modules(ours)
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=form
    )
    kinds = {path: type(module) for path, module in theirs.named_modules()}
    assert {path: type(module) for path, module in ours.named_modules() if path not in past} == {
        path: kind for path, kind in kinds.items() if path not in past
    }
    experts = tuple(f"{path}.{kind}" for path, held in experts_modules(ours) for kind in weights_of_experts(held))
    expected, found = theirs.state_dict(), ours.state_dict()
    apart = (*experts, *(f"{path}." for path in past), "\0")
    same = [key for key in expected if not key.startswith(apart)]
    assert {*same} == {key for key in found if not key.startswith(apart)}
    for key in same:
        assert torch.equal(found[key], expected[key]), key


@each_family
def test_a_family_trains_as_plain_peft_does(name, tmp_path):
    folder = write_family(tmp_path / "base", name)
    config = read_config(folder)
    assert max(_LENGTHS) > 2 * max(WINDOW, ORIGINAL) > 2 * min(_LENGTHS)
    families.refuse_family(config)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    model = PackedModel(attach_lora(base, _LORA, source="tiny", revision=None, seed=0))
    assert sum(p.numel() for p in trainable(model)) == refuse_targets(config, _LORA)
    assert shape_of(config).layers == len({*range(config.num_hidden_layers)})
    check_model(model)
    assert model.rows == families.rows_of(base)  # nothing slower was needed
    choice = choice_for(model)
    assert ("one document a row" in choice.reason) == (not model.is_packed)
    documents = [torch.randint(3, config.vocab_size, (length,)) for length in _LENGTHS]
    ours, our_gradients = accumulated(choice, model, documents)
    by_peft = plain(folder, model)
    torch.testing.assert_close(ours, plain_losses(by_peft, documents), rtol=1e-4, atol=1e-4)
    for parameter_name, parameter in by_peft.named_parameters():
        if parameter.requires_grad:
            gradient = our_gradients[f"model.{parameter_name}"]
            off = float((gradient - parameter.grad).norm() / parameter.grad.norm())
            assert off < 1e-3, (parameter_name, off)
    kept = ours[: -(_LENGTHS[-1] - 1)]
    changed, _ = accumulated(choice, model, [*documents[:-1], torch.roll(documents[-1], 1)])
    assert torch.equal(changed[: len(kept)], kept)
    without, _ = accumulated(choice, model, documents[:-1])
    if model.rows == "padded":  # to another length, which may round otherwise
        torch.testing.assert_close(without, kept, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(without, kept)  # whatever stands beside them, and however long it is


NAMED_TODAY = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
    *(
        "qwen3_5_moe_text",
        "gpt_oss",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi3",
        "smollm3",
        "olmo2",
        "olmo3",
    ),
    *("granite", "granitemoehybrid", "glm4", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "mixtral", "llama4_text"),
    *("cohere2", "exaone4", "starcoder2", "lfm2", "lfm3", "falcon_h1", "nemotron_h", "gpt_neox", "seed_oss", "apertus"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "ernie4_5", "ernie4_5_moe"),
)
"""What people tune most, by transformers' model_type; of wrappers, their decoders."""


def test_there_is_a_test_for_every_family_that_is_packed():
    assert {model_type for model_type, _ in FAMILIES.values()} >= {*families.FAMILIES}
    assert {model_type for model_type, _ in FAMILIES.values()} >= {*NAMED_TODAY}
    assert len({model_type for model_type, _ in FAMILIES.values()}) >= 45


def test_a_family_that_nobody_knows_trains_one_document_a_row(tmp_path):
    """Slower than it might be, never wrong."""
    base = load_base(write_family(tmp_path, "llama"), device=CPU, dtype=torch.float32)
    assert families.is_packed(base)
    other = SimpleNamespace(config=SimpleNamespace(model_type="never-heard-of"), named_modules=base.named_modules)
    assert not families.is_packed(other)


def test_the_page_of_models_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
