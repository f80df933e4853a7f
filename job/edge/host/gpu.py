"""What the driver reports of GPUs: memory errors, repairs, slow-downs, who else is on one, links. Owner of NVML.

The driver's management library counts GPUs in its own order and sees all of them, whatever CUDA_VISIBLE_DEVICES is:
the caller names the one it computes on by UUID or place on the bus.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from job.core.errors import SickDeviceError
from job.core.plan.memory import GIB

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process on the GPU; inside a container the driver may give a number that means something outside only."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """What the driver reports about one GPU; None where it reports nothing."""

    uuid: str | None = None
    """As the driver writes it, for the log and for whoever looks at the node."""
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA that the driver supports."""
    temperature_celsius: int | None = None
    uncorrected_errors: int | None = None
    """Memory errors since the last reset of the GPU or load of the driver."""
    remap_pending: bool | None = None
    """A broken row of memory is replaced at the next reset."""
    recovery_action: str | None = None
    """What the driver (R570 or newer) asks for; `none` where all is well."""
    slowdowns: tuple[str, ...] = ()
    """Why the clocks are held down now, as far as the hardware does it."""
    processes: tuple[GpuProcess, ...] = ()
    """That compute on it now; before CUDA starts here, all of them are others."""
    not_looked_at: tuple[str, ...] = ()
    """What could not be asked, and why; what a GPU does not have is left out."""
    warnings: tuple[str, ...] = ()
    """Sentences for the log and the report."""

    @property
    def held_by(self) -> str | None:
        """Who else is on it, in words; None when nobody is known."""
        return ", ".join(_described(process) for process in self.processes) or None


def _described(process: GpuProcess) -> str:
    if process.used_bytes is None:
        return f"process {process.pid}"
    return f"process {process.pid} with {process.used_bytes / GIB:.1f} GiB"


