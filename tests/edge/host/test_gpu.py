"""The GPU's health through the real nvidia-ml-py, whose C library is played by an object with the same functions."""
# ruff: noqa: N802 - the C library's own names

import sys

import pynvml
import pytest
from nvml_calls import give, number, play, put

from job.core.errors import SickDeviceError
from job.edge.host.gpu import GpuProcess, look_at_gpu

UUID = "bd2f0a5c-6f1e-4e6a-9d6f-0c8a5a3f7b11"
BUS = "0000:1b:00.0"
CARD, PART, OTHER = 7, 8, 9
GIB = 1 << 30


class Driver:
    """A node's driver: functions by their C names, arguments as ctypes passes them, a return code each."""

    def __init__(self):
        self.names = {f"GPU-{UUID}": CARD, "GPU-other": OTHER}
        self.buses = {BUS: CARD}
        self.cards = {PART: CARD}
        self.errors = {CARD: 0, OTHER: 5}
        self.rows = (3, 0, 0, 0)
        """Remapped after correctable errors, after uncorrectable ones, pending, failed."""
        self.action = 0
        self.reasons = 0x1
        self.processes = []
        self.refused = {}
        """Function -> the code that it ends with."""
        self.opened = self.closed = 0

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in (refused := object.__getattribute__(self, "refused")):
            return lambda *_: refused[name]
        return object.__getattribute__(self, name)

    def nvmlInitWithFlags(self, _flags):
        self.opened += 1
        return pynvml.NVML_SUCCESS

    def nvmlShutdown(self):
        self.closed += 1
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetHandleByUUID(self, uuid, out):
        return give(out, self.names.get(uuid.value.decode()))

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus, out):
        return give(out, self.buses.get(bus.value.decode()))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part, out):
        card = self.cards.get(number(part))
        return pynvml.NVML_ERROR_INVALID_ARGUMENT if card is None else give(out, card)

    def nvmlDeviceGetUUID(self, gpu, out, _size):
        (out.value,) = [name.encode() for name, handle in self.names.items() if handle == number(gpu)]
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetTotalEccErrors(self, gpu, kind, since, out):
        assert (kind.value, since.value) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        if number(gpu) not in self.errors:
            return pynvml.NVML_ERROR_INVALID_ARGUMENT
        return put(out, self.errors[number(gpu)])

    def nvmlDeviceGetRemappedRows(self, _gpu, *outs):
        for out, value in zip(outs, self.rows, strict=True):
            put(out, value)
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetFieldValues(self, _gpu, count, out):
        assert count.value == 1
        (field,) = out._obj
        assert field.fieldId == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
        if self.action is None:
            field.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
        else:
            field.value.uiVal = self.action
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetCurrentClocksEventReasons(self, _gpu, out):
        return put(out, self.reasons)

    def nvmlDeviceGetTemperature(self, _gpu, _sensor, out):
        return put(out, 41)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, _gpu, count, out):
        if out is None:
            put(count, len(self.processes))
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE if self.processes else pynvml.NVML_SUCCESS
        for place, (pid, used) in zip(out, self.processes, strict=False):
            place.pid, place.usedGpuMemory = pid, used
        return put(count, len(self.processes))

    def nvmlSystemGetDriverVersion(self, out, _size):
        out.value = b"580.95.05"
        return pynvml.NVML_SUCCESS

    def nvmlSystemGetCudaDriverVersion(self, out):
        return put(out, 13000)


@pytest.fixture
def driver(monkeypatch):
    playing = play(monkeypatch, Driver())
    yield playing
    assert playing.opened == playing.closed


def test_a_healthy_gpu_is_told_with_all_its_facts(driver):
    health = look_at_gpu(uuid=UUID, bus_id=BUS)

    assert health.uuid == f"GPU-{UUID}"
    assert (health.driver, health.driver_cuda) == ("580.95.05", "13.0")
    assert (health.uncorrected_errors, health.remap_pending, health.recovery_action) == (0, False, "none")
    assert health.temperature_celsius == 41
    assert (health.slowdowns, health.processes, health.held_by) == ((), (), None)
    assert (health.warnings, health.not_looked_at) == ((), ())


