"""Documents one a row: padded together where that changes nothing, one at a time where it does, never wrong."""

import pytest
import torch
from test_all_families import accumulated, choice_for, micro_batch_of, plain, plain_losses
from tiny import CPU
from tiny_families import write_family

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.tune.engines import selftest
from job.tune.engines.attention import PER_DOCUMENT, per_document_attention
from job.tune.engines.decoder_inputs import row_inputs
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base

_LORA = LoraSection(r=4, alpha=8)
_HYBRIDS = ("qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h")


def model_of(folder, name, lora=_LORA):
    base = load_base(write_family(folder, name), device=CPU, dtype=torch.float32)
    return PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0))


def calls_of(model):
    """Rows and tokens of each call of the decoder, as they come."""
    seen = []
    decoder = model.model.get_base_model().model

    def note(_module, _args, inputs):
        assert inputs.get("attention_mask") is None  # padding stands behind: attention is plainly causal
        seen.append(tuple(inputs["input_ids"].shape))

    decoder.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def of_lengths(*lengths):
    torch.manual_seed(4)
    return [torch.randint(3, 300, (length,)) for length in lengths]


def test_documents_of_like_lengths_are_padded_together(tmp_path):
    model = model_of(tmp_path, "qwen3_5_text").eval()
    seen = calls_of(model)
    model(micro_batch_of(of_lengths(9, 40, 38, 8, 39, 100)))
    assert seen == [(1, 100), (3, 40), (2, 9)]
    model.take_rows("alone")
    del seen[:]
    model(micro_batch_of(of_lengths(9, 40, 38)))
    assert seen == [(1, 9), (1, 40), (1, 38)]


@pytest.mark.parametrize("name", _HYBRIDS)
def test_padded_rows_give_what_documents_alone_give(name, tmp_path):
    """Losses and gradients, in the order of the micro-batch."""
    model = model_of(tmp_path, name)
    choice, documents = choice_for(model), of_lengths(9, 70, 33, 68, 36, 10, 72)
    assert model.rows == "padded"
    losses, gradients = accumulated(choice, model, documents)
    padded = {each: gradient.clone() for each, gradient in gradients.items()}
    model.zero_grad()
    model.take_rows("alone")
    alone, gradients = accumulated(choice, model, documents)
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
    for each, gradient in gradients.items():
        assert float((padded[each] - gradient).norm() / gradient.norm()) < 1e-4, each


@pytest.mark.parametrize("name", _HYBRIDS)
def test_what_stands_in_another_row_changes_no_bit(name, tmp_path):
    model = model_of(tmp_path, name).eval()
    documents = of_lengths(40, 38, 39)
    before = model(micro_batch_of(documents))
    after = model(micro_batch_of([torch.roll(documents[0], 3), *documents[1:]]))
    assert torch.equal(before[39:], after[39:])
    assert not torch.equal(before[:39], after[:39])


def test_recomputing_layers_of_padded_rows_changes_no_gradient(tmp_path):
    model = model_of(tmp_path, "qwen3_5_text")
    choice, documents = choice_for(model), of_lengths(33, 36, 35)
    losses, gradients = accumulated(choice, model, documents)
    before = {each: gradient.clone() for each, gradient in gradients.items()}
    model.zero_grad()
    model.layers.recomputing = True
    again, gradients = accumulated(choice, model, documents)
    assert torch.equal(losses, again)
    assert all(torch.equal(gradient, before[each]) for each, gradient in gradients.items())


