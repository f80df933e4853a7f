"""A base that is sharded over the ranks: each keeps a part of each layer's bytes, and gathers a layer before its use.

The large tensors of a decoder layer (weights in 4 bits with their scales, a mixture's experts among them, and matrices
that are not in 4 bits) are one row of bytes, of which each rank keeps one part. There are two buffers; layer i is
gathered into buffer i % 2, one layer ahead of its use. The layers' parameters are views into these buffers, made once.
All else stays whole on each rank.

A gather needs all ranks, so that they make the same ones in the same order. The layers are passed in turns: before each
pass of any rank all of them meet, and a rank that has nothing to pass makes the turn's gathers alone. So no rank needs
to know what another one has left to do, and one that ran out of memory tries again while the others keep it company.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from job.core.errors import SickDeviceError, UsageError
from job.tune.device.digest import digest
from job.tune.model.experts import stand_in, stand_ins, tensors_of_experts
from job.tune.model.recurrent import mixers_of
from job.tune.ranks import Ranks

_ALIGNED = 256
"""Bytes: where tensors start in a row."""
_NOTHING, _FORWARD, _TRAINING = 0, 1, 2
"""What a rank wishes to pass in a turn; the most that one of them wishes is what all of them gather for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """One tensor of a layer, and where it lies in the layer's row."""

    start: int
    tensor: Tensor
    put: Callable[[Tensor], None]
    """Replaces it where it is used."""

    @property
    def end(self) -> int:
        return self.start + self.tensor.nbytes

    def view_in(self, row: Tensor) -> Tensor:
        """The same tensor in another place; without the place's count of changes, which autograd would go by."""
        view = row[self.start : self.end].view(self.tensor.dtype).view(self.tensor.shape)
        return view.data


