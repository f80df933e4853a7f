"""Recurrent layers in packed rows: their kernels get the borders of documents, and the self-test sees who ignores them.

The kernels run on GPUs only; in their place stands transformers' own code, called for each document.
"""

import inspect
from itertools import pairwise

import pytest
import torch
from test_all_families import accumulated, choice_for, micro_batch_of, plain, plain_losses
from tiny import CPU
from tiny_families import config_of, write_family

from job.core.recipe.schema import LoraSection
from job.tune.engines import families
from job.tune.engines.families import words_on
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base
from job.tune.model.config import empty_model
from job.tune.model.recurrent import mixers_of

_LORA = LoraSection(r=4, alpha=8)
_LENGTHS = (9, 33, 36, 70)
BY_BORDERS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid", "bamba", "falcon_h1"),
    *("nemotron_h", "nemotron_h, experts", "zamba2", "lfm2", "lfm2_moe", "lfm3"),
)
_SOME = ("qwen3_5_text", "granitemoehybrid", "lfm2")
each_by_borders = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _SOME else pytest.mark.families) for name in BY_BORDERS]
)


def packages_of(name):
    return "fla" if name.startswith(("qwen3", "olmo", "lfm")) else "causal_conv1d"


def borders_of(seq_idx):
    changes = torch.nonzero(seq_idx[0].diff()).flatten() + 1
    return [0, *changes.tolist(), seq_idx.shape[1]]


def conv(real, *, is_right=True):
    def causal_conv1d_fn(x, weight, bias=None, activation=None, seq_idx=None, **_unused):
        if seq_idx is None or not is_right:
            return real(x, weight, bias, activation=activation)
        assert seq_idx.dtype == torch.int32  # as the kernel asks for
        parts = [x[:, :, start:end] for start, end in pairwise(borders_of(seq_idx))]
        return torch.cat([real(part, weight, bias, activation=activation) for part in parts], dim=2)

    return causal_conv1d_fn


def delta_rule(real):
    def chunk_gated_delta_rule(q, k, v, g=None, beta=None, cu_seqlens=None, **options):
        options = {name: value for name, value in options.items() if name in inspect.signature(real).parameters}
        if cu_seqlens is None:
            return real(q, k, v, g=g, beta=beta, **options)
        assert cu_seqlens.dtype == torch.int32
        found = []
        for start, end in pairwise(cu_seqlens.tolist()):
            part = [each[:, start:end] for each in (q, k, v, g, beta)]
            found.append(real(*part[:3], g=part[3], beta=part[4], **options)[0])
        return torch.cat(found, dim=1), None

    return chunk_gated_delta_rule


def scan(real):
    def mamba_chunk_scan_combined(x, dt, A, B, C, *, seq_idx=None, **options):  # noqa: N803 - its own names
        options = {name: value for name, value in options.items() if name in inspect.signature(real).parameters}
        if seq_idx is None:
            return real(x, dt, A, B, C, **options)
        found = [
            real(x[:, start:end], dt[:, start:end], A, B[:, start:end], C[:, start:end], **options)
            for start, end in pairwise(borders_of(seq_idx))
        ]
        return torch.cat(found, dim=1)

    return mamba_chunk_scan_combined


def with_kernels(monkeypatch, name, *, is_right=True):
    """As where the packages are installed."""
    monkeypatch.setattr(families, "_is_installed", lambda _package: True)
    code = inspect.getmodule(type(next(mixers_of(empty_model(config_of(name))))[1]))
    stand_ins = {
        "causal_conv1d_fn": lambda real: conv(real, is_right=is_right),
        "torch_chunk_gated_delta_rule": delta_rule,
        "mamba2_chunk_scan": scan,
    }
    for function, stand_in in stand_ins.items():
        if hasattr(code, function):
            monkeypatch.setattr(code, function, stand_in(inspect.unwrap(getattr(code, function))))


def model_of(folder, name):
    base = load_base(write_family(folder, name), device=CPU, dtype=torch.float32)
    return PackedModel(attach_lora(base, _LORA, source="tiny", revision=None, seed=0))


def documents_of(name):
    torch.manual_seed(2)
    return [torch.randint(3, config_of(name).vocab_size, (length,)) for length in _LENGTHS]


@each_by_borders
def test_documents_of_a_row_stay_apart_by_their_borders(name, tmp_path, monkeypatch):
    with_kernels(monkeypatch, name)
    model = model_of(tmp_path, name)
    assert model.rows == "packed"
    check_model(model)
    assert model.rows == "packed"
    choice, documents = choice_for(model), documents_of(name)
    assert f"documents apart by the kernels of {packages_of(name)}" in choice.reason
    seen = []
    model.model.get_base_model().model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    ours, our_gradients = accumulated(choice, model, documents)
    assert seen == [(1, sum(_LENGTHS))]
    by_peft = plain(tmp_path, model)
    torch.testing.assert_close(ours, plain_losses(by_peft, documents), rtol=1e-4, atol=1e-4)
    for parameter_name, parameter in by_peft.named_parameters():
        if parameter.requires_grad:
            off = float((our_gradients[f"model.{parameter_name}"] - parameter.grad).norm() / parameter.grad.norm())
            assert off < 1e-3, (parameter_name, off)
    changed, _ = accumulated(choice, model, [*documents[:-1], torch.roll(documents[-1], 1)])
    assert torch.equal(changed[: 1 - _LENGTHS[-1]], ours[: 1 - _LENGTHS[-1]])


@pytest.mark.parametrize("name", _SOME)
def test_a_kernel_that_ignores_borders_is_found_and_rows_are_padded(name, tmp_path, monkeypatch):
    with_kernels(monkeypatch, name, is_right=False)
    model = model_of(tmp_path, name)
    check_model(model)
    assert model.rows == "padded"
    choice, documents = choice_for(model), documents_of(name)
    assert "rows of like lengths padded together" in choice.reason
    losses, _ = accumulated(choice, model, documents)
    torch.testing.assert_close(losses, plain_losses(plain(tmp_path, model), documents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _SOME)
def test_transformers_own_code_does_not_take_borders_and_rows_are_padded(name, tmp_path, monkeypatch):
    """As where a package is there and is not what transformers looks for."""
    monkeypatch.setattr(families, "_is_installed", lambda _package: True)
    model = model_of(tmp_path, name)
    assert model.rows == "packed"
    check_model(model)
    assert model.rows == "padded"


@pytest.mark.parametrize("name", _SOME)
def test_without_the_packages_nothing_is_tried_and_the_words_say_how_rows_stand(name, monkeypatch):
    config = config_of(name)
    assert any("rows of like lengths padded together" in each for each in words_on(config))
    monkeypatch.setattr(families, "_is_installed", lambda _package: True)
    said = f"documents of a row stay apart by the kernels of {packages_of(name)}"
    assert any(said in each for each in words_on(config))


def test_a_scan_that_takes_no_borders_is_never_packed(monkeypatch):
    """Mamba's first form, in Jamba."""
    monkeypatch.setattr(families, "_is_installed", lambda _package: True)
    for name in ("jamba", "mamba", "minimax", "recurrent_gemma"):
        assert families.rows_of(empty_model(config_of(name))) == "padded"


def test_layers_that_attend_alone_get_no_borders(bases):
    from job.tune.engines.decoder_inputs import decoder_inputs

    batch = micro_batch_of([torch.arange(5), torch.arange(3)])
    assert "seq_idx" not in decoder_inputs(batch)
    inputs = decoder_inputs(batch, by_borders=True)
    assert inputs["seq_idx"].tolist() == [[0] * 5 + [1] * 3]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 8]
