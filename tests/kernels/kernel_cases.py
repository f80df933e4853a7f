"""Each kernel beside the reference, on shapes that fill no block; prints the largest differences as JSON."""

import json
import sys
from dataclasses import replace

import bitsandbytes as bnb
import torch

from job.kernels import reference
from job.kernels import triton_elementwise as kernels
from job.kernels.attention import Attention, Segments
from job.kernels.blocks import blocks_of
from job.kernels.ops import Gate, Masks
from job.kernels.weights import Quantised, QuantisedExperts

T, K, HEADS, WIDTH = 7, 96, 3, 16
EPSILON = 1e-5


def off(one, other):
    difference = (one.float() - other.float()).abs().nan_to_num(nan=float("inf"))  # `max` may pass over a NaN
    return float(difference.max() / other.float().abs().max())


def both(run):
    """Largest difference of what `run` returns with the kernels and with the reference."""
    results = []
    for ops in (kernels, reference):
        torch.manual_seed(0)
        results.append(run(ops))
    return max(off(a, b) for a, b in zip(*results, strict=True))


def padded(rows, width):
    """A view whose rows lie apart."""
    return torch.zeros(rows, width + 5)[:, :width]


def dequantise(ops, *, width=192):
    weight = torch.randn(64, width)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    out = padded(64, width)
    ops.dequantise(
        Quantised(
            packed=packed.reshape(-1),
            scales=state.absmax,
            scales_code=state.state2.code,
            outer_scales=state.state2.absmax,
            offset=state.offset.reshape(1),
            code=state.code,
            height=64,
            width=width,
        ),
        out,
    )
    return (out,)


def dequantise_experts(ops, *, width=192):
    """Blocks fill neither a program nor an outer block; one expert has no rows, and its place stays as it is."""
    parts = [
        bnb.functional.quantize_4bit(torch.randn(96, width), blocksize=64, compress_statistics=True, quant_type="nf4")
        for _ in range(4)
    ]
    states = [state for _, state in parts]
    weights = QuantisedExperts(
        packed=torch.stack([packed.reshape(-1) for packed, _ in parts]),
        scales=torch.stack([state.absmax for state in states]),
        scales_code=states[0].state2.code,
        outer_scales=torch.stack([state.state2.absmax for state in states]),
        offsets=torch.stack([state.offset for state in states]),
        code=states[0].code,
        height=96,
        width=width,
    )
    out = torch.full((4, 96, width), 7.0)
    ops.dequantise_experts(weights, torch.tensor([3, 0, 1, 2], dtype=torch.int32), out)
    assert bool((out[1] == 7).all())
    return (out,)


GATES = (Gate(), Gate(interleaved=True, alpha=1.702, limit=0.8, one_more=True))


def gate_forward(ops, *, width=1100):
    """More columns than a program takes at once."""
    outs = [padded(T, width) for _ in GATES]
    z = torch.randn(T, 2 * width)
    for gate, out in zip(GATES, outs, strict=True):
        ops.gate_forward(z, gate, out)
    return outs


def gate_backward(ops, *, width=1100):
    z, grad, weights = torch.randn(T, 2 * width), torch.randn(T, width), torch.rand(T)
    found = []
    for gate in GATES:
        found += [padded(T, 2 * width), padded(T, width), torch.empty(T)]
        ops.gate_backward(z, grad, weights, gate, *found[-3:])
    return found


def combine_rows(ops, *, width=1100):
    rows, places, weights = torch.randn(T * 3, width), torch.randperm(T * 3).view(T, 3), torch.rand(T, 3)
    once, weighted = padded(T, width), padded(T, width)
    ops.combine_rows(rows, places, None, once)
    ops.combine_rows(rows, places, weights, weighted)
    return once, weighted


def sums_by_expert(ops):
    """The first and the last expert have no rows, one has more than a block; sides fill none, or more than one."""
    ends = torch.tensor([0, 3, 103, 110, 110], dtype=torch.int32)
    found = []
    for n, k in ((5, 70), (130, 3)):
        found.append(torch.full((5, n, k), 7.0))
        ops.sums_by_expert(torch.randn(110, n), torch.randn(110, k), ends, found[-1])
    return found


def rms_forward(ops):
    out, rstd = padded(T, K), torch.empty(T)
    ops.rms_forward(torch.randn(T, K), torch.rand(K) + 0.5, out, rstd, EPSILON)
    return out, rstd


def rms_backward_add(ops):
    into = padded(T, K)
    ops.rms_backward_add(torch.randn(T, K), torch.randn(T, K), torch.rand(K) + 0.5, torch.rand(T), into)
    return (into,)


