"""One micro-batch through a decoder of the Llama family, forward and backward, without autograd.

What the backward needs is kept once, where the next product reads it; the residual stream is one tensor that layers
add to. docs/engine.md has the stages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from job.kernels.attention import Segments
from job.kernels.blocks import blocks_of
from job.kernels.decoder import Decoder, DecoderLayer, PackedRow, Saving
from job.kernels.head_loss import LOGITS_AT_ONCE
from job.kernels.ops import Masks, Ops
from job.kernels.weights import Group, exact_product

OnLayer = Callable[[int], None]
"""Called when the gradients of a layer's adapters are complete for a micro-batch: the last first; a head has the number
of layers."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Kept:
    """What one layer's backward needs. The `x_*` are [x | h]: an input with its low-rank activations beside it."""

    x_attention: Tensor
    rstd_attention: Tensor
    qkv: Tensor
    rstd_query: Tensor | None
    rstd_key: Tensor | None
    attended: Tensor
    attention: Any
    h_out: Tensor
    x_mlp: Tensor
    rstd_mlp: Tensor
    gate_up: Tensor
    h_down: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class _StepContext:
    """What all layers need of one micro-batch."""

    row: PackedRow
    segments: Segments
    cos: Tensor
    sin: Tensor

    def masks(self, group: Group, site: int) -> Masks | None:
        """Dropout masks of a group's input; None where nothing is dropped."""
        if self.row.seed is None or not group.dropout or not group.rank:
            return None
        return Masks(seed=self.row.seed, site=site, adapters=group.adapters, rate=group.dropout)


_HEAD_SITE = 2**20
"""The head's first site of masks, beyond those of any decoder's layers."""


