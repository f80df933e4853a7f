"""Answers token by token are `generate`'s, whatever is dropped, moved, kept or done again on the way."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import structlog
import torch
from structlog.testing import capture_logs
from tiny import CPU, adapted, targets_of
from tiny_families import FAMILIES, write_family

from job.core.errors import StopRequestedError
from job.core.recipe.schema import LoraSection
from job.kernels.recorded import Recorder
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.answers import greedy, remembered
from job.tune.loop.answers.greedy import AnswersDifferError, greedy_tokens
from job.tune.loop.answers.remembered import Memory, can_remember
from job.tune.loop.evaluate import Question, answer, generated_tokens
from job.tune.model.adapter import attach_lora, trainable
from job.tune.model.base import load_base
from job.tune.model.experts import in_four_bits

_OF_EACH_KIND = (
    "llama, tied",
    "mistral",
    "qwen2, window",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "granite",
    "gpt_oss",
)
"""Tied heads, windows in all or some layers, caps, learned positions, factors on logits, sinks and experts; the others
are marked."""
LENGTHS = (9, 33, 5, 60, 14, 40)
"""Tokens of the questions: most are longer than every window."""
LONGEST = 16
NAMES = SimpleNamespace(eos_token_id=2, bos_token_id=1)


OPEN = frozenset({10**6})
"""No token has this id: nothing ends an answer."""


def never():
    return False


def by_generate(model, prompts, ends):
    questions = [Question(ids=tuple(prompt), prompt="", expected=None) for prompt in prompts]
    return generated_tokens(model, questions, ends, NAMES, max_new_tokens=LONGEST, seed=0, should_stop=never)


def token_by_token(model, prompts, ends, *, should_stop=never, longest=LONGEST):
    return greedy_tokens(model, prompts, ends, max_new_tokens=longest, should_stop=should_stop)


def prompts_of(lengths=LENGTHS, *, most=200):
    torch.manual_seed(5)
    return [torch.randint(3, most, (length,)).tolist() for length in lengths]


def early(answers):
    """Ends by which some answers end at once, some on the way, and some never."""
    return [frozenset({*answers[0][3:4], *answers[2][7:8], answers[4][0]})] * len(answers)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of()


@pytest.fixture(scope="module")
def open_ended(llama, prompts):
    """What a Llama answers where nothing ends it."""
    return by_generate(llama, prompts, [OPEN] * len(prompts))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _OF_EACH_KIND else pytest.mark.families) for name in FAMILIES]
)
def test_greedy_answers_are_generate_s_token_for_token(name, tmp_path):
    """Of every family that is packed; the others say that they are not, and are answered by `generate`."""
    base = load_base(write_family(tmp_path / "base", name), device=CPU, dtype=torch.float32)
    on_experts = any(map(in_four_bits, base.modules()))
    lora = LoraSection(r=4, alpha=8, targets=("all-linear", "experts") if on_experts else "all-linear")
    model = PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0)).eval()
    if name not in _OF_EACH_KIND and not can_remember(model):
        assert not model.is_packed or model.kernels_by_borders or name in {"llama, rope dynamic", "phi3, longrope"}
        return
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    prompts = prompts_of()
    ends, answers = [OPEN] * len(prompts), {}
    for which in ("tuned", "base"):
        with model.model.disable_adapter() if which == "base" else nullcontext():
            answers[which] = by_generate(model, prompts, ends)
            assert token_by_token(model, prompts, ends) == answers[which]
            sooner = early(answers[which])
            assert token_by_token(model, prompts, sooner) == by_generate(model, prompts, sooner)
    assert answers["tuned"] != answers["base"] or name in {"gemma2", "gemma3_text"}


def test_rows_are_dropped_and_moved_as_answers_end(llama, prompts, open_ended, monkeypatch):
    ends = early(open_ended)
    expected = by_generate(llama, prompts, ends)
    assert len({len(answer) for answer in expected}) > 2
    counts, moved = [], []
    write, move = remembered.write, Memory.move

    def watched(model, memory, tokens, at, *, seen):
        counts.append(len(tokens))
        return write(model, memory, tokens, at, seen=seen)

    def watched_move(self, source, target):
        moved.append((source, target))
        move(self, source, target)

    monkeypatch.setattr(remembered, "write", watched)
    monkeypatch.setattr(Memory, "move", watched_move)

    assert token_by_token(llama, prompts, ends) == expected
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8 > counts[-1]  # one of few sizes
    assert moved


@pytest.mark.parametrize("every", [3, 8])
def test_looking_less_often_changes_no_answer(llama, prompts, open_ended, monkeypatch, every):
    """As on a GPU, where each look waits; and where few places are seen at once."""
    monkeypatch.setattr(greedy, "_UNIT", 8)
    monkeypatch.setattr(greedy, "_READ_AT_ONCE", 50)
    ends, run = early(open_ended), greedy._Answering.run
    expected = by_generate(llama, prompts, ends)

    def on_a_gpu(self, *arguments):
        self._on_gpu = True
        try:
            return run(self, *arguments)
        finally:
            self._on_gpu = False

    monkeypatch.setattr(greedy, "_LOOK_EVERY", every)
    monkeypatch.setattr(greedy._Answering, "run", on_a_gpu)
    assert token_by_token(llama, prompts, ends) == expected


def test_what_is_replayed_reads_and_writes_the_rows_in_place(llama, prompts, open_ended, monkeypatch):
    """A recording does again what it did, in the same memory: nothing of a token's work may hang on the host's values.

    What a GPU would replay is the work that was recorded, with its arguments; groups that follow use it again.
    """
    first, replayed = {}, []

    def run(self, kind, work):
        if kind in first:
            replayed.append(kind)
        first.setdefault(kind, work)()

    monkeypatch.setattr(Recorder, "run", run)
    monkeypatch.setattr(Recorder, "forget", lambda _self: first.clear())
    monkeypatch.setattr(greedy, "_MOST_ROWS_CPU", 3)
    monkeypatch.setattr(greedy, "_UNIT", 16)
    ends = early(open_ended)

    assert token_by_token(llama, prompts, ends) == by_generate(llama, prompts, ends)
    assert len(replayed) > 10


def test_questions_with_ends_of_their_own_are_not_ended_by_others(llama, prompts, open_ended):
    own = [frozenset({answer[number]}) for number, answer in enumerate(open_ended)]
    expected = [by_generate(llama, [prompt], [end])[0] for prompt, end in zip(prompts, own, strict=True)]

    assert token_by_token(llama, prompts, own) == expected == by_generate(llama, prompts, own)
    assert [len(answer) for answer in expected] != [LONGEST] * 6


def test_answers_of_one_token_and_no_questions_at_all(llama, prompts, open_ended):
    ends = [OPEN] * len(prompts)

    assert token_by_token(llama, prompts, ends, longest=1) == [answer[:1] for answer in open_ended]
    assert token_by_token(llama, [], []) == []


def test_a_stop_is_asked_for_with_each_token_and_leaves_the_model_as_it_was(llama, prompts, open_ended):
    asked = []

    def at_the_fifth():
        asked.append(1)
        return len(asked) == 5

    with pytest.raises(StopRequestedError, match="answering"):
        token_by_token(llama, prompts, [OPEN] * 6, should_stop=at_the_fifth)
    assert len(asked) == 5
    assert llama.model.get_base_model().config._attn_implementation == "per_document"
    assert not llama.linears.keeps_dequantised


def test_each_group_s_longest_answer_is_read_again_and_what_is_another_is_generated(llama, prompts, monkeypatch):
    """Whatever went wrong: here a token sees places that nobody wrote, or what is computed is no number."""
    questions = [Question(ids=tuple(prompt), prompt="", expected=None) for prompt in prompts]
    decoded = SimpleNamespace(eos_token_id=2, bos_token_id=1, decode=lambda ids, **_: str(ids))
    expected = [str(each) for each in by_generate(llama, prompts, [frozenset({2})] * 6)]
    attend = remembered._one_token
    for wrong in (
        lambda query, keys, values, mask, **rest: attend(query, keys, values, mask.logical_not() | mask, **rest),
        lambda query, *given, **rest: attend(query, *given, **rest) * float("nan"),
    ):
        monkeypatch.setattr(remembered, "_one_token", wrong)
        with pytest.raises(AnswersDifferError, match="standard deviations of the logits"):
            token_by_token(llama, prompts, [OPEN] * 6)
        structlog.reset_defaults()  # a command that was called before may have left warnings only
        with capture_logs() as logs:
            answers = answer(llama, questions, decoded, max_new_tokens=LONGEST, seed=0, should_stop=never)
        assert answers == expected
        assert [each["event"] for each in logs if each["log_level"] == "warning"] == ["answers_differ"]


# --- memory ----------------------------------------------------------------------------------------------------------


def scarce(monkeypatch, *, most_rows, with_kept=True):
    """Memory for so few questions at once, or only without dequantised weights kept."""
    tried, read = [], remembered.read

    def reads(model, memory, questions):
        if len(questions["ends"]) == len(questions["lengths"]):  # not an answer that is read again
            tried.append((memory.rows, model.linears.keeps_dequantised))
        if memory.rows > most_rows or (model.linears.keeps_dequantised and not with_kept):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(model, memory, questions)

    monkeypatch.setattr(remembered, "read", reads)
    return tried


def test_what_does_not_fit_is_done_again_in_smaller_groups(llama, prompts, open_ended, monkeypatch):
    tried = scarce(monkeypatch, most_rows=2)

    assert token_by_token(llama, prompts, [OPEN] * 6) == open_ended
    assert [rows for rows, _ in tried] == [8, 4, 1, 2, 4, 1, 2]


def test_what_does_not_fit_alone_fits_without_the_kept_weights(llama, prompts, open_ended, monkeypatch):
    tried = scarce(monkeypatch, most_rows=1, with_kept=False)

    assert token_by_token(llama, prompts, [OPEN] * 6) == open_ended
    assert [kept for _, kept in tried] == [True] * 3 + [False] * (len(tried) - 3)
    assert not llama.linears.keeps_dequantised


def test_one_question_that_never_fits_ends_with_what_would_help(llama, prompts, monkeypatch):
    scarce(monkeypatch, most_rows=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"one question and its answer, \d+ tokens.*max_new_tokens"):
        token_by_token(llama, prompts, [OPEN] * 6)
    assert not llama.linears.keeps_dequantised


def test_generate_is_done_again_in_smaller_groups_too(llama, prompts, open_ended, monkeypatch):
    rows, generate = [], llama.model.generate

    def generates(**arguments):
        rows.append(len(arguments["input_ids"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**arguments)

    monkeypatch.setattr(llama.model, "generate", generates)
    assert by_generate(llama, prompts, [OPEN] * 6) == open_ended
    assert rows == [6, 3, 1, 2, 3, 1, 2]


def test_weights_are_kept_meanwhile_and_what_was_kept_before_stays(bases, prompts):
    model = adapted(bases["llama"], LoraSection(r=4, targets=targets_of("llama")), moved=True)
    seen, ends = [], [OPEN] * 6

    def look():
        seen.append(model.linears.keeps_dequantised)
        return False

    answers = token_by_token(model, prompts, ends, should_stop=look)
    assert all(seen)
    assert not model.linears.keeps_dequantised
    model.linears.keep_dequantised(wanted=True)
    assert token_by_token(model, prompts, ends, should_stop=look) == answers
    assert model.linears.keeps_dequantised


def test_weights_are_not_kept_where_there_is_no_room_for_them(llama, prompts, open_ended, monkeypatch):
    monkeypatch.setattr(greedy, "_WEIGHTS_CPU", llama.linears.dequantised_bytes - 1)
    seen = []

    def look():
        seen.append(llama.linears.keeps_dequantised)
        return False

    assert token_by_token(llama, prompts, [OPEN] * 6, should_stop=look) == open_ended
    assert not any(seen)
