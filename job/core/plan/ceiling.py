"""What training on a token takes, and what share that is of what a GPU's large products sustain."""

import numpy as np

from job.core.data.lengths import Lengths
from job.core.plan.gpus import Speed
from job.core.plan.memory import AdapterShape, ModelShape


def flops_per_token(shape: ModelShape, adapter: AdapterShape, *, lengths: Lengths, targets: int) -> float:
    """Floating-point operations of a step, a real token; recomputing and padding are no work.

    The base: 2 forward and 2 for the gradient of the input, a weight; no gradient of the weight itself. The adapter: 6.
    Of experts those count that a token goes through.
    Attention: 12 layers width a pair of tokens that see each other (Kaplan et al. 2020, arXiv 2001.08361, section 2.1,
    and one and a half times as much for the backward), as if no layer had a window: of documents longer than one, too
    many. The head: target tokens only.

    Args:
        shape: of the base.
        adapter: of what is trained.
        lengths: of the examples that are trained on.
        targets: tokens the loss is over, in all of them.
    """
    exact = lengths.astype(np.float64)
    tokens = float(exact.sum())
    head = 4 * shape.vocabulary * shape.hidden * targets / tokens
    pairs = float((exact * (exact + 1) / 2).sum()) / tokens
    attention = 12 * shape.layers * shape.heads * shape.head_width * pairs
    return 4 * shape.active_parameters + head + 6 * adapter.active_parameters(shape) + attention


def share_of_ceiling(speed: Speed, *, tokens_per_second: float, flops: float) -> float:
    """Share of what large bf16 products sustain on one GPU.

    Args:
        speed: the GPU's.
        tokens_per_second: real ones, of one GPU.
        flops: operations of one of them.
    """
    return tokens_per_second * flops / speed.sustained_flops
