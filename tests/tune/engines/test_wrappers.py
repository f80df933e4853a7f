"""The text decoder of every multimodal model that we know, tiny: losses, gradients and adapters of the whole one."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_all_families import accumulated, choice_for, micro_batch_of, plain_losses
from tiny import CPU, EVERY_LINEAR
from tiny_wrappers import WRAPPED, in_the_other_layout, whole_class_of, whole_config_of, write_wrapper
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from job.core.base.promises import form_in_files
from job.core.errors import DataError, UsageError
from job.core.recipe.schema import LoraSection
from job.tune.data.micro_batch import MicroBatch
from job.tune.engines import selftest
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import ADAPTER_FILES, adapter_to_publish, load_adapter
from job.tune.model import wrappers
from job.tune.model.adapter import attach_lora, load_with_peft, refuse_targets, trainable
from job.tune.model.base import load_base, quantised_files
from job.tune.model.config import empty_model, read_config, read_whole_config, read_wrapper, shape_of
from job.tune.model.experts import dequantised_experts
from job.tune.model.four_bit import form_of, left_whole
from job.tune.model.mixtures import experts_modules, weights_of_experts
from job.tune.model.promises import hold_to_promises
from job.tune.model.stored import tensor_files

_OF_EACH_KIND = ("gemma3", "mistral3, ministral3", "qwen3_vl", "qwen3_5")
"""Enough for every start: a window and a tied head, a rotation by length, another class's decoder, other attention."""
_LENGTHS = (9, 33, 40, 70)
_LORA = LoraSection(r=4, alpha=8)
_NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
_FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
each_wrapper = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _OF_EACH_KIND else pytest.mark.families) for name in WRAPPED]
)


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """Names of the tensors whose values are read."""
    names: set[str] = set()
    original = tensor_files.StoredTensor.__getitem__

    def noted(self, index):
        names.add(self.name)
        return original(self, index)

    monkeypatch.setattr(tensor_files.StoredTensor, "__getitem__", noted)
    return names


def ours_on(folder: Path, lora: LoraSection = _LORA) -> PackedModel:
    """Base and adapter, which does something."""
    base = load_base(folder, device=CPU, dtype=torch.float32)
    model = PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0))
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def published(model: PackedModel, base: Path, folder: Path) -> Path:
    """Its adapter as it is published."""
    model.model.save_pretrained(folder / "checkpoint", save_embedding_layers=False)
    to_publish = adapter_to_publish(model.model, read_wrapper(base))
    to_publish.write(folder / "checkpoint" / ADAPTER_FILES[0], folder / "adapter")
    return folder / "adapter"


