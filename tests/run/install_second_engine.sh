#!/usr/bin/env bash
# CTranslate2, in an environment that sees the packages of .venv and leaves them as they are.
set -euo pipefail

cd "$(dirname "$0")/../.."
[ -e .second-engine/bin/python ] || .venv/bin/python -m venv .second-engine
.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \
    > "$(.second-engine/bin/python -c 'import site; print(site.getsitepackages()[0])')/ours.pth"
.second-engine/bin/python -m pip install --quiet --disable-pip-version-check 'ctranslate2>=4.8'
