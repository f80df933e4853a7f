"""The proof runs what training ran."""

from types import SimpleNamespace

import torch
from tiny import CPU, adapted, stages_attempt

from job.core.recipe.schema import LoraSection, Recipe
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
