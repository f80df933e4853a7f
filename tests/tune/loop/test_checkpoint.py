"""A checkpoint: what is in the folder, and that stopping and resuming equals not stopping, to the bit."""

import hashlib
import json
from typing import get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import ARCHITECTURES, CPU, LAYERS, attempt, cut_of, micro_batch, own_losses, targets_of
from transformers import AutoModelForCausalLM

from job.core.errors import DataError, StopRequestedError
from job.core.recipe.schema import LoraSection, Optimizer
from job.tune.loop import checkpoint as checkpoints
from job.tune.model.adapter import trainable
from job.tune.model.base import load_base

STEPS, STOP = 12, 6


def prepare(bases, documents, folder, architecture, optimizer, **options):
    lora = LoraSection(r=64, alpha=64, dropout=0.1, targets=targets_of(architecture))
    return attempt(
        bases[architecture],
        documents,
        folder=folder,
        lora=lora,
        optimizer=optimizer,
        dtype=torch.bfloat16,
        learning_rate=1e-3,
        **options,
    )


def load(made, folder, *, step):
    return checkpoints.load(made.state, folder, step=step, layers=LAYERS, targets=made.documents.targets)


def sha256(made, folder):
    checkpoints.save(made.state, folder)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def numbers(made):
    progress = made.progress
    return (
        progress.losses,
        progress.grad_norms,
        progress.learning_rates,
        progress.tokens,
        {step: (e.nll.tolist(), e.tokens.tolist(), e.correct) for step, e in progress.evaluations.items()},
    )


RESUMED = [
    *((architecture, "adamw_8bit") for architecture in ARCHITECTURES),
    *(("llama", name) for name in ("adamw_torch", "paged_adamw_32bit", "paged_lion_8bit", "sgd")),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("architecture", "optimizer"), RESUMED)
def test_stopping_and_resuming_equals_not_stopping_to_the_bit(architecture, optimizer, bases, documents, tmp_path):
    whole = prepare(bases, documents, tmp_path, architecture, optimizer, steps=STEPS).run(evaluate_every=4)

    first = prepare(bases, documents, tmp_path, architecture, optimizer, steps=STEPS)
    first.stop_after, first.save_to = STOP, tmp_path / "saved"
    with pytest.raises(StopRequestedError):
        first.run(evaluate_every=4)
    torch.manual_seed(999)  # another process has other random numbers
    second = prepare(bases, documents, tmp_path, architecture, optimizer, steps=STEPS)
    load(second, tmp_path / "saved" / f"step-{STOP}", step=STOP)
    assert second.progress.step == STOP
    second.run(evaluate_every=4)

    assert numbers(second) == numbers(whole)
    assert sorted(second.progress.evaluations) == [0, 4, 8, 12]
    assert sha256(second, tmp_path / "second") == sha256(whole, tmp_path / "whole")
    assert [record.step for record in second.records] == list(range(STOP + 1, STEPS + 1))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_resuming_before_the_first_step_equals_not_stopping_to_the_bit(optimizer, bases, documents, tmp_path):
    """The optimizer has kept nothing yet, and makes it in its first step."""
    whole = prepare(bases, documents, tmp_path, "llama", optimizer, steps=4)
    checkpoints.save(whole.state, tmp_path / "saved")
    whole.run(evaluate_every=4)

    second = prepare(bases, documents, tmp_path, "llama", optimizer, steps=4)
    load(second, tmp_path / "saved", step=0)
    second.run(evaluate_every=4)

    assert numbers(second) == numbers(whole)
    assert sha256(second, tmp_path / "second") == sha256(whole, tmp_path / "whole")


def test_a_step_that_is_dropped_in_its_middle_leaves_no_trace(bases, documents, tmp_path):
    """Asked to stop with too little time for the rest of the step: the state is that before it, dropout's draws too."""

    def made():
        run = prepare(bases, documents, tmp_path, "llama", "adamw_8bit", steps=STEPS)
        run.progress.cut = cut_of(1)  # as small as can be, so that a step has a middle
        return run

    whole = made().run(evaluate_every=4)
    stop = next(step for step in range(2, STEPS) if whole.micro_batches.count(step) > 1)
    first = made()
    first.cut_after, first.save_to = stop, tmp_path / "saved"
    with pytest.raises(StopRequestedError, match=f"step {stop} of {STEPS} is committed"):
        first.run(evaluate_every=4)
    torch.manual_seed(999)
    second = made()
    load(second, tmp_path / "saved" / f"step-{stop}", step=stop)
    second.run(evaluate_every=4)

    assert numbers(second) == numbers(whole)
    assert sha256(second, tmp_path / "second") == sha256(whole, tmp_path / "whole")


def test_the_adapter_s_description_is_the_same_in_every_process(bases, documents, tmp_path):
    """PEFT holds the targets in a set, whose order a process draws anew."""
    made = prepare(bases, documents, tmp_path, "llama", "adamw_8bit", steps=STEPS)
    contents = []
    for order in (["v_proj", "q_proj", "lm_head"], ["lm_head", "q_proj", "v_proj"]):
        made.state.model.peft_config["default"].target_modules = order
        checkpoints.save(made.state, tmp_path / order[0])
        contents.append((tmp_path / order[0] / "adapter_config.json").read_bytes())
    assert contents[0] == contents[1]


