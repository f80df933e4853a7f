"""A channel's files in the store: what is in use, swapped by compare-and-swap, and all that later nights need of it.

channels/{name}/promoted.json                  what is in use: the pointer that servers follow
channels/{name}/history/000007-RUN.json        each change, create-only
channels/{name}/verdicts/RUN-1.json            each verdict, create-only, written before anything is done by it
channels/{name}/state.json                     budget, challengers that wait, the last nights; conditional writes
channels/{name}/new/RUN.json                   what was new when a run was begun, create-only
channels/{name}/exams/ results/ seen/          examples, results on them, hashes of records; named by their content
channels/{name}/trained/RUN-TEMPLATES.bin      hashes of the records that a run was trained on
channels/{name}/adapter/                       a copy of the adapter in use, under one name

A change of what is in use reaches the history before the next one can be made: whoever swaps writes the entry of what
stands there first, and its own after.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, UnavailableError
from job.core.nightly.channel import ChannelState, Judged, Promoted, read_as
from job.core.nightly.exam_results import Exam, ExampleResults, read_exam, read_results
from job.core.nightly.promotion_report import NewData
from job.core.section import Section
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import CONTROL_BYTES, ObjectStore, PreconditionError

log = structlog.get_logger(__name__)
_ROUNDS = 20
"""How often the state is changed anew when others change it at the same time."""
SETTLE_SECONDS = 2.0
"""Without conditional writes: how long a rival's write may take to show after ours."""
_SEEN_BYTES = 2**30
"""Most of the hashes of all records: of 134 million."""
_ENTRY = re.compile(r"history/(\d{6,})-[^/]*\.json")
_KEPT_RESULTS = 400
"""Objects of results that stay, those written last."""
_KEPT_TRAINED = 8
"""Runs whose records' hashes stay, beside those that are needed: they may be promoted later, or gone back to."""
_LEFT_SECONDS = 86400
"""Hashes that no state names stay for as long: another night may have written them, and be about to name them."""
T = TypeVar("T", bound=Section)
R = TypeVar("R")


