"""What is replayed and when, with a step that adds up its tokens; the real one is replayed in tests/gpu."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from job.kernels import cuda_graphs
from job.kernels.attention import Segments
from job.kernels.cuda_graphs import Replay, rounded
from job.kernels.decoder import PackedRow


class AddingStep:
    """Adds the tokens to the gradient, and returns the targets."""

    def __init__(self):
        self.parameter = nn.Parameter(torch.zeros(1))
        self.parameter.grad = torch.zeros(1)
        self.sizes, self.refreshed = [], 0
        self.on_finished = None

    def accumulate(self, row):
        self.sizes.append(len(row.ids))
        self.parameter.grad += row.ids.sum()
        if self.on_finished is not None:
            self.on_finished(1)
            self.on_finished(0)
        return row.targets.float()

    def refresh(self):
        self.refreshed += 1


class Played(Replay):
    """In place of the GPU's graphs."""

    def _recorded(self, work):
        before = self._parameters[0].grad.clone()
        work()
        self._parameters[0].grad.copy_(before)  # a recording runs nothing
        return SimpleNamespace(replay=work)

    def _event(self):
        return "an event"


def row_of(*lengths, first=1):
    tokens = sum(lengths)
    ids = torch.arange(first, first + tokens)
    return PackedRow(
        ids=ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        segments=Segments(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), lengths=lengths),
        places=torch.arange(tokens - 1),
        targets=ids[1:],
        weight_per_target=torch.ones(1),
        seed=None,
    )


@pytest.fixture
def step():
    return AddingStep()


def replay_of(kind, step, told, *, most_tokens=512, most_recorded=4096):
    options = {"most_tokens": most_tokens, "most_recorded": most_recorded, "on_failure": told.append}
    return kind(step, [step.parameter], **options)


def test_each_micro_batch_counts_once(step):
    replay, expected = replay_of(Played, step, []), 0
    for row in (row_of(70, 30), row_of(20, 60, first=5), row_of(90, 90), row_of(50)):
        expected += int(row.ids.sum())

        assert torch.equal(replay.accumulate(row), row.targets.float())
        assert float(step.parameter.grad) == expected
    assert set(step.sizes) == {128, 256}


def test_a_large_one_is_left_to_the_step(step):
    row = row_of(400, 200)
    losses = replay_of(Played, step, []).accumulate(row)

    assert step.sizes == [600]
    assert torch.equal(losses, row.targets.float())


@pytest.mark.parametrize("most_recorded", [4096, 128, 0])
def test_what_there_is_no_memory_to_record_is_run_in_the_same_size(step, most_recorded):
    said = []
    replay, expected = replay_of(Played, step, said, most_recorded=most_recorded), 0
    for row in (row_of(70, 30), row_of(90, 90)):
        expected += int(row.ids.sum())

        assert torch.equal(replay.accumulate(row), row.targets.float())
    assert float(step.parameter.grad) == expected
    runs = {size: step.sizes.count(size) for size in (128, 256)}  # one is recorded: run before it, in it, and replayed
    assert runs == {size: 3 if size <= most_recorded else 1 for size in (128, 256)}
    assert not said


def test_a_recording_has_what_the_largest_micro_batch_leaves():
    step = SimpleNamespace(kept_token_bytes=10)
    assert cuda_graphs.most_recorded(step, micro_batch_tokens=500, free_bytes=10_000) == 350
    assert cuda_graphs.most_recorded(step, micro_batch_tokens=900, free_bytes=10_000) == 0


def test_who_watches_hears_of_every_layer_once_with_an_event_where_the_step_is_replayed(step):
    replay, heard = replay_of(Played, step, []), []
    replay.accumulate(row_of(70, 30))  # recorded while nobody watched
    replay.watch(lambda index, event: heard.append((index, event)))
    for row in (row_of(70, 30), row_of(20, 60), row_of(400, 200)):
        heard.clear()
        replay.accumulate(row)

        event = "an event" if len(row.ids) < 512 else None
        assert heard == [(1, event), (0, event)]


def test_beside_other_ranks_there_is_less_padding_and_documents_make_no_sizes_of_their_own(step):
    """What one rank records, and what it adds in padding, all others wait for."""
    replay = replay_of(Played, step, [], most_tokens=4096)
    alone = rounded(row_of(1000, 640), finely=False)
    replay.watch(lambda _index, _event: None)
    for lengths in ((1000, 640), (600, 500, 400, 141), (*8 * (200,), 60)):
        replay.accumulate(row_of(*lengths))

    assert alone.tokens == 1792
    assert set(step.sizes) == {1664}
    assert len(step.sizes) == 2 + 3  # recorded once: run before it, and while it is; then replayed


def test_masks_have_recordings_of_their_own():
    row = row_of(70, 30)
    masked = PackedRow(
        **{name: getattr(row, name) for name in PackedRow.__slots__} | {"seed": torch.ones(1, dtype=torch.int64)}
    )

    assert rounded(row, finely=False) != rounded(masked, finely=False)


@pytest.mark.parametrize("error", [RuntimeError("not permitted while capturing"), torch.OutOfMemoryError("full")])
def test_what_cannot_be_recorded_is_reported_once_and_run_in_the_same_size(step, monkeypatch, error):
    def refuse():
        raise error

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", refuse)
    told = []
    replay, expected = replay_of(Replay, step, told), 0
    for row in (row_of(70, 30), row_of(20, 60), row_of(90, 90)):
        expected += int(row.ids.sum())

        assert torch.equal(replay.accumulate(row), row.targets.float())
        assert float(step.parameter.grad) == expected
    replay.refresh()
    assert len(told) == 1
    assert str(error) in told[0]
    assert set(step.sizes) == {128, 256}
    assert step.refreshed


def test_a_changed_adapter_is_taken_over_each_time(step):
    replay = replay_of(Played, step, [])
    counts = []
    for _change in range(3):
        replay.refresh()
        counts.append(step.refreshed)

    assert counts[0] < counts[1] < counts[2]
