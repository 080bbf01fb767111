#!/bin/bash
#SBATCH --job-name=solar-choose
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Select the setting of each variant by its trials on the development split. slurm/experiment.sh submits it, before the
# variants are trained with several seeds and evaluated on the test split. OUTPUT is the directory of the study.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
source slurm/env.sh
source slurm/lib.sh

[ -n "${OUTPUT:-}" ] || fail "OUTPUT is not set; set it to the directory of a study"
on_one_rank python -m pipeline.study choose --output "$OUTPUT" || finish $?
finish 0
