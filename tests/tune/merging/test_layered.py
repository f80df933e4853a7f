"""A decoder that has one layer in memory computes what transformers does with all of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merged import adapted, lora, merge, save_adapter
from safetensors.torch import load_file, save_file
from test_merging import DENSE, MIXTURES, each_of
from tiny import CPU, PAIR, config_of, documents_of, random_text, write_base, write_tokenizer
from tiny_families import config_of as family_config
from tiny_families import write_family
from tiny_wrappers import write_wrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.tune.data.micro_batch import micro_batch
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import load_adapter
from job.tune.merging.layered import Layered, give_memory
from job.tune.model.adapter import attach_lora
from job.tune.model.config import read_config

ROOT = Path(__file__).parents[3]
IDS = torch.arange(3, 19)[None]


def layered(folder, dtype=torch.float32):
    model = Layered(read_config(folder), device=CPU, dtype=dtype)
    model.read_from(folder, not_finite=set())
    return model


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", each_of(*DENSE, *MIXTURES))
def test_every_family_computes_the_same_to_the_bit(family, tmp_path):
    base = write_family(tmp_path / "base", family)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    found = layered(base)

    for _ in range(2):
        assert torch.equal(logits_of(found.model), logits_of(whole))
        assert sum(parameter.is_meta for parameter in found.model.parameters()) >= 4


@pytest.mark.parametrize("wrapper", ["gemma3", "qwen2_5_vl", "qwen3_vl_moe"])
def test_the_decoder_of_a_multimodal_model_is_found_in_it(wrapper, tmp_path):
    base = write_wrapper(tmp_path / "base", wrapper)
    found = layered(base)

    assert bool(torch.isfinite(logits_of(found.model)).all())


def scores(model, documents):
    model.eval()
    return torch.tensor([n for i in range(len(documents)) for n in model.score(micro_batch(documents, [i])).nll])


def test_with_an_adapter_and_without_it_on_one_folder_and_the_next(tmp_path):
    base = write_base(write_tokenizer(tmp_path / "base", puts_bos=True), config_of("qwen3", tied=True))
    lora_section = LoraSection(r=4, alpha=12, targets=["q_proj", "down_proj"])
    plain = adapted(base, lora())
    adapter = save_adapter(plain, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    pairs = [(random_text(9, seed=n), random_text(5 + n, seed=n + 9)) for n in range(4)]
    documents = documents_of(tmp_path / "data", AutoTokenizer.from_pretrained(base), pairs, data=PAIR)

    found = Layered(read_config(base), device=CPU, dtype=torch.float32)
    model = attach_lora(found.model, lora_section, source="a/b", revision=None, seed=0)
    give_memory(model, CPU)
    load_adapter(model, adapter, None)
    packed = PackedModel(model)
    packed.linears.leave_to_peft()
    found.read_from(base, not_finite=set())
    beside = scores(packed, documents)
    found.read_from(tmp_path / "merged", not_finite=set())
    with model.disable_adapter():
        alone = scores(packed, documents)
    found.read_from(base, not_finite=set())
    with model.disable_adapter():
        untrained = scores(packed, documents)

    assert torch.allclose(beside, scores(PackedModel(plain), documents), rtol=1e-5)
    assert torch.allclose(alone, beside, rtol=1e-5)
    assert not torch.allclose(untrained, beside, rtol=1e-2)


def test_a_tensor_that_is_not_in_the_files_is_refused(tmp_path):
    base = write_base(tmp_path / "base", config_of("llama"))
    file = base / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1.mlp.up_proj" not in n}, file)
    found = layered(base)

    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: is not in the files"):
        logits_of(found.model)


MEASURED = """
import sys
sys.path[:0] = [*sys.argv[1:3], *sys.argv[6:]]
import resource
from pathlib import Path
from merged import merge
base, adapter, onto = Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge(base / "tiny", adapter / "tiny", base.parent / "out-tiny", onto=onto)  # what libraries take
before = peak()
from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.merging.preparing import prepare_merge
import torch
weights = prepare_merge(
    base / "large", *(adapter / "large" / name for name in ADAPTER_FILES), onto=onto, device=torch.device("cpu")
).weights
assert sum(sum(map(len, make())) for _, make in weights.files()) > weights.bytes
print(peak() - before, weights.bytes)
"""


def peak_of_a_merge(tmp_path, sizes_of, adapter_of, *, onto):
    """Above what libraries take, and the merged files' bytes."""
    for name in ("tiny", "large"):
        torch.manual_seed(0)
        base = tmp_path / "base" / name
        AutoModelForCausalLM.from_config(sizes_of(name), dtype=torch.bfloat16).save_pretrained(base)
        save_adapter(adapted(base, adapter_of(), dtype=torch.bfloat16), tmp_path / "adapter" / name)
    folders = [str(ROOT), str(Path(__file__).parent), str(tmp_path / "base"), str(tmp_path / "adapter")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *folders, onto, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split()[-2:])


def test_the_memory_of_a_merge_is_that_of_its_largest_tensor(tmp_path):
    """One file whose largest tensor is a tenth of it: two of it in its own dtype, a block in fp32, and its adapter."""

    def sizes_of(name):
        config = config_of("llama")
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 64, 128
        if name == "large":
            config.hidden_size, config.intermediate_size = 1024, 16384
        config.head_dim = config.hidden_size // 4
        return config

    peak, of = peak_of_a_merge(tmp_path, sizes_of, lora, onto="weights")

    largest = 1024 * 16384 * 2
    assert of > 6 * largest
    assert peak < 5 * largest, f"{peak / largest:.1f} times the largest tensor"


@pytest.mark.parametrize("onto", ["weights", "quantised"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_the_memory_of_a_merge_of_experts_is_not_that_of_all_of_them(family, onto, tmp_path):
    """Of files with all of a layer's in one tensor, that tensor and little else; of files with each, a few of these."""
    experts, hidden, inner = 32, 512, 1024

    def sizes_of(name):
        many = name == "large"
        config = family_config(family, layers=2)
        config.hidden_size, config.head_dim = (hidden, 128) if many else (64, 16)
        config.intermediate_size = config.moe_intermediate_size = inner if many else 64
        config.num_experts = config.num_local_experts = experts if many else 4
        return config

    def adapter_of():
        return lora(["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])

    peak, of = peak_of_a_merge(tmp_path, sizes_of, adapter_of, onto=onto)

    stack, factors = experts * hidden * 2 * inner * 2, experts * 4 * (hidden + 2 * inner) * 4
    assert of > 2 * 1.4 * stack
    most = 1.6 * stack if family == "gpt_oss" else 1.0 * stack
    assert peak < most + 4 * factors + 2**25, f"{peak / stack:.2f} times the experts of a layer"
