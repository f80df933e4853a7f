#!/bin/bash
# Submits a sweep: an array with one task for each line of a file, and a job after it that writes the table of its runs.
# usage: slurm/sweep.sh [options of sbatch] RECIPE SWEEP_FILE [more arguments for run]
#        slurm/sweep.sh --table FOLDER      the table now, here
# A line of SWEEP_FILE holds arguments for run: --set lora.r=16 --set lora.alpha=32
set -u
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export QLORA_HOME=$home
: "${QLORA_AT_ONCE:=4}" # tasks at once

say() { printf 'sweep.sh: %s\n' "$*" >&2; }

[[ ${1:-} != --table ]] || exec bash "$home/slurm/sweep.sbatch" "$@"
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
[[ $# -ge 2 ]] || { say 'usage: slurm/sweep.sh [--partition=... and the like] RECIPE SWEEP_FILE'; exit 64; }
recipe=$1 file=$2
shift 2
[[ -r $recipe && -r $file ]] || { say "$recipe or $file cannot be read"; exit 64; }

# Copies: what is edited from now on is no part of this sweep.
folder=$PWD/sweep-$(date +%Y%m%d-%H%M%S)
mkdir "$folder" || exit 74
cp "$recipe" "$folder/recipe.yaml"
grep -vE '^[[:space:]]*(#|$)' "$file" > "$folder/sweep.txt"
tasks=$(wc -l < "$folder/sweep.txt")
double=$(sort "$folder/sweep.txt" | uniq -d | head -n 1)
[[ $tasks -gt 0 ]] || { say "$file holds no line"; exit 64; }
[[ -z $double ]] || { say "$file holds this line twice, which would be one run: $double"; exit 64; }

# shellcheck source=slurm/train.sbatch
source "$home/slurm/train.sbatch"
forget_job
export QLORA_SWEEP_FOLDER=$folder
array=$(sbatch --parsable --array="1-$tasks%$QLORA_AT_ONCE" --output="$folder/task-%a.out" "${options[@]}" \
  "$home/slurm/sweep.sbatch" "$folder/recipe.yaml" "$folder/sweep.txt" "$@") || { say 'sbatch refused it'; exit 69; }
# With the resources of a task: where a task may run, the table may. It takes some seconds.
table=$(sbatch --parsable "${options[@]}" --dependency="afterany:${array%%;*}" --job-name=qlora-sweep-table \
  --time=00:15:00 --open-mode=truncate --output="$folder/table.txt" "$home/slurm/sweep.sbatch" --table "$folder") ||
  { say "the table was refused; later: slurm/sweep.sh --table $folder"; exit 69; }
say "$tasks tasks are job $array, the table is job $table: $folder/table.txt"
say "at any time: slurm/sweep.sh --table $folder"
