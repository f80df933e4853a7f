"""What is trained, as the plan's formulas count it: a base's sizes and a dataset's lengths, without any weight."""

from bench.options import GSM8K
from bench.training import documents_of, recipe_of
from job.core.plan.course import course_of
from job.core.plan.forecast import Workload
from job.core.plan.memory import AdapterShape
from job.tune.engines.families import is_supported
from job.tune.model.adapter import refuse_targets
from job.tune.model.config import load_tokenizer, read_config, shape_of


def workload_of(base, train, folder, *, text=GSM8K, batch, steps, max_length):
    """Steps of a batch, with the adapter that `bench.training` measures with; nothing is evaluated."""
    config = read_config(base)
    shape = shape_of(config)
    limit = min(max_length, shape.positions)
    recipe = recipe_of(base, train, text=text, max_length=limit, batch_size=batch, steps=steps)
    documents = documents_of(recipe, load_tokenizer(base), shape.positions, folder)
    return Workload(
        shape=shape,
        adapter=AdapterShape(
            parameters=refuse_targets(config, recipe.lora), rank=recipe.lora.r, optimizer=recipe.train.optimizer
        ),
        engine="fast" if is_supported(config) else "generic",
        compiled=False,
        course=course_of(recipe.train, examples=len(documents)),
        lengths=documents.lengths,
        targets=int(documents.targets.sum()),
        validation_tokens=0,
        evaluations=0,
        max_length=documents.max_length,
        kept_checkpoints=recipe.checkpoint.keep,
    )
