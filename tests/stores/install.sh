#!/bin/bash
# Installs the real object store of these tests: Ceph's gateway and the two daemons below it (Debian or Ubuntu, root).
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common curl
