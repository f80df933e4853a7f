"""Where a sharded base's layers are, pass by pass: whoever asks for a layer finds its bytes, whatever others pass."""

from types import SimpleNamespace

import pytest
import tiny_families as families
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import OneRank
from test_tensor_files import resident_bytes
from tiny import CPU, config_of, write_base, write_copy
from tiny_families import write_family
from tiny_wrappers import WRAPPED, write_wrapper
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from job.core.errors import SickDeviceError, UsageError
from job.core.recipe.schema import LoraSection
from job.tune.data.trial_documents import one_row
from job.tune.device.digest import digest
from job.tune.engines import selftest
from job.tune.engines.choice import choose_engine
from job.tune.engines.families import is_packed
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model, check_whole
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base
from job.tune.model.config import empty_model, read_wrapper
from job.tune.model.experts import stand_ins, tensors_of_experts
from job.tune.model.sharded.layers import ShardedLayers, layers_of, reason_against_sharding

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
FORWARD, TRAINING = 1, 2


class Layer(GradientCheckpointingLayer):
    """A matrix of its own size and a bias."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 + 3 * (number % 3), 5), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(5), requires_grad=False)


def model_of(count):
    torch.manual_seed(count)
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(number) for number in range(count))
    model.head = nn.Linear(5, 3)
    return model


def sharded(count, world):
    model = model_of(count)
    before = [layer.weight.data.clone() for layer in model.layers]
    return ShardedLayers(model, world, CPU), [layer.weight for layer in model.layers], before


@steady
@given(
    st.integers(1, 9),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from([FORWARD, TRAINING]), st.integers(0, 20)), max_size=6),
    st.lists(st.integers(0, TRAINING), max_size=8),
)
def test_a_layer_that_is_asked_for_is_there_however_passes_end(count, lazy, passes, wishes):
    """Each pass is cut short after some layers; others pass something else meanwhile."""
    world = OneRank(lazy=lazy, wishes=wishes)
    layers, weights, before = sharded(count, world)
    for kind, steps in passes:
        layers.begin(trains=kind == TRAINING)
        for number in range(min(steps, count)):
            layers.forward(number)
            assert torch.equal(weights[number], before[number])
        if kind == TRAINING and steps >= count:
            for number in range(count - 1, max(-1, count - 1 - (steps - count)), -1):
                layers.backward(number)
                assert torch.equal(weights[number], before[number])
    layers.meet()


@steady
@given(st.integers(1, 9), st.lists(st.sampled_from([FORWARD, TRAINING]), min_size=1, max_size=5), st.data())
def test_ranks_that_pass_other_things_make_the_same_gathers(count, kinds, data):
    """One that passes all of it, one that is cut short, and one that keeps them company."""
    orders = []
    for whole in ("all", "some", "none"):
        world = OneRank(wishes=kinds)
        layers, _, _ = sharded(count, world)
        world.gathered.clear()
        names = {id(part): number for number, part in enumerate(layers._parts)}
        for kind in kinds if whole != "none" else ():
            layers.begin(trains=kind == TRAINING)
            for number in range(count if whole == "all" else data.draw(st.integers(0, count))):
                layers.forward(number)
            if whole == "all" and kind == TRAINING:
                for number in range(count - 1, -1, -1):
                    layers.backward(number)
        layers.meet()
        orders.append([names[id(part)] for part in world.gathered])

    assert orders[0] == orders[1] == orders[2]
    turns = {FORWARD: max(0, count - 2) + min(2, max(0, count - 2)), TRAINING: 2 * max(0, count - 2)}
    assert len(orders[0]) == sum(turns[kind] for kind in kinds)


def test_layers_that_do_not_follow_one_another_are_refused():
    layers, _, _ = sharded(5, OneRank())
    layers.begin(trains=True)
    layers.forward(0)
    with pytest.raises(UsageError, match="layer 2 follows layer 0"):
        layers.forward(2)
    layers.begin(trains=False)
    with pytest.raises(UsageError, match="--base-placement replicated"):
        layers.backward(0)


def test_a_part_that_is_not_what_was_read_is_refused():
    world = OneRank()
    gather = world.gather
    world.gather = lambda value: [[value[0], value[1] + 1, *value[2:]]] if len(value) > 1 else gather(value)

    with pytest.raises(SickDeviceError, match="rank 0 has gathered other bytes of layer 1 than rank 0 has read"):
        sharded(4, world)


@steady
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), st.data())
def test_a_digest_shows_every_word_that_is_another_one_and_two_that_changed_places(words, data):
    content = torch.tensor(words, dtype=torch.int32)
    place = data.draw(st.integers(0, len(words) - 1))
    other = content.clone()
    other[place] ^= 1 << data.draw(st.integers(0, 30))
    assert int(digest(content)) != int(digest(other))
    swapped = content.clone()
    second = data.draw(st.integers(0, len(words) - 1))
    swapped[place], swapped[second] = content[second].clone(), content[place].clone()
    assert (int(digest(content)) == int(digest(swapped))) == torch.equal(content, swapped)
    assert int(digest(content.view(torch.uint8))) == int(digest(content))


def test_nothing_of_the_base_stays_in_the_host_s_memory_once_it_is_spread(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    base = write_base(tmp_path / "base", LlamaConfig(vocab_size=512, **sizes))
    copy = write_copy(tmp_path / "copy", base)
    size = sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    loaded = load_base(copy, device=CPU, dtype=torch.bfloat16, on_host=True)
    mapped = resident_bytes(copy)
    layers = ShardedLayers(loaded, OneRank(), CPU)

    assert mapped < 1.1 * size  # pages of the files, which all processes have in common, each of them once
    assert resident_bytes(copy) < size / 10
    assert layers.device_bytes < 1.5 * size
    places = [parameter.data_ptr() for parameter in layers_of(loaded)[0].parameters() if parameter.ndim > 1]
    again = [parameter.data_ptr() for parameter in layers_of(loaded)[2].parameters() if parameter.ndim > 1]
    assert places == again


def test_of_a_mixture_experts_are_in_rows_and_what_stands_in_their_place_has_no_memory(tmp_path):
    base = write_copy(tmp_path / "copy", write_family(tmp_path / "base", "qwen3_moe", layers=4), dtype=torch.float32)
    whole = load_base(base, device=CPU, dtype=torch.float32)
    loaded = load_base(base, device=CPU, dtype=torch.float32, on_host=True)
    world = OneRank()
    layers = ShardedLayers(loaded, world, CPU)

    held = [each for layer in layers_of(loaded) for each, _ in tensors_of_experts(layer, large=True)]
    assert len(held) == 4 * 2 * 3
    assert [each.data_ptr() for each in held[:12]] == [each.data_ptr() for each in held[12:]]  # layers 0 and 2, 1 and 3
    assert layers.device_bytes < 3 * sum(each.nbytes for each in held)  # one in fp32 would be eight times as large
    for parameter in stand_ins(loaded):
        assert parameter.data.untyped_storage().nbytes() == 4
        assert bool(torch.isinf(parameter).all())
    layers.begin(trains=False)
    for number, (layer, theirs) in enumerate(zip(layers_of(loaded), layers_of(whole), strict=True)):
        layers.forward(number)
        found = [[each for each, _ in tensors_of_experts(side, large=True)] for side in (layer, theirs)]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_a_sharded_mixture_that_would_have_to_train_one_document_a_row_is_refused(tmp_path, monkeypatch):
    """Where its experts' products do not keep documents apart; with the whole base on each GPU it trains that way."""
    base = write_copy(tmp_path / "copy", write_family(tmp_path / "base", "qwen3_moe", layers=4), dtype=torch.float32)
    monkeypatch.setattr(selftest, "_check_isolation", apart_only_in_rows_of_their_own)
    for world in (None, OneRank()):
        loaded = load_base(base, device=CPU, dtype=torch.float32, on_host=world is not None)
        layers = None if world is None else ShardedLayers(loaded, world, CPU)
        lora = LoraSection(r=4, targets=("q_proj",))
        model = PackedModel(attach_lora(loaded, lora, source="tiny", revision=None, seed=0), layers)
        if world is None:
            check_model(model)
            assert model.rows == "padded"
            continue
        with pytest.raises(UsageError, match=r"one document a row, .* --base-placement replicated"):
            check_model(model)


