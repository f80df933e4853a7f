#!/bin/bash
# usage: install.sh [FOLDER]
# Installs the real object stores of these tests (Debian or Ubuntu, root): Ceph's gateway with the two daemons below it,
# and Swift with memcached. Swift's packages go into an environment of their own in FOLDER (.lab/swift), away from the
# job's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../../.lab/swift}
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
  radosgw ceph-mon ceph-osd ceph-common memcached curl
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/swift.txt"
