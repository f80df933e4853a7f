"""Puts files into a model repository on the hub, in one commit: what is there already is not sent again."""

import contextvars
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from job.core.errors import DeniedError, JobError, NotFoundError, StopRequestedError, UnavailableError, UsageError
from job.edge.base.hub_answers import answer_behind, answer_message, chain, is_passing, is_transient, reason_of
from job.edge.store.patience import Patience

log = structlog.get_logger(__name__)
_Result = TypeVar("_Result")
_POLL_SECONDS = 0.2
_TRY_SECONDS = 1800.0
"""Of one try: half a gigabyte at 0.3 MB/s. The library waits for an answer without an end."""
_LOOK_SECONDS = 20.0
PUSH_PATIENCE = Patience(attempts=5, budget_seconds=600.0, first_pause_seconds=2.0, longest_pause_seconds=60.0)
LOOK_PATIENCE = Patience(attempts=2, budget_seconds=30.0, first_pause_seconds=1.0, longest_pause_seconds=1.0)
"""For who the token is: that is known again when it is pushed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What stands on the hub."""

    repository: str
    commit: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepository:
    """A model repository that may not exist yet."""

    name: str
    """`owner/name`."""
    token: str | None
    should_stop: Callable[[], bool]
    on_beat: Callable[[], None]
    """Called while the hub is waited for."""

    def look(self, patience: Patience = LOOK_PATIENCE) -> str:
        """Whose token it is; it must be one that can write to the owner's repositories, as far as the hub says.

        Raises:
            DeniedError: there is none, it is wrong, or cannot write there.
            UsageError: HF_HUB_OFFLINE is set.
            UnavailableError: the hub does not answer.
            StopRequestedError: asked to stop.
        """
        token = self._token()

        def ask() -> Any:
            from huggingface_hub import HfApi

            return HfApi().whoami(token=token)

        found = self._persist(ask, patience, seconds=_LOOK_SECONDS)
        account, role, owners = _read(found)
        owner = self.name.partition("/")[0]
        if role == "read":
            raise DeniedError(f"output_hub: {self.name}: HF_TOKEN can only read; make one that can write")
        if owners and owner not in owners:
            raise DeniedError(
                f"output_hub: {self.name}: HF_TOKEN is of {account}, who is no member of {owner}; correct the name, or "
                "set the token of a member"
            )
        return account

    def push(self, files: Mapping[str, Path], *, message: str, patience: Patience = PUSH_PATIENCE) -> Pushed:
        """Make the repository, private, where there is none, and commit the files to it; other files stay.

        Args:
            files: by their names there.
            message: of the commit.
            patience: with a hub that fails.

        Raises:
            JobError: as `look`; the hub refuses the repository's name, or a file.
        """
        token = self._token()

        def commit() -> Pushed:
            from huggingface_hub import CommitOperationAdd, HfApi, constants

            # Weights go by LFS over HTTP, although hf_xet is installed: what Xet refuses has no status, so a token that
            # may not write would look like a hub that is away, and a stop would wait for its threads.
            constants.HF_HUB_DISABLE_XET = True
            api = HfApi(token=token)
            api.create_repo(self.name, private=True, exist_ok=True)
            added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
            made = api.create_commit(self.name, added, commit_message=message)
            return Pushed(repository=self.name, commit=made.oid, url=f"{api.endpoint}/{self.name}/tree/{made.oid}")

        return self._persist(commit, patience, seconds=_TRY_SECONDS)

    def _token(self) -> str:
        if not self.token:
            raise DeniedError(f"output_hub: {self.name}: HF_TOKEN is not set; set it to a token that can write there")
        return self.token

    def _persist(self, ask: Callable[[], _Result], patience: Patience, *, seconds: float) -> _Result:
        """The answer; what passes is tried again until the patience ends."""
        gives_up_at = time.monotonic() + patience.budget_seconds
        failures = 0
        while True:
            try:
                return self._once(ask, seconds=seconds)
            except JobError:
                raise
            except Exception as error:
                if (final := self._final(error)) is not None:
                    raise final from error
                failures += 1
                pause = patience.pause_seconds(failures)
                if failures >= patience.attempts or time.monotonic() + pause > gives_up_at:
                    raise UnavailableError(
                        f"output_hub: {self.name}: the hub is not to be had ({reason_of(error)}), tried {failures} "
                        "times; look at the network and at the hub's status, then start the same job again"
                    ) from error
                log.warning("hub_retry", repository=self.name, reason=reason_of(error), wait_seconds=pause)
                self._wait(threading.Event(), pause)

    def _once(self, ask: Callable[[], _Result], *, seconds: float) -> _Result:
        """One try, on a thread that is left alone where it takes too long or nobody waits any more."""
        results: list[_Result] = []
        failures: list[Exception] = []
        done = threading.Event()

        def work() -> None:
            try:
                results.append(ask())
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                failures.append(error)
            finally:
                done.set()

        threading.Thread(target=contextvars.copy_context().run, args=(work,), name="push", daemon=True).start()
        if not self._wait(done, seconds):
            raise TimeoutError(f"no answer in {seconds:.0f} s")
        if failures:
            raise failures[0]
        return results[0]

    def _wait(self, done: threading.Event, seconds: float) -> bool:
        """Whether it was done within the time."""
        until = time.monotonic() + seconds
        while not done.is_set() and (left := until - time.monotonic()) > 0:
            if self.should_stop():
                raise StopRequestedError(
                    f"stopped while it was pushed to {self.name} on the hub; the next start of the job pushes it"
                )
            self.on_beat()
            done.wait(min(_POLL_SECONDS, left))
        return done.is_set()

    def _final(self, error: Exception) -> JobError | None:
        """What to raise for a failure that another try would not mend, None for every other."""
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

        where = f"output_hub: {self.name}"
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain(error)):
            return UsageError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset one of them")
        response = answer_behind(error)
        if response is not None:
            return self._refusal(error, response)
        # The library's word for what it can tell without the hub; JSON that is none is the hub's.
        is_ours = isinstance(error, HFValidationError | ValueError) and not is_transient(error)
        return UsageError(f"{where}: {error}") if is_ours else None

    def _refusal(self, error: Exception, response: Any) -> JobError | None:
        where, status = f"output_hub: {self.name}", response.status_code
        answer = f"HTTP {status}{answer_message(response)}"
        if status in {401, 402, 403}:
            return DeniedError(f"{where}: the hub refuses it ({answer}); look at what HF_TOKEN may write to")
        if status == 404:  # noqa: PLR2004 Not Found
            return NotFoundError(f"{where}: not found ({answer}); correct the name, or look at HF_ENDPOINT")
        if status in {409, 412} or is_passing(status):  # or somebody else has committed in this moment
            return None
        words = str(error) if isinstance(error, ValueError) else answer
        return UsageError(f"{where}: the hub does not take it as it is ({words})")


def _read(found: Any) -> tuple[str, str | None, frozenset[str]]:
    """Account, what its token may do, and the owners that it can act for; what is not said is empty."""
    content = found if isinstance(found, dict) else {}
    auth = content.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    role = token.get("role") if isinstance(token, dict) else None
    account = content.get("name")
    orgs = content.get("orgs")
    names = [each.get("name") for each in orgs if isinstance(each, dict)] if isinstance(orgs, list) else []
    owners = {name for name in (account, *names) if isinstance(name, str)}
    return str(account), role if isinstance(role, str) else None, frozenset(owners)
