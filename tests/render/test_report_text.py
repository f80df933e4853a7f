"""The report for people: what a terminal shows."""

from job.core.judging.held_out import Answer
from job.render.report_text import histogram_lines, report_lines


def shown(report, **changes):
    return "\n".join(report_lines(report.model_copy(update=changes)))


def test_the_first_lines_say_whether_it_learned_and_what_to_keep(report):
    lines = report_lines(report)

    assert lines[0] == "run notes-1f2e  s3://models/notes/runs/notes-1f2e"
    assert lines[2] == "validation loss    base 2.5000 -> tuned 1.2500 nats a token"
    assert lines[3] == "chosen checkpoint  step 50 of 100 (lowest validation loss)"
    assert lines[4] == "overfitting        from step 100 on: significantly worse than step 50"
    assert lines[5] == "exact match        base 0% -> tuned 95% of 60 held out"


def test_overfitting_that_was_not_seen_is_not_claimed(report):
    calm = report.sweet_spot.model_copy(update={"overfitting_from_step": None})

    assert "overfitting        not seen" in shown(report, sweet_spot=calm)


def test_every_evaluation_is_shown_and_the_chosen_one_marked(report):
    rows = [line for line in report_lines(report) if line.strip().startswith(("0 ", "50 ", "100 "))]

    assert len(rows) == 3
    assert [row.endswith("<- chosen") for row in rows] == [False, True, False]


def test_notes_and_left_out_lines_are_told(report):
    text = shown(report)

    assert "note               the store has no conditional writes" in text
    assert "wrong lines left out 1, duplicates 2, too long and dropped 1" in text
    assert "held out and trained on" not in text


def test_what_to_do_next_is_told_below_the_notes(report):
    lines = report_lines(report)
    told = [line for line in lines if line.startswith("what next")]

    assert told[-1] == (
        'what next          wrong lines were left out (1): mend them, the first is train.jsonl:17 ("text" is missing)'
    )
    assert lines.index(told[0]) > lines.index("note               the store has no conditional writes")


def test_attempts_are_told_when_there_was_more_than_one(report):
    assert "attempt 1: ended without a word" in shown(report)
    assert "attempt 2: exit 0: finished" in shown(report)
    assert "attempt" not in shown(report, attempts=report.attempts[1:]).replace("in this attempt", "")


def test_the_wait_for_the_first_step_is_told_the_longest_part_first(report):
    line = "start: 21.5 s until the first step was done (base from weights): load_model 15.0, first_step 6.0, start 0.5"

    assert line in report_lines(report)
    assert "until the first step" not in shown(report, start=None)


def test_the_share_of_the_ceiling_stands_below_the_speed(report):
    known = {"ceiling_share": 0.843, "ceiling_tflops": 685.0, "ceiling_from": "measured"}
    lines = report_lines(report.model_copy(update={"throughput": report.throughput.model_copy(update=known)}))
    line = "       0.84 of what the GPU's large products sustain (685 TFLOP/s, measured on one of its kind)"
    derived = {"ceiling_from": "derived", "ranks": 2}

    assert lines[lines.index(line) - 1].startswith("speed: 4,000 real tokens a second")
    text = shown(report, throughput=report.throughput.model_copy(update=known | derived))
    assert "0.84 of what each GPU's large products sustain (685 TFLOP/s, derived from its data sheet)" in text
    assert "sustain" not in shown(report)


def test_answers_stand_side_by_side_each_on_one_line(report):
    lines = report_lines(report)

    assert "  prompt    question 0 Answer:" in lines
    at = lines.index("  prompt    question 0 Answer:")
    assert lines[at + 1 : at + 3] == ["  base      mumble", "  tuned     answer 0"]
    assert lines[-1] == "  ... and 2 more in report.json"


def test_a_long_answer_is_cut(report):
    long = Answer(prompt="q", expected="x " * 500, base="", tuned="y" * 500)

    assert all(len(line) <= 172 for line in shown(report, answers=(long,)).splitlines())
    assert f"  tuned     {'y' * 157}..." in shown(report, answers=(long,))


def test_a_report_without_extras_is_shown_too(report):
    bare = shown(report, exact_match=None, answers=(), notes=(), evaluations=report.evaluations[:1])

    assert "exact match" not in bare
    assert "prompt" not in bare


def test_a_histogram_has_a_bar_for_each_bin_and_points_at_max_length():
    assert histogram_lines((8, 16, 24, 32), (1, 0, 400), mark=30) == [
        "   8-15       1 #",
        "  16-23       0 ",
        "  24-31     400 " + "#" * 24 + "  <- max_length",
    ]


def test_a_max_length_between_two_bins_belongs_to_the_upper_one():
    assert ["max_length" in line for line in histogram_lines((8, 16, 24), (1, 2), mark=16)] == [False, True]


def test_a_max_length_outside_the_histogram_is_pointed_at_nowhere():
    assert all("max_length" not in line for line in histogram_lines((8, 16, 24), (1, 2), mark=64))


def test_an_empty_histogram_has_no_bars():
    assert histogram_lines((0, 1), (0,)) == ["  0-0       0 "]


def test_several_processes_are_shown_with_what_they_lost_and_sent(report):
    together = {"ranks": 8, "nodes": 2, "tokens_per_second_a_rank": 2500.0, "waited_seconds": 3.25}
    speed = report.throughput.model_copy(update={**together, "bytes_a_step": 640_000_000})

    assert "by 8 processes on 2 nodes: 2,500 tokens a second each, 3.2 s waited" in shown(report, throughput=speed)
    sharded = speed.model_copy(update={"placement": "sharded"})
    assert "by 8 processes on 2 nodes, the base sharded over them: 2,500" in shown(report, throughput=sharded)
    assert "640.0 MB sent a step" in shown(report, throughput=speed)
    assert "processes" not in shown(report)


def test_a_run_that_found_nothing_better_than_the_base_says_so_first(report):
    assert "nothing better" not in "\n".join(report_lines(report))

    spot = report.sweet_spot.model_copy(update={"step": report.evaluations[0].step})
    assert report.evaluations[0].step == 0
    _run, _blank, first, *_ = report_lines(report.model_copy(update={"sweet_spot": spot}))
    assert first == "verdict            nothing better than the base was found: the adapter leaves it as it is"
