"""Which tensors of a base's files make which parameter of its model, by transformers' own rules; read one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from job.core.base.mxfp4 import is_mxfp4
from job.core.base.promises import STATE
from job.core.errors import DataError
from job.tune.model.config import read_config
from job.tune.model.four_bit import dequantised_in_files
from job.tune.model.stored.mxfp4 import Stored, with_decoded
from job.tune.model.stored.tensor_files import stored_tensors

STATES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""What stands beside a weight in 4 bits, and its state."""
STACK = 3
"""Dimensions of all experts' weights of a layer."""
_CPU = torch.device("cpu")


def tensors_in(folder: Path, *, not_finite: set[str]) -> dict[str, Stored]:
    """Every tensor of a model's files, experts in MXFP4 as they are decoded; no data is read.

    Args:
        folder: a base's, or a merged model's.
        not_finite: gets the name of each tensor that is read and holds a value that is NaN or infinite.
    """
    config, tensors = read_config(folder), stored_tensors(folder, _CPU, not_finite=not_finite)
    form = getattr(config, "quantization_config", None)
    return with_decoded(tensors, _CPU) if is_mxfp4(form, config.model_type) else {**tensors}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors of the files that become parameters of the model together."""

    target: str
    """transformers' name for what they become."""
    converter: WeightConverter | None
    """What makes them that; None: one tensor, which is one parameter as it stands."""
    sources: Mapping[str, Sequence[str]]
    """The converter's pattern -> names, in the order of the experts where there is one for each."""
    made: Mapping[str, torch.Size]
    """The parameters, with their shapes."""

    @property
    def names(self) -> list[str]:
        """Of all sources."""
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What can be converted by itself of a group: one expert's share, or all of it."""

    group: Group
    expert: int | None
    """None: all of it."""
    pieces: Mapping[str, Sequence[str]]
    """As the group's sources; of a stack of all experts a piece is the share of this one."""


