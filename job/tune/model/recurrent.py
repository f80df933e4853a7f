"""A decoder's recurrent and convolutional layers: which they are, and what a token takes in transformers' code.

Measured, not derived: a layer runs forward and backward with its own sizes on the meta device, where nothing is
computed and nothing is taken, and every tensor that would be there is counted.
"""

import inspect
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from job.core.plan.memory import RecurrentShape
from job.kernels.triton_recurrent import take_kernels

_WITHOUT_CONVOLUTION = re.compile(r"LightningAttention|Retention$")
"""Names of classes that hand something on from token to token, and have no convolution."""
_CHUNK = 64
"""Tokens that layers compute at once which do not say how many."""
_IF_UNKNOWN = 512
"""Times what goes into a layer, where it does not run alone: more than any of those that do keeps."""


def mixers_of(causal_lm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that look at other tokens by other means than attention, each with its own linear modules."""
    for name, module in causal_lm.named_modules():
        has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
        if has_convolution or _WITHOUT_CONVOLUTION.search(type(module).__name__):
            yield name, module


def read_past_modules(causal_lm: nn.Module) -> list[str]:
    """Linear modules whose weight transformers multiplies itself, past the module: Mamba's time steps, in full names.

    They stay in 16 bits, and get no adapter: it would be passed over, by others if not here, where code asks whether
    the model is quantised.
    """
    mixers = ((name, getattr(module, _TIME_STEPS, None)) for name, module in mixers_of(causal_lm))
    return [f"{name}.{_TIME_STEPS}" for name, module in mixers if isinstance(module, nn.Module)]


_TIME_STEPS = "dt_proj"


def leave_fused_paths(causal_lm: nn.Module) -> None:
    """Keep these modules, not what is in them, out of training mode.

    In it Mamba's fused kernels take the weight of the output projection past its module: packed 4-bit numbers would be
    multiplied as if they were weights, and its adapter passed over. What the mode changes besides is in their children.
    """
    for _, module in mixers_of(causal_lm):
        module.training = False


def recurrent_shape(model: nn.Module, config: Any) -> RecurrentShape | None:
    """What a token takes in those layers, in bf16 and with what goes into their linear modules; None: it has none.

    Args:
        model: on the meta device.
        config: its config.
    """
    mixers = [module for _, module in mixers_of(model)]
    if not mixers:
        return None
    take_kernels(mixers)
    kinds = {str([(name, p.shape) for name, p in module.named_parameters()]): module for module in mixers}
    found = [_of_a_token(module, config.hidden_size) for module in kinds.values()]
    kept, backward, moved, by_length = (max(each) for each in zip(*found, strict=True))
    return RecurrentShape(layers=len(mixers), kept=kept, backward=backward, moved=moved, moved_by_length=by_length)


def _of_a_token(module: nn.Module, hidden: int) -> tuple[int, int, int, int]:
    """Bytes that are kept, that the backward adds at most, that are moved, and moved for each token of the document.

    From two lengths, so that what does not grow with them falls out.
    """
    few = 2 * int(getattr(module, "chunk_size", None) or _CHUNK)
    try:
        shorter, longer = (_counted(module, hidden, tokens) for tokens in (few, 2 * few))
    except Exception:  # noqa: BLE001 - a module of a family that nobody knows may want anything
        unknown = 2 * hidden * _IF_UNKNOWN
        return unknown, unknown, 2 * unknown, 0
    kept, backward, _ = (-(-(b - a) // few) for a, b in zip(shorter, longer, strict=True))
    moved, twice = shorter[2], longer[2]  # linear and quadratic part: few, and few squared, times what is looked for
    return kept, backward, max(0, (4 * moved - twice) // (2 * few)), max(0, (twice - 2 * moved) // (2 * few * few))


def _counted(module: nn.Module, hidden: int, tokens: int) -> tuple[int, int, int]:
    x = torch.empty(1, tokens, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with _in_bf16(module), _inputs_kept(module), _Bytes() as there:
        result = module(x, **_arguments(module, tokens))
        out: Tensor = result[0] if isinstance(result, tuple) else result
        kept = there.now - out.nbytes
        there.most = there.now
        torch.autograd.backward(out.sum())
        backward = there.most - kept
        moved = there.moved
    return kept, backward, moved


@contextmanager
def _inputs_kept(module: nn.Module) -> Iterator[None]:
    """Meanwhile what goes into its linear modules stays there: an adapter's gradient takes it."""
    kept: list[Tensor] = []
    hooks = [
        each.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        for each in module.modules()
        if isinstance(each, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _arguments(module: nn.Module, tokens: int) -> Mapping[str, Any]:
    """What the forward of some asks for beside the hidden states."""
    asked: dict[str, Any] = {
        "position_ids": torch.arange(tokens, device="meta")[None],
        "position_embeddings": None,
        "attention_mask": None,
        "use_cache": False,
    }
    return {name: asked[name] for name in asked.keys() & inspect.signature(module.forward).parameters}


@contextmanager
def _in_bf16(module: nn.Module) -> Iterator[None]:
    """Meanwhile what a module holds is in bf16 and frozen, as a base's tensors are."""
    held = [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]
    before = [(each.data, each.requires_grad) for each in held]
    try:
        for each in held:
            each.requires_grad_(False)  # noqa: FBT003 - torch's signature
            each.data = each.data.to(torch.bfloat16)
        yield
    finally:
        for each, (data, grad) in zip(held, before, strict=True):
            each.data = data
            each.requires_grad_(grad)


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no types for it
    """Counts the bytes of tensors that come and go, and those that operations read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.now = self.most = self.moved = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        old = {_key(each.untyped_storage()) for each in read}
        new = [each for each in written if _key(each.untyped_storage()) not in old]
        if new:  # else it is a view, or writes where it reads
            self.moved += sum(each.nbytes for each in (*read, *written))
        for each in new:
            self._add(each.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = _key(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(storage: Any) -> int:
    """What tells storages apart: on the meta device all are at the same address."""
    return int(storage._cdata)  # noqa: SLF001 - torch has no public word for it
