"""Answers side by side: the wrong ones first, and among them those that became worse.

On a channel the model in use stands beside base and tuned model, and before all others come the answers that it gave
better: what would be lost by a change.
"""

from collections.abc import Sequence

from job.core.judging.answer_metrics import MetricName
from job.core.judging.held_out import Answer
from job.core.nightly.channel import THE_BASE
from job.render.page.blocks import Answers, Chapter, Room, ShownAnswer, Words

_AT_ONCE, _MOST_AT_ONCE = 6, 12
"""Answers that are seen without asking; more where they are wrong."""
_RIGHT_OR_WRONG = ("pattern", "json_equal", "contains")
_ORDER = {"asked": 0, "wrong": 1, "right": 2}


def answers_chapter(
    answers: Sequence[Answer], room: Room, *, metric: MetricName | None = None, champion: str | None = None
) -> Chapter:
    """At most as many as there is room for.

    Args:
        answers: the report's.
        room: on the page.
        metric: which of them are right; None: the words say it.
        champion: what the run was compared with on its channel; None: its recipe names none.
    """
    if not answers:
        said = "Nothing was asked: evaluate.prompts and evaluate.answers say what both models answer."
        return Chapter(anchor="answers", name="Answers", blocks=[Words(text=said)])
    lost = [] if champion is None else [each for each in answers if _is_lost(each, champion)]
    others = [each for each in answers if champion is None or not _is_lost(each, champion)]
    ordered = [*lost, *sorted(others, key=lambda each: (_ORDER[_state(each)], -_change(each)))]
    shown = [_shown(each, room) for each in ordered[: room.answers]]
    at_once = max(_AT_ONCE, sum(each.state != "right" for each in shown[:_MOST_AT_ONCE]))
    right = sum(_state(each) == "right" for each in answers)
    expected = sum(each.expected is not None for each in answers)
    first = "The recipe's own prompts come first;"
    if champion is not None:
        better = f"{len(lost):,} were answered better by {room.cut(champion)}"
        first = f"{better}, and come first; then the recipe's own prompts;"
    said = f"{first} then the wrong answers, those whose loss rose most before the others."
    how = "are right by the metric" if metric in _RIGHT_OR_WRONG else "came word for word"
    counted = f" {right:,} of {expected:,} expected answers {how}." if expected else ""
    block = Answers(answers=shown[:at_once], folded=shown[at_once:], left_out=len(answers) - len(shown))
    return Chapter(anchor="answers", name="Answers", blocks=[Words(text=said + counted), block])


def _state(answer: Answer) -> str:
    if answer.expected is None:
        return "asked"
    if answer.tuned_score is not None and answer.tuned_score in (0, 1):
        return "right" if answer.tuned_score else "wrong"
    return "right" if answer.tuned == answer.expected else "wrong"


def _is_lost(answer: Answer, champion: str) -> bool:
    """Whether what the run was compared with is known to have given a better answer."""
    before = answer.base_score if champion == THE_BASE else answer.champion_score
    return before is not None and answer.tuned_score is not None and answer.tuned_score < before


def _change(answer: Answer) -> float:
    if answer.base_loss is None or answer.tuned_loss is None:
        return 0.0
    return answer.tuned_loss - answer.base_loss


def _shown(answer: Answer, room: Room) -> ShownAnswer:
    figures = [room.cut(answer.where)] if answer.where is not None else []
    if answer.base_loss is not None and answer.tuned_loss is not None:
        figures.append(f"loss {answer.base_loss:.4f} → {answer.tuned_loss:.4f}")
    if answer.base_score is not None and answer.tuned_score is not None:
        figures.append(f"score {answer.base_score:.2g} → {answer.tuned_score:.2g}")
    if answer.champion_score is not None:
        figures.append(f"of the model in use {answer.champion_score:.2g}")
    return ShownAnswer(
        prompt=room.cut(answer.prompt),
        expected=None if answer.expected is None else room.cut(answer.expected),
        reference=None if answer.reference is None else room.cut(answer.reference),
        base=room.cut(answer.base),
        champion=None if answer.champion is None else room.cut(answer.champion),
        tuned=room.cut(answer.tuned),
        state=_state(answer),
        figures=", ".join(figures),
    )
