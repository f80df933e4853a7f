"""The trainer of k8s/job.yaml as a process: its arguments, its variables, its user, its volumes; a folder is the node.

In a root of its own: the container's paths and user, read-only but for its volumes. Elsewhere it is a fork of a warm
image, each path of a volume is replaced by a folder's, and the user is the pod's where that one can read our files.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from job_process import Ended, Running
from k8s_manifests import ROOT, standalone
from k8s_parts import pod_specs, quantity, trainer
from warm_image import PAGE_BYTES, Forked, WarmImage

# What kubelet and runtime do, short of an image: its code is this checkout, its packages are our virtual environment.
_OWN_ROOT = """
set -eu
node=$1 app=$2 venv=$3 python=$4 user=$5; shift 5
root=$node/root
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
for name in bin sbin lib lib32 lib64; do [ ! -L /$name ] || cp -P /$name .; done
for path in /usr /etc /bin /sbin /lib /lib64 "$python"; do
  if [ -d "$path" ] && [ ! -e "$root$path" ]; then mkdir -p "$root$path"; mount --rbind "$path" "$root$path"; fi
done
mkdir -p app opt/venv proc dev recipe work
mount --bind "$app" app; mount -o remount,bind,ro app
mount --bind "$venv" opt/venv; mount -o remount,bind,ro opt/venv
mount --rbind /proc proc
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir -m 1777 dev/shm; mount -t tmpfs -o mode=1777 tmpfs dev/shm
touch dev/termination-log; mount --bind "$node/termination-log" dev/termination-log
mount --bind "$node/recipe" recipe; mount -o remount,bind,ro recipe
mount --bind "$node/work" work
mount -o remount,ro .
exec chroot . setpriv --reuid "$user" --regid "$user" --clear-groups \
  --no-new-privs --bounding-set=-all --inh-caps=-all sh -c 'cd /app && exec "$@"' sh "$@"
"""


def may_mount() -> bool:
    """Whether a process may have a root of its own here."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("unshare", "setpriv", "chroot")):
        return False
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _readable_by_others() -> bool:
    """Whether the pod's user can read our code and packages where they stand."""
    places = {place for root in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) for place in (root, *root.parents)}
    return all(place.stat().st_mode & 0o005 == 0o005 for place in places)


class Node:
    """Where one pod after the other runs; `image` None: each in a root of its own."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], image: WarmImage | None) -> None:
        (self._pod,) = pod_specs(standalone())
        self._trainer = trainer(self._pod)
        self._folder = folder
        self._image = image
        as_others = image is None or (os.geteuid() == 0 and _readable_by_others())
        self.user = self._pod["securityContext"]["runAsUser"] if as_others else os.geteuid()
        self.log = folder / "termination-log"
        self._put_recipe(yaml.safe_dump(dict(recipe)))

    def _put_recipe(self, text: str) -> None:
        # As kubelet puts a ConfigMap: a link to a link, so that an update is one rename.
        first = self._folder / "recipe" / "..2026_11_24"
        first.mkdir(parents=True)
        (first / "recipe.yaml").write_text(text, encoding="utf-8")
        (self._folder / "recipe" / "..data").symlink_to(first.name)
        (self._folder / "recipe" / "recipe.yaml").symlink_to("..data/recipe.yaml")

    @contextlib.contextmanager
    def pod(self, **changed: str) -> Iterator[Running]:
        """A new pod: empty volumes, an empty message, the container's command line; `changed` variables."""
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        work.chmod(0o777)
        (self._folder / "root").mkdir(exist_ok=True)
        self.log.write_bytes(b"")
        self.log.chmod(0o666)
        err = self._folder / "stderr"
        with err.open("wb") as stderr:
            child = self._start({**self.environment(), **changed}, stderr)
        running = Running(child, err)
        try:
            yield running
        finally:
            child.kill()
            child.stdout.close()
            child.wait()

    def _start(self, environment: dict[str, str], stderr: Any) -> subprocess.Popen[str] | Forked:
        # What only we can write holds the message, as /dev does on a real node.
        self._folder.chmod(0o555)
        output = {"stdout": subprocess.PIPE, "stderr": stderr}
        if self._image is not None:
            return self._image.begin(
                [self._here(word) for word in self._trainer["args"]],
                environment={name: self._here(value) for name, value in environment.items()},
                cwd=Path("/"),
                user=None if self.user == os.geteuid() else self.user,
                **output,
            )
        script = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OWN_ROOT, "sh"]
        here = [str(self._folder), str(ROOT), sys.prefix, sys.base_prefix, str(self.user)]
        command = ["/opt/venv/bin/python", "/app/entrypoint.py", *self._trainer["args"]]
        pipes = {"stdin": subprocess.DEVNULL, "text": True, "pipesize": PAGE_BYTES, **output}
        return subprocess.Popen([*script, *here, *command], env=environment, **pipes)

    def _here(self, text: str) -> str:
        """A path of the container as one of ours."""
        for path, name in (("/recipe", "recipe"), ("/work", "work"), ("/dev/termination-log", "termination-log")):
            if text == path or text.startswith(f"{path}/"):
                return str(self._folder / name) + text.removeprefix(path)
        return text

    def environment(self) -> dict[str, str]:
        """The image's variables, and the manifest's."""
        variables = image_environment()
        for each in self._trainer["env"]:
            variables[each["name"]] = each["value"] if "value" in each else self._from_resources(each)
        return variables

    def _from_resources(self, variable: Mapping[str, Any]) -> str:
        kind, name = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
        return str(int(quantity(self._trainer["resources"][kind][name])))


def image_environment() -> dict[str, str]:
    """What the Dockerfile's last ENV sets, and a PATH."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    block = re.findall(r"^ENV ((?:.*\\\n)*.*)$", text, re.MULTILINE)[-1]
    pairs = dict(each.split("=", 1) for each in shlex.split(block.replace("\\\n", " ")))
    return pairs | {"PATH": "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def ended(running: Running, node: Node) -> Ended:
    """How it ended, with its termination message."""
    running.outcome_file = node.log
    return running.end()
