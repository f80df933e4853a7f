"""What a mixture's targets get, and what PEFT gives them when it reads the published config: the same, or a refusal."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_families import FAMILIES, config_of
from torch import nn

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.tune.model import adapter
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_in, is_router

_SOME = ("mixtral", "deepseek_v3", "jamba")
_WITH_EXPERTS = [name for name in FAMILIES if experts_in(empty_model(config_of(name)))]
"""In 4 bits or not."""


def adapted_by(model: PeftModel) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Where an adapter is -> its factors."""
    return {
        name.removeprefix("base_model.model."): sorted(
            (own, tuple(each.shape)) for own, each in module.named_parameters() if "lora_" in own
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def fresh(name: str, targets: tuple[str, ...]) -> PeftModel:
    base, lora = empty_model(config_of(name)), LoraSection(r=4, alpha=8, targets=targets)
    return adapter._adapted(base, lora, adapter._check_targets(base, lora), revision=None)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _SOME else pytest.mark.families) for name in _WITH_EXPERTS]
)
def test_each_target_gets_what_peft_reads_in_the_published_config(name, tmp_path):
    """One rank and one scale for all, no router, and no module beside those of the name.

    PEFT reads names of a mixture's modules anew, in each family by rules of its own: it takes some for the experts,
    with twice the rank where two matrices have become one.
    """
    base = empty_model(config_of(name))
    head = base.get_output_embeddings()
    linear = {path: module for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    routers = {path for path, module in base.named_modules() if is_router(base, path, module)}
    names = sorted({path.rpartition(".")[2] for path, module in linear.items() if module is not head})
    cases = [*((each,) for each in names), *((each, "experts") for each in names), tuple(names)]
    taken = 0
    for targets in [("all-linear",), ("all-linear", "experts"), ("experts",), *cases]:
        try:
            model = fresh(name, targets)
        except UsageError:
            continue
        taken += 1
        config = model.peft_config["default"]
        assert (config.rank_pattern, config.alpha_pattern) == ({}, {}), targets
        config.save_pretrained(tmp_path)
        again = get_peft_model(empty_model(config_of(name)), LoraConfig.from_pretrained(tmp_path))
        assert adapted_by(again) == adapted_by(model), targets
        assert not routers & adapted_by(model).keys(), targets
        if not {"all-linear", "experts"} & {*targets}:
            named = {path for path in linear.keys() - routers if path.rpartition(".")[2] in targets}
            assert adapted_by(model).keys() == named, targets
    assert taken > 4  # all-linear, and attention's
