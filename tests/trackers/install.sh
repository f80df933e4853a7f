#!/usr/bin/env bash
# MLflow with its server and W&B, in an environment that sees the packages of .venv and leaves them as they are.
set -euo pipefail

cd "$(dirname "$0")/../.."
[ -e .trackers/bin/python ] || .venv/bin/python -m venv .trackers
.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \
    > "$(.trackers/bin/python -c 'import site; print(site.getsitepackages()[0])')/ours.pth"
.trackers/bin/python -m pip install --quiet --disable-pip-version-check 'mlflow>=3' 'wandb>=0.22'
