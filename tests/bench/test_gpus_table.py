"""Which runs stand beside each other, what the table makes of made-up ones, and real ones on the CPU."""

import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bench import gpus_table, ours
from bench.gpus_table import Batch, Cell, batch_text, carry_together, cells_of, gpus_of, losses_text, rounds_of
from bench.spread_runs import Carried, Runs, Way

BOTH = ("replicated", "sharded")


@pytest.fixture
def bench(calls):
    return calls(gpus_table.main)


def rows(text, name):
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_gpus_double_and_one_gpu_has_no_placement():
    names = [cell.name for cell in cells_of([256], BOTH, fewest=1, gpus=4)]

    assert names == [
        *("batch 256, 1 GPU", "batch 256, 2 GPUs, replicated", "batch 256, 2 GPUs, sharded"),
        *("batch 256, 4 GPUs, replicated", "batch 256, 4 GPUs, sharded"),
    ]
    assert {cell.way.gpus for cell in cells_of([256], ["sharded"], fewest=2, gpus=8)} == {2, 4, 8}


def sizes(rounds):
    return [[cell.way.gpus for cell in cells] for cells in rounds]


def test_runs_that_fit_stand_beside_each_other_and_those_of_all_gpus_come_first_and_alone():
    cells = cells_of([256, 32], BOTH, fewest=1, gpus=4)
    rounds = rounds_of(cells, 4)

    assert sizes(rounds) == [[4], [4], [4], [4], [2, 2], [2, 2], [1, 1]]
    assert sorted(map(id, cells)) == sorted(id(cell) for together in rounds for cell in together)
    assert [cell.batch for cell in rounds[4]] == [256, 256]
    assert [[*gpus] for gpus in gpus_of(rounds[4])] == [[0, 1], [2, 3]]


def test_a_smaller_run_takes_what_larger_ones_leave():
    assert sizes(rounds_of(cells_of([256], ["replicated"], fewest=1, gpus=4), 4)) == [[4], [2, 1]]


def test_each_runs_alone_where_that_is_asked_for():
    rounds = rounds_of(cells_of([256], BOTH, fewest=1, gpus=4), 4, one_by_one=True)

    assert sizes(rounds) == [[4], [4], [2], [2], [1]]


def on_gpus(tmp_path, base, examples, **given):
    options = {"base": base, "train": examples, "text": "{t}", "device": "cuda", "limit": 60, "free_gib": None} | given
    pair = [Cell(batch=4, way=Way(gpus=2, placement=placement)) for placement in BOTH]
    batches = {4: Batch(steps=1, warm_up=0, computed={})}
    return [*carry_together(Runs(SimpleNamespace(**options), tmp_path), pair, batches)]


def test_each_run_sees_its_own_gpus_and_has_a_name_of_its_own(tmp_path, base, examples, monkeypatch):
    """Of those that the whole call sees; and the options reach the command line."""
    say = "import os, sys; raise ValueError(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + ' '.join(sys.argv[1:]))"
    monkeypatch.setattr(ours, "command_of", lambda run, *_: [sys.executable, "-c", say, run.name])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    one, two = on_gpus(tmp_path, base, examples)

    work = f"--workdir {tmp_path}/work"
    assert str(one[1]) == f"ended with 1: ValueError: 4,5 run-01 {work} --gpus 2 --base-placement replicated"
    assert str(two[1]) == f"ended with 1: ValueError: 6,7 run-02 {work} --gpus 2 --base-placement sharded"


def test_of_each_runs_gpus_no_more_is_left_free(tmp_path, base, examples, monkeypatch):
    asked = []

    @contextmanager
    def held(gib, gpus):
        asked.append((gib, [*gpus]))
        yield

    monkeypatch.setattr(gpus_table, "only_free_of_each", held)
    monkeypatch.setattr(ours, "command_of", lambda *_: [sys.executable, "-c", "raise ValueError"])
    on_gpus(tmp_path, base, examples, free_gib=79.2)

    assert asked == [(79.2, [0, 1]), (79.2, [2, 3])]


# --- the table -------------------------------------------------------------------------------------------------------


def carried(rate, *, planned=2**30, losses=(3.0, 2.0)):
    throughput = {"waited_seconds": 0.25, "seconds": 10.0, "bytes_a_step": 2_000_000, "peak_memory_bytes": 2**30}
    report = {
        "throughput": throughput,
        "plan": {"predicted_peak_bytes": planned},
        "curve": {"loss": [*losses]},
    }
    return Carried(report=report, rates=(1.0, rate, rate), steps={})


