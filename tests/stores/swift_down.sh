#!/bin/bash
# usage: swift_down.sh FOLDER
# Ends what swift_up.sh started there.
folder=$1
[ -f "$folder/pids" ] || exit 0
ours=()
while read -r pid; do
  # A number may have been given to another process meanwhile: ours name the folder.
  tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF -- "$folder/" && ours+=("$pid")
done < "$folder/pids"
# Each leads a group of its own, its worker included.
for pid in "${ours[@]}"; do kill -- "-$pid"; done
for pid in "${ours[@]}"; do
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  kill -9 -- "-$pid" 2> /dev/null
done
rm -f "$folder/pids"
