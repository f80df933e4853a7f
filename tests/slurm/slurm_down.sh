#!/bin/bash
# usage: slurm_down.sh FOLDER
# Ends what slurm_up.sh started there: the jobs first, so that none outlives its daemon, then the daemons.
folder=$1
[ -f "$folder/pids" ] || exit 0
export SLURM_CONF=$folder/slurm.conf
queue() { timeout 60 squeue --noheader "$@" 2> /dev/null; }
if [ -f "$SLURM_CONF" ] && timeout 60 scontrol ping > /dev/null 2>&1; then
  # A job that is ended may put itself back into the queue: cancelled until none is left.
  for _ in $(seq 60); do
    [ -n "$(queue)" ] || break
    queue --format=%i | xargs -r timeout 60 scancel --full --signal=KILL 2> /dev/null
    queue --format=%i | xargs -r timeout 60 scancel 2> /dev/null
    sleep 0.5
  done
fi
tac "$folder/pids" | while read -r pid; do
  # A number may have been given to another process meanwhile: ours name the folder.
  tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF -- "$folder/" || continue
  kill "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2> /dev/null
done
rm -f "$folder/pids"
