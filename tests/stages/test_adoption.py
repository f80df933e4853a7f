"""The cut that was planned meets a device whose memory has gone since."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import cut_of

from job.stages.preparing import compile_first
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


class Stepper:
    """Notes before which step it compiles."""

    def __init__(self):
        self.asked = []

    def compile_ahead(self, number):
        self.asked.append(number)


@pytest.mark.parametrize(("compiled", "step", "asked"), [(True, 0, [1]), (True, 3, [4]), (True, 6, []), (False, 0, [])])
def test_compiled_layers_are_compiled_in_a_phase_of_their_own_before_the_next_step(compiled, step, asked):
    stepper, phases = Stepper(), []
    progress = SimpleNamespace(cut=cut_of(2048, compiled=compiled), step=step)
    planned = SimpleNamespace(course=SimpleNamespace(steps=6))
    attempt = SimpleNamespace(phases=SimpleNamespace(phase=lambda name: nullcontext(phases.append(name))))

    compile_first(attempt, stepper, progress, planned)

    assert stepper.asked == asked
    assert phases == ["compile"] * len(asked)