OPTIMIZERS = {
    "adamw_torch": torch.float32,
    "adamw_torch_fused": torch.float32,
    "adamw_8bit": torch.uint8,
    "paged_adamw_8bit": torch.uint8,
    "paged_adamw_32bit": torch.float32,
    "lion_8bit": torch.uint8,
    "paged_lion_8bit": torch.uint8,
    "sgd": None,
}


def flat(state):
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": entry for inner, entry in flat(value).items()}
        elif isinstance(value, list):
            found |= {f"{name}.{at}.{k}": v for at, group in enumerate(value) for k, v in group.items()}
        else:
            found[name] = value
    return found


def test_each_of_the_recipe_s_optimizers_is_tried():
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back_to_the_bit(optimizer, bases, documents, tmp_path):
    made = prepare(bases, documents, tmp_path, "llama", optimizer, steps=3).run(evaluate_every=100)
    assert made.progress.losses[-1] != made.progress.losses[0]
    checkpoints.save(made.state, tmp_path / "saved")
    other = prepare(bases, documents, tmp_path, "llama", optimizer, steps=3)
    load(other, tmp_path / "saved", step=3)

    before, after = flat(made.state.optimizer.state_dict()), flat(other.state.optimizer.state_dict())
    assert before.keys() - after.keys() <= {"param_groups.0.lr_lambda"}
    moments = []
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value), name
            assert after[name].dtype is value.dtype, name
            moments.append(value)
        elif name in after:
            assert after[name] == value, name
            assert type(after[name]) is type(value), name
    if OPTIMIZERS[optimizer] is None:
        assert not moments
    else:
        big = [m for m in moments if m.numel() >= 4096]
        assert big
        assert {m.dtype for m in big} == {OPTIMIZERS[optimizer]}
    assert other.state.scheduler.state_dict() == made.state.scheduler.state_dict()


@pytest.fixture(scope="module")
def saved(bases, documents, tmp_path_factory):
    """A trained attempt and its checkpoint folder."""
    root = tmp_path_factory.mktemp("saved")
    made = prepare(bases, documents, root, "llama", "adamw_8bit", steps=4).run(evaluate_every=4)
    checkpoints.save(made.state, root / "folder")
    return made, root / "folder"


def test_a_checkpoint_holds_nothing_that_can_run_code(saved):
    assert {file.suffix for file in saved[1].iterdir()} == {".safetensors", ".json"}
    assert {file.name for file in saved[1].iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "random.safetensors",
        "evaluations.safetensors",
        "state.json",
    }


def test_the_adapter_names_the_recipes_base_and_no_folder_of_this_machine(saved, bases):
    text = (saved[1] / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "tiny/base"
    assert str(bases["llama"].parent) not in text
    assert str(bases["llama"].parent) not in (saved[1] / "state.json").read_text()


def test_the_adapter_file_holds_the_adapter_and_not_the_head(saved):
    parameters = sum(p.numel() for p in trainable(saved[0].model))
    size = (saved[1] / "adapter_model.safetensors").stat().st_size
    assert 4 * parameters < size < 4 * parameters + 4096  # fp32, and safetensors' own header


def test_plain_peft_reads_the_adapter(saved, bases, documents):
    made, folder = saved
    base = load_base(bases["llama"], device=CPU, dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, str(folder)).eval()
    batch = micro_batch(documents, [5])
    made.model.eval()
    with torch.no_grad(), made.model.linears.as_peft_has_them():
        logits = plain(input_ids=batch.input_ids, use_cache=False).logits
        expected = own_losses(made.model, batch.input_ids[0])
    found = torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch.input_ids[0, 1:], reduction="none")
    torch.testing.assert_close(found, expected)

    full = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(full, str(folder)).merge_and_unload()
    assert merged(input_ids=batch.input_ids).logits.isfinite().all()


def test_an_adapter_of_another_recipe_is_not_loaded(saved, bases, documents, tmp_path):
    lora = LoraSection(r=64, targets=("q_proj",))
    other = attempt(bases["llama"], documents, folder=tmp_path, lora=lora)
    with pytest.raises(DataError, match="belongs to another model or recipe"):
        checkpoints.load_adapter(other.model.model, saved[1], None)
    fewer = attempt(bases["llama"], documents, folder=tmp_path, lora=LoraSection(r=64, targets=("v_proj",)))
    with pytest.raises(DataError, match="belongs to another model or recipe"):
        checkpoints.load_adapter(fewer.model.model, saved[1], None)


def test_evaluations_come_back_to_the_bit(saved, bases, documents, tmp_path):
    made, folder = saved
    other = prepare(bases, documents, tmp_path, "llama", "adamw_8bit", steps=4)
    load(other, folder, step=4)
    assert other.progress.evaluations.keys() == made.progress.evaluations.keys() == {0, 4}
    for step, evaluation in made.progress.evaluations.items():
        found = other.progress.evaluations[step]
        assert np.array_equal(found.nll, evaluation.nll)
        assert np.array_equal(found.tokens, evaluation.tokens)
        assert (found.correct, found.step) == (evaluation.correct, step)
    assert other.progress.seconds == made.progress.seconds
