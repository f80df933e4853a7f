"""A fifth of all requests to the store goes wrong in one way or another: the run ends as if nothing had been."""

import contextlib
import dataclasses
import itertools
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chaos_runs import Run
from faults import NO_FAULT, Fault, Request, faulty_proxy

SHARE = 0.2
_READ_SECONDS = 25.0
"""Longer than the job waits for a byte."""
_OLDEST = 30
"""Keys that were handed out since; then one is no longer known to the store."""

EXPIRED = Fault(status=400, code="ExpiredToken")
ANY = {
    "500": Fault(status=500, code="InternalError"),
    "503 SlowDown": Fault(status=503, code="SlowDown"),
    "408": Fault(status=408, code="RequestTimeout"),
    "lost answer": Fault(lose_answer=True),
    "expired": EXPIRED,
}
WRITES = ANY | {"409": Fault(status=409, code="ConditionalRequestConflict")}
READS = ANY | {
    "reset": Fault(cut_after_bytes=9, reset=True),
    "truncated": Fault(cut_after_bytes=9),
    "short, and its length agrees": Fault(shorten_to_bytes=9),
    "wrong byte": Fault(flip_byte=True),
    "trickle": Fault(trickle_seconds=0.02),
}
TIMEOUT = Fault(trickle_seconds=_READ_SECONDS)
KINDS = {**WRITES, **READS}


class Faults:
    """A rule of the proxy that injures a share of the requests, each kind in its turn, and counts."""

    def __init__(self, seed: str, *, timeouts: int = 0) -> None:
        self._draw = random.Random(seed)
        self._turns = {
            "PUT": itertools.cycle(WRITES),
            "GET": itertools.cycle([*READS, *(["time-out"] if timeouts else [])]),
            "other": itertools.cycle(ANY),
        }
        self._timeouts = timeouts
        self.counts: Counter[str] = Counter()
        self.requests = 0
        self.keys_handed_out = 0
        self.refused_keys = 0

    def __call__(self, request: Request) -> Fault:
        self.requests += 1
        if self._is_expired(request):
            self.refused_keys += 1
            return EXPIRED
        if self._draw.random() >= SHARE:
            return NO_FAULT
        kind = next(self._turns.get(request.method, self._turns["other"]))
        if kind == "time-out":
            self._timeouts -= 1
            if self._timeouts < 0:
                kind = "500"
        self.counts[kind] += 1
        return TIMEOUT if kind == "time-out" else KINDS[kind]

    def _is_expired(self, request: Request) -> bool:
        key = re.search(r"Credential=key-(\d+)/", request.headers.get("authorization", ""))
        return key is not None and int(key[1]) < self.keys_handed_out - _OLDEST


@contextlib.contextmanager
def short_lived_credentials(faults: Faults) -> Iterator[dict[str, str]]:
    """What a role's credentials are to a container: an endpoint that hands out new ones, and is sometimes away.

    Each set is close to its end, so that botocore's chain renews it with each request; a store that is asked with an
    old one refuses.
    """
    lock = threading.Lock()
    draw = random.Random("credentials")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                faults.keys_handed_out += 1
                number, away = faults.keys_handed_out, draw.random() < SHARE / 4
            until = datetime.now(UTC) + timedelta(minutes=5)
            answer = {
                "AccessKeyId": f"key-{number}",
                "SecretAccessKey": "testing-secret",
                "Token": f"token-{number}",
                "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            content = b"away" if away else json.dumps(answer).encode()
            self.send_response(500 if away else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{server.server_port}/role"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def carried(tmp_path, s3_place, s3_recipe, server, warm, undisturbed):
    """Carry a run to its end through the faults, in one attempt."""

    def carry(name: str, faults: Faults, **environment: str) -> None:
        with faulty_proxy(server.at.endpoint) as proxy:
            proxy.rule = faults
            place = s3_place.below(f"{tmp_path.name}-{name}")
            given = {k: v for k, v in place.environment.items() if not (environment and k.startswith("AWS_ACCESS"))}
            place = dataclasses.replace(place, environment={**given, **environment, "AWS_ENDPOINT_URL": proxy.endpoint})
            run = Run(tmp_path / name, place, s3_recipe, warm)
            attempt = run.begin()
            code = attempt.wait()
            run.look(attempt, set())
        assert code == 0, attempt.told()
        run.same_result(undisturbed[0], attempt)
        assert sum(faults.counts.values()) > faults.requests * SHARE / 2

    return carry


def test_a_fifth_of_the_requests_going_wrong_changes_nothing(carried, seed):
    carried("short", Faults(f"{seed}/short"))


@pytest.mark.chaos
def test_every_fault_on_a_fifth_of_the_requests_changes_nothing(carried, seed, results):
    counts: Counter[str] = Counter()
    requests = 0
    for number in range(3):
        faults = Faults(f"{seed}/{number}", timeouts=2)
        carried(f"run-{number}", faults)
        counts += faults.counts
        requests += faults.requests
    assert counts.keys() == {*KINDS, "time-out"}
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    results.add(
        f"**A faulty way to the store.** A proxy injured {counts.total()} of {requests} requests of three runs "
        f"({told}): each run ended with 0 in its first attempt, and with the same numbers."
    )


@pytest.mark.chaos
def test_credentials_that_expire_are_renewed_by_the_chain(carried, seed, results):
    faults = Faults(f"{seed}/credentials")
    with short_lived_credentials(faults) as given:
        carried("credentials", faults, **given)
    assert faults.keys_handed_out > 2 * _OLDEST
    assert faults.refused_keys == 0
    results.add(
        "The same with credentials of a role that end while the run goes on, from an endpoint that fails now and then: "
        f"{faults.keys_handed_out} sets, renewed by the chain; no request was sent with an old one."
    )
