"""Where a run goes on: the cut that a checkpoint holds, and what another device or an earlier version changes."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny import LAYERS, cut_of

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.store.directory import DirectoryStore
from job.stages.resuming import resume
from job.tune.loop import checkpoint as checkpoints

STOP = 3


@pytest.fixture
def stored(start, tmp_path):
    """(sections) -> an attempt that stopped at step 3, and the run whose store holds its checkpoint."""

    def make(change_state=None, **sections):
        made = start(steps=6, **sections)
        made.stop_after, made.save_to = STOP, tmp_path / "saved"
        with pytest.raises(Exception, match="asked to stop"):
            made.run(evaluate_every=3)
        folder = made.save_to / f"step-{STOP}"
        if change_state is not None:
            state = json.loads((folder / "state.json").read_text())
            change_state(state)
            (folder / "state.json").write_text(json.dumps(state))
        artifacts = Artifacts(DirectoryStore(tmp_path / "store"), "r1")
        artifacts.publish_checkpoint(folder, Checkpoint(step=STOP, attempt=1))
        return made, artifacts

    return make


def resumed(made, artifacts, tmp_path):
    return resume(
        made.state,
        artifacts,
        made.recipe,
        tmp_path / "scratch",
        layers=LAYERS,
        targets=made.documents.targets,
        sources=1,
        should_stop=lambda: False,
    )


def as_0d8f748_wrote_it(state, **plan):
    """The state before there was a format: the cut as `plan`, one switch for recomputing."""
    del state["format"]
    cut = state["progress"].pop("cut")
    recomputed = {"checkpointing": cut["recomputed_layers"] > 0}
    state["progress"]["plan"] = {**cut, **recomputed, **plan}


def test_it_goes_on_with_the_cut_that_the_checkpoint_holds(start, stored, tmp_path):
    _, artifacts = stored(micro_batch_tokens=80)
    made = start(steps=6, micro_batch_tokens=64)
    found = resumed(made, artifacts, tmp_path)

    assert found.checkpoint == Checkpoint(step=STOP, attempt=1)
    assert made.progress.step == STOP
    assert made.progress.cut == cut_of(80)
    assert made.progress.changes == []
    assert not (tmp_path / "scratch" / found.checkpoint.name).exists()


def test_without_a_checkpoint_it_begins_at_the_start(start, tmp_path):
    made = start(steps=6)
    found = resumed(made, Artifacts(DirectoryStore(tmp_path / "store"), "r1"), tmp_path)

    assert (found.checkpoint, found.passed_over, made.progress.step) == (None, (), 0)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"compiled": True}, {}, "on CPU in bf16 after CPU in bf16 with compiled layers"),
        (
            {"compiled": True},
            {"engine": "fast"},
            "on CPU in bf16 on the fast engine after CPU in bf16 with compiled layers",
        ),
        ({}, {"device": "H100", "compiled": True}, "on H100 in bf16 with compiled layers after CPU in bf16"),
        ({}, {"compute_dtype": "fp32"}, "on CPU in fp32 after CPU in bf16"),
        ({"compute_dtype": "fp32"}, {}, "on CPU in bf16 after CPU in fp32"),
    ],
)
@pytest.mark.parametrize(("dropout", "masks"), [(0.0, ""), (0.1, " (and dropout draws other masks)")])
def test_another_arithmetic_has_a_cut_of_its_own_and_is_reported(
    start, stored, tmp_path, before, now, said, dropout, masks
):
    lora = LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=dropout)
    _, artifacts = stored(lambda state: state["progress"]["cut"].update(before), lora=lora)
    made = start(steps=6, lora=lora)
    planned = made.progress.cut = cut_of(2048, **now)
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == planned
    assert made.progress.changes == [f"resumed at step 3 {said}: equal within rounding, not to the bit{masks}"]


def test_what_was_no_longer_compiled_stays_as_it_is_and_to_the_bit(start, stored, tmp_path):
    _, artifacts = stored()
    made = start(steps=6)
    made.progress.cut = cut_of(2048, compiled=True)
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == cut_of(64)
    assert made.progress.changes == []


# --- checkpoints of earlier and later versions -----------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "changes"), [(0.0, 0), (0.1, 1)])
def test_a_run_that_commit_0d8f748_began_goes_on_and_dropout_s_other_masks_are_reported(
    start, stored, tmp_path, dropout, changes
):
    lora = LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=dropout)
    whole = start(steps=6, lora=lora).run(evaluate_every=3)
    _, artifacts = stored(as_0d8f748_wrote_it, lora=lora)
    made = start(steps=6, lora=lora)
    resumed(made, artifacts, tmp_path)
    assert made.progress.cut == cut_of(64)
    assert len(made.progress.changes) == changes
    assert all("earlier version's checkpoint: dropout draws other masks" in each for each in made.progress.changes)
    made.run(evaluate_every=3)

    assert made.progress.losses == whole.progress.losses
    for mine, theirs in zip(made.adapter(), whole.adapter(), strict=True):
        assert torch.equal(mine, theirs)


def in_format_2(state):
    """Every device computed in bf16, and the cut did not say so."""
    state["format"] = 2
    del state["progress"]["cut"]["compute_dtype"]


@pytest.mark.parametrize("earlier", [in_format_2, as_0d8f748_wrote_it])
@pytest.mark.parametrize(("now", "changes"), [("bf16", 0), ("fp32", 1)])
def test_what_an_earlier_version_began_was_in_bf16(start, stored, tmp_path, earlier, now, changes):
    def wrote(state):
        earlier(state)
        state["progress"].get("plan", {}).pop("compute_dtype", None)

    _, artifacts = stored(wrote, lora=LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=0.0))
    made = start(steps=6, lora=LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=0.0))
    made.progress.cut = cut_of(64, compute_dtype=now)
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == cut_of(64, compute_dtype=now)
    assert len(made.progress.changes) == changes
    assert all("in fp32 after CPU in bf16: equal within rounding" in each for each in made.progress.changes)


def without_rows(state):
    del state["progress"]["cut"]["rows"]


@pytest.mark.parametrize("earlier", [without_rows, as_0d8f748_wrote_it])
@pytest.mark.parametrize(("now", "changes"), [("packed", 0), ("padded", 1)])
def test_other_rows_than_an_earlier_version_s_are_said(start, stored, tmp_path, earlier, now, changes):
    """It had documents in one row, or one at a time, and did not write down which."""
    _, artifacts = stored(earlier, lora=LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=0.0))
    made = start(steps=6, lora=LoraSection(r=8, alpha=16, targets=("v_proj",), dropout=0.0))
    made.progress.cut = cut_of(64, rows=now)
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == cut_of(64, rows=now)
    assert len(made.progress.changes) == changes
    assert all("one document a row, padded after CPU in bf16: equal within" in each for each in made.progress.changes)


def test_what_its_plan_did_not_say_is_as_it_is_planned_now(start, stored, tmp_path):
    def older(state):
        as_0d8f748_wrote_it(state)
        state["progress"]["plan"] = {"micro_batch_tokens": 1024, "checkpointing": True, "device": "CPU"}

    _, artifacts = stored(older)
    made = start(steps=6)
    made.progress.cut = cut_of(4096, evaluation_tokens=512, kept_layers=1)
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == cut_of(1024, evaluation_tokens=512, kept_layers=1, recomputed_layers=LAYERS)


def test_a_state_of_a_newer_version_is_refused_with_what_to_do(start, stored, tmp_path):
    _, artifacts = stored(lambda state: state.update(format=99))
    with pytest.raises(DataError, match=r"format 99, and this version of the job reads up to \d+; start it with"):
        resumed(start(steps=6), artifacts, tmp_path)


def test_the_cut_stands_in_a_checkpoint_by_its_names(start, tmp_path):
    made = start(steps=1)
    made.progress.cut = replace(made.progress.cut, recomputed_layers=1)
    checkpoints.save(made.state, tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())

    assert state["progress"]["cut"] == asdict(cut_of(64, recomputed_layers=1))


@pytest.mark.parametrize(
    ("before", "now", "noted"),
    [
        ((1, 1), (1, 1), None),
        ((2, 1), (2, 1), None),
        ((4, 2), (4, 2), None),
        ((1, 1), (2, 1), "in 2 processes after 1 process"),
        ((4, 1), (1, 1), "in 1 process after 4 processes"),
        ((4, 1), (4, 2), "in 4 processes of 2 nodes after 4 processes"),
    ],
)
def test_another_number_of_processes_is_kept_with_the_run(start, stored, tmp_path, before, now, noted):
    """And of nodes, where each sums by itself first."""

    def made_by(state):
        state["progress"]["ranks"], state["progress"]["nodes_that_sum"] = before

    _, artifacts = stored(change_state=made_by)
    made = start(steps=6)
    made.progress.ranks, made.progress.nodes_that_sum = now
    found = resumed(made, artifacts, tmp_path)

    assert found.checkpoint is not None
    assert (made.progress.ranks, made.progress.nodes_that_sum) == now
    assert len(made.progress.changes) == (noted is not None)
    for change in made.progress.changes:
        assert f"{noted}: equal within rounding" in change


@pytest.mark.parametrize("now", [2, 3])
def test_batches_are_cut_anew_for_another_number_of_processes(start, stored, tmp_path, now):
    """The same number goes on as it was cut, to the same bits; another one has other shares."""

    def made_by_two(state):
        state["progress"]["ranks"] = 2

    _, artifacts = stored(change_state=made_by_two)
    made = start(steps=6)
    before = made.progress.cut
    planned = made.progress.cut = replace(before, micro_batch_tokens=before.micro_batch_tokens + 1)
    made.progress.ranks = now
    resumed(made, artifacts, tmp_path)

    assert made.progress.cut == (before if now == 2 else planned)


def test_a_checkpoint_of_a_version_that_knew_one_process_alone_is_that_of_one(start, stored, tmp_path):
    def as_format_3(state):
        state["format"] = 3
        del state["progress"]["ranks"]

    _, artifacts = stored(change_state=as_format_3)
    made = start(steps=6)
    resumed(made, artifacts, tmp_path)

    assert (made.progress.step, made.progress.ranks, made.progress.changes) == (STOP, 1, [])
