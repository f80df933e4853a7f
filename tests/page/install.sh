#!/usr/bin/env bash
# What `make test-page` looks at the page with: a browser, fonts of other scripts, and axe-core. What cannot be had is
# said, and its tests are skipped.
set -euo pipefail

cd "$(dirname "$0")/../.."
if ! command -v chromium-headless-shell chromium google-chrome > /dev/null && [ "$(id -u)" = 0 ] &&
    apt-cache show chromium-headless-shell > /dev/null 2>&1; then
    apt-get install -y --no-install-recommends chromium-headless-shell fonts-noto-core fonts-noto-cjk
fi
if [ ! -e .page/node_modules/axe-core/axe.min.js ] && command -v npm > /dev/null; then
    npm install --prefix .page --no-audit --no-fund --silent axe-core@4 || echo "axe-core is not to be had from npm here"
fi
