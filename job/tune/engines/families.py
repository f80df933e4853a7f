"""How each family of decoders trains: by the hand-written step, in packs, or one document a row; or why it does not."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from job.core.data.packing import Rows
from job.core.errors import UsageError
from job.core.plan.memory import GIB, NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.attention import WIDEST_HEAD, Attention
from job.kernels.decoder import HERE, Arrivals, Decoder, DecoderLayer
from job.kernels.triton_recurrent import computes_by_fla
from job.kernels.weights import Adapter, Dequantise, Group, Linear
from job.tune.model.adapter import chosen_by_all_linear
from job.tune.model.config import ROTATIONS_BY_LENGTH, empty_model
from job.tune.model.four_bit import quantised_of
from job.tune.model.mixtures import experts_in, experts_in_four_bits, has_noise, has_other_experts
from job.tune.model.recurrent import read_past_modules
from job.tune.model.stored.mxfp4 import is_published_in_mxfp4
from job.tune.model.wrappers import Wrapper

Training = Literal["hand-written", "packed"]
FAMILIES: Mapping[str, Training] = {
    "llama": "hand-written",
    "mistral": "hand-written",
    "qwen2": "hand-written",
    "qwen3": "hand-written",
    **dict.fromkeys(
        (
            *("apertus", "arcee", "bitnet", "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma"),
            *("gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
            *("granitemoehybrid", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "jais2", "ministral"),
            *("ministral3", "nanochat", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "seed_oss"),
            *("smollm3", "starcoder2", "vaultgemma"),
            *("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"),
        ),
        "packed",
    ),
}
"""Families whose layers look at other tokens by attention alone, and take it from where ours is registered: documents
in one row do not see each other, to the bit. All others train one document a row, but for those of `_KERNELS`. Adding
one is an entry here and one in `tests/tune/tiny_families.py`, whose tests hold it against plain PEFT."""
_FAST = tuple(name for name, training in FAMILIES.items() if training == "hand-written")
_MOST_EXPERTS_BYTES = 8 * GIB
"""Of experts that stay in 16 bits. With more, most of the base would not be in 4 bits, and fits few GPUs."""
_ACROSS = re.compile(r"Conv1d|Mamba|DeltaNet|LightningAttention|Recurrent|ShortConv|Rglru|Retention|xLSTM|Rwkv")
"""Modules that hand something from token to token, and so from document to document, beside attention."""


_KERNELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), ("fla",)),
    **dict.fromkeys(("granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "zamba2"), ("causal_conv1d", "mamba_ssm")),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), ("fla",)),
}
"""Families whose recurrent layers keep documents of a row apart by their borders, where these packages compute them.
transformers' own code, which runs without them, cannot, and raises where it is asked to."""


def is_packed(causal_lm: Any) -> bool:
    """Whether a row of this model may hold several documents.

    Of a mixture, where its experts are in 4 bits, and so multiplied by us: transformers' own products give a token
    other last bits when other tokens go to the same expert. Whether ours do not, the self-test finds out, as it does
    where documents stay apart by their borders.
    """
    known = bool(kernels_by_borders(causal_lm)) if layers_across(causal_lm) else causal_lm.config.model_type in FAMILIES
    return known and experts_in(causal_lm) == experts_in_four_bits(causal_lm)


def attends_by_documents(causal_lm: Any) -> bool:
    """Whether this model's attention layers, beside its others, take attention from where ours is registered."""
    return causal_lm.config.model_type in _KERNELS


def kernels_by_borders(causal_lm: Any) -> tuple[str, ...]:
    """Packages whose kernels take the borders of documents to this model's recurrent layers; none: they do not."""
    packages = _KERNELS.get(causal_lm.config.model_type, ()) if layers_across(causal_lm) else ()
    return packages if all(map(_is_installed, packages)) else ()


def _is_installed(package: str) -> bool:
    return computes_by_fla() if package == "fla" else find_spec(package) is not None