def leaking(real):
    """A decoder whose rows see each other."""

    def forward(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        states = found.last_hidden_state
        found.last_hidden_state = states + 0.05 * states.mean(dim=(0, 1), keepdim=True) * (len(states) > 1)
        return found

    return forward


def test_rows_that_see_each_other_are_found_and_then_stand_alone(tmp_path, monkeypatch):
    model = model_of(tmp_path / "base", "lfm2")
    kind = type(model.model.get_base_model().model)
    monkeypatch.setattr(kind, "forward", leaking(kind.forward))
    with pytest.raises(UsageError, match="a document changes its neighbour in a padded micro-batch"):
        selftest._check_isolation(model, selftest._documents(model, CPU, ()), 1.0)  # by the bits alone
    check_model(model)
    assert model.rows == "alone"
    choice, documents = choice_for(model), of_lengths(33, 36, 35)
    assert "one document a row, a row at a time" in choice.reason
    losses, _ = accumulated(choice, model, documents)
    torch.testing.assert_close(losses, plain_losses(plain(tmp_path / "base", model), documents), rtol=1e-4, atol=1e-4)


def test_padding_that_is_seen_is_found(tmp_path, monkeypatch):
    """As by a layer that looks at a row's end."""
    model = model_of(tmp_path, "lfm2")
    kind = type(model.model.get_base_model().model)
    real = kind.forward

    def looks_at_the_end(self, input_ids, **kwargs):
        found = real(self, input_ids=input_ids, **kwargs)
        is_padded = (input_ids[:, -1] == input_ids[:, -2])[:, None, None]
        found.last_hidden_state = found.last_hidden_state * torch.where(is_padded, 1.5, 1.0)
        return found

    monkeypatch.setattr(kind, "forward", looks_at_the_end)
    with pytest.raises(UsageError, match="padding behind a document changes its loss"):
        selftest._check_isolation(model, selftest._documents(model, CPU, ()), 0.01)
    check_model(model)
    assert model.rows == "alone"


def test_code_that_takes_one_row_only_gets_one(tmp_path, monkeypatch):
    model = model_of(tmp_path, "lfm2")
    kind = type(model.model.get_base_model().model)
    real = kind.forward

    def one_row(self, input_ids, **kwargs):
        if len(input_ids) > 1:
            raise ValueError("one row, please")
        return real(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(kind, "forward", one_row)
    check_model(model)
    assert model.rows == "alone"


def test_a_target_without_a_gradient_is_no_matter_of_rows(tmp_path, monkeypatch):
    model = model_of(tmp_path, "lfm2")
    name = next(each for each, parameter in model.named_parameters() if "lora_B" in each)
    model.get_parameter(name).register_hook(torch.zeros_like)
    with pytest.raises(UsageError, match=r"lora\.targets: no gradient reaches"):
        check_model(model)
    assert model.rows == "padded"


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_rows_is_that_of_each_row(softcap, window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 12, 16, requires_grad=True) for heads in (4, 2, 2))
    options = {"scaling": 0.2, "sliding_window": window, "softcap": softcap}
    layer = torch.nn.Identity().eval()
    found, _ = per_document_attention(
        layer, query, key, value, None, **row_inputs(3, 12, CPU, in_blocks=False), **options
    )
    for row in range(3):
        one = [part[row : row + 1] for part in (query, key, value)]
        alone, _ = per_document_attention(layer, *one, None, **row_inputs(1, 12, CPU, in_blocks=False), **options)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-6, atol=1e-6)
    assert found.shape == (3, 12, 4, 16)


def test_hybrids_attend_by_our_attention_and_others_by_transformers_own(tmp_path):
    """Its gradients have the same bits each time, on a GPU too."""
    hybrid, other = model_of(tmp_path / "hybrid", "qwen3_5_text"), model_of(tmp_path / "other", "glm4_moe")
    assert hybrid.rows == other.rows == "padded"
    assert hybrid.model.get_base_model().config._attn_implementation == PER_DOCUMENT
    assert other.model.get_base_model().config._attn_implementation == "sdpa"
    hybrid.take_rows("alone")
    assert hybrid.model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["phimoe", "llama4_text"])
def test_what_rows_would_change_is_never_padded(name, tmp_path):
    """A rotation by a document's length, experts multiplied by transformers' products."""
    assert model_of(tmp_path, name).rows == "alone"