@pytest.mark.parametrize("rows", ["padded", "alone"])
def test_a_sharded_base_takes_no_rows_but_packed_ones(bases, rows):
    loaded = load_base(bases["llama"], device=CPU, dtype=torch.float32)
    lora = LoraSection(r=4, targets=("q_proj",))
    model = PackedModel(
        attach_lora(loaded, lora, source="tiny", revision=None, seed=0), ShardedLayers(loaded, OneRank(), CPU)
    )
    model.take_rows("packed")
    with pytest.raises(UsageError, match=r"one document a row, .* --base-placement replicated"):
        model.take_rows(rows)
    assert model.is_packed


def apart_only_in_rows_of_their_own(model, _documents, _tolerance):
    if model.is_packed:
        raise UsageError("a document changes its neighbour")


@pytest.mark.parametrize(
    ("model", "packed", "reason"),
    [
        (lambda: empty_model(config_of("llama")), True, None),
        (lambda: empty_model(config_of("gemma2")), True, None),
        (lambda: empty_model(config_of("llama")), False, "one document a row"),
        (lambda: empty_model(families.config_of("qwen3_next")), True, "recurrent layers"),
        (lambda: SimpleNamespace(modules=list, config=SimpleNamespace(model_type="x")), True, "of no kind"),
    ],
)
def test_a_base_that_cannot_be_sharded_says_why(model, packed, reason):
    against = reason_against_sharding(model(), packed=packed)

    assert against is None if reason is None else reason in against
    assert is_packed(empty_model(config_of("llama")))


def test_layers_that_share_weights_are_not_sharded():
    model = empty_model(config_of("llama"))
    model.model.layers[1].mlp = model.model.layers[0].mlp

    assert "share their weights" in reason_against_sharding(model, packed=True)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_decoder_out_of_a_multimodal_base_is_compared_with_the_whole_by_the_layers_that_are_there(name, tmp_path):
    """The whole model's own layers have the decoder's tensors in them (qwen3_vl), or are the decoder's own (llava)."""
    text = {**WRAPPED[name][1]["text_config"], "num_hidden_layers": 5}
    base = write_copy(tmp_path / "copy", write_wrapper(tmp_path / "base", name, text_config=text), dtype=torch.float32)
    lora = LoraSection(r=4, targets=("q_proj", "down_proj"))
    losses = []
    for world in (None, OneRank()):
        loaded = load_base(base, device=CPU, dtype=torch.float32, on_host=world is not None)
        layers = None if world is None else ShardedLayers(loaded, world, CPU)
        model = PackedModel(attach_lora(loaded, lora, source="tiny", revision=None, seed=0), layers)
        check_model(model)
        check_whole(model, read_wrapper(base))
        choice = choose_engine(model, "fast", backward=torch.Tensor.backward)
        assert choice.name == "fast"
        batch = one_row([torch.arange(3, 40), torch.arange(50, 70)])
        losses.append(choice.engine.accumulate(batch, targets=batch.targets, seed=0))

    assert torch.equal(*losses)
