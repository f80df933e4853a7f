"""How good the model is on held-out documents: their loss, and its own answers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import structlog
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from job.core.data.packing import pack
from job.core.data.records import Example, Part
from job.core.errors import StopRequestedError
from job.core.judging.answer_groups import AnswerGroup, answer_groups
from job.core.judging.verdict import Evaluation
from job.core.plan.dealing import deal
from job.tune.data.asked import asked_and_learned, asked_documents
from job.tune.data.chats.chat import ChatTemplate
from job.tune.data.control import control_tokens
from job.tune.data.documents import Documents
from job.tune.data.frame import TokenRules, encode_given, encode_prompt
from job.tune.data.micro_batch import micro_batch
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.answers.greedy import (
    STOPPED,
    AnswersDifferError,
    greedy_tokens,
    one_does_not_fit,
    unless_out_of_memory,
    up_to_end,
)
from job.tune.loop.answers.remembered import can_remember
from job.tune.world import ALONE, World

log = structlog.get_logger(__name__)

_PROMPTS_AT_ONCE = 32
"""Prompts that `generate` answers together: it is bound by memory bandwidth, so that more cost next to nothing."""
_TOKENS_AT_ONCE = 16384
"""Tokens of prompts and answers whose keys and values are kept at once, at most: 8.6 GB for Llama-2-7B."""


def evaluate(
    model: PackedModel,
    documents: Documents,
    *,
    step: int,
    tokens_at_once: int,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
    world: World = ALONE,
    planned_tokens: int | None = None,
) -> Evaluation:
    """Loss of each held-out document. Draws no random numbers, so that training continues as without it.

    With several ranks each computes some of the passes that one alone would compute, and all get all results: the same
    to the bit on the same kind of device.

    Args:
        model: base and adapter.
        documents: held out.
        step: the adapter's.
        tokens_at_once: of a forward, at most; raised to the documents' `max_length` where that is more.
        should_stop: asked before each forward.
        on_progress: called with the number of documents that are done.
        world: who else evaluates.
        planned_tokens: by which the passes are shared out, the same on all ranks; None: tokens_at_once. Where memory
            ran out here meanwhile, ours are smaller.

    Raises:
        StopRequestedError: asked to stop, here or on another rank; the result so far is of no use and is dropped.
        PeerLostError: another rank is gone.
    """
    device = next(model.parameters()).device
    nll, correct, done, stopped = np.zeros(len(documents)), 0, 0, False
    was_training = model.training
    model.eval()
    try:
        for members in _own_passes(documents, world, planned_tokens or tokens_at_once, tokens_at_once):
            if stopped := should_stop():
                break
            scores = model.score(micro_batch(documents, members).to(device))
            nll[members] = scores.nll
            correct += scores.correct
            done += len(members)
            on_progress(done)
    finally:
        model.train(was_training)
    counts = torch.tensor([float(stopped), float(correct)], dtype=torch.float64)
    # Of each document one rank has a number and the others have zero: their sum is that number, to the bit.
    world.sum_in_order([counts, torch.from_numpy(nll)])
    if counts[0]:
        raise StopRequestedError(f"asked to stop while evaluating at step {step}")
    return Evaluation(step=step, nll=nll, tokens=documents.targets, correct=int(counts[1]))


def _own_passes(documents: Documents, world: World, planned: int, now: int) -> Iterator[list[int]]:
    """The documents of each forward that is ours: some of those planned, each in parts where memory asks for it."""
    lengths = documents.lengths
    passes = pack(lengths.tolist(), budget=max(planned, documents.max_length))
    for mine in deal([int(lengths[members].sum()) for members in passes], shares=world.size)[world.rank]:
        members = passes[mine]
        if now >= planned:
            yield members
        else:
            for part in pack(lengths[members].tolist(), budget=max(now, documents.max_length)):
                yield [members[place] for place in part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as token ids, as text, and the answer that the dataset gives (None for a prompt of the recipe)."""

    ids: tuple[int, ...]
    prompt: str
    expected: str | None
    ends: tuple[int, ...] = ()
    """Tokens that end the answer, beside the tokenizer's end of sequence: a chat's end of turn."""
    document: int | None = None
    """Which held-out document asks it; None for a prompt of the recipe."""


def questions_of_prompts(
    prompts: Sequence[str], rules: TokenRules, template: ChatTemplate | None = None
) -> list[Question]:
    """The recipe's prompts; with a template each is a user's turn."""
    if template is not None:
        return [question_of_chat(template.prompt(text), text, rules, template) for text in prompts]
    return [Question(ids=tuple(encode_prompt(p, rules)), prompt=p, expected=None) for p in prompts]


def question_of_chat(example: Example, prompt: str, rules: TokenRules, template: ChatTemplate) -> Question:
    """What a chat template rendered up to the answer."""
    ends = () if template.end_of_turn is None else (template.end_of_turn,)
    ids = tuple(encode_given(example.parts, rules, is_chat=True))
    return Question(ids=ids, prompt=prompt, expected=None, ends=ends)


