"""gpt-oss as it is published: experts in MXFP4 are decoded exactly, one at a time, and held to the config."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import changed, config_with
from safetensors.torch import load_file, save_file
from test_promises import headers_of
from tiny import CPU, adapted
from tiny_mxfp4 import EXPERTS, SECTION, write_mxfp4
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.tune.engines.selftest import check_model
from job.tune.model.base import is_quantised, load_base, quantised_files
from job.tune.model.config import read_config, shape_of
from job.tune.model.experts import in_four_bits
from job.tune.model.four_bit import form_of
from job.tune.model.promises import hold_to_promises
from job.tune.model.stored.mxfp4 import decoded
from job.tune.model.stored.tensor_files import StoredTensor

ONE = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The base as it is published, and decoded by transformers."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    return write_mxfp4(folder / "base", decoded=folder / "decoded"), folder / "decoded"


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def test_every_byte_with_every_scale_is_decoded_as_by_transformers_to_the_bit():
    """16 numbers, of which two are zero, under 256 scales: the least is 2^-128, which bf16 has below its least."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 16).contiguous()
    ours, theirs = decoded(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert ours.shape == theirs.shape == (1, 512, 256)
    assert ours.dtype == theirs.dtype
    assert torch.equal(bits(ours[..., :255]), bits(theirs[..., :255]))
    assert float(ours[..., 0].abs()[ours[..., 0] != 0].min()) == 2.0**-128
    assert not ours[..., 255].isfinite().any()  # which stands for no number


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_whatever_the_sides_each_number_has_its_place(experts, height, groups, seed):
    chance = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, height, groups, 16), generator=chance, dtype=torch.uint8)
    scales = torch.randint(100, 150, (experts, height, groups), generator=chance, dtype=torch.uint8)
    assert torch.equal(decoded(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def test_what_is_loaded_is_the_decoded_base_to_the_bit(published):
    """So that all that is proven of a base in bf16 holds for it: losses, gradients, packing, resuming, its copy."""
    ours, plain = (load_base(folder, device=CPU, dtype=torch.float32) for folder in published)
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert sum(bool(in_four_bits(module)) for module in ours.modules()) == 2
    assert form_of(ours) == form_of(plain)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_transformers_reads_the_same_numbers_out_of_these_files(published):
    folder, plain = published
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map={"": "cpu"}
    )
    tensors = load_file(plain / "model.safetensors")
    for name in (name for name in tensors if name.endswith(EXPERTS)):
        assert torch.equal(whole.get_parameter(name).data, tensors[name])


def test_a_base_in_mxfp4_passes_the_self_test_in_one_row(published):
    model = adapted(published[0], LoraSection(r=4, alpha=8, targets=("all-linear", "experts")), moved=True)
    check_model(model)
    assert model.is_packed


def test_it_is_put_into_4_bits_by_us_and_its_copy_holds_the_result(published, tmp_path):
    folder, copy = published[0], tmp_path / "copy"
    assert not is_quantised(folder)  # so that a copy is kept
    base = load_base(folder, device=CPU, dtype=torch.float32)
    copy.mkdir()
    for file, content in quantised_files(base, folder):
        (copy / file).write_bytes(content())
    assert is_quantised(copy)
    again = load_base(copy, device=CPU, dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in base.state_dict().items())


def test_sizes_are_those_of_the_decoded_base(published):
    left = hold_to_promises(published[0], headers_of(published[0]), source="the/base")
    assert left is None  # linear modules are in 16 bits, and put into 4 by us
    ours, plain = (shape_of(read_config(folder), left) for folder in published)
    assert ours == plain
    assert ours.experts.parameters == 2 * 4 * 64 * (2 * 128 + 128)


def test_one_expert_is_read_and_decoded_at_a_time(published, monkeypatch):
    read, sizes = StoredTensor.__getitem__, []

    def noted(self, index):
        part = read(self, index)
        if ".experts." in self.name and not self.name.endswith("bias"):
            sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", noted)
    load_base(published[0], device=CPU, dtype=torch.float32)
    assert len(sizes) == 2 * 2 * 2 * 4  # layers, matrices, blocks and scales, experts
    assert max(sizes) == 2 * 128 * 64 // 2


def one_changed(published, folder, name, change):
    def apply(tensors):
        value = change(tensors.pop(name))
        return tensors if value is None else tensors | {name: value}

    return changed(published[0], folder, apply)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scales", lambda _: None, rf"1 tensor of the model is not in the files \({ONE}_scales\)"),
        ("blocks", lambda _: None, rf"1 tensor of the model is not in the files \({ONE}_blocks\)"),
        ("scales", lambda t: t[:, :, :2], rf"\({ONE}_scales: 4 x 64 x 2 in the files, 4 x 64 x 4 in the model"),
        ("scales", lambda t: t[0], rf"1 tensor is of another shape \({ONE}_scales: 64 x 4 in the files"),
        ("blocks", lambda t: t[0], rf"{ONE}\); 1 tensor is of another shape \({ONE}_scales"),
        ("scales", lambda t: t.float(), r"1 tensor is stored as F32 .*_scales"),
        ("blocks", lambda t: t.view(4, 64, 2, 32), r"of another shape .*_blocks: 4 x 64 x 2 x 32 in the files"),
    ],
)
def test_blocks_and_scales_that_do_not_go_together_are_refused(published, part, change, said, tmp_path):
    folder = one_changed(published, tmp_path / "base", f"{ONE}_{part}", change)
    with pytest.raises(DataError, match=said):
        hold_to_promises(folder, headers_of(folder), source="the/base")
    with pytest.raises(DataError, match=said):
        load_base(folder, device=CPU, dtype=torch.float32)


def test_experts_of_another_size_than_the_config_says_are_refused(published, tmp_path):
    folder = config_with(changed(published[0], tmp_path / "base", dict), intermediate_size=64)
    with pytest.raises(DataError, match=r"down_proj: 4 x 128 x 64 in the files, 4 x 64 x 64 in the model"):
        hold_to_promises(folder, headers_of(folder), source="the/base")


def test_a_config_that_does_not_say_so_is_refused(published, tmp_path):
    folder = config_with(changed(published[0], tmp_path / "base", dict), quantization_config=None)
    with pytest.raises(DataError, match="scales are left over: the weights were quantised, and the config does not"):
        hold_to_promises(folder, headers_of(folder), source="the/base")


def test_a_config_that_says_so_of_weights_in_bf16_is_read_as_what_the_files_are(published, tmp_path):
    folder = config_with(changed(published[1], tmp_path / "base", dict), quantization_config=SECTION)
    assert hold_to_promises(folder, headers_of(folder), source="the/base") is None
    mine, plain = (load_base(each, device=CPU, dtype=torch.float32).state_dict() for each in (folder, published[1]))
    assert all(torch.equal(value, plain[name]) for name, value in mine.items())


def test_a_scale_that_stands_for_no_number_is_named(published, tmp_path):
    folder = changed(published[0], tmp_path / "base", dict)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{ONE}_scales"][2, 5, 1] = 255
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"NaN or infinity in {ONE}_scales, in 1 of all tensors"):
        load_base(folder, device=CPU, dtype=torch.float32)