class Step:
    """Adds the gradients of a micro-batch to those of the adapters."""

    def __init__(
        self, decoder: Decoder, ops: Ops, *, dtype: torch.dtype, saving: Saving, own_attention: bool = False
    ) -> None:
        """Dequantise the weights that are kept, so that running out of memory shows before the first step."""
        self._decoder = decoder
        self._ops = ops
        self._dtype = dtype
        self._recomputed = saving.recomputed_layers
        self._own_attention = own_attention
        self.on_finished: OnLayer = lambda _: None
        self.device = decoder.embeddings.device
        self._hidden = decoder.embeddings.shape[1]
        self._kept_matrices: dict[int, tuple[Tensor, ...]] = {}
        for index, layer in enumerate(decoder.layers[: saving.kept_layers]):
            self._kept_matrices[index] = tuple(group.make(dtype, self.device) for group in layer.groups)
            for group, matrix in zip(layer.groups, self._kept_matrices[index], strict=True):
                group.fill_weights(matrix)
        self._shared: dict[tuple[int, int], Tensor] = {}
        """M by place in the layer and ranks, filled anew for each layer; layers with the same targets share one."""
        self._head_matrix = decoder.head.make(dtype, self.device)
        decoder.head.fill_weights(self._head_matrix)
        self.refresh()

    @property
    def token_bytes(self) -> int:
        """Bytes of the activations that a token leaves for the backward where no layer recomputes them, about."""
        return sum(layer.numbers_of_a_token for layer in self._decoder.layers) * self._dtype.itemsize

    @property
    def kept_token_bytes(self) -> int:
        """The same as the layers are: of those that recompute, what goes in, and one at a time as a whole."""
        of_each = [layer.numbers_of_a_token for layer in self._decoder.layers]
        again = self._recomputed * self._hidden + max(of_each[: self._recomputed], default=0)
        return (sum(of_each[self._recomputed :]) + again) * self._dtype.itemsize

    def refresh(self) -> None:
        """Copy the adapters' new values into the kept matrices: after each change of them."""
        self._decoder.head.fill_adapters(self._head_matrix)
        for index, matrices in self._kept_matrices.items():
            for group, matrix in zip(self._decoder.layers[index].groups, matrices, strict=True):
                group.fill_adapters(matrix)

    @torch.no_grad()
    def accumulate(self, row: PackedRow) -> Tensor:
        """Add the gradients of weight_per_target * (sum of the losses) to those of the adapters.

        Returns:
            Loss of each target, in nats: [N] fp32.
        """
        cos, sin = self._decoder.rotation(row.positions)
        segments = row.segments
        if self._own_attention:
            segments = replace(segments, blocks=blocks_of(segments.cu_seqlens, len(row.ids)))
        context = _StepContext(row=row, segments=segments, cos=cos, sin=sin)
        stream = self._decoder.embeddings[row.ids].to(self._dtype)
        kept: list[_Kept | Tensor] = []
        arrivals = self._decoder.arrivals
        arrivals.begin(trains=True)
        for index in range(len(self._decoder.layers)):
            arrivals.forward(index)
            if index < self._recomputed:
                kept.append(stream.clone())
                self._layer_forward(index, stream, context)
            else:
                kept.append(self._layer_forward(index, stream, context))
        room = max(group.padded_rank for layer in self._decoder.layers for group in (layer.out, layer.down))
        losses, grad = self._head(stream, context, room=room)
        del stream
        self.on_finished(len(self._decoder.layers))
        for index in range(len(self._decoder.layers) - 1, -1, -1):
            state = kept.pop()
            arrivals.backward(index)
            if isinstance(state, Tensor):
                state = self._layer_forward(index, state, context)
            self._mlp_backward(index, state, grad, context)
            self._attention_backward(index, state, grad, context)
            self.on_finished(index)
        return losses

    # --- forward ------------------------------------------------------------------------------------------------------

    def _layer_forward(self, index: int, stream: Tensor, context: _StepContext) -> _Kept:
        """Add attention and MLP to the stream; returns what the backward needs."""
        layer, tokens = self._decoder.layers[index], len(stream)
        x_attention, rstd_attention = self._normed(stream, layer.attention_norm, layer.qkv)
        matrix = self._matrix(index, 0)
        self._ranks(layer.qkv, matrix, x_attention, x_attention[:, layer.qkv.width :], context, site=4 * index)
        qkv = self._product(layer.qkv, matrix, x_attention)
        rstd_query, rstd_key = self._rotate(layer, qkv, context)
        query, key, value = self._heads_of(qkv)
        attended, attention = layer.attention.forward(query, key, value, context.segments)
        attended = attended.reshape(tokens, -1)
        matrix = self._matrix(index, 1)
        h_out = self._empty(tokens, layer.out.padded_rank)
        self._ranks(layer.out, matrix, attended, h_out, context, site=4 * index + 1)
        self._add_product(layer.out, matrix, attended, h_out, stream)
        x_mlp, rstd_mlp = self._normed(stream, layer.mlp_norm, layer.gate_up)
        matrix = self._matrix(index, 2)
        self._ranks(layer.gate_up, matrix, x_mlp, x_mlp[:, layer.gate_up.width :], context, site=4 * index + 2)
        gate_up = self._product(layer.gate_up, matrix, x_mlp)
        matrix = self._matrix(index, 3)
        act = self._empty(tokens, layer.down.width + layer.down.padded_rank)
        self._ops.swiglu_forward(gate_up, act[:, : layer.down.width])
        self._ranks(layer.down, matrix, act, act[:, layer.down.width :], context, site=4 * index + 3)
        used = layer.down.width + layer.down.rank
        stream.addmm_(act[:, :used], matrix[: layer.down.height, :used].t())
        return _Kept(
            x_attention=x_attention,
            rstd_attention=rstd_attention,
            qkv=qkv,
            rstd_query=rstd_query,
            rstd_key=rstd_key,
            attended=attended,
            attention=attention,
            h_out=h_out,
            x_mlp=x_mlp,
            rstd_mlp=rstd_mlp,
            gate_up=gate_up,
            h_down=act[:, layer.down.width :].clone(),
        )

    def _normed(self, stream: Tensor, weight: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """The normed stream with room for the low-rank activations beside it, and each row's rstd."""
        x = self._empty(len(stream), group.width + group.padded_rank)
        rstd = self._empty_exact(len(stream))
        self._ops.rms_forward(stream, weight, x[:, : group.width], rstd, self._decoder.epsilon)
        return x, rstd

    def _ranks(self, group: Group, matrix: Tensor, x: Tensor, out: Tensor, context: _StepContext, *, site: int) -> None:
        """Low-rank activations: h = dropout(x) A^T, into out [T, R]."""
        if not group.rank:
            return
        x, a, masks = x[:, : group.width], matrix[group.height :, : group.width], context.masks(group, site)
        if masks is None:
            torch.mm(x, a.t(), out=out[:, : group.rank])
        else:
            self._ops.masked_ranks(x, a, out[:, : group.rank], masks)

    def _product(self, group: Group, matrix: Tensor, x: Tensor) -> Tensor:
        """[x h] [W sB]^T, and the bias where there is one."""
        used = group.width + group.rank
        w_t = matrix[: group.height, :used].t()
        return torch.mm(x[:, :used], w_t) if group.bias is None else torch.addmm(group.bias, x[:, :used], w_t)

    def _add_product(self, group: Group, matrix: Tensor, x: Tensor, h: Tensor, stream: Tensor) -> None:
        """Add [x h] [W sB]^T to the stream, where x and h are two tensors."""
        stream.addmm_(x, matrix[: group.height, : group.width].t())
        if group.rank:
            stream.addmm_(h[:, : group.rank], matrix[: group.height, group.width : group.width + group.rank].t())

    def _rotate(self, layer: DecoderLayer, qkv: Tensor, context: _StepContext) -> tuple[Tensor | None, Tensor | None]:
        query, key, _ = self._heads_of(qkv)
        rstds = []
        for part, weight in ((query, layer.query_norm), (key, layer.key_norm)):
            rstd = None if weight is None else self._empty_exact(len(part), part.shape[1])
            self._ops.rotate_forward(part, context.cos, context.sin, weight, rstd, self._decoder.epsilon)
            rstds.append(rstd)
        return rstds[0], rstds[1]

    def _heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, heads, width] of query, key and value."""
        decoder = self._decoder
        count = (decoder.heads, decoder.key_heads, decoder.key_heads)
        width = decoder.head_width
        query, key, value = torch.split(qkv[:, : sum(count) * width], [number * width for number in count], dim=1)
        rows = len(qkv)
        return (
            query.view(rows, count[0], width),
            key.view(rows, count[1], width),
            value.view(rows, count[2], width),
        )

    # --- the head: loss and its gradient, a chunk at a time -----------------------------------------------------------

    def _head(self, stream: Tensor, context: _StepContext, *, room: int) -> tuple[Tensor, Tensor]:
        """Losses [N], and the gradient of the stream [T, hidden + room]."""
        group, row = self._decoder.head, context.row
        last = stream[row.places]
        x, rstd = self._normed(last, self._decoder.final_norm, group)
        losses = self._empty_exact(len(last))
        d_x = self._empty(len(last), self._hidden)
        size = max(1, LOGITS_AT_ONCE // group.height)
        for number, start in enumerate(range(0, len(last), size)):
            part = slice(start, min(start + size, len(last)))
            site = _HEAD_SITE + number
            self._ranks(group, self._head_matrix, x[part], x[part, group.width :], context, site=site)
            logits = self._empty(part.stop - part.start, group.height + group.padded_rank)
            used = group.width + group.rank
            torch.mm(x[part, :used], self._head_matrix[: group.height, :used].t(), out=logits[:, : group.height])
            self._ops.cross_entropy_in_place(
                logits[:, : group.height], row.targets[part], losses[part], row.weight_per_target
            )
            h = x[part, group.width :]
            d_x[part] = self._group_backward(group, self._head_matrix, logits, x[part], h, context, site=site)
            del logits
        d_last = torch.zeros_like(last)
        self._ops.rms_backward_add(d_x, x[:, : group.width], self._decoder.final_norm, rstd, d_last)
        grad = torch.zeros(len(stream), self._hidden + room, dtype=self._dtype, device=self.device)
        grad[:, : self._hidden].index_copy_(0, row.places, d_last)
        return losses, grad

    # --- backward -----------------------------------------------------------------------------------------------------

    def _mlp_backward(self, index: int, kept: _Kept, grad: Tensor, context: _StepContext) -> None:
        layer, tokens, site = self._decoder.layers[index], len(grad), 4 * index
        down, gate_up = layer.down, layer.gate_up
        matrix = self._matrix(index, 3)
        self._thin_backward(down, matrix, grad)
        d_act = self._input_gradient(down, matrix, grad, context, site=site + 3)
        act = self._empty(tokens, down.width)
        d_gate_up = self._empty(tokens, gate_up.height + gate_up.padded_rank)
        self._ops.swiglu_backward(kept.gate_up, d_act, d_gate_up, act)
        del d_act
        self._adapter_gradients(down, grad, act, kept.h_down, context, site=site + 3)
        del act
        d_x = self._group_backward(
            gate_up,
            self._matrix(index, 2),
            d_gate_up,
            kept.x_mlp,
            kept.x_mlp[:, gate_up.width :],
            context,
            site=site + 2,
        )
        y = kept.x_mlp[:, : gate_up.width]
        self._ops.rms_backward_add(d_x, y, layer.mlp_norm, kept.rstd_mlp, grad[:, : self._hidden])

    def _attention_backward(self, index: int, kept: _Kept, grad: Tensor, context: _StepContext) -> None:
        layer, tokens, site = self._decoder.layers[index], len(grad), 4 * index
        matrix = self._matrix(index, 1)
        d_attended = self._group_backward(layer.out, matrix, grad, kept.attended, kept.h_out, context, site=site + 1)
        group = layer.qkv
        query, key, value = self._heads_of(kept.qkv)
        d_qkv = self._empty(tokens, group.height + group.padded_rank)
        into_query, into_key, into_value = room = self._heads_of(d_qkv)
        d_query, d_key, d_value = layer.attention.backward(
            d_attended.view(query.shape),
            query,
            key,
            value,
            kept.attended.view(query.shape),
            kept.attention,
            context.segments,
            room=room,
        )
        del d_attended
        for d_part, part, weight, rstd, into in (
            (d_query, query, layer.query_norm, kept.rstd_query, into_query),
            (d_key, key, layer.key_norm, kept.rstd_key, into_key),
        ):
            self._ops.rotate_backward(d_part, part, context.cos, context.sin, weight, rstd, into)
        into_value.copy_(d_value)  # nothing to do where it is the same tensor
        del d_query, d_key, d_value
        x = kept.x_attention
        if index == 0:  # nothing below it is trained
            self._thin_backward(group, self._matrix(index, 0), d_qkv)
            self._adapter_gradients(group, d_qkv, x, x[:, group.width :], context, site=site)
            return
        d_x = self._group_backward(group, self._matrix(index, 0), d_qkv, x, x[:, group.width :], context, site=site)
        y = x[:, : group.width]
        self._ops.rms_backward_add(d_x, y, layer.attention_norm, kept.rstd_attention, grad[:, : self._hidden])

    def _group_backward(
        self, group: Group, matrix: Tensor, grad: Tensor, x: Tensor, h: Tensor, context: _StepContext, *, site: int
    ) -> Tensor:
        """Gradient of x [T, K] from that of the result, which has room for g beside it: [T, N + R]."""
        self._thin_backward(group, matrix, grad)
        self._adapter_gradients(group, grad, x, h, context, site=site)
        return self._input_gradient(group, matrix, grad, context, site=site)

    def _thin_backward(self, group: Group, matrix: Tensor, grad: Tensor) -> None:
        """Gradient of the low-rank activations: g = dy sB, written beside dy."""
        for rows, ranks in zip(group.rows, group.ranks, strict=True):
            if ranks is not None:
                corner = matrix[rows, group.width + ranks.start : group.width + ranks.stop]
                torch.mm(grad[:, rows], corner, out=grad[:, group.height + ranks.start : group.height + ranks.stop])

    def _input_gradient(
        self, group: Group, matrix: Tensor, grad: Tensor, context: _StepContext, *, site: int
    ) -> Tensor:
        """[dy g] [W ; A]; with dropout each adapter's share passes through its own mask."""
        masks = context.masks(group, site)
        used = group.height + (group.rank if masks is None else 0)
        result = torch.mm(grad[:, :used], matrix[:used, : group.width])
        if masks is not None:
            thin = grad[:, group.height : group.height + group.rank]
            self._ops.masked_add(thin, matrix[group.height :, : group.width], result, masks)
        return result

    def _adapter_gradients(
        self, group: Group, grad: Tensor, x: Tensor, h: Tensor, context: _StepContext, *, site: int
    ) -> None:
        """Add g^T dropout(x) to A's gradient, and s dy^T h to B's."""
        if not group.rank:
            return
        x, thin = x[:, : group.width], grad[:, group.height : group.height + group.rank]
        masks = context.masks(group, site)
        a = exact_product(thin, x) if masks is None else self._ops.masked_gradient(thin, x, masks)
        for layer, rows, ranks in zip(group.layers, group.rows, group.ranks, strict=True):
            if layer.adapter is not None and ranks is not None:
                _add(layer.adapter.a, a[ranks])
                _add(layer.adapter.b, exact_product(grad[:, rows], h[:, ranks]), scale=layer.adapter.scaling)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _matrix(self, index: int, place: int) -> Tensor:
        """M of a layer's group: kept, or filled now, over that of the layer before."""
        kept = self._kept_matrices.get(index)
        if kept is not None:
            return kept[place]
        group = self._decoder.layers[index].groups[place]
        key = (place, group.rank)
        if key not in self._shared:
            self._shared[key] = group.make(self._dtype, self.device)
        group.fill_weights(self._shared[key])
        group.fill_adapters(self._shared[key])
        return self._shared[key]

    def _empty(self, *shape: int) -> Tensor:
        # On CPUs with AMX bf16 products (oneDNN) read a row's padding and multiply it by zero: it must hold numbers.
        make = torch.zeros if self.device.type == "cpu" else torch.empty
        return make(*shape, dtype=self._dtype, device=self.device)

    def _empty_exact(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)


def _add(parameter: Tensor, gradient: Tensor, *, scale: float = 1.0) -> None:
    if parameter.grad is None:
        parameter.grad = gradient * scale
    else:
        parameter.grad.add_(gradient, alpha=scale)
