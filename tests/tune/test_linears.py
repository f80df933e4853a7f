"""Linear layers as one op each: the losses and gradients of PEFT's own, the masks of its dropout, and nothing else."""

import pytest
import torch
from tiny import ARCHITECTURES, EVERY_LINEAR, adapted, backward, gradients, micro_batch, targets_of

from job.core.recipe import LoraSection
from job.tune.model import trainable

SEVERAL = {"llama": EVERY_LINEAR, "mistral": EVERY_LINEAR, "qwen3": EVERY_LINEAR, "gemma2": EVERY_LINEAR}


def model_of(bases, architecture="llama", *, dropout=0.0, dtype=torch.float32):
    targets = SEVERAL.get(architecture, targets_of(architecture))
    return adapted(
        bases[architecture], LoraSection(r=4, alpha=8, dropout=dropout, targets=targets), dtype=dtype, moved=True
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_peft_s_own(bases, documents, architecture):
    model, batch = model_of(bases, architecture), micro_batch(documents, range(len(documents)))
    with model.linears.as_peft_has_them():
        expected = backward(model, [batch])
    found = backward(model, [batch])

    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_nothing_of_the_base_or_of_peft_runs(bases, documents, monkeypatch):
    """Neither an adapter's own layers nor a base layer: each linear module is one op, the untargeted ones too."""
    model = adapted(bases["llama"], LoraSection(r=4, targets=("q_proj", "lm_head")), moved=True)
    for module in model.modules():
        if "lora" in type(module).__module__ or "bitsandbytes" in type(module).__module__:
            monkeypatch.setattr(type(module), "forward", None)

    assert all(gradient.any() for gradient in backward(model, [micro_batch(documents, [0])])[1].values())


def test_a_mask_comes_from_the_seed_and_each_micro_batch_has_its_own(bases, documents):
    model, batch = model_of(bases, dropout=0.3), micro_batch(documents, range(3))
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(backward(model, [batch]))
    again = backward(model, [batch])

    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(gradient, losses[1][1][name]) for name, gradient in losses[0][1].items())
    assert len({losses[0][0], losses[2][0], again[0]}) == 3
    model.eval()
    assert backward(model, [batch])[0] == backward(model, [batch])[0]


def test_dropout_keeps_the_mean_of_what_peft_s_has(bases, documents):
    """Over many masks the loss comes near to PEFT's own mean: the rate is the same, and only adapters' inputs drop."""
    model, batch = model_of(bases, dropout=0.3), micro_batch(documents, [3])
    model.train()

    def mean():
        torch.manual_seed(0)
        with torch.no_grad():
            return torch.stack([model(batch).mean() for _ in range(25)]).mean()

    ours = mean()
    with model.linears.as_peft_has_them():
        assert float(ours) == pytest.approx(float(mean()), rel=0.1)


def test_without_the_adapter_it_is_the_base(bases, documents):
    model, batch = model_of(bases), micro_batch(documents, range(3))
    with model.model.disable_adapter():
        base = model(batch)
    for parameter in trainable(model):
        parameter.data.zero_()

    torch.testing.assert_close(model(batch), base)


def test_what_is_saved_is_what_peft_saves(bases, tmp_path):
    model = model_of(bases)
    names = set(model.model.state_dict())
    with model.linears.as_peft_has_them():
        assert set(model.model.state_dict()) == names
    model.model.save_pretrained(tmp_path, save_embedding_layers=False)

    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_of_an_unusual_kind_is_left_to_peft(bases, documents):
    model = model_of(bases)
    expected = backward(model, [micro_batch(documents, [0])])[0]
    module = model.model.get_base_model().model.layers[0].self_attn.q_proj
    module.lora_bias["default"] = True
    from job.tune.linears import OneOpLinears

    with model.linears.as_peft_has_them():
        linears = OneOpLinears(model.model)
        assert module not in linears._modules
    assert backward(model, [micro_batch(documents, [0])])[0] == pytest.approx(expected, rel=1e-5)
    gradients(model)
