#!/bin/bash
# usage: ceph_down.sh FOLDER
# Ends what ceph_up.sh started there, the gateway first.
[ -f "$1/pids" ] || exit 0
tac "$1/pids" | while read -r pid; do
  # A number may have been given to another process meanwhile: ours name the folder.
  tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF -- "$1/ceph.conf" || continue
  kill "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2> /dev/null
done
rm -f "$1/pids"
