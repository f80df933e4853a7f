"""What an evaluation says of each source of the held-out side."""

from types import SimpleNamespace

import numpy as np
import pytest

from job.core.judging.held_out import plus_minus
from job.core.judging.verdict import Evaluation
from job.stages.data.dataset import Dataset


def test_a_source_s_interval_is_that_of_its_own_examples_alone():
    tokens = np.array([3, 1, 2, 4, 5])
    nll = np.array([3.0, 2.0, 1.0, 8.0, 2.5])
    sources = [SimpleNamespace(name=name, used=used) for name, used in (("new", 4), ("old", 1), ("none", 0))]
    dataset = Dataset(
        train=None,
        validation=SimpleNamespace(sources=np.array([0, 0, 1, 0, 0])),
        report=SimpleNamespace(validation=SimpleNamespace(sources=sources)),
        notes=(),
        judging=None,
    )
    new, old, none = dataset.losses_by_source(Evaluation(step=0, nll=nll, tokens=tokens, correct=0))

    mine = [0, 1, 3, 4]
    assert (new.tokens, new.loss) == (13, pytest.approx(15.5 / 13))
    assert new.plus_minus == plus_minus(nll[mine], tokens[mine]) > 0
    assert (old.loss, old.plus_minus) == (0.5, None)
    assert (none.tokens, none.loss, none.plus_minus) == (0, None, None)