def rotate(ops, *, normed=False):
    x = torch.randn(T, HEADS * WIDTH + 8)[:, : HEADS * WIDTH].view(T, HEADS, WIDTH)
    angle = torch.randn(T, WIDTH // 2)
    weight, rstd = (torch.rand(WIDTH) + 0.5, torch.empty(T, HEADS)) if normed else (None, None)
    ops.rotate_forward(x, angle.cos(), angle.sin(), weight, rstd, EPSILON)
    return (x,) if rstd is None else (x, rstd)


def rotate_backward(ops, *, normed=False):
    x, grad, out = torch.randn(T, HEADS, WIDTH), torch.randn(T, HEADS, WIDTH), torch.zeros(T, HEADS, WIDTH)
    angle = torch.randn(T, WIDTH // 2)
    weight, rstd = (torch.rand(WIDTH) + 0.5, torch.rand(T, HEADS)) if normed else (None, None)
    ops.rotate_backward(grad, x, angle.cos(), angle.sin(), weight, rstd, out)
    return (out,)


def swiglu_forward(ops):
    out = padded(T, K)
    ops.swiglu_forward(torch.randn(T, 2 * K), out)
    return (out,)


def swiglu_backward(ops):
    into, out = padded(T, 2 * K), padded(T, K)
    ops.swiglu_backward(torch.randn(T, 2 * K), torch.randn(T, K), into, out)
    return into, out


def cross_entropy_in_place(ops):
    logits, losses = torch.randn(T, 5000 + 3)[:, :5000], torch.empty(T)  # more than a block
    targets = torch.randint(0, 5000, (T,))
    targets[2] = -1
    ops.cross_entropy_in_place(logits, targets, losses, torch.tensor([0.25]))
    return logits, losses


ROWS, RANK = 70, 5


def masks():
    return Masks(seed=torch.tensor([2**31 - 5]), site=2**20 + 3, adapters=3, rate=0.25)


def masked_ranks(ops):
    out = padded(ROWS, 3 * RANK)
    ops.masked_ranks(torch.randn(ROWS, K), torch.randn(3 * RANK, K), out, masks())
    return (out,)


def masked_gradient(ops):
    return (ops.masked_gradient(torch.randn(ROWS, 3 * RANK), torch.randn(ROWS, K), masks()),)


def masked_add(ops):
    into = padded(ROWS, K)
    ops.masked_add(torch.randn(ROWS, 3 * RANK), torch.randn(3 * RANK, K), into, masks())
    return (into,)


LENGTHS = (1, 64, 0, 130, 63, 65)


def attention(*, heads, key_heads, width, window, sinks=None):
    """Forward and backward, in the rows of a wider tensor, beside the formula."""
    tokens, counts = sum(LENGTHS), (heads, key_heads, key_heads)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    plain = Segments(cu_seqlens=cu_seqlens, lengths=LENGTHS)
    own = replace(plain, blocks=blocks_of(cu_seqlens, tokens))
    of = Attention(scale=0.3, window=window, sinks=None if sinks is None else torch.tensor(sinks))
    torch.manual_seed(0)

    def parts(wide):
        columns = torch.split(wide[:, : sum(counts) * width], [n * width for n in counts], dim=1)
        return tuple(part.unflatten(1, (-1, width)) for part in columns)

    query, key, value = parts(torch.randn(tokens, sum(counts) * width + 5))
    room = parts(torch.full((tokens, sum(counts) * width + 5), torch.nan))
    grad, results = torch.randn(tokens, heads, width), []
    for segments in (own, plain):
        out, kept = of.forward(query, key, value, segments)
        results.append((out, *of.backward(grad, query, key, value, out, kept, segments, room=room)))
    assert all(one is other for one, other in zip(results[0][1:], room, strict=True))
    return max(off(a, b) for a, b in zip(*results, strict=True))


def main():
    found = {
        "attention": attention(heads=3, key_heads=3, width=16, window=None),
        "attention_grouped": attention(heads=4, key_heads=2, width=32, window=None),
        "attention_windowed": attention(heads=2, key_heads=1, width=16, window=50),
        "attention_barely_windowed": attention(heads=2, key_heads=2, width=16, window=2),
        "attention_with_sinks": attention(heads=2, key_heads=1, width=64, window=None, sinks=(-3.0, 4.0)),
        "attention_windowed_with_sinks": attention(heads=2, key_heads=1, width=64, window=50, sinks=(0.5, 4.0)),
        "dequantise": both(dequantise),
        "dequantise_experts": both(dequantise_experts),
        "dequantise_across_rows": both(lambda ops: dequantise(ops, width=172)),
        "gate_forward": both(gate_forward),
        "gate_backward": both(gate_backward),
        "combine_rows": both(combine_rows),
        "sums_by_expert": both(sums_by_expert),
        "rms_forward": both(rms_forward),
        "rms_backward_add": both(rms_backward_add),
        "rotate": both(rotate),
        "rotate_normed": both(lambda ops: rotate(ops, normed=True)),
        "rotate_backward": both(rotate_backward),
        "rotate_backward_normed": both(lambda ops: rotate_backward(ops, normed=True)),
        "swiglu_forward": both(swiglu_forward),
        "swiglu_backward": both(swiglu_backward),
        "cross_entropy_in_place": both(cross_entropy_in_place),
        "masked_ranks": both(masked_ranks),
        "masked_gradient": both(masked_gradient),
        "masked_add": both(masked_add),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
