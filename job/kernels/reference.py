"""The ops in plain torch: what runs where Triton does not, and what its kernels are tested against.

All but `masked_gradient` write into memory that the caller provides. Sums are in fp32; results are rounded to the dtype
of that memory.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from job.core.plan.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.ops import Gate, Masks
from job.kernels.weights import Quantised, QuantisedExperts, exact_product


def dequantise(weight: Quantised, out: Tensor) -> None:
    """NF4 -> values: [N, K]."""
    outer = weight.outer_scales.repeat_interleave(NF4_OUTER_BLOCK)[: weight.scales.numel()]
    scales = weight.scales_code[weight.scales.long()] * outer + weight.offset
    packed = weight.packed.reshape(-1)
    values = weight.code[torch.stack([packed >> 4, packed & 15], dim=1).long()]
    out.copy_((values.reshape(-1, NF4_BLOCK) * scales[:, None]).reshape(weight.height, weight.width))


def dequantise_experts(weights: QuantisedExperts, rows: Tensor, out: Tensor) -> None:
    """NF4 -> values of the experts that are used: [E, N, K]; the others' places are left as they are.

    Args:
        weights: of E experts.
        rows: [E] int32, of each expert; with none it is not used.
        out: [E, N, K].
    """
    for expert, count in enumerate(rows.tolist()):
        if count:
            dequantise(weights[expert], out[expert])


def gate_forward(z: Tensor, gate: Gate, out: Tensor) -> None:
    """What stands between an expert's products: z [S, 2 I] -> out [S, I]."""
    out.copy_(gate(z.float()))


def gate_backward(
    z: Tensor, grad: Tensor, row_weights: Tensor, gate: Gate, d_z: Tensor, out: Tensor, shares: Tensor
) -> None:
    """The gate's result again, and what its gradient makes of what went in.

    Args:
        z: [S, 2 I].
        grad: [S, I], of the result of a row that counts once.
        row_weights: [S], what each row counts.
        gate: the formula.
        d_z: [S, 2 I], each row's gradient by its weight.
        out: [S, I].
        shares: [S] fp32, the result times its gradient: what the row's weight gets.
    """
    gates, ups = (part.float() for part in gate.parts(z))
    passes = gates.new_ones(()), gates.new_ones(())
    if gate.limit is not None:
        passes = gates <= gate.limit, ups.abs() <= gate.limit
        gates, ups = gates.clamp(max=gate.limit), ups.clamp(-gate.limit, gate.limit)
    ups = ups + 1 if gate.one_more else ups
    sigmoid = torch.sigmoid(gate.alpha * gates)
    swish = gates * sigmoid
    result, by_weight = swish * ups, grad.float() * row_weights.float()[:, None]
    out.copy_(result)
    shares.copy_((result * grad.float()).sum(dim=-1))
    d_gate, d_up = gate.parts(d_z)
    d_gate.copy_(by_weight * ups * (sigmoid + gate.alpha * swish * (1 - sigmoid)) * passes[0])
    d_up.copy_(by_weight * swish * passes[1])


def combine_rows(rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """Of each token the sum of its rows, in their order.

    Args:
        rows: [S, N].
        places: [T, k] int64, where a token's rows are.
        weights: [T, k], what each counts; None: once.
        out: [T, N].
    """
    its = rows[places].float()
    out.copy_((its if weights is None else its * weights.float()[..., None]).sum(dim=1))


def sums_by_expert(left: Tensor, right: Tensor, ends: Tensor, out: Tensor) -> None:
    """left^T right over each expert's rows, [S, n] and [S, k] -> [E, n, k] fp32; zero where there are none.

    Args:
        left: rows sorted by expert.
        right: the same.
        ends: [E] int32, where each expert's rows end.
        out: of any values.
    """
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            out[expert] = exact_product(left[start:end], right[start:end])
        else:
            out[expert] = 0


def rms_forward(x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, epsilon: float) -> None:
    """Root mean square norm, as transformers does it: x [T, K] -> out [T, K], rstd [T] fp32.

    Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    """
    exact = x.float()
    torch.rsqrt(exact.pow(2).mean(dim=-1) + epsilon, out=rstd)
    out.copy_((exact * rstd[:, None]).to(out.dtype) * weight)


def rms_backward_add(grad: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, into: Tensor) -> None:
    """Add the gradient of the norm's input: x is not needed, because x * rstd = y / weight.

    With n = x * rstd and g = grad * weight: rstd * (g - n * mean(g * n)).
    """
    normed = y.float() / weight.float()
    scaled = grad.float() * weight.float()
    change = rstd[:, None] * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    into.copy_(into.float() + change)


def rotate_forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, rstd: Tensor | None, epsilon: float
) -> None:
    """Rotary position embedding in place, after a norm of each head where there is one (Qwen 3).

    Su et al. 2021, arXiv 2104.09864, eq. 34, halves instead of pairs.

    Args:
        x: [T, heads, width].
        cos: [T, width / 2] fp32.
        sin: [T, width / 2] fp32.
        weight: [width], of the norm.
        rstd: [T, heads] fp32, written: the norm's inverse root mean squares.
        epsilon: of the norm.
    """
    exact = x.float()
    if weight is not None and rstd is not None:
        rstd.copy_(torch.rsqrt(exact.pow(2).mean(dim=-1) + epsilon))
        exact = (exact * rstd[:, :, None]).to(x.dtype).float() * weight.float()
    first, second = exact.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    x.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))


