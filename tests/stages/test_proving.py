"""The proof runs what training ran."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, adapted, stages_attempt

from job.core.errors import SickDeviceError
from job.core.recipe.schema import LoraSection, Recipe
from job.stages.finishing import proving
from job.stages.finishing.proving import load_published
from job.tune.data.micro_batch import micro_batch


def test_linear_layers_that_were_left_to_peft_are_peft_s_in_the_proof(bases, documents, tmp_path):
    trained = adapted(bases["llama"], LoraSection(r=4), dtype=torch.bfloat16, moved=True).eval()
    trained.linears.leave_to_peft()

    def fetch_adapter(folder, _files, *, should_stop):
        assert not should_stop()
        trained.model.save_pretrained(folder)

    data = {"train": "t.jsonl", "text": "{q}", "validation": "v.jsonl"}
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(bases["llama"])},
            "data": data,
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
            "output": "o",
        }
    )
    inputs = SimpleNamespace(
        artifacts=SimpleNamespace(fetch_adapter=fetch_adapter),
        base=SimpleNamespace(folder=bases["llama"]),
        device=CPU,
        placement="replicated",
    )
    attempt = stages_attempt(recipe, tmp_path)
    batch = micro_batch(documents, range(4))
    theirs, ours = (
        load_published(attempt, inputs, tmp_path / "published", {}, left_to_peft=left, rows="packed")
        for left in (True, False)
    )

    assert ours.linears
    assert not theirs.linears
    assert theirs.score(batch).nll == trained.score(batch).nll


@pytest.mark.parametrize("proven", [2.5001, math.nan, math.inf])
def test_another_loss_than_that_of_training_is_no_proof(proven, monkeypatch):
    """NaN, too, which is neither more nor less than what is accepted."""

    def proves(loss):
        monkeypatch.setattr(proving, "evaluate", lambda *_given, **_how: SimpleNamespace(loss=loss))
        cut = SimpleNamespace(evaluation_tokens=512)
        progress = SimpleNamespace(cut=cut, evaluations={3: SimpleNamespace(loss=2.5)})
        facts = SimpleNamespace(progress=progress, memory=SimpleNamespace(cut=cut), resume_exact=True)
        attempt = SimpleNamespace(worker=SimpleNamespace(should_stop=None), phases=None, notes=[])
        inputs = SimpleNamespace(dataset=SimpleNamespace(validation=None))
        return proving.prove(attempt, inputs, facts, None, step=3).loss

    assert proves(2.5) == 2.5
    with pytest.raises(SickDeviceError, match="changed it"):
        proves(proven)
