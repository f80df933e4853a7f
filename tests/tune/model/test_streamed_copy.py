"""A copy in 4 bits that is made from file to file is the one of a base that was loaded, to the bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tensor_files import difference
from tiny import ARCHITECTURES, CPU, config_of, write_base
from tiny_families import write_family
from tiny_mxfp4 import SECTION, write_mxfp4
from tiny_wrappers import write_wrapper

from job.core.errors import DataError, UsageError
from job.tune.model.base import load_base, quantised_files
from job.tune.model.sharded import streamed_copy
from job.tune.model.sharded.streamed_copy import StreamedCopy

DTYPES = (torch.bfloat16, torch.float32)
_ONE_BY_ONE = [name for name in ARCHITECTURES if name != "gpt_neox"]
"""Those whose tensors have the same names in the files and in the model."""
_MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
"""Those that train in packs."""


def tensors_in(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted({*index.values()}):
        content = load_file(folder / file)
        assert {name for name, place in index.items() if place == file} == content.keys()
        found |= content
    return found


def write(folder, files):
    folder.mkdir()
    for name, content in files:
        (folder / name).write_bytes(content())
    return folder


def both(base, folder, dtype):
    """The copy of the base as it is loaded, and the streamed one."""
    loaded = write(folder / "loaded", quantised_files(load_base(base, device=CPU, dtype=dtype), base))
    copy = StreamedCopy(base, device=CPU, dtype=dtype)
    streamed = write(folder / "streamed", copy.files())
    copy.check()
    return loaded, streamed, copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*_ONE_BY_ONE, "tied", "gemma3_text", *_MIXTURES, "qwen3_vl", "llava"])
def test_the_streamed_copy_is_that_of_the_loaded_base_to_the_bit(name, dtype, bases, tied_base, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_copy, "_FILE_BYTES", 30_000)  # several files
    if name in bases or name == "tied":
        base = tied_base if name == "tied" else bases[name]
    else:
        base = (write_family if name in {"gemma3_text", *_MIXTURES} else write_wrapper)(tmp_path / "base", name)
    loaded, streamed, copy = both(base, tmp_path, dtype)

    one, other = tensors_in(loaded), tensors_in(streamed)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key
    assert json.loads((loaded / "config.json").read_text()) == json.loads((streamed / "config.json").read_text())
    assert len([*streamed.glob("*.safetensors")]) > 2
    assert sum(tensor.nbytes for tensor in one.values()) <= copy.needed_bytes + 2000 * len(one)
    again, directly = (load_base(folder, device=CPU, dtype=dtype) for folder in (streamed, base))
    assert difference(directly, again) == []


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama4_text", "qwen3_5_text", "falcon_mamba"])
def test_a_base_that_is_put_together_while_it_is_loaded_is_copied_right_or_refused(name, tmp_path):
    base = write_family(tmp_path / "base", name)
    try:
        loaded, streamed, _ = both(base, tmp_path, torch.bfloat16)
    except UsageError as error:
        assert "put together while it is loaded" in str(error)  # noqa: PT017 - either will do, but nothing third
        return
    one, other = tensors_in(loaded), tensors_in(streamed)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_are_published_in_mxfp4_are_decoded_on_the_way(dtype, tmp_path):
    base, plain = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded"), tmp_path / "decoded"
    loaded, streamed, copy = both(base, tmp_path, dtype)

    one, other = tensors_in(loaded), tensors_in(streamed)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    for folder in (loaded, streamed):
        assert json.loads((folder / "config.json").read_text())["published_quantization_config"] == SECTION
    assert sum(tensor.nbytes for tensor in one.values()) <= copy.needed_bytes + 2000 * len(one)
    again, decoded = (load_base(folder, device=CPU, dtype=dtype) for folder in (streamed, plain))
    assert difference(decoded, again) == []


def test_no_more_than_a_file_of_it_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_copy, "_FILE_BYTES", 1)
    base = write_base(tmp_path / "base", config_of("llama"))
    copy, quantised = StreamedCopy(base, device=CPU, dtype=torch.bfloat16), []
    quantise = bnb.functional.quantize_4bit

    def noted(*args, **options):
        quantised.append(args[0].shape)
        return quantise(*args, **options)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", noted)
    files = [*copy.files()]
    assert quantised == []
    most = 0
    for _, content in files:
        before = len(quantised)
        content()
        most = max(most, len(quantised) - before)
    assert most == 1
    assert len(quantised) == 14


def test_a_value_that_is_not_finite_is_found(bases, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in bases["llama"].iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    copy = StreamedCopy(base, device=CPU, dtype=torch.bfloat16)
    for _, content in copy.files():
        content()

    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        copy.check()
