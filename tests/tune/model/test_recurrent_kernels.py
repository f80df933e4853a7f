"""Recurrent layers by fla: where, in which one of its ways, and what they keep. Its kernels run in tests/gpu."""

import functools
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs
from tiny import CPU, attach_lora, load_base
from tiny_families import config_of, write_family
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.kimi_linear import modeling_kimi_linear

from job.core.recipe.schema import LoraSection
from job.kernels import triton_recurrent
from job.kernels.triton_recurrent import BY_BORDERS, Asked, asked_of_fla, computes_by_fla, take_kernels
from job.tune.engines import packed_model
from job.tune.engines.families import _KERNELS
from job.tune.engines.packed_model import PackedModel
from job.tune.model import recurrent, recurrent_choice
from job.tune.model.config import empty_model
from job.tune.model.recurrent import mixers_of, recurrent_shape

NAMES = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn", "torch_recurrent_gated_delta_rule")


def with_fla(monkeypatch, *, is_right=True):
    monkeypatch.setattr(triton_recurrent, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_recurrent, "has_fla", lambda: is_right)


def layers_of(family):
    return [module for _, module in mixers_of(empty_model(config_of(family)))]


@pytest.fixture
def code(monkeypatch):
    """transformers' module, which is as it was after the test."""
    module = inspect.getmodule(type(layers_of("qwen3_5_text")[0]))
    for name, package in zip(NAMES, ("fla", "causal_conv1d", "fla"), strict=True):
        plain = inspect.unwrap(getattr(module, name))
        monkeypatch.setattr(module, name, use_kernel_func_from_hub_with_fallback(name, package)(plain))
    monkeypatch.setattr(triton_recurrent._Fla, "left", False)
    return module


def test_without_fla_every_layer_stays_as_it_is(code, monkeypatch):
    monkeypatch.setattr(triton_recurrent, "find_spec", lambda _name: None)
    before = [getattr(code, name) for name in NAMES]
    take_kernels(layers_of("qwen3_5_text"))
    assert [getattr(code, name) for name in NAMES] == before


@pytest.mark.parametrize(
    ("packages", "triton", "there"),
    [
        ({"fla", "triton"}, "3.7.1", True),
        ({"fla", "triton"}, "3.6.0", False),
        ({"triton"}, "3.9.0", False),
        ({"fla"}, "", False),
    ],
)
def test_fla_counts_only_with_a_triton_that_computes_it_right(packages, triton, there, monkeypatch):
    monkeypatch.setattr(triton_recurrent, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(triton_recurrent, "version", lambda _name: triton)
    assert triton_recurrent.has_fla() is there


def test_a_layer_of_another_kind_stays_as_it_is(monkeypatch):
    with_fla(monkeypatch)
    module = inspect.getmodule(type(layers_of("bamba")[0]))
    before = module.causal_conv1d_fn
    take_kernels(layers_of("bamba"))
    assert module.causal_conv1d_fn is before


@pytest.fixture
def taken(code, monkeypatch):
    with_fla(monkeypatch)
    before = [getattr(code, name) for name in NAMES]
    for _ in range(2):  # once for every model, and the same
        take_kernels(layers_of("qwen3_5_text"))
    assert [getattr(code, name).__wrapped__ for name in NAMES] == before
    return code, [inspect.unwrap(each) for each in before]


def rows_of_a_layer():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, heads, 8) for heads in (2, 2, 4))
    return q, k, v, -torch.rand(1, 40, 4), torch.rand(1, 40, 4)


