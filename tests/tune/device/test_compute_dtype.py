import subprocess
import sys

import pytest
import torch

from job.tune.device import compute_dtype as chosen
from job.tune.device.compute_dtype import compute_dtype, dtype_name
from job.tune.device.device import device_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ZEN_4 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_bf16": True}
GRANITE_OF_AMX_ALONE = ZEN_4 | {"avx512_bf16": False, "amx_bf16": True}
ICE_LAKE = ZEN_4 | {"avx512_bf16": False}
LAPTOP = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}
GRAVITON_3 = {"architecture": "aarch64", "neon": True, "bf16": True}
GRAVITON_2 = {"architecture": "aarch64", "neon": True, "bf16": False}


@pytest.fixture
def processor(monkeypatch):
    """Makes this process see another processor."""

    def become(capabilities, *, onednn=True, available=True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)

    return become


@pytest.mark.parametrize("capabilities", [ZEN_4, SAPPHIRE_RAPIDS, GRANITE_OF_AMX_ALONE, GRAVITON_3])
def test_a_processor_with_the_instructions_computes_in_bf16(processor, capabilities):
    processor(capabilities)

    assert compute_dtype(CPU) is torch.bfloat16
    assert device_memory(CPU).compute_dtype == "bf16"


@pytest.mark.parametrize("capabilities", [ICE_LAKE, LAPTOP, GRAVITON_2, {"architecture": "unknown"}])
def test_one_without_them_computes_in_fp32_also_where_onednn_would_convert_each_number(processor, capabilities):
    processor(capabilities)

    assert compute_dtype(CPU) is torch.float32
    assert device_memory(CPU).compute_dtype == "fp32"


@pytest.mark.parametrize("missing", ["onednn", "available"])
def test_instructions_that_onednn_does_not_use_are_none(processor, missing):
    processor(ZEN_4, **{missing: False})

    assert compute_dtype(CPU) is torch.float32


def test_a_gpu_computes_in_bf16_whatever_the_processor_beside_it_can(processor):
    processor(LAPTOP)

    assert compute_dtype(GPU) is torch.bfloat16


def test_onednn_kept_to_avx2_is_a_processor_without_bf16():
    """So a laptop can be tried on any machine; the libraries read the variable when they start."""
    program = "import torch; from job.tune.device.compute_dtype import *; print(compute_dtype(torch.device('cpu')))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert ended.stdout.strip() == "torch.float32"


def test_each_dtype_has_the_name_that_plan_and_report_use():
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float32)] == ["bf16", "fp32"]
    assert chosen.processor_multiplies_bf16() in {True, False}
