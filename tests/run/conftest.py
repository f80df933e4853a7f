"""Fixtures of the whole job: a tiny random base, made once a session, and a job on it."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# Tiny models of every kind.
sys.path.append(str(Path(__file__).parents[1] / "tune"))

from job_process import Job
from run_material import SECRETS, TOKEN, long_recipe, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Llama of two layers with random weights and a word tokenizer of its own."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base, warm):
    return Job(tmp_path, base, warm)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base):
    """An undisturbed run by the real command, and how its process ended; look, do not touch.

    It is what the runs that are stopped and gone on with, forks of a warm image, are compared with to the bit.
    """
    job = long_recipe(Job(tmp_path_factory.mktemp("finished"), base))
    return job, job.start("run", cold=True, **SECRETS)


@pytest.fixture
def received():
    """A URL on this machine, and what is posted there."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{TOKEN}", got
    server.shutdown()
    server.server_close()
    thread.join()