def layers_of(causal_lm: Any) -> list[nn.Module]:
    """The decoder's layers, in the order of their use."""
    found: list[nn.Module] = [
        module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    return found


def reason_against_sharding(causal_lm: Any, *, packed: bool) -> str | None:
    """Why a base cannot be sharded; None: it can.

    Args:
        causal_lm: the model; it may be on the meta device.
        packed: whether it trains documents packed into a row.
    """
    layers = layers_of(causal_lm)
    if not packed:
        return f"{causal_lm.config.model_type} trains one document a row"
    if not layers:
        return f"the layers of {causal_lm.config.model_type} are of no kind that transformers recomputes"
    if next(mixers_of(causal_lm), None) is not None:
        return f"{causal_lm.config.model_type} has recurrent layers, which have not been tried on a base in shards"
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    inner = [module for layer in layers for module in layer.modules() if module is not layer]
    if len({*map(id, parameters)}) < len(parameters) or any(layer in inner for layer in layers):
        return f"layers of {causal_lm.config.model_type} share their weights"
    return None


class ShardedLayers:
    """The layers of a base that is spread over all ranks."""

    def __init__(
        self, causal_lm: Any, world: Ranks, device: torch.device, *, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        """Every rank must do this, with the same base; its tensors are left to the buffers.

        Args:
            causal_lm: in 4 bits, on the host, where its tensors may be pages of their files: of each row only our part
                is read. All that is not in rows moves to the device.
            world: the others.
            device: gets our parts and the buffers.
            on_beat: called after each layer.

        Raises:
            SickDeviceError: what was gathered is not what the rank that sent it has read from the files.
        """
        self._world, self._device = world, device
        world.share_rows()
        self._layers = layers_of(causal_lm)
        rows = [[*_pieces(layer)] for layer in self._layers]
        unit = 16 * world.size
        self._sizes = [-(-max((piece.end for piece in row), default=1) // unit) * unit for row in rows]
        self._buffers = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=device) for _ in self._layers[:2]]
        self._parts: list[Tensor] = []
        digests: list[int] = []
        for number, row in enumerate(rows):
            part = _part(row, self._sizes[number] // world.size, world.rank)
            digests.append(int(digest(part)))
            self._parts.append(part.to(device))
            for piece in row:
                piece.put(piece.view_in(self._buffers[number % 2]))
            on_beat()
        del rows
        _to_device(causal_lm, device, but={id(each) for layer in self._layers for each in _matrices(layer)})
        self._pending: list[Callable[[], None] | None] = [None, None]
        self._ahead: deque[int] = deque()
        """What is left to gather in this turn."""
        self._at, self._kind = -1, _NOTHING
        """The layer that was asked for last, on the way up; on the way down it is that one as well."""
        self._verify(digests, on_beat)
        world.before_meeting = self.meet

    @property
    def device_bytes(self) -> int:
        """What our parts and the buffers take."""
        return sum(tensor.nbytes for tensor in (*self._parts, *self._buffers))

    def close(self) -> None:
        """Ranks meet without us from here on, and our parts are let go."""
        self._world.before_meeting = lambda: None
        self._parts, self._buffers = [], []

    @contextmanager
    def asked_by(self, decoder: nn.Module) -> Iterator[None]:
        """Meanwhile layers of another class, with the same tensors in them, ask for what a forward of theirs needs."""

        def ask(number: int, _layer: nn.Module, _inputs: Any) -> None:
            if number == 0:
                self.begin(trains=False)
            self.forward(number)

        others = [(number, layer) for number, layer in enumerate(layers_of(decoder)) if layer not in self._layers]
        hooks = [layer.register_forward_pre_hook(partial(ask, number)) for number, layer in others]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # --- turns --------------------------------------------------------------------------------------------------------

    def begin(self, *, trains: bool) -> None:
        """Before the first layer of a pass: wait until all ranks are here.

        Args:
            trains: whether there will be a backward pass.

        Raises:
            PeerLostError: one of them is gone.
        """
        self._finish()
        self._open(self._world.turn(_TRAINING if trains else _FORWARD))

    def meet(self) -> None:
        """Help the other ranks through their passes, until none of them has any left.

        Raises:
            PeerLostError: one of them is gone.
        """
        self._finish()
        while (kind := self._world.turn(_NOTHING)) != _NOTHING:
            self._open(kind)
            self._finish()
        for buffer in (0, 1):
            self._wait(buffer)  # sums go through the same links: one after the other

    def forward(self, layer: int) -> None:
        """Before a layer's forward: its weights are there, and the next ones are on their way."""
        if layer != self._at + 1:
            raise _disorderly(layer, self._at)
        self._at = layer
        self._gather_beside(layer)
        self._wait(layer % 2)

    def backward(self, layer: int) -> None:
        """Before a layer's backward, and before its forward is recomputed for that."""
        if layer not in {self._at, self._at - 1} or self._kind != _TRAINING:
            raise _disorderly(layer, self._at)
        self._at = layer
        self._gather_beside(layer)
        self._wait(layer % 2)

    def _open(self, kind: int) -> None:
        """Layers 0 and 1 are there, or on their way, at the beginning and at the end of each turn."""
        count = len(self._layers)
        up = [*range(2, count)]
        again = [*range(count - 3, -1, -1)]
        if kind == _FORWARD:
            again = [number % 2 for number in (count - 2, count - 1) if number > 1]
        self._ahead.extend(up + again)
        self._kind, self._at = kind, -1

    def _finish(self) -> None:
        """Gather what a pass that was cut short, or that was not ours, has left of its turn."""
        while self._ahead:
            self._gather(self._ahead.popleft())

    def _gather_beside(self, layer: int) -> None:
        """The next one of the turn, if it is for the other buffer: what was there has done its work."""
        if self._ahead and self._ahead[0] % 2 != layer % 2:
            self._gather(self._ahead.popleft())

    def _gather(self, layer: int) -> None:
        buffer = layer % 2
        self._wait(buffer)
        row = self._buffers[buffer][: self._sizes[layer]]
        self._pending[buffer] = self._world.gather_row(self._parts[layer], row)

    def _wait(self, buffer: int) -> None:
        arrived, self._pending[buffer] = self._pending[buffer], None
        if arrived is not None:
            arrived()

    # --- what was gathered --------------------------------------------------------------------------------------------

    def _verify(self, digests: Sequence[int], on_beat: Callable[[], None]) -> None:
        """Gather each layer once; layers 0 and 1 stay."""
        sent = self._world.gather(digests)
        wrong: list[tuple[int, int]] = []
        for layer in range(len(self._layers) - 1, -1, -1):
            self._gather(layer)
            self._wait(layer % 2)
            parts = self._buffers[layer % 2][: self._sizes[layer]].view(self._world.size, -1)
            arrived = torch.stack([digest(part) for part in parts]).tolist()
            wrong += [(layer, rank) for rank, each in enumerate(arrived) if each != sent[rank][layer]]
            on_beat()
        found = self._world.gather(wrong[-1:])
        for rank, each in enumerate(found):
            for layer, sender in each:
                raise SickDeviceError(
                    f"rank {rank} has gathered other bytes of layer {layer} than rank {sender} has read from the "
                    "base's files: one of their devices, or the link between them, is sick; start the same job again "
                    "on other ones"
                )


def _pieces(layer: nn.Module) -> Iterator[_Piece]:
    """What of a layer goes into its row: matrices. Vectors and code books are small, and are read before passes."""
    start = 0
    for tensor, put in chain(_places(layer), tensors_of_experts(layer, large=True)):
        yield _Piece(start=start, tensor=tensor, put=put)
        start += -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _places(layer: nn.Module) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Tensors of a layer's matrices, and what replaces each."""
    for parameter in _matrices(layer):
        state = getattr(parameter, "quant_state", None)
        yield parameter.data, partial(setattr, parameter, "data")
        if state is not None:
            yield state.absmax, partial(setattr, state, "absmax")
        if state is not None and state.nested:
            state.state2.absmax = state.state2.absmax.float()  # as the kernels take it: they must not copy it
            yield state.state2.absmax, partial(setattr, state.state2, "absmax")


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    """Without those that only stand in the place of experts."""
    seeming = {*map(id, stand_ins(layer))}
    return [parameter for parameter in layer.parameters() if parameter.ndim > 1 and id(parameter) not in seeming]


def _part(row: Sequence[_Piece], size: int, rank: int) -> Tensor:
    """Our part of a row, on the host: [size] uint8."""
    part, first = torch.zeros(size, dtype=torch.uint8), rank * size
    for piece in row:
        begin, end = max(piece.start, first), min(piece.end, first + size)
        if begin < end:
            content = piece.tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            part[begin - first : end - first] = content[begin - piece.start : end - piece.start]
    return part


def _to_device(causal_lm: Any, device: torch.device, *, but: Collection[int]) -> None:
    """What is whole on each rank, out of its file's pages; not parameters with these identities, which are in rows."""
    seeming = stand_ins(causal_lm)
    for parameter in seeming:  # a copy would have memory
        parameter.data = stand_in(parameter.shape, dtype=parameter.dtype, device=device)
    but = {*but, *map(id, seeming)}
    for tensor, put in tensors_of_experts(causal_lm, large=False):
        put(tensor.to(device, copy=True))
    for module in causal_lm.modules():
        for parameter in module.parameters(recurse=False):
            in_row = id(parameter) in but
            if not in_row:
                parameter.data = parameter.data.to(device, copy=True)
            for state, name in _small_parts(getattr(parameter, "quant_state", None), scales=not in_row):
                setattr(state, name, getattr(state, name).to(device, copy=True))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device, copy=True))
    if getattr(causal_lm, "hf_device_map", None):
        causal_lm.hf_device_map = {"": device}


def _small_parts(state: Any, *, scales: bool) -> Iterator[tuple[Any, str]]:
    """What of a quantisation state is in no row: code books and offset, and the scales of a weight that is in none."""
    if state is None:
        return
    yield state, "code"
    if scales:
        yield state, "absmax"
    if state.nested:
        yield from ((state, "offset"), (state.state2, "code"))
        if scales:
            yield state.state2, "absmax"


def _disorderly(layer: int, before: int) -> UsageError:
    return UsageError(
        f"model.base: layer {layer} follows layer {before}: layers that do not run one after the other cannot be "
        "sharded; use GPUs that hold the whole base, and --base-placement replicated"
    )