class Origins:
    """A base's files, seen from the parameters of its decoder."""

    def __init__(self, model: Any, tensors: Mapping[str, Stored]) -> None:
        """No data is read.

        Args:
            model: of the decoder's own class, on the meta device.
            tensors: by their names in that class, or by those that transformers renames to them.
        """
        self._model, self._tensors = model, tensors
        self._packed = {name.partition(STATE)[0] for name in tensors if STATE in name}
        states = {name + state for name in self._packed for state in STATES}
        self._plain = [name for name in tensors if name not in states and STATE not in name]
        self._groups = {name: group for group in self._sorted_out() for name in group.names}
        self._of_parameter = {made: group for group in self._groups.values() for made in group.made}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._of_parameter

    def parameters(self) -> list[str]:
        """Every parameter and buffer of the model that the files have."""
        return [*self._of_parameter]

    def names(self) -> list[str]:
        """Tensors of the files, what stands beside those in 4 bits apart."""
        return self._plain

    def stored(self, name: str) -> Stored:
        """One of them as it stands in its file."""
        return self._tensors[name]

    def is_packed(self, name: str) -> bool:
        """Whether it is in 4 bits."""
        return name in self._packed

    def group_of(self, name: str) -> Group | None:
        """The group of a tensor of the files; None: the model has no use for it."""
        return self._groups.get(name)

    def read(self, name: str) -> Tensor:
        """A tensor of the files on the host; what is in 4 bits is dequantised.

        Raises:
            DataError: it is in 4 bits, and what stands beside it cannot be read.
        """
        value: Tensor = self._tensors[name][...]
        if name not in self._packed:
            return value
        beside = {each: self._tensors[each][...] for each in self._tensors if each.startswith(f"{name}.")}
        return dequantised_in_files(value, beside, name=name)

    def parameter(self, name: str) -> Tensor:
        """A parameter of the model, as transformers makes it of the files."""
        group = self._of_parameter[name]
        return self.converted(Part(group=group, expert=None, pieces=group.sources), self._values(group.sources))[name]

    def parts(self, group: Group) -> Iterator[Part]:
        """A group, cut into what can be converted by itself: neither memory nor time need all experts at once."""
        experts = self._experts(group)
        if experts is None:
            yield Part(group=group, expert=None, pieces=group.sources)
            return
        for expert in range(experts):
            pieces = {
                pattern: [names[expert]] if len(names) == experts else names for pattern, names in group.sources.items()
            }
            yield Part(group=group, expert=expert, pieces=pieces)

    def values(self, part: Part) -> dict[str, list[Tensor]]:
        """What stands in the files of a part, by pattern; of a stack this expert's share, as a stack of one."""
        return {pattern: [self.share(name, part.expert) for name in names] for pattern, names in part.pieces.items()}

    def converted(self, part: Part, values: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """What transformers makes of these values, by the parameters' names; of an expert's, stacks of one.

        Raises:
            DataError: they do not go together.
        """
        group = part.group
        if group.converter is None:
            ((value,),) = values.values()
            return {group.target: value}
        rule = deepcopy(group.converter)
        for pattern, tensors in values.items():
            rule.collected_tensors[pattern] = [*tensors]
        made: dict[str, Any] = rule.convert(group.target, model=self._model, config=self._model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if part.expert is not None and any(len(value) != 1 for value in found.values()):
            raise DataError(
                f"{group.target}: expert {part.expert} of the files is no matrix of it; copy the base again"
            )
        return found

    def share(self, name: str, expert: int | None) -> Tensor:
        """What a tensor of the files has of one expert: of a stack a stack of one, of anything else all of it."""
        if expert is None or len(self._tensors[name].header.shape) < STACK:
            return self.read(name)
        share: Tensor = self._tensors[name][expert : expert + 1]
        return share

    def _values(self, sources: Mapping[str, Sequence[str]]) -> dict[str, list[Tensor]]:
        return {pattern: [self.read(name) for name in names] for pattern, names in sources.items()}

    def _experts(self, group: Group) -> int | None:
        """How many a group is of; None: it is of none, or cannot be cut by them."""
        sizes = {shape[0] for shape in group.made.values() if len(shape) == STACK}
        if len(sizes) != 1 or any(len(shape) != STACK for shape in group.made.values()):
            return None
        (experts,) = sizes

        def by_expert(names: Sequence[str]) -> bool:
            shapes = [self._tensors[name].header.shape for name in names]
            alone = len(names) == experts > 1 and all(len(shape) < STACK for shape in shapes)
            return alone or (len(names) == 1 and len(shapes[0]) == STACK and shapes[0][0] == experts)

        return experts if all(map(by_expert, group.sources.values())) else None

    def _sorted_out(self) -> Iterator[Group]:
        """By the rules by which transformers itself renames and joins what files hold."""
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        expected, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, dict[str, list[str]]] = {}
        rule_of: dict[str, WeightConverter | None] = {}
        for name in sorted(self._plain, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            rule_of[target] = None if pattern is None else of_pattern[pattern]
            sources.setdefault(target, {}).setdefault(pattern or name, []).append(name)
        for target, found in sources.items():
            made = self._made(target, rule_of[target], found, expected)
            if made:
                yield Group(target=target, converter=rule_of[target], sources=found, made=made)

    def _made(
        self,
        target: str,
        converter: WeightConverter | None,
        sources: Mapping[str, Sequence[str]],
        expected: Mapping[str, Tensor],
    ) -> dict[str, torch.Size]:
        """What the model gets of these tensors; nothing, where it has no such parameter."""
        if converter is None:
            return {target: expected[target].shape} if target in expected else {}
        group = Group(target=target, converter=converter, sources=sources, made={})
        empty = {
            pattern: [torch.empty(self._tensors[name].header.shape, device="meta") for name in names]
            for pattern, names in sources.items()
        }
        made = self.converted(Part(group=group, expert=None, pieces=sources), empty)
        return {name: value.shape for name, value in made.items() if name in expected}
