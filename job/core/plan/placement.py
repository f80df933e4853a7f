"""Where the base of a run goes: the whole of it on each GPU, or its layers spread over all of them."""

from dataclasses import dataclass

from job.core.errors import UsageError
from job.core.plan.cut import least_bytes
from job.core.plan.memory import GIB, AdapterShape, DeviceMemory, EngineName, ModelShape, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placement, and why it is this one."""

    placement: Placement
    reason: str


def refuse_shards_of_one(wanted: Placement | None) -> None:
    """What is asked for, of one process.

    Raises:
        UsageError: it is asked for shards, and there is nothing to spread them over.
    """
    if wanted == "sharded":
        raise UsageError("--base-placement sharded: there is one GPU, and nothing to spread the base over; give more")


def place(
    shape: ModelShape,
    adapter: AdapterShape,
    *,
    engine: EngineName,
    device: DeviceMemory,
    max_length: int,
    ranks: int,
    wanted: Placement | None,
    against: str | None,
) -> Placed:
    """Replicated, which is faster, where one GPU holds the base and one example at a time; else sharded.

    Args:
        shape: of the base.
        adapter: of the adapter.
        engine: that will compute the gradients, as far as the config shows.
        device: what is free on a GPU.
        max_length: tokens of the longest example.
        ranks: GPUs.
        wanted: what is asked for; None: nothing is.
        against: why this base cannot be sharded; None: it can.

    Raises:
        UsageError: it is asked for shards, and there is nothing to spread them over, or they cannot be.
    """
    if wanted == "sharded":
        if ranks == 1:
            refuse_shards_of_one(wanted)
        if against is not None:
            raise UsageError(f"--base-placement sharded: {against}; use GPUs that hold the whole base")
        return Placed(placement="sharded", reason="asked for")
    if wanted == "replicated":
        return Placed(placement="replicated", reason="asked for")
    if ranks == 1 or device.kind == "cpu":
        return Placed(placement="replicated", reason="one GPU" if ranks == 1 else "on the CPU")
    whole = least_bytes(shape, adapter, engine=engine, max_length=max_length, shards=1)
    said = f"a GPU needs {whole / GIB:.1f} GiB to hold the whole base, and {device.free_bytes / GIB:.1f} GiB are free"
    if whole <= device.free_bytes:
        return Placed(placement="replicated", reason=said)
    if against is not None:
        return Placed(placement="replicated", reason=f"{said}; it cannot be sharded: {against}")
    return Placed(placement="sharded", reason=said)
