"""Checkpoints that somebody wrote anew, with a manifest that matches: passed over, and nothing of them is published."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tampering import change_tensors, documents, reseal
from tiny import LAYERS

from job.core.errors import DataError, StopRequestedError
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.saved_state import DamagedStateError

STOP = 3


@pytest.fixture
def saved(start, tmp_path):
    """(optimizer) -> a fresh tiny attempt, and the checkpoint of another one."""

    def make(optimizer):
        made = start(steps=6, optimizer=optimizer)
        made.stop_after, made.save_to = STOP, tmp_path / "saved"
        with pytest.raises(StopRequestedError):
            made.run(evaluate_every=3)
        return start(steps=6, optimizer=optimizer), made.save_to / f"step-{STOP}"

    return make


def load(made, folder):
    targets = made.documents.targets
    return checkpoints.load(made.state, folder, step=STOP, layers=LAYERS, targets=targets)


def is_untouched(made):
    return made.progress.step == 0 and not made.state.optimizer.state_dict()["state"]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("name", [name for name in checkpoints.FILES if name.endswith(".safetensors")])
def test_whatever_a_tensor_file_holds_it_is_restored_or_refused_with_nothing_touched(saved, optimizer, name, often):
    made, folder = saved(optimizer)
    whole = (folder / name).read_bytes()

    @often
    @given(st.integers(0, 2**32))
    def check(seed):
        (folder / name).write_bytes(whole)
        change_tensors(folder / name, random.Random(seed))
        try:
            load(made, folder)
        except DamagedStateError:
            assert is_untouched(made)
        else:  # what does not matter, or cannot be seen: finite numbers of the right form
            for entries in made.state.optimizer.state.values():
                assert all(not t.is_floating_point() or t.isfinite().all() for t in _tensors(entries))
            made.state.optimizer.state.clear()
            made.progress.step = 0

    check()


def _tensors(entries):
    return [value for value in entries.values() if isinstance(value, torch.Tensor)]


def test_whatever_a_state_says_it_is_restored_or_refused_with_nothing_touched(saved, often):
    made, folder = saved("adamw_8bit")
    path = folder / "state.json"
    rates = [group["lr"] for group in made.state.optimizer.param_groups]

    @often
    @given(documents(json.loads(path.read_bytes())))
    def check(content):
        path.write_bytes(content)
        try:
            load(made, folder)
        except DataError:
            assert is_untouched(made)
        else:
            assert made.progress.step == STOP == len(made.progress.losses)
            assert all(group["weight_decay"] == 0 for group in made.state.optimizer.param_groups)
            made.state.optimizer.state.clear()
            made.progress.step = 0
        for group, rate in zip(made.state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    check()


def test_what_a_checkpoint_says_of_rate_and_schedule_is_not_obeyed(saved):
    made, folder = saved("adamw_torch")
    load(made, folder)
    expected = made.state.optimizer.param_groups[0]["lr"], made.state.scheduler.state_dict()
    state = json.loads((folder / "state.json").read_text())
    state["optimizer"]["groups"][0] |= {"lr": 1e6, "weight_decay": 1e6, "betas": [0, 0]}
    state["scheduler"] |= {"last_epoch": 0, "base_lrs": [1e6], "_last_lr": [1e6]}
    (folder / "state.json").write_text(json.dumps(state))
    load(made, folder)
    (group,) = made.state.optimizer.param_groups
    assert (group["lr"], made.state.scheduler.state_dict()) == expected
    assert (group["weight_decay"], group["betas"]) == (0.0, (0.9, 0.999))


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """A run that is trained, and was killed before anything of it was published."""
    from job_process import Job

    from job.edge.host.crashing import disarm

    job = Job(tmp_path_factory.mktemp("trained"), base)
    job.recipe["train"]["learning_rate"] = 1e-12  # so all evaluations are equal, and the first one is chosen
    try:
        assert job.call("run", "--crash-at", "adapter.before_file=error").code == 70
    finally:
        disarm()
    return job


@pytest.fixture
def tampered(trained, tmp_path, base):
    """The same run in a place of its own, and its checkpoints, oldest first."""
    from job_process import Job

    job = Job(tmp_path, base)
    for name in ("store", "data"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(trained.folder / name, tmp_path / name)
    return job


def _named(job, trained):
    """Where the data stands is part of what a run is."""
    job.recipe |= {name: trained.recipe[name] for name in ("data", "train")}
    return sorted(job.only_run().glob("checkpoints/*"))


def test_a_description_of_another_base_is_not_published(tampered, trained):
    for place in _named(tampered, trained):
        path = place / "adapter_config.json"
        config = json.loads(path.read_text())
        true = json.dumps(config, indent=2, sort_keys=True)
        config |= {"base_model_name_or_path": "evil/base", "peft_type": "IA3", "modules_to_save": ["lm_head"]}
        config["auto_mapping"] = {"base_model_class": "x", "parent_library": "os"}
        path.write_text(json.dumps(config))
        reseal(place)
    ended = tampered.call("run")
    assert ended.code == 0, ended.stdout
    assert (tampered.only_run() / "adapter/adapter_config.json").read_text() == true


def test_a_checkpoint_of_another_form_is_passed_over_and_said(tampered, trained):
    *_, newest = _named(tampered, trained)
    change = json.loads((newest / "state.json").read_text())
    change["progress"]["losses"][0] = "ten"
    (newest / "state.json").write_text(json.dumps(change))
    reseal(newest)
    ended = tampered.call("run")
    assert ended.code == 0, ended.stdout
    (event,) = ended.named("checkpoint_passed_over")
    assert event["checkpoint"] == newest.name
    assert "progress" not in ended.named("resumed")[0]
    (*_, last) = tampered.report()["attempts"]
    assert "losses.0" in last["passed_over"][0]["reason"]


def test_weights_of_another_form_are_not_published(tampered, trained):
    *older, _ = _named(tampered, trained)
    for place in older:
        path = place / "adapter_model.safetensors"
        save_file({name: torch.ones(3) for name in load_file(path)}, path)
        reseal(place)
    ended = tampered.call("run")
    assert ended.code == 0, ended.stdout
    assert ended.named("checkpoint_passed_over")
    assert tampered.report()["sweet_spot"]["step"] == 6
    published = load_file(tampered.only_run() / "adapter/adapter_model.safetensors")
    assert all(tensor.ndim > 1 for tensor in published.values())