# --- which GPU it is -------------------------------------------------------------------------------------------------


def test_the_gpu_is_found_by_its_uuid_whatever_its_number(driver):
    """Another GPU of the node with memory errors is another job's business."""
    driver.action = None

    assert look_at_gpu(uuid=UUID).uncorrected_errors == 0
    with pytest.raises(SickDeviceError, match="GPU-other: 5 uncorrectable"):
        look_at_gpu(uuid="other")


def test_the_gpu_is_found_by_its_place_where_the_uuid_says_nothing(driver):
    assert look_at_gpu(uuid="unheard-of", bus_id=BUS).uuid == f"GPU-{UUID}"
    assert look_at_gpu(uuid=None, bus_id=BUS).uuid == f"GPU-{UUID}"


def test_a_part_of_a_gpu_is_as_healthy_as_its_card(driver):
    driver.names["MIG-part"] = PART
    assert look_at_gpu(uuid="part").uuid == "MIG-part"

    driver.errors[CARD], driver.action = 2, None
    with pytest.raises(SickDeviceError, match="2 uncorrectable memory errors"):
        look_at_gpu(uuid="part")


def test_a_gpu_that_the_driver_does_not_list_is_not_looked_at(driver):
    assert look_at_gpu(uuid="unheard-of").not_looked_at == (
        "the health of GPU-unheard-of: the driver's list has no such GPU",
    )


# --- what makes it sick ----------------------------------------------------------------------------------------------


def set_driver(driver, **settings):
    for name, value in settings.items():
        setattr(driver, name, {CARD: value} if name == "errors" else value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"action": 1}, "asks for recovery: reset the GPU"),
        ({"action": 2}, "asks for recovery: reboot the node"),
        ({"action": 4}, "asks for recovery: drain peer-to-peer traffic and reset the GPU"),
        ({"action": 6}, "asks for recovery: reset the GPU's PCIe bus"),
        ({"action": 7}, "asks for recovery: reboot the system"),
        ({"rows": (0, 9, 0, 1)}, "a broken row of its memory could not be replaced"),
        ({"action": None, "errors": 4}, "4 uncorrectable memory errors (ECC) since its last reset"),
        ({"action": None, "rows": (0, 1, 1, 0)}, "a broken row of its memory waits to be replaced"),
        ({"refused": {"nvmlDeviceGetHandleByUUID": pynvml.NVML_ERROR_GPU_IS_LOST}}, "the GPU is lost"),
        ({"refused": {"nvmlDeviceGetTotalEccErrors": pynvml.NVML_ERROR_GPU_IS_LOST}}, "the GPU is lost"),
        ({"refused": {"nvmlDeviceGetTemperature": pynvml.NVML_ERROR_RESET_REQUIRED}}, "the GPU needs a reset"),
    ],
)
def test_a_sick_gpu_is_named_with_what_it_has_and_what_to_do(driver, settings, told):
    set_driver(driver, **settings)

    with pytest.raises(SickDeviceError) as caught:
        look_at_gpu(uuid=UUID)

    assert str(caught.value).startswith(f"GPU-{UUID}: ")
    assert told in str(caught.value)
    assert "drain" in str(caught.value)
    assert str(caught.value).endswith("and start the job on another one")