def by_anybody(base: Path, adapter: Path, kind=None, quantised=_NF4) -> PeftModel:
    """The whole model with the adapter on it, by transformers, bitsandbytes and PEFT alone, without a warning."""
    kind = kind or whole_class_of(read_whole_config(base))
    options = {} if quantised is None else {"quantization_config": quantised}
    whole = kind.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}, **options
    )
    for module in whole.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if quantised is not None and next(experts_modules(whole), None) is not None:
        give_experts(whole, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        return PeftModel.from_pretrained(whole.requires_grad_(False), adapter, is_trainable=True).eval()


def give_experts(whole, folder: Path) -> None:
    """The values that its experts have in 4 bits: transformers leaves them in 16."""
    decoder, wrapper = load_base(folder, device=CPU, dtype=torch.float32), read_wrapper(folder)
    for path, module in experts_modules(whole):
        inner = path if wrapper is None else wrapper.inside(path)
        held = decoder.get_submodule(inner)
        for kind in weights_of_experts(module):
            values = dequantised_experts(held, kind, dtype=torch.float32)
            getattr(module, kind).data = (
                values if module.is_transposed == held.is_transposed else values.mT.contiguous()
            )


def random_documents(folder: Path) -> list[torch.Tensor]:
    return [torch.randint(3, read_config(folder).vocab_size, (length,)) for length in _LENGTHS]


def batch_of(folder: Path) -> MicroBatch:
    torch.manual_seed(2)
    return micro_batch_of(random_documents(folder))


@each_wrapper
def test_a_decoder_trains_as_plain_peft_trains_it_in_the_whole_model(name, tmp_path, read):
    folder = write_wrapper(tmp_path / "base", name)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    whole = read_wrapper(folder)
    assert read == {*load_file(folder / "model.safetensors")} - left_in_files(folder)
    assert whole.left_out() or name == "gemma4_unified"
    model = PackedModel(attach_lora(base, _LORA, source="tiny", revision=None, seed=0))
    assert sum(p.numel() for p in trainable(model)) == refuse_targets(read_config(folder), _LORA)
    selftest.check_model(model)
    selftest.check_whole(model, whole)
    choice = choice_for(model)
    documents = random_documents(folder)
    ours, our_gradients = accumulated(choice, model, documents)
    theirs = by_anybody(folder, published(model, folder, tmp_path))
    torch.testing.assert_close(ours, plain_losses(theirs, documents), rtol=1e-4, atol=1e-4)
    learning = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(learning) == len(our_gradients)
    for its_name, gradient in our_gradients.items():
        inner = its_name.removeprefix("model.base_model.model.")
        parameter = learning[f"base_model.model.{whole.outside(inner)}"]
        off = float((gradient - parameter.grad).norm() / parameter.grad.norm())
        assert off < 1e-3, (its_name, off)
    kept = ours[: -(_LENGTHS[-1] - 1)]
    changed, _ = accumulated(choice, model, [*documents[:-1], torch.roll(documents[-1], 1)])
    assert torch.equal(changed[: len(kept)], kept)
    without, _ = accumulated(choice, model, documents[:-1])
    assert torch.equal(without, kept)


@pytest.mark.families
@pytest.mark.parametrize("name", [name for name in WRAPPED if "moe" in name])
def test_adapters_on_experts_are_those_of_the_whole_model(name, tmp_path):
    folder = write_wrapper(tmp_path / "base", name)
    model = ours_on(folder, LoraSection(r=4, alpha=8, targets=("all-linear", "experts")))
    choice, documents = choice_for(model), random_documents(folder)
    ours, _ = accumulated(choice, model, documents)
    adapter = published(model, folder, tmp_path)
    theirs = by_anybody(folder, adapter)
    torch.testing.assert_close(ours, plain_losses(theirs, documents), rtol=1e-4, atol=1e-4)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    again = PackedModel(load_with_peft(base, adapter, read_wrapper(folder))).eval()
    with torch.no_grad():
        assert torch.equal(again(micro_batch_of(documents)), ours)


def left_in_files(folder: Path) -> set[str]:
    """What of the one file is of no text decoder, by the words that publishers have for it."""
    words = ("vision", "visual", "audio", "multi_modal", "projector", "connector", "image_newline", "mlp1")
    return {name for name in load_file(folder / "model.safetensors") if any(word in name for word in words)}


@each_wrapper
def test_the_proof_gets_the_adapter_by_peft_on_the_whole_model(name, tmp_path):
    folder = write_wrapper(tmp_path / "base", name)
    trained = ours_on(folder)
    adapter, batch = published(trained, folder, tmp_path), batch_of(folder)
    base = load_base(folder, device=CPU, dtype=torch.float32)

    proven = PackedModel(load_with_peft(base, adapter, read_wrapper(folder))).eval()
    assert proven.score(batch).nll == trained.score(batch).nll
    assert {n for n, _ in proven.model.named_parameters()} == {n for n, _ in trained.model.named_parameters()}

    fresh = load_base(folder, device=CPU, dtype=torch.float32)
    tried = PackedModel(attach_lora(fresh, _LORA, source="tiny", revision=None, seed=5)).eval()
    load_adapter(tried.model, adapter, read_wrapper(folder))
    assert tried.score(batch).nll == trained.score(batch).nll


@each_wrapper
def test_a_copy_in_4_bits_is_the_decoder_under_the_whole_s_names_and_read_again_to_the_bit(name, tmp_path):
    folder, copy = write_wrapper(tmp_path / "base", name), tmp_path / "copy"
    base = load_base(folder, device=CPU, dtype=torch.float32)
    copy.mkdir()
    for file, content in quantised_files(base, folder):
        (copy / file).write_bytes(content())
    again = load_base(copy, device=CPU, dtype=torch.float32)
    for key, value in base.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert form_of(base) == form_of(again)
    whole = read_wrapper(copy)
    names = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(whole.inside(key) for key in names)
    shape = shape_of(read_config(copy))
    assert shape == shape_of(read_config(folder))
    assert shape.parameters == sum(parameter.numel() for parameter in empty_model(read_config(folder)).parameters())


OTHER_LAYOUTS = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision", "internvl")


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_names_of_today_and_of_earlier_versions_are_the_same_base_and_take_the_same_adapter(name, tmp_path):
    saved = write_wrapper(tmp_path / "saved", name)
    other = in_the_other_layout(shutil.copytree(saved, tmp_path / "other"))
    one, same = (load_base(each, device=CPU, dtype=torch.float32).state_dict() for each in (saved, other))
    assert all(torch.equal(one[key], same[key]) for key in one)
    trained = ours_on(other)
    adapter, batch = published(trained, other, tmp_path), batch_of(other)
    for folder in (saved, other):
        theirs = by_anybody(folder, adapter, AutoModelForImageTextToText)
        losses = plain_losses(theirs, torch.split(batch.input_ids[0], [*_LENGTHS]))
        torch.testing.assert_close(trained(batch).detach(), losses, rtol=1e-4, atol=1e-4)


def test_an_adapter_fits_what_transformers_takes_for_the_causal_language_model_where_that_is_the_whole(tmp_path):
    folder = write_wrapper(tmp_path / "base", "gemma3")
    trained = ours_on(folder)
    adapter, batch = published(trained, folder, tmp_path), batch_of(folder)
    theirs = by_anybody(folder, adapter, AutoModelForCausalLM)
    assert type(theirs.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
    losses = plain_losses(theirs, torch.split(batch.input_ids[0], [*_LENGTHS]))
    torch.testing.assert_close(trained(batch).detach(), losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), EVERY_LINEAR], ids=["some", "with the head"])
