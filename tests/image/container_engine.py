"""Docker or podman: runs containers as a strict cluster does."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PATIENCE_SECONDS = 3600
"""Longest that anything here may take; the tests never depend on how fast it is."""
UID = 12345
"""A user that the image does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A container that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[dict]:
        """The JSON lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass(slots=True)
class Container:
    """One that runs; its output is read as it comes."""

    name: str
    child: subprocess.Popen
    errors: IO[str]
    lines: list[str] = field(default_factory=list)

    def until(self, seen: Callable[[dict], bool]) -> dict:
        """Read on to the first event that satisfies a condition."""
        for line in self.child.stdout:
            self.lines.append(line)
            event = json.loads(line)
            if seen(event):
                return event
        raise AssertionError(f"not seen (exit {self.child.wait()}):\n{''.join(self.lines)}\n{self._said()}")

    def end(self) -> Ended:
        self.lines += self.child.stdout
        code = self.child.wait(PATIENCE_SECONDS)
        return Ended(code=code, stdout="".join(self.lines), stderr=self._said())

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The program, and what it needs to run on this machine."""

    program: str
    environment: Mapping[str, str]
    run_options: Sequence[str]

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [self.program, *arguments],
            env=os.environ | dict(self.environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}"
        return done

    def has(self, image: str) -> bool:
        return self.call("image", "inspect", image, check=False).returncode == 0

    def inspect(self, image: str) -> dict:
        return json.loads(self.call("image", "inspect", image).stdout)[0]

    def layers(self, image: str) -> list[str]:
        """Digests of the layers, from the base up."""
        return self.inspect(image)["RootFS"]["Layers"]

    def wait_for(self, container: "Container", seen: Callable[[str], bool]) -> None:
        """Until the container's processes (/proc/*/stat) satisfy a condition."""
        end = time.monotonic() + PATIENCE_SECONDS
        look = ("exec", container.name, "sh", "-c", "cat /proc/[0-9]*/stat")
        while not seen(shown := self.call(*look, check=False).stdout):
            assert time.monotonic() < end, shown
            assert container.child.poll() is None, container.end()
            time.sleep(0.2)

    def start(
        self,
        image: str,
        *arguments: str,
        work: Path | None = None,
        mounts: Sequence[str] = (),
        entrypoint: str | None = None,
        user: str = str(UID),
        options: Sequence[str] = (),
        **environment: str,
    ) -> Ended:
        """Run a container to its end: see `begun`."""
        how = {"work": work, "mounts": mounts, "entrypoint": entrypoint, "user": user, "options": options}
        with self.begun(image, *arguments, **how, **environment) as container:
            return container.end()

    @contextmanager
    def begun(
        self,
        image: str,
        *arguments: str,
        work: Path | None,
        mounts: Sequence[str] = (),
        entrypoint: str | None = None,
        user: str = str(UID),
        options: Sequence[str] = (),
        **environment: str,
    ) -> Iterator[Container]:
        """A container under way; whatever happens, it does not outlive the block.

        It has a user that nobody knows, a read-only root, no network but its own loopback, no capability, and of the
        machine only `work` at /work, and `mounts` (here:inside, or here:inside:ro). `options` are more words for `run`.
        """
        name = f"qlora-job-test-{os.getpid()}-{threading.get_ident()}-{os.urandom(4).hex()}"
        command = [self.program, "run", "--rm", "--name", name, *self.run_options, "--user", user, *options]
        command += ["--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        if work is not None:
            command += ["--volume", f"{work}:/work"]
        for mount in mounts:
            command += ["--volume", mount]
        if entrypoint is not None:
            command += ["--entrypoint", entrypoint]
        for variable, value in ({"OMP_NUM_THREADS": "1"} | environment).items():
            command += ["--env", f"{variable}={value}"]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                [*command, image, *arguments],
                env=os.environ | dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            watchdog = threading.Timer(PATIENCE_SECONDS, self.call, ("rm", "--force", name), {"check": False})
            watchdog.start()
            try:
                yield Container(name, child, errors)
            finally:
                watchdog.cancel()
                self.call("rm", "--force", name, check=False)
                child.kill()
                child.stdout.close()
                child.wait()


def work_folder(path: Path) -> Path:
    """A new folder that belongs to the container's user alone."""
    path.mkdir(mode=0o700)
    os.chown(path, UID, -1)
    return path


def find_engine(folder: Path, *, storage: Path | None = None) -> Engine | None:
    """What runs images here; podman is told to ask of the machine no more than this process may.

    Podman and buildah keep all they make in `storage`, if that is given; docker's daemon has its own place.
    """
    answers = ["docker", "version", "--format", "{{.Server.Version}}"]
    if shutil.which("docker") and subprocess.run(answers, capture_output=True, check=False).returncode == 0:
        return Engine(program="docker", environment={}, run_options=())
    if not shutil.which("podman"):
        return None
    settings = folder / "containers.conf"
    limits = [f"nofile={_limit(resource.RLIMIT_NOFILE)}", f"nproc={_limit(resource.RLIMIT_NPROC)}"]
    runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""
    settings.write_text(
        f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n"
        f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n{runtime}'
    )
    # Docker's --read-only leaves /tmp read-only, as clusters do, and adds no line to /etc/passwd.
    options = ("--read-only-tmpfs=false", "--passwd=false")
    environment = {"CONTAINERS_CONF": str(settings)} | (_kept_in(storage) if storage else {})
    return Engine(program="podman", environment=environment, run_options=options)


def _kept_in(storage: Path) -> dict[str, str]:
    """Variables by which podman and buildah keep images, containers and caches of builds below a folder."""
    file = storage / "storage.conf"
    file.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{storage / "images"}"\nrunroot = "{storage / "run"}"\n'
    )
    (storage / "tmp").mkdir()
    return {"CONTAINERS_STORAGE_CONF": str(file), "TMPDIR": str(storage / "tmp")}


def _limit(kind: int) -> str:
    soft = min(limit for limit in (*resource.getrlimit(kind), 20000) if limit != resource.RLIM_INFINITY)
    return f"{soft}:{soft}"
