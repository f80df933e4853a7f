"""Greedy answers, token by token: questions of like lengths together, answers that have ended dropped on the way.

Each answer is what `generate` gives for its question alone, up to the token that ends it. Weights in 4 bits are
dequantised once and kept meanwhile where there is room; what runs out of memory is done again in smaller groups.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import structlog
import torch
from torch import Tensor

from job.core.errors import StopRequestedError
from job.core.judging.answer_groups import AnswerGroup, answer_groups, moves_to_front, rows_for
from job.core.plan.memory import GIB
from job.kernels.recorded import Recorder
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.answers import remembered
from job.tune.loop.answers.remembered import Memory, packed_questions

log = structlog.get_logger(__name__)

_MOST_ROWS_GPU, _MOST_ROWS_CPU = 128, 32
"""Answers at once: a token of one more costs little on a GPU, where the weights are what is read."""
_TOKENS_CPU = 16384
"""Tokens whose keys and values are kept at once on the CPU, at most."""
_OF_FREE = 0.6
"""Of the GPU's free memory that keys and values may take; ..."""
_OF_FREE_WEIGHTS = 0.5
"""... and dequantised weights, before them."""
_WEIGHTS_CPU = GIB
"""The same on the CPU."""
_READ_AT_ONCE = 8192
"""Tokens of questions that one forward reads, unless one has more by itself."""
_UNIT = 128
"""Places that a token may see come in multiples of it: each number of them is recorded once."""
_WIDTH_UNIT = 256
_CHECKED = 64
"""Tokens of an answer that are looked at again."""
_MEAN_SHORT, _MOST_SHORT = 0.25, 1.0
"""By how much a token may be less likely than the likeliest, in standard deviations of the logits. Rounding makes two
that are nearly as likely change places; a wrong answer is short by several, token after token."""
_LOOK_EVERY = 8
"""Tokens between two looks at what has ended, on a GPU: each waits until it is idle."""
STOPPED = "asked to stop while the model was answering"


class AnswersDifferError(Exception):
    """What was written is not what the model finds likeliest when it reads it: this device or library is not fit."""


