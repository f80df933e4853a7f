"""The cut that was planned meets a device whose memory has gone since."""

from types import SimpleNamespace

import pytest
import torch
from tiny import cut_of

from job.stages.training import TrainingStage


class Engine:
    """Has room for so many layers that keep their weights."""

    def __init__(self, room):
        self.room, self.adopted, self.refreshed = room, [], 0

    def adopt(self, cut):
        self.adopted.append(cut.kept_layers)
        if cut.kept_layers > self.room:
            raise torch.OutOfMemoryError

    def refresh(self):
        self.refreshed += 1


@pytest.mark.parametrize(("room", "counted"), [(2, 0), (0, 1)])
def test_a_cut_that_no_longer_fits_is_made_smaller_and_counted(room, counted):
    engine = Engine(room)
    facts = SimpleNamespace(progress=SimpleNamespace(cut=cut_of(2048, engine="fast", kept_layers=2)), out_of_memory=0)

    TrainingStage._adopt(None, SimpleNamespace(choice=SimpleNamespace(engine=engine)), facts)

    assert facts.progress.cut.kept_layers == engine.adopted[-1] <= room
    assert facts.out_of_memory == counted
    assert engine.refreshed == 1
