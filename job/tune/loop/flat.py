"""The adapter as one vector: its parameters are views of it, and their gradients are views of another.

An adapter has hundreds of small tensors. Clipping, checking, updating and clearing them one by one launches thousands
of kernels a step, which takes longer than a small step's own work; on a vector each is one.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate

import torch
from torch import Tensor, nn

from job.tune.model.adapter import trainable

_MOST = 2**30
"""Elements of a vector: optimizer kernels count in 32 bits."""


class FlatAdapter:
    """Vectors that hold the trained parameters; the model still uses its own, which are views of them."""

    def __init__(self, model: nn.Module, *, most: int = _MOST) -> None:
        """Move the model's trainable parameters, all of one type, into vectors of at most `most` elements.

        A parameter that is larger has a vector of its own.
        """
        self._members: list[list[nn.Parameter]] = [[]]
        size = 0
        for parameter in trainable(model):
            if size and size + parameter.numel() > most:
                self._members.append([])
                size = 0
            self._members[-1].append(parameter)
            size += parameter.numel()
        self.vectors = [self._joined(members) for members in self._members]
        """What the optimizer updates; each has its gradient."""
        self.clear()

    def pieces(self, most: int) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The gradients in the order in which a backward completes them: the last layer's first.

        Args:
            most: elements of a piece.

        Returns:
            Views of the vectors' gradients, each with the parameters of which it holds a part.
        """
        found = []
        for vector, members in zip(self.vectors, self._members, strict=True):
            assert vector.grad is not None
            ends = list(accumulate(member.numel() for member in members))
            for start in range(0, vector.numel(), most):
                stop = min(start + most, vector.numel())
                inside = members[bisect_right(ends, start) : bisect_left(ends, stop) + 1]
                found.append((vector.grad[start:stop], inside))
        return found[::-1]

    @staticmethod
    def _joined(members: list[nn.Parameter]) -> nn.Parameter:
        vector = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in members]))
        vector.grad = torch.zeros_like(vector)
        for parameter, values in zip(members, _views(vector.data, members), strict=True):
            parameter.data = values
        return vector

    def clear(self) -> None:
        """Zero the vectors' gradients, and make the parameters' gradients views of them where they are not."""
        for vector, members in zip(self.vectors, self._members, strict=True):
            assert vector.grad is not None
            vector.grad.zero_()
            if members[0].grad is None or members[0].grad.data_ptr() != vector.grad.data_ptr():
                for parameter, gradient in zip(members, _views(vector.grad, members), strict=True):
                    parameter.grad = gradient


def _views(vector: Tensor, members: list[nn.Parameter]) -> list[Tensor]:
    """Parts of a vector in the shapes of the parameters."""
    parts = torch.split(vector, [parameter.numel() for parameter in members])
    return [part.view(parameter.shape) for part, parameter in zip(parts, members, strict=True)]