class Channel:
    """One channel's place in the store."""

    def __init__(self, store: ObjectStore, name: str, *, conditional: bool) -> None:
        """Nothing is asked of the store yet; `conditional`: whether it keeps conditions on writes."""
        self.store = store
        self.name = name
        self.conditional = conditional
        self.root = f"channels/{name}/"

    @property
    def uri(self) -> str:
        """Where a person finds it."""
        return f"{self.store.uri.rstrip('/')}/{self.root.rstrip('/')}"

    # --- what is in use -----------------------------------------------------------------------------------------------

    def promoted(self) -> tuple[Promoted | None, str | None]:
        """What is in use, and the ETag of that; None, None: nothing was promoted yet.

        Raises:
            DataError: what stands there is not as this job writes it.
        """
        found = self._read("promoted.json", Promoted)
        return (None, None) if found is None else found

    def swap(self, new: Promoted, *, etag: str | None) -> bool:
        """Put another model in use, if what is in use is still that with this ETag (None: nothing).

        Returns:
            Whether it was put in use, by this call or by an earlier one that said the same, which may have been
            replaced since; False: another change came before.
        """
        now, _ = self.promoted()
        if now is not None:
            self._record(now)  # before it can be replaced
            if _is_same_change(now, new) or self._was_made(new):
                return True
        won = self._swap_on_condition(new, etag) if self.conditional else self._swap_by_looking(new, etag)
        if won:
            crash_point("promoted.after_swap")
            self._record(new)
        return won

    def _swap_on_condition(self, new: Promoted, etag: str | None) -> bool:
        data = json_bytes(new.model_dump(mode="json"))
        try:
            self.store.write(self.root + "promoted.json", data, create_only=etag is None, if_match=etag)
        except (PreconditionError, NotFoundError):
            # An answer that was lost on its way looks the same: then what stands there is ours.
            now, _ = self.promoted()
            return now is not None and _is_same_change(now, new)
        return True

    def _swap_by_looking(self, new: Promoted, etag: str | None) -> bool:
        """On a store without conditions: look, write, and look again after a rival's write would show."""
        if self.promoted()[1] != etag:
            return False
        self.store.write(self.root + "promoted.json", json_bytes(new.model_dump(mode="json")))
        time.sleep(SETTLE_SECONDS)
        now, _ = self.promoted()
        return now is not None and _is_same_change(now, new)

    def history(self) -> list[Promoted]:
        """Every change, oldest first; one that is damaged is passed over."""
        return [*self.changes()][::-1]

    def changes(self) -> Iterator[Promoted]:
        """The same, newest first, each read when it is asked for."""
        now, _ = self.promoted()
        if now is not None:  # whoever swapped it may have been killed before its entry stood
            yield now
        names = (entry.key.removeprefix(self.root) for entry in self.store.list(f"{self.root}history/"))
        found = [(int(match[1]), name) for name in names if (match := _ENTRY.fullmatch(name)) is not None]
        for sequence, name in sorted(found, reverse=True):
            if now is not None and sequence >= now.sequence:
                continue
            read = self._unless_damaged(name, lambda name=name: self._read(name, Promoted))  # type: ignore[misc]
            if read is not None:
                yield read[0]

    def _record(self, change: Promoted) -> None:
        self._create(_entry(change), change)

    def _was_made(self, change: Promoted) -> bool:
        found = self._read(_entry(change), Promoted)
        return found is not None and _is_same_change(found[0], change)

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def judged(self, run_id: str, number: int) -> Judged | None:
        """The verdict on a run, if there is one.

        Raises:
            DataError: what stands there is not as this job writes it.
        """
        found = self._read(_verdict(run_id, number), Judged)
        return None if found is None else found[0]

    def last_judged(self, run_id: str) -> Judged | None:
        """The last verdict on a run, if there is one.

        Raises:
            DataError: as `judged`.
        """
        last = None
        while (found := self.judged(run_id, 1 if last is None else last.round + 1)) is not None:
            last = found
        return last

    def record_judged(self, judged: Judged) -> Judged:
        """Write a verdict down, and return the one that holds: the first."""
        crash_point("verdict.before")
        self._create(_verdict(judged.run_id, judged.round), judged)
        crash_point("verdict.after")
        return self.judged(judged.run_id, judged.round) or judged

    def record_new(self, run_id: str, new: NewData) -> NewData:
        """Write down what was new when a run was begun, and return what holds: the first, whoever resumes it."""
        name = f"new/{run_id}.json"
        self._create(name, new)
        found = self._read(name, NewData)
        return new if found is None else found[0]

    # --- the state ----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[ChannelState | None, str | None]:
        """The state and its ETag; None, None: the channel has none yet.

        Raises:
            DataError: what stands there is not as this job writes it.
        """
        found = self._read("state.json", ChannelState)
        return (None, None) if found is None else found

    def change_state(
        self, change: Callable[[ChannelState], ChannelState], *, first: Callable[[], ChannelState]
    ) -> ChannelState:
        """Change the state, whoever else changes it at the same time.

        On a store without conditions it is looked at again after a rival's write would show: where ours was undone by
        it, the change is made again, on what the rival wrote. What remains is a rival who stands still between its
        reading and its writing for longer than that; it undoes ours.

        Args:
            change: gets the state as it stands, perhaps several times; a state that it has changed stays as it is.
            first: makes that of a new channel.

        Raises:
            UnavailableError: it is never left alone.
        """
        for _ in range(_ROUNDS):
            before, etag = self.state()
            after = change(before or first())
            if after == before:
                return after
            with contextlib.suppress(PreconditionError, NotFoundError):
                self.write_state(after, etag=etag)
                if self.conditional:
                    return after
                time.sleep(SETTLE_SECONDS)
        raise UnavailableError(f"{self.uri}/state.json: others change it all the time; start the same job again")

    def write_state(self, state: ChannelState, *, etag: str | None) -> None:
        """Write it, if it is still that with this ETag (None: there was none).

        Raises:
            PreconditionError: it is another one by now.
        """
        data = json_bytes(state.model_dump(mode="json"))
        if not self.conditional:
            self.store.write(self.root + "state.json", data)
        else:
            self.store.write(self.root + "state.json", data, create_only=etag is None, if_match=etag)

    # --- what models made of the examples -----------------------------------------------------------------------------

    def keep_exam(self, exam: Exam) -> None:
        """Keep the examples that results are on; whoever writes them writes the same."""
        self.store.write(f"{self.root}exams/{exam.name}.json", json_bytes(exam.model_dump(mode="json")))

    def exam(self, name: str) -> Exam | None:
        """What `keep_exam` kept under this name; None: nothing, or what is there is damaged."""
        place = f"exams/{name}.json"
        exam = self._unless_damaged(place, lambda: self._parsed(place, read_exam))
        return exam if exam is not None and exam.name == name else None

    def keep_results(self, run: str, results: ExampleResults) -> None:
        """Keep what a model made of an exam, and let go of what was kept longest ago."""
        name = _results(run, results.exam, results.how, results.model)
        self.store.write(self.root + name, json_bytes(results.model_dump(mode="json")))
        kept = sorted(self.store.list(f"{self.root}results/"), key=lambda entry: entry.modified)
        if len(kept) > _KEPT_RESULTS:
            self.store.delete([entry.key for entry in kept[:-_KEPT_RESULTS]])

    def results(self, run: str, *, exam: str, how: str, model: str) -> ExampleResults | None:
        """What a model made of an exam; None: it is not kept, or what is kept is not of this model, exam and way."""
        place = _results(run, exam, how, model)
        results = self._unless_damaged(place, lambda: self._parsed(place, read_results))
        if results is None or (results.model, results.exam, results.how) != (model, exam, how):
            return None
        return results

    # --- records that were seen ---------------------------------------------------------------------------------------

    def seen(self, name: str, *, size: int) -> bytes:
        """The hashes that `keep_seen` kept, of this size in bytes.

        Raises:
            NotFoundError: they are gone.
            DataError: what stands there is not what was kept.
        """
        key = f"{self.root}seen/{name}.bin"
        data, _ = self.store.read(key, max_bytes=min(size, _SEEN_BYTES))
        if len(data) != size or not hashlib.sha256(data).hexdigest().startswith(name):
            raise DataError(f"{self.store.uri}/{key}: not what its name says")
        return data

    def keep_seen(self, name: str, hashes: bytes) -> None:
        """Keep hashes under the name of their content."""
        self.store.write(f"{self.root}seen/{name}.bin", hashes)

    def forget_seen(self, *, but: Iterable[str]) -> None:
        """Delete the hashes that no state names any more, a day after they were written; by the store's own clock."""
        kept = {f"{self.root}seen/{name}.bin" for name in but}
        found = [*self.store.list(f"{self.root}seen/")]
        newest = max((entry.modified for entry in found), default=0.0)
        old = [entry.key for entry in found if newest - entry.modified > _LEFT_SECONDS]
        self.store.delete([key for key in old if key not in kept])

    def trained(self, run_id: str, templates: str) -> bytes | None:
        """Hashes of the records that a run was trained on, as text of these templates; None: they are not kept."""
        try:
            return self.store.read(self.root + _trained(run_id, templates), max_bytes=_SEEN_BYTES)[0]
        except NotFoundError:
            return None

    def keep_trained(self, run_id: str, templates: str, hashes: bytes, *, needed: Iterable[str]) -> None:
        """Keep them, and let go of what was kept longest ago, but for the runs that are needed."""
        self.store.write(self.root + _trained(run_id, templates), hashes)
        kept = sorted(self.store.list(f"{self.root}trained/"), key=lambda entry: entry.modified)
        stay = tuple(f"{self.root}trained/{each}-" for each in (run_id, *needed))
        others = [entry.key for entry in kept if not entry.key.startswith(stay)]
        self.store.delete(others[:-_KEPT_TRAINED])

    # --- small JSON ---------------------------------------------------------------------------------------------------

    def _create(self, name: str, content: Section) -> None:
        """Write a record that is written once; the first one holds."""
        with contextlib.suppress(PreconditionError):
            if self.conditional or self._content(name) is None:
                data = json_bytes(content.model_dump(mode="json"))
                self.store.write(self.root + name, data, create_only=self.conditional)

    def _read(self, name: str, kind: type[T]) -> tuple[T, str] | None:
        try:
            data, etag = self.store.read(self.root + name, max_bytes=CONTROL_BYTES)
        except NotFoundError:
            return None
        try:
            return read_as(kind, json_object(data)), etag
        except ValueError as error:
            raise DataError(
                f"{self.uri}/{name}: damaged, or not written by this version of the job ({error}); look at who can "
                "write there, and put an earlier version of it back"
            ) from error

    def _content(self, name: str) -> dict[str, Any] | None:
        try:
            return json_object(self.store.read(self.root + name, max_bytes=CONTROL_BYTES)[0])
        except NotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: not a JSON object ({error})") from error

    def _parsed(self, name: str, read: Callable[[dict[str, Any]], T]) -> T | None:
        content = self._content(name)
        try:
            return None if content is None else read(content)
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: damaged ({error})") from error

    def _unless_damaged(self, name: str, read: Callable[[], R | None]) -> R | None:
        """What is only kept to save time, and does not verify, is made anew."""
        try:
            return read()
        except DataError as error:
            log.warning("channel_record_passed_over", record=f"{self.uri}/{name}", reason=str(error))
            return None


def _is_same_change(one: Promoted, other: Promoted) -> bool:
    """Whether two entries are one change, written by two attempts."""
    return (one.sequence, one.kind, one.run_id) == (other.sequence, other.kind, other.run_id)


def _entry(change: Promoted) -> str:
    return f"history/{change.sequence:06d}-{change.run_id or 'base'}.json"


def _verdict(run_id: str, number: int) -> str:
    return f"verdicts/{run_id}-{number}.json"


def _trained(run_id: str, templates: str) -> str:
    return f"trained/{run_id}-{templates}.bin"


def _results(run: str, exam: str, how: str, model: str) -> str:
    return f"results/{run}/{exam}-{how}-{model}.json"
