#!/bin/bash
# Installs the real Slurm of these tests (Debian or Ubuntu, root); nothing of it is started.
set -euo pipefail
# Packages of daemons start them where systemd runs, unless a policy says no: ours, where there is none.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
  slurm-wlm slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
