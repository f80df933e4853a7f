"""Every layout in which a base can come: trained as what it is, or refused with the code of the table."""

import pytest
from layout_table import LAYOUTS, outcome_of, same_weights, token_beyond

SAME = (
    *("one file in bf16", "files and an index", "fp32", "names without `model.`"),
    *("rotations of old versions (`rotary_emb.inv_freq`)", "a section of 4 bits left over, weights in bf16"),
    "bitsandbytes: NF4, double quantisation",
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_trained_or_refused_and_nothing_in_between(name, scratch):
    code, said = outcome_of(name, scratch)
    assert code == LAYOUTS[name][0], said
    assert ("linear layers in 4 bits" in said) == (code == 0)
    assert code == 0 or "model.base" in said or "again" in said or "one in 4 bits of bitsandbytes" in said, said


@pytest.mark.parametrize("name", SAME)
def test_the_same_weights_in_another_layout_are_the_same_base(name, scratch):
    assert same_weights(name, scratch)


def test_there_are_enough_of_them():
    assert len(LAYOUTS) >= 25
    assert token_beyond()[0] == 65
