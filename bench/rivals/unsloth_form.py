"""How Unsloth's uploads hold a mixture in 4 bits, with the names that its loader looks for (unsloth_zoo 2026.10.9).

Stacks of experts are quantised whole; of gpt-oss each expert is a linear layer of its own. Ours quantises each expert
of a stack by itself, so that neither reads the other's files.
"""

import bitsandbytes as bnb

_LINEAR = {"gate_up_proj": "gate_up_projs", "down_proj": "down_projs"}
"""gpt-oss's stacks, and the lists of linear layers that stand for them."""
_EXPERTS, _ROUTER = ".mlp.experts", ".mlp.router."


def packed(name, matrix):
    """One tensor in 4 bits, whatever its shape: its parts under bitsandbytes' names."""
    values, state = bnb.functional.quantize_4bit(matrix.contiguous(), compress_statistics=True, quant_type="nf4")
    return {name: values, **{f"{name}.{part}": each for part, each in state.as_dict(packed=True).items()}}


def experts(name, stack, *, one_by_one):
    """A stack [experts, out, in], whole or as linear layers."""
    if not one_by_one:
        return packed(name, stack)
    path, _, kind = name.rpartition(".")
    names = (f"{path}.{_LINEAR[kind]}.{number}.weight" for number in range(len(stack)))
    return {part: each for own, matrix in zip(names, stack, strict=True) for part, each in packed(own, matrix).items()}


def beside(name, tensor):
    """Anything else: gpt-oss's biases of experts apart, and its router below a linear layer."""
    path, _, kind = name.rpartition(".")
    if path.endswith(_EXPERTS) and kind.endswith("_bias"):
        found = _LINEAR[kind.removesuffix("_bias")]
        return {f"{path}.{found}.{number}.bias": row.clone() for number, row in enumerate(tensor)}
    return {name.replace(_ROUTER, f"{_ROUTER}linear."): tensor}


def text_alone(config):
    """Of a model of more than text its decoder's config: as a whole it would want a processor for pictures."""
    text = config.get_text_config()
    text.dtype = config.dtype
    return text