def greedy_tokens(
    model: PackedModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[frozenset[int]],
    *,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> list[list[int]]:
    """The tokens of each answer, with the one that ends it.

    Args:
        model: `remembered.can_remember` is true of it.
        prompts: token ids of each question.
        ends: tokens that end its answer.
        max_new_tokens: longest answer.
        should_stop: asked on the way.

    Raises:
        StopRequestedError: asked to stop.
        torch.OutOfMemoryError: one question alone does not fit.
        AnswersDifferError: an answer of each group is read again by the attention that trains, and is another one.
    """
    found: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return found
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(remembered.remembering(model))
        answering = _Answering(model, ends, max_new_tokens=max_new_tokens, should_stop=should_stop)
        stack.callback(answering.close)
        groups = deque(answering.groups(prompts, ends))
        while groups:
            group = groups.popleft()
            tokens = unless_out_of_memory(partial(answering.run, group, prompts, ends))
            if tokens is None:
                groups.extendleft(reversed(answering.smaller(group)))
                continue
            for member, its in zip(group.members, tokens, strict=True):
                found[member] = its
    return found


def unless_out_of_memory(run: Callable[[], list[list[int]]]) -> list[list[int]] | None:
    """What a group's answers are; None: it did not fit."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return None  # only now its frames are gone, and what they held


def one_does_not_fit(group: AnswerGroup) -> str:
    """Of a group that has no halves."""
    return f"one question and its answer, {group.width} tokens, do not fit; lower evaluate.max_new_tokens"


class _Answering:
    """What groups share: the memory of keys and values, the state of each row, and recordings of a token's work."""

    def __init__(
        self,
        model: PackedModel,
        ends: Sequence[frozenset[int]],
        *,
        max_new_tokens: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._on_gpu = self._device.type == "cuda"
        self._longest_answer = max_new_tokens
        self._should_stop = should_stop
        self._most_ends = max(len(each) for each in ends)
        self._rows: _Rows | None = None
        self._recorder = Recorder(
            # A base in shards is gathered layer by layer, and of experts the device decides who computes.
            wanted=self._on_gpu and model.sharded is None and not model.linears.experts,
            on_failure=lambda reason: log.warning("no_cuda_graphs", reason=reason, then="answers are slower"),
        )
        self._kept_before = model.linears.keeps_dequantised
        self._keep_weights()

    def close(self) -> None:
        """Leave the model, and the memory, as they were."""
        self._release()
        self._model.linears.keep_dequantised(wanted=self._kept_before)
        self._empty_cache()

    def _keep_weights(self) -> None:
        linears = self._model.linears
        if self._model.sharded is not None:
            return  # most of them are not here
        room = _OF_FREE_WEIGHTS * self._free_bytes() if self._on_gpu else _WEIGHTS_CPU
        if linears.keeps_dequantised or linears.dequantised_bytes > room:
            return
        try:
            linears.keep_dequantised(wanted=True)
        except torch.OutOfMemoryError as error:
            log.info("weights_not_kept", reason=str(error)[:200], then="they are dequantised for each token")

    def groups(self, prompts: Sequence[Sequence[int]], ends: Sequence[frozenset[int]]) -> list[AnswerGroup]:
        """The questions in groups for which there is room."""
        return list(
            answer_groups(
                [len(prompt) for prompt in prompts],
                ends,
                longest_answer=self._longest_answer,
                most_rows=_MOST_ROWS_GPU if self._on_gpu else _MOST_ROWS_CPU,
                most_tokens=self._most_tokens(min(prompts, key=len)),
                unit=_WIDTH_UNIT if self._on_gpu else 1,
            )
        )

    def _most_tokens(self, shortest: Sequence[int]) -> int:
        if not self._on_gpu:
            return _TOKENS_CPU
        memory = Memory(1, len(shortest))
        remembered.read(self._model, memory, packed_questions([shortest], 0, self._device))
        return max(1, int(_OF_FREE * self._free_bytes() / memory.token_bytes))

    def smaller(self, group: AnswerGroup) -> Sequence[AnswerGroup]:
        """What to do instead of a group that did not fit.

        Raises:
            torch.OutOfMemoryError: nothing is left to try.
        """
        self._release()
        self._empty_cache()
        halves = group.halves()
        if not halves:
            if not self._model.linears.keeps_dequantised or self._kept_before:
                raise torch.OutOfMemoryError(one_does_not_fit(group))
            self._model.linears.keep_dequantised(wanted=False)
            halves = (group,)
        log.warning("out_of_memory", during="answering", then={"questions_at_once": len(halves[0].members)})
        return halves

    def run(
        self, group: AnswerGroup, prompts: Sequence[Sequence[int]], ends: Sequence[frozenset[int]]
    ) -> list[list[int]]:
        """Answers of one group, in the order of its members."""
        rows = self._rows_for(len(group.members), group.width)
        rows.begin([prompts[i] for i in group.members], ends[group.members[0]])
        every = _LOOK_EVERY if self._on_gpu else 1
        for written in range(1, self._longest_answer):
            if (written - 1) % every == 0:
                self._stop_if_asked()
                if not rows.drop_finished():
                    break
            count, seen = rows.count, rows.seen(written)
            self._recorder.run((count, seen), partial(rows.advance, count, seen))
        self._stop_if_asked()
        answers = rows.tokens(ends[group.members[0]])
        longest = max(range(len(answers)), key=lambda place: len(answers[place]))
        self._verify(prompts[group.members[longest]], answers[longest])
        return answers

    def _verify(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Read a question with its answer as one: each token of it should be the likeliest after those before."""
        places = range(len(answer))
        checked = [*places] if len(places) <= _CHECKED else [*places[: _CHECKED // 2], *places[-_CHECKED // 2 :]]
        ids = [*prompt, *answer[:-1]]
        after = torch.tensor([len(prompt) - 1 + place for place in checked], device=self._device)
        whole = {**packed_questions([ids], 0, self._device), "ends": after}
        logits = remembered.read(self._model, Memory(1, len(ids)), whole)
        written = torch.tensor([answer[place] for place in checked], device=self._device)
        behind = logits.max(dim=-1).values - logits.gather(1, written[:, None])[:, 0]
        short = behind / logits.std(dim=-1).clamp(min=1e-6)
        mean, most = float(short.mean()), float(short.max())
        if not (mean <= _MEAN_SHORT and most <= _MOST_SHORT):  # also where it is no number
            raise AnswersDifferError(
                f"tokens of an answer are less likely than others by {mean:.2f} standard deviations of the logits, "
                f"{most:.2f} at most"
            )

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise StopRequestedError(STOPPED)

    def _rows_for(self, count: int, width: int) -> "_Rows":
        """Rows whose memory is taken already, where it does."""
        if self._rows is None or self._rows.width != width or self._rows.room < count:
            self._release()
            self._rows = _Rows(
                self._model,
                Memory(rows_for(count), width),
                self._device,
                longest_answer=self._longest_answer,
                most_ends=self._most_ends,
            )
        return self._rows

    def _release(self) -> None:
        self._recorder.forget()
        self._rows = None

    def _free_bytes(self) -> int:
        self._empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

    def _empty_cache(self) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()


class _Rows:
    """A row for each question of a group, in memory that stays where it is: recordings read and write it."""

    def __init__(
        self, model: PackedModel, memory: Memory, device: torch.device, *, longest_answer: int, most_ends: int
    ) -> None:
        self._model = model
        self._memory = memory
        self._device = device
        self.room, self.width = memory.rows, memory.width
        self.count = 0
        """Rows that are computed: the first ones."""
        self._members: list[int | None] = []
        """Whose each row is; None: nobody's."""
        self._lengths: list[int] = []
        self._last, self._at = (torch.zeros(self.room, dtype=torch.int64, device=device) for _ in range(2))
        self._ended = torch.ones(self.room, dtype=torch.bool, device=device)
        self._written = torch.zeros(self.room, longest_answer, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._ends = torch.full((most_ends,), -1, device=device)
        self._done: dict[int, list[int]] = {}

    def begin(self, prompts: Sequence[Sequence[int]], ends: frozenset[int]) -> None:
        """Read the questions, and write the first token of each answer."""
        self.count = min(self.room, rows_for(len(prompts)))
        self._members = [*range(len(prompts)), *([None] * (self.count - len(prompts)))]
        self._lengths, self._done = [len(prompt) for prompt in prompts], {}
        self._ends.fill_(-1)
        self._ends[: len(ends)] = torch.tensor(sorted(ends), device=self._device)
        self._ended.fill_(True)  # noqa: FBT003 - torch's signature
        self._ended[: len(prompts)] = False
        self._at.zero_()
        self._at[: len(prompts)] = torch.tensor(self._lengths, device=self._device)
        self._last.zero_()
        first = 0
        for part in _read_together(prompts):
            logits = remembered.read(self._model, self._memory, packed_questions(part, first, self._device))
            self._last[first : first + len(part)] = logits.argmax(dim=-1)
            first += len(part)
        self._written[:, 0] = self._last
        self._ended |= self._is_end(self._last)
        self._column.fill_(1)

    def advance(self, count: int, seen: int) -> None:
        """One token more of the first rows; nothing here waits for the GPU, or writes elsewhere."""
        last, at, ended = self._last[:count], self._at[:count], self._ended[:count]
        chosen = remembered.write(self._model, self._memory, last, at, seen=seen).argmax(dim=-1)
        last.copy_(chosen)
        self._written[:count].index_copy_(1, self._column, chosen[:, None])
        ended |= self._is_end(chosen)
        at += 1
        self._column += 1

    def _is_end(self, tokens: Tensor) -> Tensor:
        return torch.eq(tokens[:, None], self._ends[None]).any(dim=1)

    def seen(self, written: int) -> int:
        """Places that the next token of any row that has not ended sees, rounded up."""
        needed = max(self._lengths[member] for member in self._members if member is not None) + written
        return min(self.width, -(-needed // _UNIT) * _UNIT)

    def drop_finished(self) -> bool:
        """Take the answers that have ended out of the way, in steps; whether any has not."""
        ended = self._ended[: self.count].tolist()
        for row, member in enumerate(self._members):
            if member is not None and ended[row]:
                self._done[member] = self._written[row].tolist()
                self._members[row] = None
        alive = [member is not None for member in self._members]
        count = rows_for(sum(alive))
        if count < self.count and any(alive):
            for source, target in moves_to_front(alive, count):
                self._memory.move(source, target)
                for part in (self._last, self._at, self._ended, self._written):
                    part[target] = part[source]
                self._members[target], self._members[source] = self._members[source], None
            self._members, self.count = self._members[:count], count
        return any(alive)

    def tokens(self, ends: frozenset[int]) -> list[list[int]]:
        """Of each question's answer, up to the token that ends it."""
        written = self._written[: self.count].tolist()
        rest = {member: written[row] for row, member in enumerate(self._members) if member is not None}
        answers = {**self._done, **rest}
        return [up_to_end(answers[member], ends) for member in range(len(self._lengths))]


def _read_together(prompts: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    parts: list[Sequence[Sequence[int]]] = []
    start = tokens = 0
    for number, prompt in enumerate(prompts):
        if number > start and tokens + len(prompt) > _READ_AT_ONCE:
            parts.append(prompts[start:number])
            start, tokens = number, 0
        tokens += len(prompt)
    return [*parts, prompts[start:]]


def up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """An answer with the token that ends it, and without what was written after that."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return list(tokens[: last + 1])
