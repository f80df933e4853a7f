"""Lets Unsloth see torch 2.11's variable-length attention, which it otherwise takes from torch 2.12 on only."""

import torch
from torch.nn.attention import varlen


def give_varlen():
    """Wrap torch's function so that its signature has `enable_gqa`, which Unsloth looks for beside `window_size`.

    The kernel under it has grouped heads in torch 2.11 too: it sees them by the number of key heads.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12):
        return
    plain = varlen.varlen_attn

    def varlen_attn(*tensors_and_sizes, window_size=(-1, -1), enable_gqa=False, **others):  # noqa: ARG001 - see above
        return plain(*tensors_and_sizes, window_size=window_size, **others)

    varlen.varlen_attn = varlen_attn
