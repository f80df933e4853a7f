"""Torch's random generators, as a checkpoint holds them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from job.tune.device.device import cuda_in_use


def random_state() -> dict[str, Tensor]:
    """Torch's generators as they stand: the host's, and the GPU's where one is in use. Waits for no GPU."""
    state = {"torch": torch.get_rng_state()}
    if cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Put them back; a GPU's is left out where none is in use."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and cuda_in_use():
        torch.cuda.set_rng_state(state["cuda"])