def test_on_a_cpu_it_is_transformers_own_code_which_keeps_no_documents_apart(taken):
    code, (delta_rule, convolution, step_by_step) = taken
    q, k, v, g, beta = rows_of_a_layer()
    how = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    ours = code.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=None, seq_idx=None, **how)
    theirs = delta_rule(q, k, v, g=g, beta=beta, **how)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    x, weight = torch.randn(1, 6, 40), torch.randn(6, 4)
    mixed = code.causal_conv1d_fn(x, weight, None, activation="silu", document_lengths=None)
    assert torch.equal(mixed, convolution(x, weight, None, activation="silu"))

    alone = {"initial_state": torch.randn(1, 4, 8, 8), **how}
    ours = code.torch_recurrent_gated_delta_rule(q[:, :1], k[:, :1], v[:, :1], g=g[:, :1], beta=beta[:, :1], **alone)
    theirs = step_by_step(q[:, :1], k[:, :1], v[:, :1], g=g[:, :1], beta=beta[:, :1], **alone)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))

    some = torch.tensor([0, 9, 40])
    with pytest.raises(ValueError, match="on GPUs alone"):
        code.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=some)
    with pytest.raises(ValueError, match="on GPUs alone"):
        code.causal_conv1d_fn(x, weight, None, activation="silu", cu_seq_lens_q=some)


class OnAGpu(torch.Tensor):
    is_cuda = True


def calls_of_fla(code, monkeypatch):
    """Has fla's place taken by the plain rule; returns what is written to where it is called."""
    before, called = code.torch_chunk_gated_delta_rule, []

    @functools.wraps(before)
    def by_fla(*given, cu_seqlens=None, **how):
        called.append("fla")
        return inspect.unwrap(before)(*given, **how)

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", by_fla)
    monkeypatch.setattr(triton_recurrent, "_kernels", lambda: None)
    return called


@pytest.mark.parametrize("is_right", [False, True])
def test_with_a_triton_that_is_too_old_it_is_transformers_own_code_on_gpus_too(code, monkeypatch, is_right):
    """transformers takes fla all the same, whose backward then refuses, or is wrong."""
    called = calls_of_fla(code, monkeypatch)
    plain = inspect.unwrap(code.torch_chunk_gated_delta_rule)
    with_fla(monkeypatch, is_right=is_right)
    take_kernels(layers_of("qwen3_5_text"))
    q, k, v, g, beta = rows_of_a_layer()
    ours = code.torch_chunk_gated_delta_rule(q.as_subclass(OnAGpu), k, v, g=g, beta=beta)
    assert torch.equal(ours[0].as_subclass(torch.Tensor), plain(q, k, v, g=g, beta=beta)[0])
    assert called == is_right * ["fla"]
    if not is_right:
        with pytest.raises(ValueError, match="on GPUs alone, by fla"):
            code.torch_chunk_gated_delta_rule(
                q.as_subclass(OnAGpu), k, v, g=g, beta=beta, cu_seqlens=torch.tensor([0, 40])
            )


def test_what_is_kept_is_counted_as_fla_keeps_it(code, monkeypatch):
    config = config_of("qwen3_5_text")
    plain = recurrent_shape(empty_model(config), config)
    with_fla(monkeypatch)
    by_fla = recurrent_shape(empty_model(config), config)
    assert by_fla.layers == plain.layers
    assert 0 < by_fla.kept < plain.kept
    assert by_fla.moved < plain.moved

    layer = next(module for module in layers_of("qwen3_5_text"))
    mixed, heads = layer.conv_dim, layer.num_v_heads
    # What comes into the convolution; queries and keys of length 1, values; sums of g; 64 numbers a head. beta is kept
    # by what makes it.
    kernels = 2 * mixed + 2 * (2 * layer.key_dim + layer.value_dim) + 4 * heads + 2 * 64 * heads
    without, _, _ = _counted_alone(layer, config.hidden_size, monkeypatch)
    assert by_fla.kept == without + kernels


class _KeepsNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, like, *others):
        ctx.given = [(each.shape, each.dtype) for each in (like, *others)]
        return like.new_empty(like.shape)

    @staticmethod
    def backward(ctx, *_gradients):
        return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.given)


