#!/bin/bash
# What cron or scrontab runs each night: submits the recipe's run if there is something to do; it never trains itself.
# usage: slurm/nightly.sh [options of sbatch] RECIPE [--set KEY=VALUE] [--output URI] [--run-id ID]
# An unfinished run goes on, whatever ended it; new data begins a new one; a run that lost its swap is judged again; when
# nothing changed nothing is submitted.
set -u
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export QLORA_HOME=$home
# shellcheck source=slurm/train.sbatch
source "$home/slurm/train.sbatch"

say() { printf '%s nightly.sh: %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }

state_of_run() { # RECIPE ARGUMENTS...: finished, todo or wrong, as far as it can be told here without a GPU
  local words
  [[ $QLORA_RUNTIME != pyxis ]] || { echo todo; return; } # only a job can start its containers
  words=$(ask report "$@" 2>&1)
  case $? in
    0) grep late_file <<< "$words" >&2; echo finished ;; # what is left out: nobody else says so on such a night
    64) printf '%s\n' "$words" >&2; echo wrong ;;
    *) echo todo ;; # not finished; or it cannot be told from here, and the job says what is the matter
  esac
}

options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
[[ $# -gt 0 ]] || { say 'usage: slurm/nightly.sh [--partition=... and the like] RECIPE [--set KEY=VALUE]'; exit 64; }
load_env_file || exit
# The same recipe and arguments have the same name, each night; --dependency=singleton goes by it.
stem=$(basename "$1")
name=nightly-${stem%.*}-$(printf '%s\n' "$(realpath "$1")" "${@:2}" | cksum | cut -d ' ' -f 1)

queued=$(squeue --noheader --user="$(id -un)" --name="$name" --format='%i %T') || { say 'squeue failed'; exit 69; }
[[ -z $queued ]] || { say "$name is still there (${queued//$'\n'/, }); nothing submitted"; exit 0; }
case $(state_of_run "$@") in
  finished) say "$name: nothing changed, the run is finished; nothing submitted"; exit 0 ;;
  wrong) say "$name: not submitted"; exit 64 ;;
esac
forget_job
job=$(sbatch --parsable --job-name="$name" --dependency=singleton "${options[@]}" "$home/slurm/train.sbatch" "$@") ||
  { say "$name: sbatch refused it"; exit 69; }
say "$name: submitted as job $job"
