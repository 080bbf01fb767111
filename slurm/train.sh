#!/bin/bash
#SBATCH --job-name=solar-train
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
#
# Train a recipe. Submit from the root of the repository:
#
#   sbatch slurm/train.sh                                                    # the demo recipe, one rank
#   RECIPE=runs/mine/recipe.yaml sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 slurm/train.sh [--any.key value]
#
# CHOICE (optional) names a file of further arguments, one a line, such as those that slurm/choose.sh writes.
# Slurm sends USR1 to the ranks 180 s before the time limit. They save and exit with 75, and the job requeues itself.
# The log is written to the directory in which sbatch was called; restarts append to it.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
source slurm/env.sh
source slurm/lib.sh
need_gpus

RECIPE=${RECIPE:-pipeline/recipes/demo.yaml}
need "$RECIPE" "set RECIPE to a recipe"

choice=()
if [ -n "${CHOICE:-}" ]; then
  need "$CHOICE" "slurm/choose.sh writes it"
  mapfile -t choice <"$CHOICE"
fi

# Rank 0 alone checks and prints, while the other ranks have ended.
[[ " $* " != *" --dry_run "* ]] || SRUN_ARGS+=(--wait=0)
status=0
on_all_ranks python pipeline/train.py --config "$RECIPE" "$@" "${choice[@]}" || status=$?
finish "$status"