def rows_of(causal_lm: Any) -> Rows:
    """How documents stand in a micro-batch of this model, before anything is tried.

    One at a time where a rotation depends on a document's length, or experts are multiplied by transformers' products:
    there rows that are padded together would change each other.
    """
    if is_packed(causal_lm):
        return "packed"
    ropes = [getattr(causal_lm.config, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    by_length = any(rope.get("rope_type") in ROTATIONS_BY_LENGTH for rope in ropes)
    return "alone" if by_length or experts_in(causal_lm) != experts_in_four_bits(causal_lm) else "padded"


def layers_across(causal_lm: Any) -> list[int]:
    """Numbers of the layers that look at other tokens by other means than attention."""
    found = {
        int(number.group(1))
        for name, module in causal_lm.named_modules()
        if _ACROSS.search(type(module).__name__) and (number := re.search(r"\.(\d+)\.", f".{name}."))
    }
    return sorted(found)


def refuse_family(config: Any) -> None:
    """Refuse, by the config alone, a base that this job does not train.

    Raises:
        UsageError: most of it are experts that cannot be put into 4 bits, and too large; the message says how large.
    """
    against = _reason_against_experts(empty_model(config))
    if against is not None:
        raise UsageError(f"model.base: {against}")


def _reason_against_experts(model: Any) -> str | None:
    if has_other_experts(model):
        return (
            f"{model.config.model_type} is a mixture whose experts transformers does not keep in stacks of matrices: "
            "neither could they be put into 4 bits, nor its router be found; choose another mixture, or a dense base"
        )
    left = 2 * (experts_in(model) - experts_in_four_bits(model))
    if left <= _MOST_EXPERTS_BYTES:
        return None
    return (
        f"{model.config.model_type} is a mixture of experts whose code does not let them be put into 4 bits: "
        f"{left / 1e9:.0f} GB of its {2 * _parameters(model) / 1e9:.0f} GB would stay in 16 bits, and at most "
        f"{_MOST_EXPERTS_BYTES / 1e9:.1f} GB may; choose a smaller one, or a dense base"
    )


def words_on(config: Any, wrapper: Wrapper | None = None) -> list[str]:
    """What a person should know of how this base trains, or that it does not.

    Args:
        config: as it is trained.
        wrapper: the multimodal model that it is the decoder of.
    """
    model = empty_model(config)
    words, across = [], layers_across(model)
    if wrapper is not None:
        words.append(
            f"{wrapper.architecture} is a model of more than text: its text decoder ({config.model_type}) is trained; "
            f"not loaded, and without an adapter: {wrapper.left_out_words()}"
        )
    against = _reason_against_experts(model)
    if against is not None:
        words.append(f"`run` refuses this base: {against}")
    words.extend(_words_on_experts(model))
    if is_published_in_mxfp4(config):
        words.append(
            f"{config.model_type}: experts are published in MXFP4; each is decoded exactly, and quantised once more, "
            "to NF4"
        )
    chosen = chosen_by_all_linear(model)
    if chosen is not None:
        words.append(f"{config.model_type}: lora.targets all-linear adapts {', '.join(chosen)}")
    if across:
        words.extend(_words_on_recurrence(model, across))
    rows = rows_of(model)
    if rows != "packed":
        words.append(f"{config.model_type} trains {IN_WORDS[rows]}: slower than packed, with the same result")
    return words


IN_WORDS: Mapping[Rows, str] = {
    "packed": "packed",
    "padded": "one document a row, rows of like lengths padded together",
    "alone": "one document a row, a row at a time",
}


def _words_on_recurrence(model: Any, across: list[int]) -> Iterator[str]:
    kind = model.config.model_type
    which = f"layers {_ranges(across)} hand" if len(across) > 1 else f"layer {across[0]} hands"
    yield f"{kind}: {which} something on from token to token beside attention"
    packages = _KERNELS.get(kind, ())
    wanted, there = " and ".join(packages), kernels_by_borders(model)
    if there:
        yield f"{kind}: documents of a row stay apart by the kernels of {wanted}"
    elif wanted:
        are = "are" if len(packages) > 1 else "is"
        yield f"{kind}: without {wanted}, which {are} not installed, transformers' plain code computes these layers"
    if read_past_modules(model):
        yield f"{kind}: without mamba_ssm transformers' code goes through a document token by token, far slower"


def _words_on_experts(model: Any) -> Iterator[str]:
    experts, inside = experts_in(model), experts_in_four_bits(model)
    if not experts:
        return
    left = f"; {2 * (experts - inside) / 1e6:,.1f} MB of them stay in 16 bits" if experts > inside else ""
    yield (
        f"{model.config.model_type} is a mixture of experts: {inside:,} of its {_parameters(model):,} parameters are "
        f"experts in 4 bits, each quantised by itself{left}"
    )
    without = ", and their noise in training is left out" if has_noise(model) else ""
    yield (
        f"{model.config.model_type}: routers stay as they are: they get no adapter, and no load-balancing loss is "
        f"added{without}"
    )


def _ranges(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")  # noqa: PLR2004 - a line


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reason_against(model: PeftModel) -> str | None:
    """Why the hand-written step does not fit this model; None: it does."""
    return next(_reasons(model.get_base_model()), None)


def is_supported(config: Any) -> bool:
    """Whether the hand-written step fits models with this config, as far as it shows without their weights."""
    return next(_reasons_of_config(config), None) is None


def _reasons_of_config(config: Any) -> Iterator[str]:
    if config.model_type not in _FAST:
        yield f"{config.model_type} is not of the Llama family ({', '.join(_FAST)})"
        return
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ROTATIONS_BY_LENGTH:
        yield f"its rotation depends on a document's length ({rope})"
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


def decoder_of(model: PeftModel, *, dequantise: Dequantise, arrivals: Arrivals = HERE) -> Decoder:
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
        arrivals=arrivals,
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
    weight = base.weight.detach() if state is None else quantised_of(base.weight, state)
    return Linear(weight=weight, bias=None if base.bias is None else base.bias.detach(), adapter=adapter)
