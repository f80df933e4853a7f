"""The manifests of k8s/: as they stand, rendered by kubectl, and as they were last rendered, for where kubectl is not.

python tests/k8s/k8s_manifests.py    copy job.yaml into the base and render every overlay (`make templates`)
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
JOB = K8S / "job.yaml"
IN_BASE = K8S / "base" / "bare" / "job.yaml"
"""The same file once more: kustomize reads nothing above its own folder, and a link fetched by URL is only a path."""
RENDERED = Path(__file__).parent / "rendered"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
KUBECTL = shutil.which("kubectl")

Document = dict[str, Any]


def standalone() -> list[Document]:
    """What `kubectl apply -f k8s/job.yaml` sends."""
    return documents(JOB.read_text(encoding="utf-8"))


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


def kustomized(folder: Path) -> str:
    """What `kubectl apply -k FOLDER` sends."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def overlay(name: str) -> list[Document]:
    """One of the overlays, rendered; without kubectl as it was last rendered, which must not be out of date."""
    return documents(_overlay(name))


@functools.cache
def _overlay(name: str) -> str:
    if KUBECTL:
        return kustomized(K8S / "overlays" / name)
    assert recorded_digest() == sources_digest(), "k8s/ changed: run `make templates` where kubectl is"
    return (RENDERED / f"{name}.yaml").read_text(encoding="utf-8")


def composed(folder: Path, *components: str, more: str = "") -> list[Document]:
    """The base with components, as a user composes them in a folder of their own."""
    here = os.path.relpath(K8S, folder.resolve())
    lines = [f"resources: [{here}/base]", f"components: [{', '.join(f'{here}/components/{c}' for c in components)}]"]
    (folder / "kustomization.yaml").write_text("\n".join([*lines, more]), encoding="utf-8")
    return documents(kustomized(folder))


def sources_digest() -> str:
    """sha256 over everything that the overlays are rendered from."""
    total = hashlib.sha256()
    for path in sorted(K8S.rglob("*.yaml")):
        total.update(f"{path.relative_to(K8S).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()


def recorded_digest() -> str:
    return (RENDERED / "SOURCES").read_text(encoding="utf-8").strip()


def main() -> None:
    if not KUBECTL:
        sys.exit("no kubectl here; it renders the overlays")
    shutil.copyfile(JOB, IN_BASE)
    shutil.rmtree(RENDERED, ignore_errors=True)
    RENDERED.mkdir()
    for name in OVERLAYS:
        head = f"# kubectl kustomize k8s/overlays/{name}; written by `make templates`\n"
        (RENDERED / f"{name}.yaml").write_text(head + kustomized(K8S / "overlays" / name), encoding="utf-8")
    (RENDERED / "SOURCES").write_text(sources_digest() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