ONE, TWO, SHARDED = Way(gpus=1), Way(gpus=2, placement="replicated"), Way(gpus=2, placement="sharded")


def test_a_row_has_efficiency_and_what_the_formula_says_of_a_replicated_base():
    about = Batch(steps=3, warm_up=1, computed={2: 1.98}, token_flops=1e10)
    found = {ONE: carried(100.0), TWO: carried(190.0), SHARDED: carried(150.0, planned=None)}
    text = batch_text(32, about, found, fewest=1, ceiling=4e12)

    memory = ["0.25 of 10.0", "2.0", "1.00", "1.00", "+0.0%", "3.000 to 2.000"]
    assert text.startswith("**32 examples a step**, 3 steps, of which the first 1 do not count:")
    assert "| times 1 GPU | efficiency |" in text
    assert rows(text, "1 GPU")[0][1:] == ["100", "100", "1.000", "100.0%", "", "", *memory, "0.250"]
    assert rows(text, TWO.name)[0][1:8] == ["190", "95", "1.900", "95.0%", "1.980", "0.960", "0.25 of 10.0"]
    assert rows(text, SHARDED.name)[0][1:7] == ["150", "75", "1.500", "75.0%", "", ""]
    assert rows(text, SHARDED.name)[0][-4:-2] == ["", ""]  # nothing was planned


def test_without_one_gpu_efficiency_is_against_the_fewest():
    about = Batch(steps=3, warm_up=1, computed={4: 3.9})
    found = {SHARDED: carried(100.0), Way(gpus=4, placement="sharded"): carried(180.0)}
    text = batch_text(256, about, found, fewest=2)

    assert "| times 2 GPUs, sharded | efficiency |" in text
    assert rows(text, "4 GPUs, sharded")[0][3:7] == ["1.800", "90.0%", "", ""]


def test_before_the_fewest_are_measured_nothing_is_said_of_efficiency():
    text = batch_text(256, Batch(steps=3, warm_up=1, computed={2: 1.98}), {TWO: carried(190.0)}, fewest=1)

    assert rows(text, TWO.name)[0][1:7] == ["190", "95", "", "", "", ""]
    assert losses_text({TWO: carried(190.0)}, fewest=1, steps=30) == ""


def test_losses_are_compared_as_far_as_both_have_them():
    found = {
        ONE: carried(1.0, losses=[4.0] * 40),
        TWO: carried(1.0, losses=[4.0] * 9 + [3.998]),
        SHARDED: carried(1.0, losses=[4.0] * 29 + [4.001] + [5.0] * 10),
    }
    text = losses_text(found, fewest=1, steps=30)

    assert "- 2 GPUs, replicated: 0.00200, 0.050% of it (step 10), in the first 10 steps" in text
    assert "- 2 GPUs, sharded: 0.00100, 0.025% of it (step 30), in the first 30 steps" in text


def test_a_run_that_fails_has_its_line_and_the_others_go_on(bench, monkeypatch):
    monkeypatch.setattr(ours, "command_of", lambda *_: [sys.executable, "-c", "raise ValueError('no GPU')"])
    code, text = bench("--gpus", "2", "--batch", "4", "--batch", "2")

    assert code == 1
    assert "<!-- begin gpus-table-tiny-llama-1-to-2-4-2 -->" in text
    assert text.count(": no result: ended with 1: ValueError: no GPU") == 6
    assert "\n- batch 4, 1 GPU beside batch 2, 1 GPU\n" in text


@pytest.mark.parametrize(("options", "said"), [(["--gpus", "6"], "6"), (["--gpus", "2", "--fewest", "4"], "4")])
def test_numbers_that_the_table_cannot_have_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        gpus_table.main(["--base", "B", "--train", "T", *options])
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.bench
def test_the_table_of_two_processes_on_the_cpu(bench):
    code, text = bench("--gpus", "2", "--batch", "4", "--batch", "2", "--steps", "3", "--ceiling")

    assert code == 0, text
    assert "## QLoRA on 1 to 2 GPUs of one host: tiny-llama" in text
    for name in ("1 GPU", "2 GPUs, replicated", "2 GPUs, sharded"):
        found = rows(text, name)
        assert len(found) == 2
        assert all(float(row[1].replace(",", "")) > 0 and row[4].endswith("%") for row in found)
    assert len(re.findall(r"- 2 GPUs, \w+: 0\.0000\d, 0\.00\d% of it \(step \d\), in the first 3 steps", text)) == 4
    assert "- batch 2, 2 GPUs, sharded: generic engine (on the CPU" in text
