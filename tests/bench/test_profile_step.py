from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.ideal import all_products_seconds, ideal_seconds
from bench.profile_step import LARGE, THIN, UNSORTED, part_of, read
from bench.training import filling
from job.core.plan.memory import ModelShape

SHAPE = ModelShape(
    layers=2,
    hidden=64,
    intermediate=128,
    vocabulary=100,
    positions=512,
    heads=4,
    key_heads=2,
    head_width=16,
    linear_parameters=73_728,
    whole_parameters=12_800,
)
RATES = {"gemm_flops": 1e12, "copy_bytes": 1e11}
CUT = SimpleNamespace(recomputed_layers=0, kept_layers=0)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT", UNSORTED),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", UNSORTED),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...cutlass::bfloat16_t>", "attention"),
        ("_attention_backward", "attention"),
        ("_dequantise", "dequantising"),
        ("kDequantizeBlockwise", "dequantising"),
        ("_rms_backward", "elementwise"),
        ("_masked_gradient", "adapters under dropout"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<float>>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("kOptimizerStatic8bit2StateBlockwise", "optimizer"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, part):
    assert part_of(kernel) == part


def test_products_are_sorted_by_their_shapes():
    large, thin = torch.ones(512, 512), torch.ones(512, 32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        torch.mm(large, large)
        torch.mm(large, thin)
        torch.mm(large, thin)
    found = read(seen.events(), torch.device("cpu"))

    assert found.products == Counter({(512, 512, 512): 1, (512, 512, 32): 2})
    assert (found.parts[LARGE].kernels, found.parts[THIN].kernels) == (1, 2)
    assert UNSORTED not in found.parts
    assert 0 < found.busy_seconds <= found.wall_seconds


def test_a_large_product_could_take_its_operations_and_a_thin_one_its_bytes():
    work = {"lengths": np.array([100]), "targets": 99, "micro_batches": 1, "cut": CUT, "adapter_parameters": 10}
    ideal = ideal_seconds(SHAPE, RATES, products={LARGE: {(4096, 4096, 4096): 2}, THIN: {(4096, 4096, 2): 1}}, **work)

    assert ideal[LARGE] == pytest.approx(2 * 2 * 4096**3 / 1e12)
    assert ideal[THIN] == pytest.approx(2 * (4096 * 4096 + 4096 * 2 + 4096 * 2) / 1e11)


def test_attention_among_short_documents_could_take_its_bytes():
    work = {"targets": 1, "micro_batches": 1, "cut": CUT, "adapter_parameters": 10, "products": {}}
    short, long = (ideal_seconds(SHAPE, RATES, lengths=np.array(n), **work)["attention"] for n in ([16] * 64, [1024]))

    assert short == pytest.approx(6 * 2 * 1024 * SHAPE.layers * (4 + 2) * 16 / 1e11)
    assert long > short


def test_a_small_step_could_take_what_reading_its_weights_takes():
    work = {"targets": 1, "micro_batches": 1, "cut": CUT, "adapter_parameters": 10}
    weights = SHAPE.linear_parameters + SHAPE.vocabulary * SHAPE.hidden
    small = all_products_seconds(SHAPE, RATES, lengths=np.array([2]), **work)
    large = all_products_seconds(SHAPE, RATES, lengths=np.array([10_000]), **work)

    assert small == pytest.approx(2 * 2 * weights / 1e11)
    assert large > small


def test_a_micro_batch_is_filled_to_the_last_token():
    documents = SimpleNamespace(lengths=np.array([50, 30, 40, 7, 3, 10]))

    assert filling(documents, 100) == [0, 1, 3, 4, 5]
