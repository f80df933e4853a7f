"""The least time that each part of a step could take on a device: operations and bytes that nobody can save.

Bytes count once in and once out, as if every part were one kernel; bf16 unless said otherwise.
"""

from bench import flops

_BF16 = 2
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: itself and its shares of two scales. QLoRA, arXiv 2305.14314, section 3."""
_UPDATE_BYTES = 36
"""Bytes of one parameter's update, fp32 with 8-bit AdamW: weight in and out (8), gradient in for the norm and for the
update (8), gradient cleared (4), two states in and out (4), a copy kept until the update has proved finite, and the
choice between both (12).
"""


def ideal_seconds(shape, rates, *, lengths, targets, micro_batches, cut, adapter_parameters, products):
    """Seconds of each part of a step.

    shape: of the base. rates: from `bench.ceiling`. lengths: tokens of each document. targets: tokens the loss is over.
    cut: that of the step. products: by part, how often each (rows, inner, columns) came.
    """
    tokens, copy = int(lengths.sum()), rates["copy_bytes"]
    return {
        **{part: sum(n * _product(rates, *sides) for sides, n in found.items()) for part, found in products.items()},
        "attention": max(
            flops.attention(shape, lengths) * (1 + _forward(shape, cut) / 3) / rates["gemm_flops"],
            attention_bytes(shape, tokens, cut) / copy,
        ),
        "elementwise": elementwise_bytes(shape, tokens, targets, cut) / copy,
        "dequantising": dequantising_bytes(shape, micro_batches, cut) / copy,
        "optimizer": _UPDATE_BYTES * adapter_parameters / copy,
    }


def all_products_seconds(shape, rates, *, lengths, targets, micro_batches, cut, adapter_parameters):
    """Seconds of all products of a step together, where their shapes are not known; arguments as above.

    Their operations, or reading the dequantised weights once a micro-batch in the forward and in the backward each.
    """
    tokens, head = int(lengths.sum()), shape.vocabulary * shape.hidden
    recomputed = 2 * shape.linear_parameters * tokens * _forward(shape, cut)
    operations = 4 * (shape.linear_parameters * tokens + head * targets) + 6 * adapter_parameters * tokens + recomputed
    read = _BF16 * micro_batches * ((2 + _forward(shape, cut)) * shape.linear_parameters + 2 * head)
    return max(operations / rates["gemm_flops"], read / rates["copy_bytes"])


def _product(rates, rows, inner, columns):
    operations, elements = 2 * rows * inner * columns, rows * inner + inner * columns + rows * columns
    return max(operations / rates["gemm_flops"], _BF16 * elements / rates["copy_bytes"])


def _forward(shape, cut):
    """Share of the layers that recompute their forward."""
    return cut.recomputed_layers / shape.layers


def elementwise_bytes(shape, tokens, targets, cut):
    """Norms, rotation, activation and loss, forward and backward; what a layer recomputes counts twice."""
    hidden, wide = shape.hidden, shape.intermediate
    turned = (shape.heads + shape.key_heads) * shape.head_width
    forward = 2 * 2 * hidden + 2 * turned + 3 * wide
    # Norms read a gradient, their result and the stream's gradient, and write that; the activation reads gate, up and a
    # gradient, and writes two gradients and itself; rotation reads and writes, the value's gradient is moved.
    backward = 2 * 4 * hidden + 6 * wide + 2 * (turned + shape.key_heads * shape.head_width)
    layers = shape.layers * (forward * (1 + _forward(shape, cut)) + backward)
    loss = 3 * shape.vocabulary * targets
    return _BF16 * (tokens * (layers + 6 * hidden) + loss)


def attention_bytes(shape, tokens, cut):
    """Query, key, value and result in or out; in the backward these and their gradients."""
    width = (shape.heads + shape.key_heads) * shape.head_width
    return _BF16 * tokens * shape.layers * width * (2 * (1 + _forward(shape, cut)) + 4)


def dequantising_bytes(shape, micro_batches, cut):
    """NF4 to bf16 once for each use; layers that keep their dequantised weights have none."""
    uses = micro_batches * (2 + _forward(shape, cut)) * (1 - cut.kept_layers / shape.layers)
    return shape.linear_parameters * (_NF4_BYTES + _BF16) * uses