def _counted_alone(layer, hidden, monkeypatch):
    """A token's bytes with kernels that keep nothing."""
    code = inspect.getmodule(type(layer))

    def delta_rule(q, k, v, g, beta, **_how):
        return _KeepsNothing.apply(v, q, k, g, beta), None

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", delta_rule)
    monkeypatch.setattr(code, "causal_conv1d_fn", lambda x, *_given, **_how: _KeepsNothing.apply(x))
    shorter, longer = (recurrent._counted(layer, hidden, tokens) for tokens in (128, 256))
    return tuple((two - one) // 128 for one, two in zip(shorter, longer, strict=True))


# --- what is not tried, and what is tried and wrong ------------------------------------------------------------------


def test_the_families_that_get_borders_are_those_whose_kernels_are_taken():
    families = [family for family, packages in _KERNELS.items() if packages == ("fla",)]
    assert {type(config_of(family)).__module__.split(".")[-2] for family in families} == {*BY_BORDERS}


def test_other_families_get_back_what_transformers_took_from_fla(monkeypatch):
    """Nobody tries it there, it picks its ways by the clock, and on a CPU it does not run."""
    rules, plain = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"), []
    for name in rules:
        own = inspect.unwrap(getattr(modeling_kimi_linear, name))
        plain.append(own)
        by_fla = use_kernel_func_from_hub_with_fallback(name, "fla")(own)
        monkeypatch.setattr(modeling_kimi_linear, name, by_fla)
    convolution = modeling_kimi_linear.causal_conv1d_fn
    mixer = type("Mixer", (), {"__module__": modeling_kimi_linear.__name__})
    with_fla(monkeypatch)
    take_kernels([mixer()])
    assert modeling_kimi_linear.causal_conv1d_fn is convolution
    for name, own in zip(rules, plain, strict=True):
        taken = getattr(modeling_kimi_linear, name)
        assert inspect.unwrap(taken) is own
        assert not triton_recurrent._is_fla_s(own)
        with pytest.raises(ValueError, match="on GPUs alone"):
            taken(cu_seqlens=torch.tensor([0, 3]))


def test_a_convolution_with_another_activation_is_not_computed_without_it(taken):
    code, _ = taken
    x, borders = torch.randn(1, 6, 40).as_subclass(OnAGpu), torch.tensor([0, 40])
    with pytest.raises(ValueError, match="not gelu"):
        code.causal_conv1d_fn(x, torch.randn(6, 4), None, activation="gelu", cu_seq_lens_q=borders)


def asked_of(family="qwen3_5_text"):
    config = config_of(family)
    with asked_of_fla() as asked:
        recurrent_shape(empty_model(config), config)
    assert {each.kind for each in asked} == {"delta rule", "convolution"}
    return {each.kind: each for each in asked}


def one_after_another(asked, *, change=lambda given: given):
    """In the place of the kernel: right, but for what is changed."""
    along = recurrent_choice._along(asked)

    def by_borders(borders, *given):
        given = change(given)
        lengths = borders.diff().tolist()
        rows = [
            torch.split(row, lengths, dim=along) if row is not None and row.dim() > along else [row] * len(lengths)
            for row in given
        ]
        return torch.cat([asked.alone(*document) for document in zip(*rows, strict=True)], dim=along)

    return by_borders


class Scaled(torch.autograd.Function):
    """Its value is right."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.7 * gradient


def tried(asked, by_borders):
    parts = {name: getattr(asked, name) for name in ("kind", "given", "alone")}
    return recurrent_choice.difference_from_plain(Asked(by_borders=by_borders, **parts), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["delta rule", "convolution"])
def test_a_kernel_is_tried_against_transformers_code_result_and_gradients(taken, kind):
    asked = asked_of()[kind]
    assert tried(asked, one_after_another(asked)) is None
    assert "the result differs" in tried(asked, lambda _borders, *given: asked.alone(*given))  # documents are not apart
    assert "the result differs by nan" in tried(asked, lambda *given: one_after_another(asked)(*given) * torch.nan)
    names = recurrent_choice._NAMES[kind][1:]
    for place, name in enumerate(names):

        def changed(given, place=place):
            return [Scaled.apply(row) if at == place else row for at, row in enumerate(given)]

        assert f"the gradient of the {name} differs by 30" in tried(asked, one_after_another(asked, change=changed))


def test_what_computes_something_else_is_left_and_named(code, monkeypatch):
    called = calls_of_fla(code, monkeypatch)
    with_fla(monkeypatch)
    model = empty_model(config_of("qwen3_5_text"))
    said = []
    monkeypatch.setattr(recurrent_choice, "difference_from_plain", lambda asked, _device: said.append(asked.kind))
    recurrent_choice.choose_recurrent(model, torch.device("cuda"))
    assert sorted(said) == ["convolution", "delta rule"]  # each once
    assert computes_by_fla()

    monkeypatch.setattr(recurrent_choice, "difference_from_plain", lambda *_: "of the delta rule it differs")
    with capture_logs() as logs:
        recurrent_choice.choose_recurrent(model, torch.device("cpu"))
        assert not logs
        recurrent_choice.choose_recurrent(model, torch.device("cuda"))
    assert [(each["event"], each["reason"]) for each in logs] == [
        ("recurrent_layers_left_to_transformers", "of the delta rule it differs")
    ]
    assert not computes_by_fla()
    q, k, v, g, beta = rows_of_a_layer()
    code.torch_chunk_gated_delta_rule(q.as_subclass(OnAGpu), k, v, g=g, beta=beta)
    assert not called
    with pytest.raises(ValueError, match="on GPUs alone"):
        code.causal_conv1d_fn(
            torch.randn(1, 6, 40).as_subclass(OnAGpu), torch.randn(6, 4), cu_seq_lens_q=torch.tensor([0, 40])
        )
    with pytest.raises(ValueError, match="on GPUs alone"):
        code.torch_chunk_gated_delta_rule(q.as_subclass(OnAGpu), k, v, g=g, beta=beta, cu_seqlens=torch.tensor([0, 40]))


def test_every_model_tries_them_before_it_says_how_documents_stand(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(packed_model, "choose_recurrent", lambda model, device: tried.append((model, device)))
    monkeypatch.setattr(packed_model, "rows_of", lambda model: tried.append(model) or "padded")
    base = load_base(write_family(tmp_path, "qwen3_5_text"), device=CPU, dtype=torch.float32)
    PackedModel(attach_lora(base, LoraSection(r=2), source="tiny", revision=None, seed=0))
    assert tried == [(base, CPU), base]


def test_a_kernel_that_does_not_run_is_left_too(code, monkeypatch):
    with_fla(monkeypatch)

    def refused(*_given):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(recurrent_choice, "difference_from_plain", refused)
    with capture_logs() as logs:
        recurrent_choice.choose_recurrent(empty_model(config_of("qwen3_5_text")), torch.device("cuda"))
    assert [each["reason"] for each in logs] == ["RuntimeError: out of resource: shared memory"]
    assert not computes_by_fla()


# --- one way of each kernel ------------------------------------------------------------------------------------------


class Autotuner:
    def __init__(self, *ways):
        self.fn = lambda: None
        self.configs = [SimpleNamespace(num_warps=warps, num_stages=stages) for warps, stages in ways]


def test_each_kernel_computes_in_one_way(monkeypatch):
    """Chosen without a clock; also within what sets its other options, and wherever it is imported to."""
    conv, rule, within = Autotuner((2, 2), (8, 3), (4, 2), (4, 3)), Autotuner((8, 4), (8, 3)), Autotuner((1, 1), (2, 1))
    modules = {
        "fla": {},
        "fla.modules.causal_conv1d": {"causal_conv1d": "its convolution", "kernel": conv},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": None, "kernel": rule, "same": conv},
        "fla.ops.common": {"kernel": SimpleNamespace(fn=SimpleNamespace(fn=within))},
        "flash": {"kernel": (other := Autotuner((1, 1), (2, 2)))},
        "triton.runtime.autotuner": {"Autotuner": Autotuner},
    }
    for name, content in modules.items():
        for part in [name.rpartition(".")[0], name]:
            if part and part not in modules:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    triton_recurrent._kernels.cache_clear()
    try:
        assert triton_recurrent._kernels() == "its convolution"
    finally:
        triton_recurrent._kernels.cache_clear()

    ways = [[(way.num_warps, way.num_stages) for way in each.configs] for each in (conv, rule, within)]
    assert ways == [[(4, 2)], [(8, 3)], [(2, 1)]]
    assert len(other.configs) == 2
