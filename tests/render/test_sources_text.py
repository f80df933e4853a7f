"""Several sources side by side: within 80 columns, and nothing where there is but one."""

import pytest

from job.core.data.report_data import SourceReport
from job.core.lines import cells
from job.core.reports.report import Report, SourceCurve, SourceLoss, SourceShare, read_report
from job.render.cards.adapter import adapter_card
from job.render.report_text import report_lines
from job.render.sources_text import source_lines

NAMES = ("notes", "a very long name of a source that has no room")


def counted(name, used):
    return SourceReport(
        name=name,
        rows=used,
        used=used,
        truncated=0,
        dropped=0,
        without_target=0,
        bad_lines=0,
        tokens=40 * used,
        targets=10 * used,
        percentiles={"p50": 40, "p100": 2048} if used else {},
    )


def with_sources(report, *, names=NAMES, held_out=(120, 0)):
    """The same run of two sources; of the second nothing is held out."""
    data = report.data.model_copy(
        update={
            side: getattr(report.data, side).model_copy(
                update={"sources": tuple(counted(n, used) for n, used in zip(names, many, strict=True))}
            )
            for side, many in (("train", (1_000_000, 250_000)), ("validation", held_out))
        }
    )
    shares = [(NAMES[0], 3_000_000, 0.75, 3.0), (NAMES[1], 1_000_000, 0.25, 4.0)]
    evaluations = tuple(
        each.model_copy(
            update={
                "sources": (
                    SourceLoss(name=names[0], examples=120, tokens=1200, loss=each.loss, plus_minus=0.1),
                    SourceLoss(name=names[1], examples=0, tokens=0, loss=None),
                )
            }
        )
        for each in report.evaluations
    )
    plan = report.plan.model_copy(
        update={"sources": tuple(SourceShare(name=n, examples=d, share=s, epochs=e) for n, d, s, e in shares)}
    )
    losses = tuple(SourceCurve(name=name, loss=report.curve.loss) for name in names)
    curve = report.curve.model_copy(update={"sources": losses})
    return report.model_copy(update={"data": data, "plan": plan, "curve": curve, "evaluations": evaluations})


def test_shares_lengths_and_losses_of_each_source_have_room_in_80_columns(report):
    lines = source_lines(with_sources(report))

    assert [line.split() for line in lines[:2]] == [
        ["source", "examples", "share", "epochs", "drawn", "p50", "tokens", "longest"],
        ["notes", "1,000,000", "75.0%", "3", "3,000,000", "40", "2,048"],
    ]
    assert lines[2].startswith("  a very long name ...  ")
    assert lines[-2].split()[1:] == ["120", "2.5000", "+-", "0.1", "1.2500", "+-", "0.1"]
    assert lines[-1].split()[-3:] == ["0", "-", "-"]
    assert max(map(cells, lines)) <= 80


def test_a_run_of_one_source_is_shown_as_ever(report):
    assert source_lines(report) == []
    assert not any("source" in line for line in report_lines(report))


def test_a_report_whose_sources_do_not_belong_together_is_none(report):
    whole = with_sources(report).model_dump(mode="json")
    assert isinstance(read_report(whole), Report)

    for change in ("plan", "curve", "evaluation"):
        other = with_sources(report).model_dump(mode="json")
        place = other["evaluations"][1] if change == "evaluation" else other[change]
        place["sources"] = place["sources"][:1]
        with pytest.raises(ValueError, match="sources: data, plan, curve and evaluations do not name the same ones"):
            read_report(other)


def test_a_report_of_an_earlier_version_has_no_interval_of_a_source_and_is_read(report):
    old = with_sources(report).model_dump(mode="json")
    for evaluation in old["evaluations"]:
        for source in evaluation["sources"]:
            del source["plus_minus"]

    assert source_lines(read_report(old))[-2].split()[1:] == ["120", "2.5000", "1.2500"]


def test_the_card_says_what_each_source_gave_and_how_well_it_is_learned(report):
    mixed = with_sources(report, names=("notes`\n# Heading", NAMES[1]))
    card = adapter_card(mixed)

    assert "- ``notes` # Heading``: " in card
    assert "1,000,000 examples, 75.0% of what was drawn" in card
    assert "| 120 | 2.5000 ± 0.1 | 1.2500 ± 0.1 |" in card
    assert "| 0 | - | - |" in card  # of the second source nothing is held out
    assert "\n# Heading" not in card
