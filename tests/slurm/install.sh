#!/bin/bash
# Installs the real Slurm of these tests (Debian or Ubuntu, root); nothing of it is started.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
  slurm-wlm slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