def visible_gpus(chosen: str | None, *, root: Path = Path("/")) -> int:
    """How many GPUs this process may use, without asking the driver, which takes a while; 0: none is seen.

    Args:
        chosen: CUDA_VISIBLE_DEVICES; None: it is not set.
        root: where /dev is.
    """
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return len([path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def look_at_gpu(*, uuid: str | None, bus_id: str | None = None) -> GpuHealth:
    """Ask the driver about one GPU; also after a CUDA error that leaves open whether the hardware is to blame.

    Args:
        uuid: as CUDA reports it, without a prefix.
        bus_id: as `0000:1b:00.0`; taken where the UUID finds nothing.

    Raises:
        SickDeviceError: the GPU is lost, or it needs a reset, a reboot or a repair before it can be trusted.
    """
    try:
        import pynvml
    except ImportError:
        return GpuHealth(not_looked_at=("the GPU's health: nvidia-ml-py is not installed (extra `gpu`)",))
    try:
        with _open(pynvml):
            return _Look(pynvml, uuid=uuid, bus_id=bus_id).health()
    except pynvml.NVMLError as error:
        return GpuHealth(not_looked_at=(f"the GPU's health: {error}",))


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLinks:
    """How the GPUs that a process may use reach each other."""

    names: tuple[str, ...] = ()
    """Of each."""
    pairs: Mapping[str, int] = field(default_factory=dict)
    """By which way, in words, so many pairs reach each other."""
    nvlinks: int = 0
    """That are up at the first of them."""
    not_known: str | None = None
    """Why it could not be asked."""

    def __str__(self) -> str:
        gpus = ", ".join(f"{count} {name}" for name, count in Counter(self.names).items())
        if self.not_known is not None:
            return f"{gpus}; how they are linked is not known: {self.not_known}"
        every = sum(self.pairs.values())
        ways = [
            (f"{self.nvlinks} x " if way == _BY_NVLINK and self.nvlinks else "")
            + (way if count == every else f"{way} ({count} of {every} pairs)")
            for way, count in self.pairs.items()
        ]
        return f"{gpus}: {'; '.join(ways)}" if ways else gpus


def look_at_links(chosen: str | None, *, root: Path = Path("/")) -> GpuLinks | None:
    """Ask the driver how the GPUs that this process may use reach each other; None: there is none.

    Args:
        chosen: CUDA_VISIBLE_DEVICES; None: it is not set.
        root: where /dev is.
    """
    count = visible_gpus(chosen, root=root)
    if not count:
        return None
    unknown = ("GPUs" if count > 1 else "GPU",) * count
    try:
        import pynvml
    except ImportError:
        return GpuLinks(names=unknown, not_known="nvidia-ml-py is not installed (extra `gpu`)")
    try:
        with _open(pynvml):
            return _links_of(pynvml, chosen)
    except pynvml.NVMLError as error:
        return GpuLinks(names=unknown, not_known=str(error))


def _links_of(pynvml: Any, chosen: str | None) -> GpuLinks:
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    if chosen is not None:
        wanted = [name.strip() for name in chosen.split(",")][: visible_gpus(chosen)]
        uuids = [pynvml.nvmlDeviceGetUUID(gpu) for gpu in gpus]
        # CUDA takes the beginning of a UUID too; and its numbers are the driver's where all GPUs are alike.
        named = [[str(place) == name or uuids[place].startswith(name) for place in range(len(gpus))] for name in wanted]
        if not all(map(any, named)):
            unknown = ("GPUs" if len(wanted) > 1 else "GPU",) * len(wanted)
            return GpuLinks(names=unknown, not_known=f"the driver lists {len(gpus)}, and not all of {chosen}")
        gpus = [gpus[each.index(True)] for each in named]
    ways = Counter(_way(pynvml, one, other) for one, other in combinations(gpus, 2))
    return GpuLinks(
        names=tuple(pynvml.nvmlDeviceGetName(gpu) for gpu in gpus),
        pairs=dict(ways),
        nvlinks=_nvlinks(pynvml, gpus) if _BY_NVLINK in ways else 0,
    )


def _way(pynvml: Any, one: Any, other: Any) -> str:
    """How two GPUs reach each other, in words."""
    if pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
        return _BY_NVLINK
    direct = pynvml.nvmlDeviceGetP2PStatus(one, other, _P2P_READ) == pynvml.NVML_P2P_STATUS_OK
    level = pynvml.nvmlDeviceGetTopologyCommonAncestor(one, other)
    return f"{'PCIe' if direct else 'no link, by the memory of the host'}, {_LEVELS.get(level, 'far apart')}"


def _nvlinks(pynvml: Any, gpus: Sequence[Any]) -> int:
    """That are up at the first GPU; 0: the driver does not count them."""
    up = 0
    with suppress(pynvml.NVMLError):
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            up += pynvml.nvmlDeviceGetNvLinkState(gpus[0], link)
    return up


_BY_NVLINK = "NVLink"
_P2P_READ = 0
"""NVML_P2P_CAPS_INDEX_READ, which nvidia-ml-py has as a tuple."""
_LEVELS = {
    0: "on one board",
    10: "behind one switch",
    20: "behind several switches",
    30: "at one host bridge",
    40: "in one NUMA node",
    50: "across NUMA nodes",
}
"""NVML_TOPOLOGY_*, as `nvidia-smi topo -m` has them: PIX, PXB, PHB, NODE, SYS."""


@contextmanager
def _open(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):  # what was found counts
            pynvml.nvmlShutdown()


class _Look:
    """One look at one GPU, with the library open."""

    def __init__(self, pynvml: Any, *, uuid: str | None, bus_id: str | None) -> None:
        self._nvml = pynvml
        self._name = f"GPU-{uuid}" if uuid else f"GPU at {bus_id}"
        self._not_looked_at: list[str] = []
        self._absent = {
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NOT_FOUND,
            pynvml.NVML_ERROR_INVALID_ARGUMENT,  # what a whole card has and a part of one has not
        }
        self._visible = self._find(uuid, bus_id)
        self._physical = None if self._visible is None else self._card(self._visible)

    def health(self) -> GpuHealth:
        """All answers, judged."""
        nvml, gpu = self._nvml, self._physical
        if gpu is None:
            why = "; ".join(self._not_looked_at) or "the driver's list has no such GPU"
            return GpuHealth(not_looked_at=(f"the health of {self._name}: {why}",))
        errors: int | None = self._ask(
            "memory errors",
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        )
        rows = self._ask("remapped rows", lambda: nvml.nvmlDeviceGetRemappedRows(gpu))
        pending, failed = (None, None) if rows is None else (bool(rows[2]), bool(rows[3]))
        action = self._recovery_action()
        self._refuse_sick(action=action, remap_failed=failed, errors=errors, remap_pending=pending)
        slowdowns = self._slowdowns()
        cuda = self._ask("the driver's CUDA", lambda: nvml.nvmlSystemGetCudaDriverVersion())  # noqa: PLW0108 - named late
        return GpuHealth(
            uuid=self._ask("the UUID", lambda: nvml.nvmlDeviceGetUUID(self._visible)),
            driver=self._ask("the driver's version", lambda: nvml.nvmlSystemGetDriverVersion()),  # noqa: PLW0108 - named late
            driver_cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            temperature_celsius=self._ask(
                "the temperature", lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
            ),
            uncorrected_errors=errors,
            remap_pending=pending,
            recovery_action=action,
            slowdowns=slowdowns,
            processes=self._processes(),
            not_looked_at=tuple(self._not_looked_at),
            warnings=self._warnings(action=action, errors=errors, remap_pending=pending, slowdowns=slowdowns),
        )

    def _find(self, uuid: str | None, bus_id: str | None) -> Any:
        """What CUDA computes on; None when the driver's list has no such GPU."""
        nvml = self._nvml
        names = [] if uuid is None else [f"GPU-{uuid}", f"MIG-{uuid}"]
        ways = [partial(nvml.nvmlDeviceGetHandleByUUID, name) for name in names]
        if bus_id is not None:
            ways.append(partial(nvml.nvmlDeviceGetHandleByPciBusId, bus_id))
        found = (self._ask("finding it", way) for way in ways)
        return next((handle for handle in found if handle is not None), None)

    def _card(self, visible: Any) -> Any:
        """The card that a part of it belongs to: the card has the memory errors."""
        card = self._ask("its card", partial(self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, visible))
        return visible if card is None else card

    def _ask(self, what: str, question: Callable[[], _Answer]) -> _Answer | None:
        """The answer; None when there is none. It is noted, unless it is about what this GPU does not have."""
        nvml = self._nvml
        try:
            return question()
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                raise self._sick("the GPU is lost", "drain the node and restart it") from error
            if error.value == nvml.NVML_ERROR_RESET_REQUIRED:
                raise self._sick("the GPU needs a reset", "drain it and reset it (nvidia-smi --gpu-reset)") from error
            if error.value not in self._absent:
                self._not_looked_at.append(f"{what}: {error}")
        except AttributeError:  # an older library, or a newer one that let go of a name
            self._not_looked_at.append(f"{what}: this version of nvidia-ml-py does not ask for it")
        return None

    def _recovery_action(self) -> str | None:
        nvml = self._nvml

        def ask() -> str:
            (field,) = nvml.nvmlDeviceGetFieldValues(self._physical, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
            if field.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(field.nvmlReturn)
            return _ACTIONS.get(field.value.uiVal, f"not known here ({field.value.uiVal})")

        return self._ask("the recovery action", ask)

    def _refuse_sick(
        self, *, action: str | None, remap_failed: bool | None, errors: int | None, remap_pending: bool | None
    ) -> None:
        if action in _SICK_ACTIONS:
            raise self._sick(f"the driver asks for recovery: {action}", f"drain the node and do that: {action}")
        if remap_failed:
            raise self._sick("a broken row of its memory could not be replaced", "drain the node and have it exchanged")
        if action is None and errors:
            # A newer driver reports itself whether the damage is contained; without that the memory is not trusted.
            raise self._sick(
                f"{errors} uncorrectable memory errors (ECC) since its last reset",
                "drain it and reset it (nvidia-smi --gpu-reset)",
            )
        if action is None and remap_pending:
            raise self._sick(
                "a broken row of its memory waits to be replaced", "drain it and reset it (nvidia-smi --gpu-reset)"
            )

    def _sick(self, what: str, remedy: str) -> SickDeviceError:
        return SickDeviceError(f"{self._name}: {what}; {remedy}, and start the job on another one")

    def _slowdowns(self) -> tuple[str, ...]:
        held = self._ask("slow-downs", lambda: self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._physical))
        return tuple(reason for bit, reason in _SLOWDOWNS.items() if held is not None and held & bit)

    def _processes(self) -> tuple[GpuProcess, ...]:
        found = self._ask("processes", lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._visible)) or []
        return tuple(GpuProcess(pid=each.pid, used_bytes=each.usedGpuMemory) for each in found)

    def _warnings(
        self, *, action: str | None, errors: int | None, remap_pending: bool | None, slowdowns: tuple[str, ...]
    ) -> tuple[str, ...]:
        found = []
        if errors:
            found.append(f"{errors} uncorrectable memory errors (ECC) since its last reset; the driver calls it usable")
        if remap_pending:
            found.append("a broken row of its memory is replaced at the next reset; plan one")
        if action not in {None, _NO_ACTION}:
            found.append(f"the driver asks for recovery: {action}")
        if slowdowns:
            found.append(f"held down now by {', '.join(slowdowns)}; look at its cooling and power")
        return tuple(f"{self._name}: {each}" for each in found)


_NO_ACTION = "none"
_ACTIONS = {
    0: _NO_ACTION,
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain peer-to-peer traffic",
    4: "drain peer-to-peer traffic and reset the GPU",
    5: "recover the IMEX domain",
    6: "reset the GPU's PCIe bus",
    7: "reboot the system",
}
"""NVML_GPU_RECOVERY_ACTION_*."""
_SICK_ACTIONS = frozenset(_ACTIONS[number] for number in (1, 2, 4, 6, 7))
"""The others are about traffic between GPUs, and a run has one."""
_SLOWDOWNS = {
    0x08: "a hardware slow-down",
    0x40: "heat (hardware)",
    0x20: "heat (driver)",
    0x80: "the power supply's brake",
}
"""nvmlClocksEventReason*; power cap and idle are everyday."""