def question_of_parts(parts: Sequence[Part], rules: TokenRules) -> Question:
    """What a template made of a record: what stands in a field is no control token here either."""
    prompt = "".join(part.text for part in parts)
    return Question(ids=tuple(encode_given(parts, rules)), prompt=prompt, expected=None)


def questions_of_documents(
    documents: Documents, tokenizer: Any, *, most: int, sources: Sequence[int] = (0,)
) -> list[Question]:
    """Questions from the first held-out documents that are whole: no right answer equals one that was cut off.

    The last learned part is the answer; what stands before it is the prompt. Sources are asked by turns.

    Args:
        documents: held out.
        tokenizer: the base model's.
        most: questions, at most.
        sources: places of those whose documents have a prompt.
    """
    questions, control = [], {token.id for token in control_tokens(tokenizer)}
    for document in asked_documents(documents, most=most, sources=sources):
        given, answer = asked_and_learned(documents, document)
        questions.append(
            Question(
                ids=tuple(given),
                prompt=tokenizer.decode(given, skip_special_tokens=True),
                expected=tokenizer.decode(answer, skip_special_tokens=True).strip(),
                ends=tuple({answer[-1]} & control),
                document=document,
            )
        )
    return questions


def answer(
    model: PackedModel,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    seed: int,
    should_stop: Callable[[], bool],
    world: World = ALONE,
) -> list[str]:
    """The model's own answers, generated greedily; training's random generators are left as they were.

    Raises:
        StopRequestedError: asked to stop, here or on another rank.
        PeerLostError: another rank is gone.
        torch.OutOfMemoryError: one question alone does not fit.
    """
    own = deal([len(question.ids) + max_new_tokens for question in questions], shares=world.size)[world.rank]
    asked = [questions[i] for i in own]
    try:
        mine = _answers(model, asked, tokenizer, max_new_tokens=max_new_tokens, seed=seed, should_stop=should_stop)
    except StopRequestedError:
        world.gather(None)
        raise
    answers: list[str] = [""] * len(questions)
    for written in world.gather([*zip(own, mine, strict=True)]):
        if written is None:
            raise StopRequestedError(STOPPED)
        for i, text in written:
            answers[i] = text
    return answers


def _answers(
    model: PackedModel,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    seed: int,
    should_stop: Callable[[], bool],
) -> list[str]:
    """What `answer` gives, by this process alone."""
    ends = [frozenset({tokenizer.eos_token_id, *question.ends}) for question in questions]
    tokens = None
    if can_remember(model):
        prompts = [question.ids for question in questions]
        try:
            tokens = greedy_tokens(model, prompts, ends, max_new_tokens=max_new_tokens, should_stop=should_stop)
        except AnswersDifferError as error:
            log.warning("answers_differ", reason=str(error), then="they are generated by transformers, which is slower")
    if tokens is None:
        tokens = generated_tokens(
            model, questions, ends, tokenizer, max_new_tokens=max_new_tokens, seed=seed, should_stop=should_stop
        )
    return [tokenizer.decode(its, skip_special_tokens=True).strip() for its in tokens]


def generated_tokens(
    model: PackedModel,
    questions: Sequence[Question],
    ends: Sequence[frozenset[int]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    seed: int,
    should_stop: Callable[[], bool],
) -> list[list[int]]:
    """The same as tokens, up to those that end the answers, by transformers' `generate`: for any decoder."""
    answers: list[list[int]] = [[] for _ in questions]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), model.generating() as generator, torch.no_grad():
        torch.manual_seed(seed)

        def generated(group: AnswerGroup) -> list[list[int]]:
            its_ends = ends[group.members[0]]
            ids, mask = _left_padded([questions[i].ids for i in group.members], tokenizer.eos_token_id)
            written = generator.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=_greedy(tokenizer, max_new_tokens, its_ends),
                stopping_criteria=StoppingCriteriaList([_Stop(should_stop)]),
            )
            return [up_to_end(row, its_ends) for row in written[:, ids.shape[1] :].tolist()]

        groups = deque(
            answer_groups(
                [len(question.ids) for question in questions],
                ends,
                longest_answer=max_new_tokens,
                most_rows=_PROMPTS_AT_ONCE,
                most_tokens=_TOKENS_AT_ONCE,
                unit=1,
            )
        )
        while groups:
            group = groups.popleft()
            tokens = unless_out_of_memory(partial(generated, group))
            if tokens is None:
                if not group.halves():
                    raise torch.OutOfMemoryError(one_does_not_fit(group))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                groups.extendleft(reversed(group.halves()))
                continue
            for i, its in zip(group.members, tokens, strict=True):
                answers[i] = its
    return answers


def _greedy(tokenizer: Any, max_new_tokens: int, ends: Iterable[int]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def _left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each [B, longest]: `generate` continues at the right end."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, width - len(row) :] = torch.tensor(row)
        mask[line, width - len(row) :] = 1
    return ids, mask


class _Stop(StoppingCriteria):  # type: ignore[misc] # transformers has no types
    """Asks after each token whether to stop."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        if self._should_stop():
            raise StopRequestedError(STOPPED)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
