#!/bin/bash
#SBATCH --job-name=solar-compare
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Compare evaluated runs: representations, differences with confidence intervals, one report. Submit from the repository
# root:
#
#   OUTPUT=runs/qwen RUNS="base sft solar" sbatch --gpus-per-node=1 slurm/compare.sh
#
# Every run is compared with the run named sft. ANSWERS (optional) names records with worked answers, on which the
# models' representations are measured. Results go into each OUTPUT/RUN and OUTPUT/report.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
source slurm/env.sh
source slurm/lib.sh

[ -n "${OUTPUT:-}" ] || fail "OUTPUT is not set; set it to the directory of the runs"
read -ra runs <<<"${RUNS:-base sft solar}"
for run in "${runs[@]}"; do need "$OUTPUT/$run/evaluation.json" "evaluate it first, with slurm/evaluate.sh"; done

for run in "${runs[@]}"; do
  if [ -n "${ANSWERS:-}" ]; then
    on_one_rank python -m pipeline.representations --model "$OUTPUT/$run/hf" --data "$ANSWERS" --output "$OUTPUT/$run" \
      "$@" || finish $?
  fi
  if [ "$run" != sft ] && [ -e "$OUTPUT/sft" ]; then
    on_one_rank python -m pipeline.compare --baseline "$OUTPUT/sft" --candidate "$OUTPUT/$run" \
      --output "$OUTPUT/$run" || finish $?
  fi
done
on_one_rank python -m pipeline.report --run "${runs[@]/#/$OUTPUT/}" --output "$OUTPUT/report" || finish $?
finish 0
