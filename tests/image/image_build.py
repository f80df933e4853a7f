"""`make image` as the tests call it, with what pip needs on this machine, and a look into what was built."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from container_engine import PATIENCE_SECONDS

IMAGE = "localhost/qlora-job-test"
LOCK = "locks/cpu.txt"
CANARY = "5b1f-not-a-password-9c27"
"""Stands in a build secret, and must stand nowhere in the image."""
REVISION = "0123456789abcdef0123456789abcdef01234567"


def build(folder, base, secret, *, flags="", lock=LOCK, image=IMAGE, environment=None):
    """`make image` in a checkout, with the operator's own BUILD_FLAGS and a canary in pip's settings."""
    given = os.environ.get("BUILD_FLAGS") or flags_of_this_machine(secret.with_name("machine.conf"))
    own = re.search(r"id=pip\.conf,src=(\S+)", given)
    secret.write_text((Path(own[1]).read_text() if own else "[global]\n") + f"# {CANARY}\n")
    named = given.replace(own[0], f"id=pip.conf,src={secret}") if own else f"{given} --secret id=pip.conf,src={secret}"
    return subprocess.run(
        ["make", "--directory", str(folder), "image", f"BASE_IMAGE={base}", f"LOCK={lock}", f"IMAGE={image}"],
        env=os.environ | {"BUILD_FLAGS": f"{named} {flags}", "REVISION": REVISION} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def flags_of_this_machine(conf):
    """What pip needs here it needs in the build as well: the certificates that it is told of, a folder of wheels."""
    settings, flags = ["[global]"], [f"--secret id=pip.conf,src={conf}"]
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if certificates:
        settings.append("cert = /run/secrets/ca.crt")
        flags.append(f"--secret id=ca.crt,src={certificates}")
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute() and shutil.which("docker") is None:  # docker's builder mounts no folder
        settings.append(f"find-links = {wheels}")
        flags.append(f"--volume {wheels}:{wheels}:ro")
    conf.write_text("\n".join(settings) + "\n")
    return " ".join(flags)


def python(engine, image, code, **options):
    """What a line of Python says in the image."""
    ended = engine.start(image, "-c", code, entrypoint="/opt/venv/bin/python", **options)
    assert ended.code == 0, ended.stderr
    return ended.stdout.strip()
