"""The copy in 4 bits that shards are read from: made before the base is loaded, or the reason why there is none."""

import pytest
import torch
from layouts import bnb4_base
from tiny import CPU, write_copy
from tiny_families import write_family
from tiny_mxfp4 import write_mxfp4

from job.core.errors import LocalDiskError, UsageError
from job.core.recipe.schema import ModelSection
from job.edge.base.fetching import BaseModel, BaseModelIdentity
from job.edge.store.objects import StoreSettings
from job.stages.base.base_source import BaseSource
from job.tune.device.compute_dtype import compute_dtype
from job.tune.model.base import has_experts_in_16_bits, load_base

IDENTITY = BaseModelIdentity(source="owner/name", revision="0" * 40)


@pytest.fixture
def copied(tmp_path):
    """Has the copy of a base made, in a work folder."""

    def make(folder, *, models=tmp_path / "models", quantised=False):
        source = BaseSource(
            IDENTITY,
            ModelSection(base="owner/name", revision="0" * 40),
            device=CPU,
            models_folder=models,
            settings=StoreSettings(),
            should_stop=lambda: False,
        )
        base = BaseModel(folder=folder, identity=IDENTITY, licence=None, bytes=1, quantised=quantised)
        beats = []
        made = source.make_copy(
            base, device=CPU, on_beat=lambda: beats.append(1), on_progress=lambda _done, _of: beats.append(1)
        )
        return base, made, beats

    return make


def test_it_is_what_the_loaded_base_would_have_become(copied, bases, tmp_path):
    _, made, beats = copied(bases["llama"])
    dtype = compute_dtype(CPU)

    assert made.quantised
    assert tmp_path / "models" in made.folder.parents
    assert beats
    one, other = (load_base(each, device=CPU, dtype=dtype).state_dict() for each in (bases["llama"], made.folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_base_that_comes_in_4_bits_needs_none(copied, bases, tmp_path):
    base, made, beats = copied(write_copy(tmp_path / "published", bases["llama"]))
    assert made is base
    base, made, _ = copied(bases["llama"], quantised=True)
    assert made is base
    assert not beats
    assert not (tmp_path / "models").exists()


def test_one_that_cannot_be_written_ends_the_run(copied, bases, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "quantised").write_text("a file where a folder should be")

    with pytest.raises(LocalDiskError, match="could not be written"):
        copied(bases["llama"])


def test_a_base_that_is_put_together_while_it_is_loaded_is_refused(copied, bases):
    with pytest.raises(UsageError, match="put together while it is loaded"):
        copied(bases["gpt_neox"])


def test_a_mixture_that_is_published_in_mxfp4_is_copied_in_nf4(copied, tmp_path):
    plain = tmp_path / "plain"
    base, made, _ = copied(write_mxfp4(tmp_path / "base", decoded=plain))
    assert made is not base
    assert made.quantised
    one, other = (load_base(each, device=CPU, dtype=compute_dtype(CPU)).state_dict() for each in (plain, made.folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_mixture_is_copied_with_its_experts_and_refused_where_they_alone_are_not_in_4_bits(copied, tmp_path):
    mixture = write_family(tmp_path / "mixture", "mixtral")
    _, made, _ = copied(mixture)
    assert made.quantised
    assert not has_experts_in_16_bits(made.folder)
    base, again, _ = copied(made.folder)
    assert again is base

    published = bnb4_base(mixture, tmp_path / "published", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with pytest.raises(UsageError, match=r"in 4 bits, but for its experts.*or the base in 16 bits"):
        copied(published, models=tmp_path / "others")
