"""The look at the device before a run: what it finds out, and that each way of computing wrongly is seen."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from job.core.errors import CannotFitError, SickDeviceError
from job.tune import device_check as preflight
from job.tune.device import compute_dtype
from job.tune.device_check import look_at_device

CPU = torch.device("cpu")
GIB = 1 << 30


def cuda_error(text, code=None):
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code
    return error


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch.cuda would describe it, which computes on the CPU; its numbers can be changed."""
    told = SimpleNamespace(count=1, capability=(9, 0), memory=(139 * GIB, 140 * GIB), name="NVIDIA H200")
    fakes = {
        "device_count": lambda: told.count,
        "get_device_name": lambda _device: told.name,
        "get_device_capability": lambda _device: told.capability,
        "mem_get_info": lambda _device: told.memory,
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    told.device = torch.device("cuda", 0)
    told.checks = []
    monkeypatch.setattr(preflight, "_check_products", lambda _device, _name: told.checks.append(1))
    return told


# --- the arithmetic, for real on the CPU -----------------------------------------------------------------------------


def test_a_device_that_computes_right_is_let_through_and_random_numbers_stay_as_they_were():
    before = torch.get_rng_state()

    facts = look_at_device(CPU)

    assert torch.equal(torch.get_rng_state(), before)
    assert facts.name.startswith("CPU, ")
    assert (facts.count, facts.capability, facts.total_bytes, facts.free_bytes) == (0, None, None, None)
    assert facts.torch == torch.__version__
    assert facts.warnings == ()


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32")])
def test_one_wrong_number_in_a_product_is_seen(monkeypatch, has_bf16, name):
    """The product has no rounding at all, so the smallest step of bf16 that is possible in it is a fault."""
    monkeypatch.setattr(compute_dtype, "processor_multiplies_bf16", lambda: has_bf16)
    multiply = torch.Tensor.__matmul__

    def wrong(left, right):
        product = multiply(left, right)
        if product.dtype is not torch.float64:  # what it is compared with
            product[300, 7] += 2
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)

    with pytest.raises(
        SickDeviceError, match=rf"CPU, .* computes wrongly: 1 of 262,144 numbers of a product in {name}"
    ):
        look_at_device(CPU)


def quantised_wrongly(change):
    """bitsandbytes' quantiser, with a change to what it stores."""
    quantise = bitsandbytes.functional.quantize_4bit

    def wrong(weight, **options):
        packed, state = quantise(weight, **options)
        change(packed, state)
        return packed, state

    return wrong


def one_code(packed, _state):
    packed[40] = (int(packed[40]) & 0x0F) | (0x0 if int(packed[40]) >> 4 > 7 else 0xF0)


def one_scale(_packed, state):
    state.absmax[10] = 0 if state.absmax[10] > 128 else 255


def all_scales(_packed, state):
    state.offset *= 1.1


@pytest.mark.parametrize("change", [one_code, one_scale, all_scales])
def test_a_4_bit_weight_that_is_not_what_was_stored_is_seen(monkeypatch, change):
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", quantised_wrongly(change))

    with pytest.raises(SickDeviceError, match="a 4-bit product of 1 rows is off by"):
        look_at_device(CPU)


def test_another_4_bit_code_is_seen(monkeypatch):
    """The sixteen values are known here: a library that mixes them up is not its own judge."""
    quantise = bitsandbytes.functional.quantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "quantize_4bit", lambda w, **o: quantise(w, **{**o, "quant_type": "fp4"})
    )

    with pytest.raises(SickDeviceError, match="4-bit product"):
        look_at_device(CPU)


@pytest.mark.parametrize(("rows", "value"), [(1, float("nan")), (64, float("nan")), (64, 0.0)])
def test_a_kernel_that_gives_nonsense_is_seen_whichever_it_is(monkeypatch, rows, value):
    """One row and many rows go through two kernels."""
    multiply = bitsandbytes.matmul_4bit

    def wrong(left, packed, quant_state):
        product = multiply(left, packed, quant_state=quant_state)
        return product.fill_(value) if len(left) == rows else product

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", wrong)

    with pytest.raises(SickDeviceError, match=f"4-bit product of {rows} rows"):
        look_at_device(CPU)


# --- what torch knows of a GPU ---------------------------------------------------------------------------------------


def test_a_free_gpu_is_described_by_its_facts(gpu):
    facts = look_at_device(gpu.device)

    assert (facts.name, facts.count, facts.capability) == ("NVIDIA H200", 1, "9.0")
    assert (facts.free_bytes, facts.total_bytes) == gpu.memory
    assert facts.warnings == ()
    assert gpu.checks == [1]


def test_more_than_one_visible_gpu_gives_a_warning(gpu):
    gpu.count = 4

    (warning,) = look_at_device(gpu.device).warnings

    assert "4 GPUs are visible and one is used (number 0, NVIDIA H200)" in warning


def test_a_gpu_that_is_older_than_the_kernels_cannot_run_it(gpu):
    gpu.capability = (7, 0)

    with pytest.raises(CannotFitError, match=r"compute capability 7\.0, and the 4-bit kernels need 7\.5"):
        look_at_device(gpu.device)
    assert gpu.checks == []


@pytest.mark.parametrize(
    ("free", "held_by", "told"),
    [
        (6.9, "process 77 with 130.0 GiB", "others hold the rest (process 77 with 130.0 GiB): end them, or start"),
        (0, None, "NVIDIA H200: 0.0 of 140.0 GiB are free; others hold the rest (the driver does not say who)"),
    ],
)
def test_a_gpu_that_others_fill_is_refused_with_their_names(gpu, free, held_by, told):
    gpu.memory = (int(free * GIB), 140 * GIB)

    with pytest.raises(SickDeviceError) as raised:
        look_at_device(gpu.device, held_by=held_by)

    assert told in str(raised.value)
    assert gpu.checks == []


@pytest.mark.parametrize(("free", "warned"), [(7.1, True), (125.9, True), (126.1, False)])
def test_a_gpu_that_others_use_gives_a_warning_from_a_tenth_on(gpu, free, warned):
    gpu.memory = (int(free * GIB), 140 * GIB)

    facts = look_at_device(gpu.device, held_by="process 77 with 20.0 GiB")

    assert len(facts.warnings) == warned
    assert all("process 77 with 20.0 GiB" in warning for warning in facts.warnings)


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (cuda_error("CUDA error: uncorrectable ECC error encountered", 214), SickDeviceError, "(ECC)"),
        # A kernel this old and simple has no bugs of its own: what fails in it is the GPU, whatever CUDA calls it.
        (
            cuda_error("CUDA error: unspecified launch failure\nCUDA kernel errors might be", 719),
            SickDeviceError,
            "launch",
        ),
        (RuntimeError(""), SickDeviceError, "RuntimeError"),
        (torch.OutOfMemoryError("CUDA out of memory."), SickDeviceError, "another process took it meanwhile"),
        (cuda_error("CUDA error: words of another version", 209), CannotFitError, "sm_75 sm_90"),
        (
            RuntimeError("CUDA error: no kernel image is available for execution"),
            CannotFitError,
            "has no kernels for it",
        ),
    ],
)
def test_what_cuda_refuses_while_it_looks_names_the_gpu(gpu, monkeypatch, error, raised, told):
    def fail(_device, _name):
        raise error

    monkeypatch.setattr(preflight, "_check_products", fail)

    with pytest.raises(raised) as caught:
        look_at_device(gpu.device)

    assert "NVIDIA H200: " in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
