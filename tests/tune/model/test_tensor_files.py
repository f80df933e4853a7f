"""Weights from files to a model and back: streamed, and in 4 bits the same to the bit."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load
from tiny import ARCHITECTURES, CPU, adapted, backward, micro_batch, trainable, write_base, write_copy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.tune.model.adapter import refuse_targets
from job.tune.model.base import load_base, quantised_bytes, quantised_files
from job.tune.model.config import read_config, shape_of
from job.tune.model.stored.tensor_files import is_finite, sharded, stored_tensors, tensors_bytes

DTYPES = (torch.bfloat16, torch.float32)


def everything_of(model):
    """Each parameter and buffer, and all that a packed weight is unpacked by: name -> what can be compared."""
    found = {name: ("tensor", tensor) for name, tensor in model.state_dict().items()}
    found |= {name: ("tensor", tensor) for name, tensor in model.named_buffers()}
    for name, module in model.named_modules():
        found[name] = ("kind", type(module))
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert state is module.quant_state
            values = {**state.as_dict(), "offset": state.offset, "code of absmax": state.state2.code}
            settings = {key: getattr(module.weight, key) for key in ("blocksize", "compress_statistics", "quant_type")}
            for key, value in (values | settings | {"compute_dtype": module.compute_dtype}).items():
                found[f"{name} {key}"] = ("tensor" if isinstance(value, torch.Tensor) else "value", value)
    return found


def difference(one, other):
    """Names of what is not the same to the bit."""
    mine, theirs = everything_of(one), everything_of(other)
    assert mine.keys() == theirs.keys()

    def same(name):
        (kind, a), (_, b) = mine[name], theirs[name]
        return (a.dtype == b.dtype and torch.equal(a, b)) if kind == "tensor" else a == b

    return [name for name in mine if not same(name)]


@pytest.fixture(scope="module")
def tied_and_others(bases, tied_base):
    return {**bases, "tied": tied_base}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "tied"])
def test_a_base_in_4_bits_comes_back_from_its_files_the_same_to_the_bit(
    architecture, dtype, tied_and_others, tmp_path, monkeypatch
):
    base = tied_and_others[architecture]
    copy = write_copy(tmp_path / "copy", base, dtype=dtype)
    quantised = load_base(base, device=CPU, dtype=dtype)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", None)  # nothing is quantised again
    again = load_base(copy, device=CPU, dtype=dtype)

    assert difference(quantised, again) == []
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("architecture", ["llama", "tied"])
def test_a_base_has_the_same_values_whatever_computes(architecture, tied_and_others):
    """Published in fp32: it is rounded to bf16 before it is put into 4 bits on every processor."""
    folder = tied_and_others[architecture]
    assert {tensor.header.dtype for tensor in stored_tensors(folder, CPU, not_finite=set()).values()} == {"F32"}
    of_bf16, of_fp32 = (load_base(folder, device=CPU, dtype=dtype) for dtype in DTYPES)

    for (name, one), (_, other) in zip(of_bf16.named_parameters(), of_fp32.named_parameters(), strict=True):
        assert torch.equal(one.data.to(other.dtype), other.data), name
    for one, other in zip(of_bf16.modules(), of_fp32.modules(), strict=True):
        if isinstance(one, bnb.nn.Linear4bit):
            assert torch.equal(one.weight.quant_state.absmax, other.weight.quant_state.absmax)


@pytest.mark.parametrize("architecture", ["llama", "tied"])
@pytest.mark.parametrize(
    ("published", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_a_base_that_was_published_in_4_bits_computes_in_what_it_is_asked_to(
    architecture, published, dtype, tied_and_others, tmp_path
):
    """Whoever published it named a dtype, which transformers and bitsandbytes would follow."""
    copy = write_copy(tmp_path / "copy", tied_and_others[architecture], dtype=published)
    base = load_base(copy, device=CPU, dtype=dtype)
    plain = load_base(tied_and_others[architecture], device=CPU, dtype=published)

    assert {m.compute_dtype for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)} == {dtype}
    assert base.get_input_embeddings().weight.dtype == base.get_output_embeddings().weight.dtype == dtype
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.float() for model in (base, plain))
    assert torch.allclose(ours, theirs, atol=0.05 * float(theirs.abs().max()))


def test_a_copy_says_of_its_base_what_the_base_itself_says(bases, tmp_path):
    copy = write_copy(tmp_path / "copy", bases["llama"])
    lora = LoraSection(r=4, targets=("q_proj", "lm_head"))

    assert shape_of(read_config(copy)) == shape_of(read_config(bases["llama"]))
    assert refuse_targets(read_config(copy), lora) == refuse_targets(read_config(bases["llama"]), lora)


def test_an_adapter_learns_on_a_copy_what_it_learns_on_the_base(bases, documents, tmp_path):
    copy, lora = write_copy(tmp_path / "copy", bases["llama"]), LoraSection(r=4, targets=("q_proj", "lm_head"))
    on_base, on_copy = (adapted(folder, lora, dtype=torch.bfloat16, moved=True) for folder in (bases["llama"], copy))

    assert all(torch.equal(a, b) for a, b in zip(trainable(on_base), trainable(on_copy), strict=True))
    batch = [micro_batch(documents, [0, 1])]
    (loss, gradients), (same_loss, same_gradients) = backward(on_base, batch), backward(on_copy, batch)
    assert loss == same_loss
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())


def test_a_base_is_what_transformers_itself_makes_of_it(bases):
    for base in bases.values():
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        theirs = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=nf4, dtype=torch.bfloat16, device_map="cpu"
        )

        assert difference(theirs, load_base(base, device=CPU, dtype=torch.bfloat16)) == []


def test_the_host_holds_one_tensor_at_a_time_and_not_all_shards(tmp_path, monkeypatch):
    """What of the weights' files counts as this process's memory, looked at before each weight is quantised."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    base = write_base(tmp_path / "base", LlamaConfig(vocab_size=512, **sizes), most_bytes="8MB")
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(shards) > 6
    resident = []
    quantise = bnb.functional.quantize_4bit

    def looked_at(*args, **kwargs):
        resident.append(resident_bytes(base))
        return quantise(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", looked_at)
    load_base(base, device=CPU, dtype=torch.bfloat16)

    assert len(resident) == 6 * 7
    assert max(resident) <= max(shards)


def resident_bytes(folder):
    """Bytes of the files in a folder that are mapped and in memory."""
    total, counts = 0, False
    with Path("/proc/self/smaps").open(encoding="utf-8") as lines:
        for line in lines:
            if "-" in line.split()[0]:  # a mapping's first line, with its addresses
                counts = str(folder) in line
            elif counts and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("most_bytes", [1, 100, 10**9])
def test_tensors_are_divided_into_files_in_their_order_and_read_from_them(most_bytes, tmp_path):
    tensors = {
        "a": torch.arange(10.0),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.ones(3, 4, dtype=torch.bfloat16).T,
        "d": torch.tensor(7),
    }
    files = {name: content() for name, content in sharded(tensors, most_bytes=most_bytes)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    assert len(files) - 1 == {1: 4, 100: 1, 10**9: 1}[most_bytes]
    found = stored_tensors(tmp_path, CPU, not_finite=set())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name][...].dtype == tensor.dtype
        assert torch.equal(found[name][...], tensor)
    assert sum(t.nbytes for name, c in files.items() if "index" not in name for t in load(c).values()) == tensors_bytes(
        tensors
    )


def test_a_model_says_how_much_its_files_hold(bases, tied_base):
    base = load_base(bases["llama"], device=CPU, dtype=torch.bfloat16)
    files = [content() for name, content in quantised_files(base, bases["llama"]) if name.endswith(".safetensors")]

    assert quantised_bytes(base) <= sum(map(len, files)) < quantised_bytes(base) + 20_000
    # The head of a tied model is its embeddings: 300 rows of 64 in bf16.
    assert (
        quantised_bytes(base) - quantised_bytes(load_base(tied_base, device=CPU, dtype=torch.bfloat16)) == 2 * 300 * 64
    )


def test_a_damaged_file_of_a_copy_is_named(bases, tmp_path):
    copy = write_copy(tmp_path / "copy", bases["llama"])
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:3000])

    with pytest.raises(DataError, match="damaged"):
        load_base(copy, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_a_value_that_is_not_finite_is_seen_wherever_it_stands(dtype, value):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 1.0], dtype=dtype).repeat(2**18)
    for place in (0, 2**20, len(values) - 1):
        spoilt = values.clone()
        if value is not None:
            spoilt[place] = value
        assert is_finite(spoilt) == (value is None)
    assert is_finite(values[:0])
    assert is_finite(torch.ones(3, dtype=torch.uint8))