def test_towers_with_modules_of_the_same_name_get_no_adapter(targets, tmp_path):
    folder = write_wrapper(tmp_path / "base", "mistral3")
    trained = ours_on(folder, LoraSection(r=4, alpha=8, targets=targets))
    adapter = published(trained, folder, tmp_path)
    config = json.loads((adapter / ADAPTER_FILES[1]).read_text())
    assert config["target_modules"] == sorted(targets)
    theirs = by_anybody(folder, adapter)
    towers = [n for n, m in theirs.named_modules() if "vision_tower" in n and n.endswith("q_proj")]
    adapted = [n for n, m in theirs.named_modules() if isinstance(m, LoraLayer)]
    assert towers
    assert not {*towers} & {*adapted}
    batch = batch_of(folder)
    losses = plain_losses(theirs, torch.split(batch.input_ids[0], [*_LENGTHS]))
    torch.testing.assert_close(trained(batch).detach(), losses, rtol=1e-4, atol=1e-4)


def test_a_head_in_the_files_is_no_tied_one_whatever_the_config_s_default_says(tmp_path):
    """Mistral 3's configs say nothing, and transformers takes that for tied until it sees the files."""
    folder = write_wrapper(tmp_path / "base", "mistral3")
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    assert read_whole_config(folder).tie_word_embeddings
    assert not read_config(folder).tie_word_embeddings
    trained = ours_on(folder, LoraSection(r=4, alpha=8, targets=("q_proj", "lm_head")))
    theirs = by_anybody(folder, published(trained, folder, tmp_path))
    batch = batch_of(folder)
    losses = plain_losses(theirs, torch.split(batch.input_ids[0], [*_LENGTHS]))
    torch.testing.assert_close(trained(batch).detach(), losses, rtol=1e-4, atol=1e-4)
    for broken in ("{", "{}", '{"weight_map": 3}'):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(broken)
        assert read_config(folder).tie_word_embeddings


def in_four_bits(folder: Path, to: Path, skipped: list[str]) -> Path:
    """The whole model as somebody quantised and published it."""
    form = BitsAndBytesConfig(**{**_NF4.to_diff_dict(), "llm_int8_skip_modules": skipped})
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=form
    )
    model.save_pretrained(to)
    return to


@pytest.mark.parametrize(
    ("skipped", "said"),
    [
        (["lm_head", "vision_tower", "multi_modal_projector"], "14 linear layers in 4 bits, 1 not (lm_head)"),
        (
            ["lm_head", "vision_tower", "multi_modal_projector", "model.language_model.layers.1.mlp", "merger"],
            "11 linear layers in 4 bits, 4 not (gate_proj, up_proj, down_proj, lm_head)",
        ),
        (["lm_head"], "14 linear layers in 4 bits, 1 not (lm_head)"),
    ],
    ids=["towers in 16 bits", "a layer's MLP as well", "towers in 4 bits as well"],
)
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_vl"])
def test_a_whole_model_in_4_bits_is_trained_as_it_is(name, skipped, said, tmp_path, read):
    skipped = [each.replace("vision_tower", "visual") if name == "qwen3_vl" else each for each in skipped]
    folder = in_four_bits(write_wrapper(tmp_path / "plain", name), tmp_path / "base", skipped)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    assert form_of(base) == f"NF4, double quantisation; {said}"
    assert not any(word in each for each in read for word in ("vision", "visual", "projector"))
    headers = headers_of(folder)
    left = hold_to_promises(folder, headers, source="the/base")
    text = wrappers.parts_of(read_whole_config(folder), headers).text
    assert form_in_files(text, left) == form_of(base)
    assert shape_of(read_config(folder), left) == shape_of(read_config(folder), left_whole(base))
    trained = ours_on(folder)
    batch = batch_of(folder)
    theirs = by_anybody(folder, published(trained, folder, tmp_path), quantised=None)
    for module in theirs.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    for parameter in theirs.parameters():  # such a base is loaded in the dtypes of its files, whatever is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    losses = plain_losses(theirs, torch.split(batch.input_ids[0], [*_LENGTHS]))
    torch.testing.assert_close(trained(batch).detach(), losses, rtol=1e-4, atol=1e-4)