def test_a_library_that_does_not_close_hides_nothing(driver):
    driver.action = 1
    driver.refused = {"nvmlShutdown": pynvml.NVML_ERROR_GPU_IS_LOST}

    with pytest.raises(SickDeviceError, match="reset the GPU"):
        look_at_gpu(uuid=UUID)
    driver.closed = driver.opened


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"errors": 4}, ["4 uncorrectable memory errors (ECC)"]),
        ({"rows": (0, 1, 1, 0)}, ["replaced at the next reset"]),
        ({"errors": 1, "rows": (0, 1, 1, 0)}, ["1 uncorrectable", "replaced at the next reset"]),
        ({"action": 3}, ["asks for recovery: drain peer-to-peer traffic"]),
        ({"action": 5}, ["asks for recovery: recover the IMEX domain"]),
        ({"action": 99}, ["asks for recovery: not known here (99)"]),
        ({"reasons": 0x48}, ["held down now by a hardware slow-down, heat (hardware)"]),
        ({"reasons": 0xA0}, ["heat (driver), the power supply's brake"]),
        ({"reasons": 0x1 | 0x2 | 0x4 | 0x10 | 0x100}, []),
    ],
)
def test_what_the_driver_calls_usable_is_only_worth_a_word(driver, settings, told):
    """Contained memory errors leave a GPU usable (NVIDIA's own guide); a driver of R570 or newer knows."""
    set_driver(driver, **settings)

    warnings = look_at_gpu(uuid=UUID).warnings

    assert len(warnings) == len(told)
    for warning, words in zip(warnings, told, strict=True):
        assert warning.startswith(f"GPU-{UUID}: ")
        assert words in warning


# --- who else is on it -----------------------------------------------------------------------------------------------


def test_others_on_the_gpu_are_named_with_what_they_hold(driver):
    driver.processes = [(4711, 70 * GIB), (4712, pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value)]

    health = look_at_gpu(uuid=UUID)

    assert health.processes == (GpuProcess(pid=4711, used_bytes=70 * GIB), GpuProcess(pid=4712, used_bytes=None))
    assert health.held_by == "process 4711 with 70.0 GiB, process 4712"


# --- what cannot be asked is no failure ------------------------------------------------------------------------------

QUESTIONS = [
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetRemappedRows",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetUUID",
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetCudaDriverVersion",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_gpu_does_not_have_is_left_out(driver, question):
    driver.refused = {question: pynvml.NVML_ERROR_NOT_SUPPORTED}

    health = look_at_gpu(uuid=UUID)

    assert health.not_looked_at == health.warnings == ()


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_the_driver_refuses_is_said_and_the_rest_is_looked_at(driver, question):
    driver.refused = {question: pynvml.NVML_ERROR_NO_PERMISSION}

    health = look_at_gpu(uuid=UUID)

    (missing,) = health.not_looked_at
    assert missing.endswith(": Insufficient Permissions")
    assert health.temperature_celsius == 41 or question == "nvmlDeviceGetTemperature"


def test_a_function_that_an_older_driver_lacks_is_left_out(driver, monkeypatch):
    monkeypatch.delattr(Driver, "nvmlDeviceGetFieldValues")

    health = look_at_gpu(uuid=UUID)

    assert health.recovery_action is None
    assert health.not_looked_at == ()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", "the recovery action"),
        ("nvmlDeviceGetTemperature", "the temperature"),
        ("nvmlSystemGetDriverVersion", "the driver's version"),
        ("nvmlSystemGetCudaDriverVersion", "the driver's CUDA"),
    ],
)
def test_a_name_that_another_version_of_the_library_lacks_is_said(driver, monkeypatch, name, what):
    monkeypatch.delattr(pynvml, name)

    assert look_at_gpu(uuid=UUID).not_looked_at == (f"{what}: this version of nvidia-ml-py does not ask for it",)


def test_a_node_without_the_drivers_library_is_not_looked_at(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", no_library)

    assert look_at_gpu(uuid=UUID).not_looked_at == ("the GPU's health: NVML Shared Library Not Found",)


def test_a_driver_that_does_not_start_is_not_looked_at(driver):
    driver.refused = {"nvmlInitWithFlags": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}

    assert look_at_gpu(uuid=UUID).not_looked_at == ("the GPU's health: RM has detected an NVML/RM version mismatch.",)


def test_without_the_package_the_look_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert look_at_gpu(uuid=UUID).not_looked_at == ("the GPU's health: nvidia-ml-py is not installed (extra `gpu`)",)
