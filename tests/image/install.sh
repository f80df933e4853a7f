#!/bin/bash
# Installs what builds and runs images (Debian or Ubuntu, root), where neither docker's daemon nor podman and buildah do.
set -euo pipefail
if docker version > /dev/null 2>&1; then exit; fi
if command -v podman > /dev/null && command -v buildah > /dev/null && command -v debootstrap > /dev/null; then exit; fi
if [ "$(id -u)" != 0 ]; then
  echo "no docker that answers, no podman with buildah and debootstrap, and not root: nothing is installed" >&2
  exit
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
  buildah podman runc debootstrap uidmap netavark aardvark-dns
