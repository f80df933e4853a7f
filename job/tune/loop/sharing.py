"""What the ranks of a run have in common: the state that they begin with, and the proof that they still have it."""

from dataclasses import asdict
from typing import Any

from job.core.errors import SickDeviceError
from job.core.plan.cut import Cut, common_cut
from job.tune.device.digest import digest
from job.tune.loop.checkpoint import State, flatten
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import set_schedule
from job.tune.world import World


def share_state(world: World, state: State, adapter: FlatAdapter) -> None:
    """Give every rank the state that rank 0 holds: weights, optimizer, schedule, step, and how batches are cut."""
    if world.size == 1:
        return
    progress = state.progress
    tensors, plain = flatten(state.optimizer.state_dict())
    tensors |= {f"adapter.{i}": vector.data for i, vector in enumerate(adapter.vectors)}
    said, shared = world.share([progress.step, plain["state"], asdict(progress.cut)], tensors)
    if world.rank == 0:
        return
    step, plain, cut = said
    for i, vector in enumerate(adapter.vectors):
        vector.data.copy_(shared.pop(f"adapter.{i}"))
    kept: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain.items()}
    for key, tensor in shared.items():
        index, _, name = key.partition(".")
        kept[int(index)][name] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": kept, "param_groups": groups})
    set_schedule(state.scheduler, state.optimizer, step=step)
    progress.step, progress.cut = step, Cut(**cut)


def settle(world: World, adapter: FlatAdapter, cut: Cut, *, waited_seconds: float) -> tuple[Cut, float]:
    """Compare the ranks' adapters, and find the cut that fits all of them: what is committed goes on alike everywhere.

    Returns:
        The cut from here on, and how long a rank has waited for others on the average.

    Raises:
        SickDeviceError: an adapter is another one, although all ranks have added the same bits to the same ones.
        PeerLostError: another rank is gone.
    """
    if world.size == 1:
        return cut, 0.0
    said = world.gather([_digest(adapter), asdict(cut), waited_seconds])
    others = [rank for rank, (digest, _, _) in enumerate(said) if digest != said[0][0]]
    if others:
        raise SickDeviceError(
            f"the adapter of rank {', '.join(map(str, others))} is another one than that of rank 0, although both were "
            "made by the same updates: one of these devices is sick, nothing of it is committed; start the same job "
            "again on other ones"
        )
    return common_cut([Cut(**each) for _, each, _ in said]), sum(waited for _, _, waited in said) / world.size


def _digest(adapter: FlatAdapter) -> list[int]:
    return [int(digest(vector)) for vector in adapter.vectors]
