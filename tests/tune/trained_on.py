"""What training makes of a base, written out as a plain one: numbers that went into 4 bits and back."""

import bitsandbytes as bnb
import torch
from tiny import CPU
from transformers import AutoModelForCausalLM

from job.tune.device.compute_dtype import compute_dtype
from job.tune.model.base import load_base
from job.tune.model.experts import dequantised_experts, in_four_bits


def trained_on(base, folder, *, decoded=None):
    """The base that training loads, with what its 4 bits stand for written out; and how many are experts'.

    `decoded`: the same base without MXFP4, where it has that.
    """
    quantised, dtype = load_base(base, device=CPU, dtype=compute_dtype(CPU)), compute_dtype(CPU)
    plain = AutoModelForCausalLM.from_pretrained(decoded or base, dtype=torch.float32, device_map={"": "cpu"})
    held = 0
    for path, module in quantised.named_modules():
        theirs = plain.get_submodule(path)
        for name in in_four_bits(module):
            theirs.get_parameter(name).data = dequantised_experts(module, name, dtype=dtype).float()
            held += 1
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            theirs.weight = torch.nn.Parameter(values.float(), requires_grad=False)
    plain.save_pretrained(folder)
    return held
