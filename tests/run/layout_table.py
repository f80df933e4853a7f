"""The layouts in which a base can come, each written from one tiny model, and what becomes of it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from layouts import bnb4_base, changed, config_with, in_fp8, one, prefixed, spoilt, tensors_of, without
from safetensors.torch import save_file
from tiny_mxfp4 import write_mxfp4
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from job.core.data.vocabulary import refuse_beyond
from job.core.errors import JobError
from job.edge.base import fetching
from job.edge.store.objects import StoreSettings
from job.tune.model.base import load_base
from job.tune.model.four_bit import form_of
from job.tune.model.promises import hold_to_promises

ROWS = 128
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def write_plain(folder: Path, *, tied: bool = False) -> Path:
    """The model as `save_pretrained` writes it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=ROWS, num_key_value_heads=2, tie_word_embeddings=tied, **_SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _dtype(dtype):
    return lambda source, folder: changed(
        source, folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}
    )


def _change(change, *, sharded=False):
    return lambda source, folder: changed(source, folder, change, sharded=sharded)


def _with(**values):
    return lambda source, folder: config_with(Path(shutil.copytree(source, folder)), **values)


def _method(**section):
    return _with(quantization_config=section)


def _bnb(**options):
    return lambda source, folder: bnb4_base(source, folder, **options)


def _bnb_8_bit(source, folder):
    form = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=form, device_map={"": "cpu"})
    model.save_pretrained(folder)


def _gpt_oss(_source, folder):
    write_mxfp4(folder)


def _gpt_oss_without_scales(_source, folder):
    write_mxfp4(folder.parent / "whole")
    changed(folder.parent / "whole", folder, without("layers.1.mlp.experts.down_proj_scales"))
    shutil.rmtree(folder.parent / "whole")


def _tied(source, folder):
    write_plain(folder, tied=True)


def _tied_with_head(source, folder):
    write_plain(folder, tied=True)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _without_shard(source, folder):
    changed(source, folder, lambda tensors: tensors, sharded=True)
    (folder / "model-1.safetensors").unlink()


def _index_lost(source, folder):
    changed(source, folder, lambda tensors: tensors, sharded=True)
    (folder / "model.safetensors.index.json").unlink()


def _pickle(source, folder):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors_of(source), folder / "pytorch_model.bin")


def _gguf(source, folder):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))


def _cut(source, folder):
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _rows(tensors):
    return {name: tensor[: ROWS - 8] if len(tensor) == ROWS else tensor for name, tensor in tensors.items()}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