def rotate_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, rstd: Tensor | None, out: Tensor
) -> None:
    """Gradient of the input of `rotate_forward`, from that of its result.

    Args:
        grad: [T, heads, width].
        x: [T, heads, width], the result of `rotate_forward`.
        cos: [T, width / 2] fp32.
        sin: [T, width / 2] fp32.
        weight: [width], of the norm.
        rstd: [T, heads] fp32, from `rotate_forward`.
        out: [T, heads, width].
    """
    cos, sin = cos[:, None], sin[:, None]

    def unrotated(rotated: Tensor) -> Tensor:
        first, second = rotated.float().chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)

    result = unrotated(grad)
    if weight is not None and rstd is not None:
        normed, result = unrotated(x) / weight.float(), result * weight.float()
        result = rstd[:, :, None] * (result - normed * (result * normed).mean(dim=-1, keepdim=True))
    out.copy_(result)


def swiglu_forward(gate_up: Tensor, out: Tensor) -> None:
    """silu(gate) * up: [T, 2 I] -> [T, I]. Shazeer 2020, arXiv 2002.05202, eq. 6."""
    gate, up = gate_up[:, : 2 * out.shape[1]].float().chunk(2, dim=-1)
    out.copy_(gate * torch.sigmoid(gate) * up)


def swiglu_backward(gate_up: Tensor, grad: Tensor, d_gate_up: Tensor, out: Tensor) -> None:
    """Gradient of gate and up [T, 2 I], and the result [T, I] recomputed, since it was not kept."""
    width = out.shape[1]
    gate, up = gate_up[:, : 2 * width].float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    out.copy_(silu * up)
    d_gate_up[:, :width].copy_(grad.float() * up * (sigmoid + silu * (1 - sigmoid)))
    d_gate_up[:, width : 2 * width].copy_(grad.float() * silu)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, losses: Tensor, weight_per_target: Tensor) -> None:
    """Loss of each row into `losses` [N] fp32; the logits [N, V] become the gradient of their weighted sum.

    Each loss is weighted by `weight_per_target` [1]. A target of -1 is none: its loss and its gradient are 0.
    """
    exact, is_target = logits.float(), targets >= 0
    losses.copy_(cross_entropy(exact, targets, reduction="none", ignore_index=-1))
    probabilities = exact.softmax(dim=-1)
    probabilities[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    logits.copy_(probabilities * (weight_per_target * is_target[:, None]))


_WORD = 2**32 - 1
MASK_STEPS = 2**16
"""An element of a mask is drawn from 16 bits: the rate is rounded to a multiple of one over this."""


def _mixed(word: Tensor) -> Tensor:
    """A hash that maps 32-bit words one to one: lowbias32, Wellons 2018 (nullprogram.com/blog/2018/07/31)."""
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def kept(shape: torch.Size, masks: Masks, adapter: int) -> Tensor:
    """Which elements of an input [T, K] one adapter sees: a hash of seed, site, adapter and the element's place."""
    first = _mixed((masks.seed + (8 * masks.site + adapter) * 0x9E3779B9) & _WORD)
    second = _mixed(first ^ 0x85EBCA6B)
    place = torch.arange(shape.numel(), device=masks.seed.device).view(shape)
    word = (place ^ first) * 0x9E3779B1 & _WORD
    word = (word ^ (word >> 15) ^ second) * 0x846CA68B & _WORD
    return (word >> 16) >= round(masks.rate * MASK_STEPS)


def _dropped(x: Tensor, masks: Masks, adapter: int) -> Tensor:
    return torch.where(kept(x.shape, masks, adapter), x.float(), 0.0) / (1 - masks.rate)


def _rows(matrix: Tensor, masks: Masks, adapter: int) -> Tensor:
    return matrix.chunk(masks.adapters)[adapter]


def masked_ranks(x: Tensor, a: Tensor, out: Tensor, masks: Masks) -> None:
    """Low-rank activations: dropout(x) A^T of each adapter, side by side.

    Args:
        x: [T, K].
        a: [R, K], the adapters' A one below the other.
        out: [T, R].
        masks: of x.
    """
    parts = [_dropped(x, masks, n) @ _rows(a, masks, n).float().t() for n in range(masks.adapters)]
    out.copy_(torch.cat(parts, dim=1))


def masked_gradient(thin: Tensor, x: Tensor, masks: Masks) -> Tensor:
    """Gradient of A: g^T dropout(x) of each adapter, one below the other: [R, K] fp32.

    Args:
        thin: [T, R], gradient g of the low-rank activations.
        x: [T, K].
        masks: of x.
    """
    parts = thin.float().chunk(masks.adapters, dim=1)
    return torch.cat([part.t() @ _dropped(x, masks, n) for n, part in enumerate(parts)])


def masked_add(thin: Tensor, a: Tensor, into: Tensor, masks: Masks) -> None:
    """Add the gradient of x through each adapter's mask: into [T, K] += dropout(g A).

    Args:
        thin: [T, R], gradient g of the low-rank activations.
        a: [R, K].
        into: [T, K].
        masks: of x.
    """
    parts = thin.float().chunk(masks.adapters, dim=1)
    shares = [_dropped(part @ _rows(a, masks, n).float(), masks, n) for n, part in enumerate(parts)]
    into.copy_(into.float() + sum(shares))
