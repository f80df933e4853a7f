"""Passwords in endpoints, proxies and URIs: refused where a recipe holds them, shown nowhere, handed on to nobody."""

import json
import os
from pathlib import Path

import pytest
from run_material import SECRETS

from job.cli import _secrets
from job.core.errors import JobError
from job.edge.host.logs import HIDDEN, configure, redact
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.patience import Patience

PASSWORD = "hunter2%2Fhunter3"
SPELLINGS = (PASSWORD, "hunter2/hunter3")
URIS = [
    f"https://me:{PASSWORD}@huggingface.co/owner/name",
    f"http://{PASSWORD}@host/data.jsonl",
    f"s3://{PASSWORD}@bucket/data.jsonl",
    f"s3://AKIA:{PASSWORD}@bucket/data.jsonl",
    "s3://AKIA:hunter2/hunter3@bucket/data.jsonl",
]


def told(ended):
    return ended.stdout + ended.stderr + json.dumps(ended.outcome)


def is_hidden(text):
    return not any(spelling in text for spelling in SPELLINGS)


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("key", ["data.train", "data.validation", "output", "model.base", "model.quantised_copies"])
def test_a_uri_with_credentials_in_a_recipe_is_refused_and_not_repeated(job, key, uri):
    section, _, name = key.partition(".")
    if name:
        job.recipe[section][name] = uri
    else:
        job.recipe[section] = uri
    ended = job.call("check")
    assert ended.code == ended.outcome["code"] == 64, ended.stdout
    assert "a URI holds no credentials" in ended.outcome["reason"]
    assert is_hidden(told(ended))


@pytest.mark.parametrize("uri", [f"{uri}/runs/r1" for uri in URIS])
@pytest.mark.parametrize("command", ["report", "try"])
def test_a_uri_with_credentials_on_a_command_line_is_hidden(job, command, uri):
    from job_process import call

    ended = call(command, uri)
    assert ended.code == 64, ended.stdout
    assert is_hidden(told(ended))


def test_an_endpoint_with_credentials_is_refused_and_not_repeated(job, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://me:{PASSWORD}@127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)
    job.recipe["output"] = "s3://bucket/runs"
    ended = job.call("run")
    assert ended.code == ended.outcome["code"] == 64, ended.stdout
    assert "AWS_ENDPOINT_URL: credentials do not belong into an endpoint" in ended.outcome["reason"]
    assert is_hidden(told(ended))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "https_proxy"])
def test_a_proxy_s_password_is_hidden_in_whatever_is_said_of_it(monkeypatch, name, scheme):
    for variable, value in {
        name: f"http://me:{PASSWORD}@127.0.0.1:9",
        "AWS_ENDPOINT_URL": f"{scheme}://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "",
    }.items():
        monkeypatch.setenv(variable, value)
    hide = configure(secrets=_secrets(os.environ))
    store = open_store("s3://bucket/x", StoreSettings(), patience=Patience(attempts=1, first_pause_seconds=0.01))
    with pytest.raises(JobError) as caught:
        store.read("key")
    chain, said = caught.value, []
    while chain is not None:
        said.append(hide(f"{chain!s} {chain!r}"))
        chain = chain.__cause__ or chain.__context__
    assert is_hidden(" ".join(said))
    assert is_hidden(hide(f"{os.environ[name]} or me:{PASSWORD} or {SPELLINGS[1]}"))


@pytest.mark.parametrize(
    "text",
    ["https://host:8443/path@x", "s3://models/a:b@c", "file:///data/me@home/x", "mail me@example.org: https://a/b"],
)
def test_an_at_sign_elsewhere_is_no_credential(text):
    assert redact(text) == text
    assert HIDDEN not in text


WATCH = """
import os, sys
def seen(event, args):
    if event in {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"}:
        with open(os.environ["CHILDREN"], "a") as file:
            file.write(f"{event} {args!r} inherits {dict(os.environ)!r}\\n")
sys.addaudithook(seen)
os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-S", "-c", "'the watch works'"], {})
"""


def test_no_process_of_a_run_has_a_secret_in_its_command_line_and_no_child_gets_one(job, tmp_path):
    """All processes are looked at at each event; and each one that is begun, however short it lives."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    children = tmp_path / "children"
    secrets = SECRETS | {"HTTPS_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9"}
    job.recipe["train"]["steps"] = 2
    lines = set()

    def look(event):
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.add(process.read_bytes())
                stat = (process.parent / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == running.child.pid:
                    lines.add((process.parent / "environ").read_bytes())
            except OSError:
                continue
        return event["event"] == "finished"

    watched = {"PYTHONPATH": str(tmp_path / "watch"), "CHILDREN": str(children)}
    with job.begun("run", cold=True, **secrets, **watched) as running:
        running.until(look)
        assert running.end().code == 0
    watch, *begun = children.read_text().splitlines()
    assert "the watch works" in watch
    assert not any(secret in line for line in begun for secret in (*SECRETS.values(), *SPELLINGS))
    assert any(b"entrypoint.py" in line for line in lines)
    for secret in (*SECRETS.values(), *SPELLINGS):
        assert not any(secret.encode() in line for line in lines)