def headers_of(folder: Path):
    return {n: t.header for n, t in tensor_files.stored_tensors(folder, CPU, not_finite=set()).items()}


def changed(folder: Path, change) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


LOST = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != LOST},
            "1 tensor of the model is not in the files (model.language_model.layers.1.mlp.up_proj.weight)",
        ),
        (lambda t: t | {LOST: t[LOST][:100]}, f"1 tensor is of another shape ({LOST}: 100 x 64 in the files, 128 x 64"),
        (lambda t: t | {LOST: t[LOST].to(torch.int8)}, f"1 tensor is stored as I8 ({LOST})"),
        (lambda t: t | {"vision_tower.x": torch.ones(1)}, "1 tensor of the files is not of the model (vision_tower.x)"),
        (
            lambda t: t | {LOST.replace("1", "2"): torch.ones(1)},
            f"1 tensor of the files is not of the model ({LOST.replace('1', '2')})",
        ),
        (lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, "every name begins with _orig_mod., which a wrapper"),
    ],
    ids=["missing", "shape", "dtype", "unknown in a tower", "a layer more", "prefixed"],
)
def test_a_decoder_is_held_to_what_the_config_promises(change, said, tmp_path):
    folder = changed(write_wrapper(tmp_path / "base", "gemma3"), change)
    with pytest.raises(DataError) as error:
        hold_to_promises(folder, headers_of(folder), source="the/base")
    assert said in str(error.value)
    with pytest.raises(DataError):
        load_base(folder, device=CPU, dtype=torch.float32)


def test_towers_may_be_damaged_or_lost_for_nothing_reads_them(tmp_path):
    def spoil(tensors):
        towers = left_in_files(folder)
        lost = min(towers)
        return {n: torch.full_like(v, float("nan")) if n in towers else v for n, v in tensors.items() if n != lost}

    folder = write_wrapper(tmp_path / "base", "gemma3")
    before = load_base(folder, device=CPU, dtype=torch.float32).state_dict()
    after = load_base(changed(folder, spoil), device=CPU, dtype=torch.float32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_for_more_tokens_at_once_are_let_through_and_not_read(tmp_path, read):
    """Qwen 3.5 comes with them, and transformers leaves them out by itself."""
    folder = write_wrapper(tmp_path / "base", "qwen3_5")
    changed(folder, lambda t: t | {"mtp.layers.0.mlp.up_proj.weight": torch.ones(128, 64)})
    load_base(folder, device=CPU, dtype=torch.float32)
    assert not any(name.startswith("mtp") for name in read)


@pytest.mark.parametrize("model_type", ["paligemma", "mllama", "aya_vision", "gemma3n", "chameleon", "idefics3"])
def test_others_are_refused_by_name_with_what_to_take_instead(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UsageError, match=rf"{model_type} is a model of more than text.*gemma3, .*take one of them"):
        read_config(tmp_path)


def test_a_whole_model_that_cannot_be_built_is_refused_with_the_reason(tmp_path):
    config = whole_config_of("gemma3")
    config.vision_config.num_attention_heads = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"Gemma3ForConditionalGeneration cannot be built .*\(.*32.*3.*\); correct"):
        read_wrapper(tmp_path)


def test_a_whole_model_that_computes_something_else_is_refused_before_it_trains(tmp_path, monkeypatch):
    """Aya Vision's decoder scales its logits, and the whole model does not."""
    from tiny_families import FAMILIES, SIZES

    tower = WRAPPED["llava_onevision"][1]["vision_config"]
    text = {**SIZES, **FAMILIES["cohere2"][1], "model_type": "cohere2", "pad_token_id": 0}
    monkeypatch.setitem(WRAPPED, "aya", ("aya_vision", {"text_config": text, "vision_config": tower}))
    monkeypatch.setattr(wrappers, "WRAPPERS", (*wrappers.WRAPPERS, "aya_vision"))
    folder = write_wrapper(tmp_path, "aya")
    with pytest.raises(UsageError, match="AyaVisionForConditionalGeneration: its loss on text is"):
        selftest.check_whole(ours_on(folder), read_wrapper(folder))


def test_there_is_a_test_for_every_wrapper():
    assert {model_type for model_type, _ in WRAPPED.values()} == {*wrappers.WRAPPERS}
    assert all(whole_class_of(whole_config_of(name)) for name in WRAPPED)