LAYOUTS: Mapping[str, tuple[int, Callable[[Path, Path], object]]] = {
    # what it is: the exit code, and what writes it
    "one file in bf16": (0, shutil.copytree),
    "files and an index": (0, _change(lambda tensors: tensors, sharded=True)),
    "fp16": (0, _dtype(torch.float16)),
    "fp32": (0, _dtype(torch.float32)),
    "names without `model.`": (0, _change(lambda t: {n.removeprefix("model."): v for n, v in t.items()})),
    "rotations of old versions (`rotary_emb.inv_freq`)": (
        0,
        _change(lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}),
    ),
    "tied head, not in the files": (0, _tied),
    "tied head, in the files as well": (0, _tied_with_head),
    "bitsandbytes: NF4, double quantisation": (0, _bnb(**_NF4, bnb_4bit_use_double_quant=True)),
    "bitsandbytes: NF4, single quantisation": (0, _bnb(**_NF4)),
    "bitsandbytes: NF4 for fp16": (0, _bnb(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)),
    "bitsandbytes: FP4 (its defaults)": (0, _bnb()),
    "bitsandbytes: NF4, layers left in 16 bits": (
        0,
        _bnb(**_NF4, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"]),
    ),
    "a section of 4 bits left over, weights in bf16": (0, _method(quant_method="bitsandbytes", load_in_4bit=True)),
    "a layer's tensors missing": (65, _change(without("layers.1.mlp"))),
    "the embedding missing": (65, _change(without("embed_tokens"))),
    "the head missing, not tied": (65, _change(without("lm_head"))),
    "a prefix of torch.compile (`_orig_mod.`)": (65, _change(prefixed("_orig_mod."))),
    "a prefix of DDP (`module.`)": (65, _change(prefixed("module."))),
    "a prefix of PEFT (`base_model.model.`)": (65, _change(prefixed("base_model.model."))),
    "tensors that the model has no place for": (65, _change(lambda t: t | {"model.extra.weight": torch.ones(4, 4)})),
    "fewer rows than the config's vocabulary": (65, _change(_rows)),
    "more layers in the config than in the files": (65, _with(num_hidden_layers=3)),
    "fewer layers in the config than in the files": (65, _with(num_hidden_layers=1)),
    "NaN in a weight": (65, _change(one("model.layers.0.mlp.up_proj.weight", spoilt(float("nan"))))),
    "infinity in a norm": (65, _change(one("model.norm.weight", spoilt(float("inf"))))),
    "fp8 with scales, the config silent": (65, _change(in_fp8(128))),
    "a file that was cut off": (65, _cut),
    "a shard missing": (66, _without_shard),
    "the index missing": (66, _index_lost),
    "pickles only (`pytorch_model.bin`)": (64, _pickle),
    "GGUF": (64, _gguf),
    "GPTQ": (64, _method(quant_method="gptq", bits=4, group_size=128)),
    "AWQ": (64, _method(quant_method="awq", bits=4, group_size=64, version="gemm")),
    "FP8, a scale a block": (64, _method(**_FP8, weight_block_size=[128, 128])),
    "FP8, a scale a tensor": (64, _method(**_FP8)),
    "compressed-tensors": (64, _method(quant_method="compressed-tensors", config_groups={"group_0": _GROUP})),
    "MXFP4, gpt-oss as it is published": (0, _gpt_oss),
    "MXFP4, gpt-oss with a tensor's scales missing": (65, _gpt_oss_without_scales),
    "MXFP4 of another family": (64, _method(quant_method="mxfp4", modules_to_not_convert=["lm_head"])),
    "NVIDIA ModelOpt": (64, _method(quant_method="modelopt", quant_algo="NVFP4")),
    "MLX": (64, _with(quantization={"bits": 4, "group_size": 64})),
    "torchao": (64, _method(quant_method="torchao", quant_type="int4_weight_only")),
    "bitsandbytes in 8 bits": (64, _bnb_8_bit),
}


def outcome_of(name: str, scratch: Path) -> tuple[int, str]:
    """The exit code, and what is said: by `check` for what it can see, else when the weights are loaded."""
    source, folder = scratch / "plain", scratch / "BASE"
    if not source.exists():
        write_plain(source)
    shutil.rmtree(folder, ignore_errors=True)
    LAYOUTS[name][1](source, folder)
    options = {"models_folder": scratch / "models", "settings": StoreSettings(), "should_stop": lambda: False}
    try:
        identity = fetching.identify(str(folder), None, settings=options["settings"])
        fetching.fetch(identity, weights=False, **options)
        hold_to_promises(folder, fetching.read_headers(identity, **options), source=str(folder))
        fetching.fetch(identity, **options)
        model = load_base(folder, device=torch.device("cpu"), dtype=torch.float32)
    except JobError as error:
        return error.code, str(error).replace(str(folder), "BASE")
    return 0, form_of(model)


def token_beyond() -> tuple[int, str]:
    """What the data makes of a tokenizer that knows more than the model."""
    try:
        refuse_beyond(ROWS, "<|new|>", rows=ROWS, where="train.jsonl:1")
    except JobError as error:
        return error.code, str(error)
    raise AssertionError("it was not refused")


def same_weights(name: str, scratch: Path) -> bool:
    """Whether what was loaded of a layout is the plain model's, to the bit."""
    outcome_of(name, scratch)
    mine, plain = (
        load_base(scratch / each, device=torch.device("cpu"), dtype=torch.bfloat16).state_dict()
        for each in ("BASE", "plain")
    )
    return mine.keys() == plain.keys() and all(torch.equal(value, plain[key]) for key, value in mine.items())
