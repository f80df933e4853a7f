"""What a trained adapter adds to each parameter of its model: two thin factors and a scale, in PEFT's own layouts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from job.core.errors import DataError

_MOST_CONFIG_BYTES = 2**20
_OF_PEFT = "base_model.model."
_READ = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("task_type",),
    }
)
"""Keys of an adapter's config that decide where it stands and by how much it counts."""
_INDIFFERENT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version"),
        *("lora_dropout", "init_lora_weights", "megatron_core", "loftq_config", "runtime_config", "qalora_group_size"),
    }
)
"""Keys that change nothing once it is trained."""
_BLOCK = 2**24
"""Values of a sum that are in fp32 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """scaling * left @ right is what is added."""

    left: Tensor
    """[rows, r] fp32, or [experts, rows, r]."""
    right: Tensor
    """[r, columns] fp32, or [experts, r, columns]."""
    scaling: float

    def of(self, expert: int | None) -> "Factors":
        """Those of one expert; None: there are no experts."""
        if expert is None:
            return self
        return Factors(left=self.left[expert], right=self.right[expert], scaling=self.scaling)

    def added_to(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum with a matrix, or a stack of them, computed in fp32 and rounded once."""
        if self.left.ndim > 2:  # noqa: PLR2004 a stack of matrices
            result = torch.empty(value.shape, dtype=dtype)
            for expert in range(len(value)):
                result[expert] = self.of(expert).added_to(value[expert], dtype)
            return result
        result = torch.empty(value.shape, dtype=dtype)
        rows = max(1, _BLOCK // value.shape[1])
        for start in range(0, len(value), rows):
            some = slice(start, start + rows)
            result[some] = (value[some].float() + self.left[some] @ self.right * self.scaling).to(dtype)
        return result


class AdapterFile:
    """A published adapter, its tensors read when they are asked for."""

    def __init__(self, weights: Path, config: Path, model: Any) -> None:
        """Its names and shapes are held to the model's; no tensor is read.

        Args:
            weights: the adapter's tensors.
            config: its adapter_config.json.
            model: that it was published for, on the meta device; changed in place.

        Raises:
            DataError: it is none of this model, or of another kind than a plain LoRA.
        """
        self._path = weights
        adapted: Any = get_peft_model(model.float(), _config(config), low_cpu_mem_usage=True)
        modules = (
            (name.removeprefix(_OF_PEFT), module)
            for name, module in adapted.named_modules()
            if isinstance(module, LoraLayer)
        )
        self._modules: dict[str, tuple[str, Any]] = {}
        for name, module in modules:
            parameter = getattr(module, "parameter_name", "weight")
            self._modules[f"{name.replace('.base_layer', '')}.{parameter}"] = name, module
        form = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        self._hold_to({name: tuple(tensor.shape) for name, tensor in form.items()})

    def parameters(self) -> list[str]:
        """Names of the model's parameters that it adds to."""
        return [*self._modules]

    def factors(self, parameter: str) -> Factors:
        """What it adds to one of them.

        Raises:
            DataError: not every number of it is finite.
        """
        name, module = self._modules[parameter]
        scaling = float(module.scaling["default"])
        if "default" in module.lora_embedding_A:
            a, b = (self._read(f"{name}.lora_embedding_{each}") for each in "AB")
            return Factors(left=a.T, right=b.T, scaling=scaling)
        a, b = (self._read(f"{name}.lora_{each}.weight") for each in "AB")
        experts = getattr(module, "num_experts", 1)
        if experts > 1:
            # PEFT keeps each expert's rows of A together, and of B each place of the rank.
            a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)
            transposed = not module._did_swap_in_out_features  # noqa: SLF001 - how PEFT knows the experts' layout
        else:
            transposed = bool(module.fan_in_fan_out)
        if transposed:
            a, b = b.transpose(-2, -1), a.transpose(-2, -1)
        return Factors(left=b, right=a, scaling=scaling)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(_OF_PEFT + name).float()
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{self._path}: {name}: not every number is finite; start the run again")
        return tensor

    def _hold_to(self, form: Mapping[str, tuple[int, ...]]) -> None:
        try:
            with safe_open(self._path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no dict
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self._path}: the adapter cannot be read ({error}); fetch it again") from error
        wrong = sorted(name for name in {*form, *found} if form.get(name) != found.get(name))
        if wrong:
            raise DataError(
                f"{self._path}: {wrong[0]} is {found.get(wrong[0], 'not there')}, and "
                f"{form.get(wrong[0], 'nothing')} by its config and the base, as {len(wrong):,} tensors are "
                "otherwise: the adapter is another model's"
            )


def _config(path: Path) -> LoraConfig:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST_CONFIG_BYTES))
        if not isinstance(content, dict) or content.get("peft_type") != "LORA":
            raise ValueError("it is of no LoRA adapter")  # noqa: TRY301 - said once, below
        config = LoraConfig(**{key: content[key] for key in _READ & {*content}})
        others = [*_unknown(content, LoraConfig())]
        if others:
            raise ValueError(f"{', '.join(sorted(others))}: a kind of LoRA that this job neither trains nor merges")  # noqa: TRY301 as above
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}; only what a run of this job has published can be exported") from error
    return config


def _unknown(content: Mapping[str, Any], plain: LoraConfig) -> Iterator[str]:
    """Keys by which an adapter would be something else than a plain LoRA."""
    defaults = plain.to_dict()
    for key, value in content.items():
        if key not in _READ | _INDIFFERENT and value != defaults.get(key):
            yield key
