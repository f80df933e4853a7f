"""The families of decoders that people tune, each as a tiny random base with what is special about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import LAYERS, VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 7
"""Tokens that a window sees, and of a chunk: fewer than the longest documents have."""
ORIGINAL = 32
"""Positions that a model with a stretched rotation was trained with: one document is longer, the others are not."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, so that attention, caps and windows move the loss
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_HYBRID = ["linear_attention", "full_attention"]
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
_DELTA = {
    "layer_types": _HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def _longrope(width: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * (width // 2),
        "long_factor": [6.0] * (width // 2),
        "original_max_position_embeddings": ORIGINAL,
        "factor": 8.0,
    }


# fmt: off
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # name: transformers' model_type, and what is its own
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, rope llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama, rope yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama, rope dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": ORIGINAL,
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", _WINDOWED),
    "ministral3": (
        "ministral3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", {**_MIXED, "shared_expert_intermediate_size": 64}),
    "qwen2_moe, window": (
        "qwen2_moe",
        {
            **_MIXED,
            "shared_expert_intermediate_size": 64,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3_moe": ("qwen3_moe", _MIXED),
    "qwen3_moe, window": ("qwen3_moe", {**_MIXED, "use_sliding_window": True, "sliding_window": WINDOW}),
    "qwen3_next": ("qwen3_next", {**_MIXED, **_DELTA, "shared_expert_intermediate_size": 64}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_MIXED, **_DELTA, "shared_expert_intermediate_size": 64}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWED}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
        },
    ),
    "gemma3_text": ("gemma3_text", {"query_pre_attn_scalar": 16, "tie_word_embeddings": True, **_WINDOWED}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "tie_word_embeddings": True,
            **_WINDOWED,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 64,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "tie_word_embeddings": True,
            **_WINDOWED,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 64,
            "global_head_dim": 32,
        },
    ),
    "gemma4_text, shared keys": (
        "gemma4_text",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 64,
            "global_head_dim": 32,
        },
    ),
    "gemma4_text, experts": (
        "gemma4_text",
        {
            "tie_word_embeddings": True,
            **_WINDOWED,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, longrope": ("phi3", {"rope_parameters": _longrope(16), "original_max_position_embeddings": ORIGINAL}),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {**_longrope(16), "short_mscale": 1.0, "long_mscale": 1.2},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3, window": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": True, **_WINDOWED}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _WINDOWED),
    "olmo_hybrid": ("olmo_hybrid", _DELTA),
    "olmoe": ("olmoe", _MIXED),
    "granite": (
        "granite",
        {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "granitemoehybrid, dense": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
        },
    ),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {**_LATENT, "num_key_value_heads": 2}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v2, lite": ("deepseek_v2", {**_LATENT, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "llama4_text",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 128,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama4_text, dense": (
        "llama4_text",
        {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 128, "moe_layers": [], "no_rope_layers": [1, 0]},
    ),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, **_WINDOWED}),
    "exaone4": ("exaone4", {**_WINDOWED, "sliding_window_pattern": 2}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}),
    "lfm2_moe": ("lfm2_moe", {**_MIXED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "lfm3": ("lfm3", {}),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "lm_head_multiplier": 0.25,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "nemotron_h, experts": (
        "nemotron_h",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "n_mamba_heads": 8,
            "mamba_d_state": 16,
            "adapter_rank": 64,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "helium": ("helium", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 0},
    ),
    "gpt2": ("gpt2", {"n_inner": 128}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "persimmon": ("persimmon", {}),
    "nemotron": ("nemotron", {}),
    "mamba": ("mamba", {"state_size": 16}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 16}),
    "mamba2": ("mamba2", {"num_heads": 8, "state_size": 16, "n_groups": 1, "head_dim": 16}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "attention_window_size": WINDOW,
            "lru_width": 64,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 3.0,
        },
    ),
    "jamba": ("jamba", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "jamba, dense": ("jamba", {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {"num_experts": 1}),
    "minicpm3": ("minicpm3", {**_LATENT}),
    "dots1": ("dots1", {**_LATENT, "num_key_value_heads": 2}),
    "bitnet": ("bitnet", {}),
    "nanochat": ("nanochat", {}),
    "vaultgemma": ("vaultgemma", {"tie_word_embeddings": True, "attn_logit_softcapping": 2.0, **_WINDOWED}),
    "exaone_moe": (
        "exaone_moe",
        {**_MIXED, **_WINDOWED, "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "cwm": ("cwm", _WINDOWED),
    "minimax": ("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _HYBRID}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "jais2": ("jais2", {}),
    "solar_open": ("solar_open", {**_LATENT, "num_key_value_heads": 2}),
    "afmoe": ("afmoe", {**_MIXED, **_WINDOWED, "num_dense_layers": 1}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    "biogpt": ("biogpt", {}),
    "youtu": ("youtu", _LATENT),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.25}),
    "internlm3": ("internlm3", {}),
}


def config_of(name: str, *, layers: int | None = None) -> Any:
    """A family's own few layers, or more of them by turns."""
    model_type, own = FAMILIES[name]
    sizes = SIZES if model_type != "falcon" else {name: size for name, size in SIZES.items() if name != "head_dim"}
    if layers is None:
        return CONFIG_MAPPING[model_type](**{**sizes, **own})
    by_turns = {key: (each * layers)[:layers] for key, each in own.items() if key in {"layer_types", "no_rope_layers"}}
    return CONFIG_MAPPING[model_type](**{**sizes, **own, **by_turns, "num_hidden_layers": layers})


def write_family(folder: Path, name: str, *, layers: int | None = None) -> Path:
    """Random weights in bf16, with nothing in them that does nothing: no norm of ones, no bias of zeros."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(name, layers=layers), dtype=torch.float32)
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().flatten()[0]), std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
