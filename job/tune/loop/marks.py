"""Moments of a step, on the clock of the device that makes it."""

import time

import torch

from job.core.errors import PeerLostError
from job.tune.world import World

_LOOK_SECONDS = 2e-4
_LOST_SECONDS = 2.0
"""How long a device may still work off what does not need the rank that is gone: an update, once the sums stand."""
Mark = float | torch.cuda.Event
"""A moment: on the GPU's own clock where there is one, so that taking it waits for nothing."""


def take_mark(device: torch.device) -> Mark:
    """This moment."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch has no types here
    event.record()
    return event


def wait_for(mark: Mark, world: World) -> None:
    """Wait for a moment on the GPU; with other ranks in a loop, for one that is gone is waited for for ever there.

    Raises:
        PeerLostError: one is gone, and the device has not come that far, or only because sums were broken off.
    """
    if isinstance(mark, float):
        return
    if world.size == 1:
        mark.synchronize()
        return
    lost_at: float | None = None
    while True:
        passed = mark.query()  # type: ignore[no-untyped-call] # torch has no types here
        if world.broken_off:  # looked at last: what had passed before is whole
            raise PeerLostError("another process of the run is gone, and what this device waited for was broken off")
        if passed:
            return
        if world.lost:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _LOST_SECONDS:
                raise PeerLostError("another process of the run is gone, and this device waits for it")
        time.sleep(_LOOK_SECONDS)


def seconds_between(began: Mark, ended: Mark) -> float:
    """Both of one kind, and passed."""
    if isinstance(began, float) or isinstance(ended, float):
        return float(ended) - float(began)  # type: ignore[arg-type] # both are of one kind
    return float(began.elapsed_time(ended)) / 1000
