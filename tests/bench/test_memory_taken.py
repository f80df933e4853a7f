import json

from bench.memory_taken import MOMENTS, row_of

PLAN = {"micro_batch_tokens": 4096, "kept_layers": 32, "out_of_memory": 0}


def report(losses, plan=PLAN):
    return {
        "plan": plan,
        "curve": {"loss": losses, "grad_norm": [2.0] * len(losses)},
        "evaluations": [{"loss": 3.0}, {"loss": losses[-1]}],
    }


def test_each_moment_begins_with_a_line_of_the_log():
    events = [
        {"event": "plan", "steps": 8},
        {"event": "phase", "name": "evaluate"},
        {"event": "phase", "name": "train"},
        {"event": "step", "step": 4, "loss": 1.0},
    ]
    before = ['{"event": "step", "step": 40}', "no JSON", '{"event": "pl']
    for moment, event in zip(MOMENTS, events, strict=True):
        assert not moment.has_come(before)
        assert moment.has_come([*before, json.dumps(event)])


def test_a_row_says_what_changed_and_how_far_apart_it_is():
    less = PLAN | {"kept_layers": 0, "out_of_memory": 1}

    assert row_of("then", report([3.0, 2.5], less), report([3.0, 2.0])) == (
        *("then", 1, "kept_layers 32 to 0", 2, "0.50000", "0.00%"),
        "2.5000, +0.5000",
    )
