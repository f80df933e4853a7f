"""The 4-bit base, its tokenizer, and the LoRA adapter on it. Owner of bitsandbytes."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from job.core.errors import DataError, UsageError
from job.core.memory import ModelShape
from job.core.recipe import LoraSection, TrainSection
from job.tune.attention import PER_DOCUMENT, register
from job.tune.attention_choice import AttentionChoice, choose_attention
from job.tune.device import device_name
from job.tune.encode import MicroBatch
from job.tune.layers import Layers
from job.tune.linears import OneOpLinears
from job.tune.loss import Head, head_of, softcap_and_scale, summed_loss, token_losses, token_scores
from job.tune.padding import decoder_inputs
from job.tune.weights import Files, sharded, stored_tensors, tensors_bytes

CONFIG = "config.json"
COMPUTE_DTYPE = torch.bfloat16
"""What the base computes in: fp16 overflows in about one of five 7B runs (QLoRA's own README)."""
_BLOCK = 64
"""Weights that share a scale: bitsandbytes' own choice for a layer, which transformers has no word for."""


def read_config(folder: Path) -> Any:
    """The base model's config.

    Raises:
        UsageError: it needs code of its own, or transformers does not know it as a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        msg = f"{folder}/config.json: not a model that transformers knows without running code from it ({error})"
        raise UsageError(msg) from error
    return config.get_text_config()


def shape_of(config: Any) -> ModelShape:
    """Sizes of a decoder from its config.

    Raises:
        UsageError: the config lacks a size, as those of decoders unlike Llama do.
    """
    try:
        hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        intermediate, positions = config.intermediate_size, config.max_position_embeddings
    except AttributeError as error:
        msg = f"model.base: {config.model_type} is not like Llama: its config has no {error.name}; choose another base"
        raise UsageError(msg) from error
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    softcap, scale = softcap_and_scale(config)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        positions=positions,
        heads=heads,
        key_heads=key_heads,
        head_width=width,
        tied=config.tie_word_embeddings,
        logits="capped" if softcap is not None else "plain" if scale == 1 else "scaled",
    )


def load_tokenizer(folder: Path) -> Any:
    """The base model's tokenizer.

    Raises:
        UsageError: there is none, or it needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        msg = (
            f"{folder}: no usable tokenizer ({str(error).strip()}); a base model needs its tokenizer.json: load the "
            "tokenizer once where its own library (sentencepiece, tiktoken) is installed, and save_pretrained it there"
        )
        raise UsageError(msg) from error


def load_base(folder: Path, *, device: torch.device, dtype: torch.dtype = COMPUTE_DTYPE) -> Any:
    """The base in 4 bits (NF4, double quantisation), frozen; embeddings, norms and head in `dtype`.

    Tensor by tensor: from the file to the device, and there into 4 bits, so that the host's memory never holds more
    than one. A folder whose weights are in 4 bits already (see `quantised_files`) gives the same base to the bit.

    Frozen by hand: peft's prepare_model_for_kbit_training would make norms, embeddings and head fp32, which is slower
    and larger, and turn on checkpointing.

    Raises:
        DataError: the weights cannot be read.
    """
    register()
    if device.type == "cuda":
        # The adapter multiplies in fp32: with TF32 a step on an H200 is six times faster. Its inputs come from bf16,
        # which TF32 holds exactly; sums stay in fp32.
        torch.set_float32_matmul_precision("high")
    config, quantised = AutoConfig.from_pretrained(folder, trust_remote_code=False), _quantisation(dtype)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = config if isinstance(config, kind.config_class) else config.get_text_config()
    done = getattr(config, "quantization_config", None) == quantised.to_dict()
    try:
        model = kind.from_pretrained(
            None,
            config=config,
            state_dict=stored_tensors(folder, device),
            quantization_config=None if done else quantised,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="eager",
            local_files_only=True,
        )
    except SafetensorError as error:
        msg = f"{folder}: a weights file is damaged ({error}); fetch the base model again"
        raise DataError(msg) from error
    model.requires_grad_(False)  # noqa: FBT003 - torch's signature
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 eval mode would repack the weights in place and refuse some shapes.
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    # `generate` takes what we leave open from here: a base's own sampling rules or repetition penalty.
    model.generation_config = GenerationConfig()
    return model


def quantised_files(base: Any, folder: Path, *, dtype: torch.dtype = COMPUTE_DTYPE) -> Files:
    """A base that `load_base` has just loaded, as files that it reads again without quantising.

    Args:
        base: with nothing added to it yet.
        folder: where it was loaded from.
        dtype: what it was loaded with.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    yield CONFIG, json.dumps(config | {"quantization_config": _quantisation(dtype).to_dict()}, indent=2).encode
    yield from sharded(_tensors(base))


def quantised_bytes(base: Any) -> int:
    """What those files hold."""
    return tensors_bytes(_tensors(base))


def quantised_form(device: torch.device) -> dict[str, str]:
    """All that decides what a base becomes in 4 bits, to the bit: how it is packed, on what, and by which libraries.

    The scales of double quantisation are taken from a mean, which each kind of device sums in its own order.
    """
    versions = {name: importlib.metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")}
    return {
        **{name: str(value) for name, value in _quantisation(COMPUTE_DTYPE).to_dict().items()},
        "block_size": str(_BLOCK),
        "device": device_name(device),
        "vectors": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        **{name: ".".join(version.split(".")[:2]) for name, version in versions.items()},
    }


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a folder are in fewer bits already, as its config says."""
    return getattr(read_config(folder), "quantization_config", None) is not None


def _tensors(base: Any) -> dict[str, Tensor]:
    """Packed weights with what they are unpacked by, and all that is not in 4 bits; a tied head is not there twice."""
    once = {name for name, _ in base.named_parameters()}
    twice = {name for name, _ in base.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in base.state_dict().items() if name not in twice}


def _quantisation(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def four_bit(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Put a weight into 4 bits as the base's layers are: rows [M, K] -> `rows @ weight.T` [M, N].

    Args:
        weight: [N, K] in the compute dtype, on the device that computes; K in whole blocks of 64.
    """
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")

    @torch.no_grad()
    def product(rows: Tensor) -> Tensor:
        result: Tensor = bnb.matmul_4bit(rows, packed, quant_state=state)
        return result

    return product


def attach_lora(base: Any, lora: LoraSection, *, source: str, revision: str | None, seed: int) -> PeftModel:
    """A fresh adapter in fp32 on the base, its first values set by the seed.

    Args:
        base: from `load_base`.
        lora: the recipe's section.
        source: the base's name in the recipe; it is written into the adapter, a folder of this machine is not.
        revision: the base's commit, where it has one.
        seed: of the first values.

    Raises:
        UsageError: a target is no linear module of this model, or is a tied head.
    """
    targets = _check_targets(base, lora)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    model = get_peft_model(base, config)
    config.base_model_name_or_path = source
    for parameter in trainable(model):
        parameter.data = parameter.data.float()  # master weights; peft ignores autocast_adapter_dtype on a 4-bit base
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_counts(model: "PackedModel") -> tuple[int, int]:
    """Trainable and total parameters; those in 4 bits count as what they stand for."""
    counts: tuple[int, int] = model.model.get_nb_trainable_parameters()
    return counts


def refuse_targets(config: Any, lora: LoraSection) -> int:
    """Look at the recipe's targets by the base's config alone: no weight is read.

    Returns:
        Parameters of the adapter.

    Raises:
        UsageError: it is no causal language model; a target is no linear module of it, or is a tied head.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UsageError(f"model.base: {config.model_type} is no causal language model; choose another base") from error
    targets, head = _check_targets(model, lora), model.get_output_embeddings()
    adapted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is not head if isinstance(targets, str) else name.rpartition(".")[2] in targets)
    ]
    return sum(lora.r * (module.in_features + module.out_features) for module in adapted)


def _check_targets(base: Any, lora: LoraSection) -> str | list[str]:
    if isinstance(lora.targets, str):
        return lora.targets
    head = base.get_output_embeddings()
    linear = {name.rpartition(".")[2]: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in lora.targets if target not in linear]
    if unknown:
        msg = (
            f"lora.targets: {', '.join(unknown)}: no linear module of {type(base).__name__} has this name; "
            f"it has {', '.join(sorted(linear))}"
        )
        raise UsageError(msg)
    tied = base.config.tie_word_embeddings
    if tied and any(linear[target] is head for target in lora.targets):
        msg = (
            "lora.targets: lm_head shares its weights with the input embeddings in this model (tied), so an adapter "
            "on it could not be merged or served; leave lm_head out of the list"
        )
        raise UsageError(msg)
    return list(lora.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentScores:
    """Held-out result of the documents of one micro-batch, on the host."""

    nll: list[float]
    correct: int


class PackedModel(nn.Module):
    """The adapted model as the training loop sees it: a micro-batch in, the loss of each target out."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self._causal_lm().set_attn_implementation(PER_DOCUMENT)
        self.linears = OneOpLinears(model)
        self.layers = Layers(self._causal_lm())

    @cached_property
    def attention(self) -> AttentionChoice:
        """Whose kernels attention is by; they are tried when it is first asked for."""
        return choose_attention(self._causal_lm().config, next(self.parameters()).device)

    def _causal_lm(self) -> Any:
        return self.model.get_base_model()

    @property
    def head(self) -> Head:
        """Hidden states -> logits."""
        return head_of(self._causal_lm())

    def hidden(self, batch: MicroBatch, *, padded_to: int | None = None) -> Tensor:
        """Last hidden states at the places whose next token is a target: [N, hidden]."""
        causal_lm = self._causal_lm()
        self.linears.draw_masks()
        decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        inputs = decoder_inputs(batch, tokens=padded_to, in_blocks=self.attention.own)
        states: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return states[0].index_select(0, batch.target_places)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Loss of each target, in nats: [N] fp32."""
        return token_losses(self.hidden(batch), batch.target_ids, self.head)

    def summed_loss(self, batch: MicroBatch, *, share: float, padded_to: int | None = None) -> tuple[Tensor, Tensor]:
        """The sum of all losses times a share, for its gradients; and the loss of each target in nats, [N] fp32."""
        return summed_loss(self.hidden(batch, padded_to=padded_to), batch.target_ids, self.head, share=share)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> DocumentScores:
        """Summed loss of each document and the number of targets that were the first choice."""
        losses, hits = token_scores(self.hidden(batch), batch.target_ids, self.head)
        nll = [float(part.double().sum()) for part in torch.split(losses.cpu(), list(batch.target_counts))]
        return DocumentScores(nll=nll, correct=int(hits.sum()))

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """The model with transformers' own attention, PEFT's own layers and a cache, for `generate`."""
        causal_lm = self._causal_lm()
        capped = getattr(causal_lm.config, "attn_logit_softcapping", None) is not None
        was_training = self.training
        causal_lm.set_attn_implementation("eager" if capped else "sdpa")
        causal_lm.config.use_cache = True
        self.eval()
        try:
            with self.linears.as_peft_has_them():
                yield self.model
        finally:
            causal_lm.config.use_cache = False
            causal_lm.set_attn_implementation(PER_DOCUMENT)
            self.train(was_training)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda *args, **kwargs: torch.optim.AdamW(*args, fused=True, **kwargs),
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "paged_lion_8bit": bnb.optim.PagedLion8bit,
    "sgd": torch.optim.SGD,
}


def make_optimizer(parameters: Sequence[nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    make = _OPTIMIZERS[train.optimizer]
    return make(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
