"""The families that the hand-written step knows: their tensors, taken out of transformers' and PEFT's modules."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from job.core.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.attention import WIDEST_HEAD, Attention
from job.kernels.decoder import Decoder, DecoderLayer
from job.kernels.weights import Adapter, Dequantise, Group, Linear, Quantised

_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


def reason_against(model: PeftModel) -> str | None:
    """Why the hand-written step does not fit this model; None: it does."""
    return next(_reasons(model.get_base_model()), None)


def is_supported(config: Any) -> bool:
    """Whether the hand-written step fits models with this config, as far as it shows without their weights."""
    return next(_reasons_of_config(config), None) is None


def _reasons_of_config(config: Any) -> Iterator[str]:
    if config.model_type not in _FAMILY:
        yield f"{config.model_type} is not of the Llama family ({', '.join(_FAMILY)})"
        return
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, not silu"
    if config.attention_dropout:
        yield f"it has attention dropout ({config.attention_dropout})"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            yield f"it has a bias in its projections ({name})"
    width = _head_width(config)
    if width % 8 or width > WIDEST_HEAD:
        yield f"its heads are {width} wide"


def _reasons(causal_lm: Any) -> Iterator[str]:
    against = next(_reasons_of_config(causal_lm.config), None)
    if against is not None:
        yield against
        return
    for path, module in causal_lm.named_modules():
        place = path.rpartition(".")[2]
        if place.endswith("norm") and not bool(module.weight.ne(0).all()):
            yield f"{path} has a weight of zero, and its gradient is computed by dividing by it"
        if place in {"o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"} and _base_of(module).bias is not None:
            yield f"{path} has a bias"
        against_form = _reason_against_form(_base_of(module))
        if against_form is not None:
            yield f"{path} {against_form}"


def decoder_of(model: PeftModel, *, dequantise: Dequantise) -> Decoder:
    """The model's decoder as tensors; `reason_against` has found nothing."""
    causal_lm: Any = model.get_base_model()
    config, trunk = causal_lm.config, causal_lm.model

    def group(*modules: nn.Module) -> Group:
        return Group([linear_of(module) for module in modules], dequantise)

    def layer(each: Any) -> DecoderLayer:
        attention, mlp = each.self_attn, each.mlp
        return DecoderLayer(
            qkv=group(attention.q_proj, attention.k_proj, attention.v_proj),
            out=group(attention.o_proj),
            gate_up=group(mlp.gate_proj, mlp.up_proj),
            down=group(mlp.down_proj),
            attention_norm=each.input_layernorm.weight,
            mlp_norm=each.post_attention_layernorm.weight,
            query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
            attention=Attention(scale=attention.scaling, window=_window(attention, config)),
        )

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.empty(0, device=positions.device)  # only its dtype counts: cos and sin come in fp32
        cos, sin = trunk.rotary_emb(exact, positions[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return Decoder(
        embeddings=trunk.embed_tokens.weight,
        layers=[layer(each) for each in trunk.layers],
        final_norm=trunk.norm.weight,
        head=group(causal_lm.lm_head),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_width=_head_width(config),
        epsilon=config.rms_norm_eps,
        rotation=rotation,
    )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(attention: Any, config: Any) -> int | None:
    """Mistral has one window for all layers, Qwen one in some of them."""
    if type(attention).__name__.startswith("Mistral"):
        return getattr(config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def is_in_whole_blocks(module: Any) -> bool:
    """Whether the kernels can dequantise a layer's weight: in whole blocks of the usual sizes, or not quantised."""
    return _reason_against_form(module) is None


def _reason_against_form(module: Any) -> str | None:
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if weight is None or state is None:
        return None
    if state.quant_type != "nf4":
        return f"is in {state.quant_type.upper()}, not NF4"
    if not state.nested:
        return "has scales that are not quantised themselves"
    if (state.blocksize, state.state2.blocksize) != (NF4_BLOCK, NF4_OUTER_BLOCK) or weight.dtype != torch.uint8:
        return "is packed in another way"
    if state.shape.numel() % NF4_BLOCK:
        return f"has {state.shape.numel()} elements, no whole blocks of {NF4_BLOCK}"
    return None


def _base_of(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)


def linear_of(module: Any) -> Linear:
    """A linear layer as the kernels take it, with its adapter where it has one."""
    base = _base_of(module)
    adapter = None
    if hasattr(module, "lora_A"):
        (name,) = module.lora_A
        adapter = Adapter(
            a=module.lora_A[name].weight,
            b=module.lora_B[name].weight,
            scaling=float(module.scaling[name]),
            dropout=float(getattr(module.lora_dropout[name], "p", 0.0)),
        )
    state = getattr(base.weight, "quant_state", None)
    weight = base.weight.detach() if state is None else _quantised(base.weight, state)
    return Linear(weight=weight, bias=None if base.bias is None else base.bias.detach(), adapter=adapter)


def _quantised(weight: Tensor, state: Any) -> Quantised:
    return Quantised(
        packed=weight.detach().reshape(-1),
        scales=state.absmax,
        scales_code=state.state2.code.float(),
        outer_scales=state.state2.absmax.float(),
        offset=state.offset.reshape(1).float(),
        code=state.code.float(),
        height=int(state.shape[0]),
        width=int(state.shape[1]),
    )
