#!/bin/bash
#SBATCH --job-name=solar-compare
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Compare the evaluated variants of a study over all seeds: representations, differences with confidence intervals, one
# table and one report. slurm/experiment.sh submits it; to repeat it, submit it from the root of the repository:
#
#   OUTPUT=runs/qwen sbatch --gpus-per-node=1 slurm/compare.sh
#
# ANSWERS (optional) names records with worked answers, on which the models' representations are measured. Results go
# into OUTPUT/results.md, OUTPUT/VARIANT/comparison.md and OUTPUT/report.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
source slurm/env.sh
source slurm/lib.sh

[ -n "${OUTPUT:-}" ] || fail "OUTPUT is not set; set it to the directory of a study"
need "$OUTPUT/study.json" "slurm/experiment.sh begins a study"

if [ -n "${ANSWERS:-}" ]; then
  need_gpus
  for run in "$OUTPUT"/base "$OUTPUT"/*-seed*; do
    [ ! -e "$run/representations.json" ] || continue
    on_one_rank python -m pipeline.representations --model "$run/hf" --data "$ANSWERS" --output "$run" "$@" || finish $?
  done
fi
on_one_rank python -m pipeline.study compare --output "$OUTPUT" || finish $?
finish 0
