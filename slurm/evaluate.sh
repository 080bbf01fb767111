#!/bin/bash
#SBATCH --job-name=solar-evaluate
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
#
# Export a run's newest checkpoint, generate and score on all ranks, write the report. Submit from the repository root:
#
#   sbatch slurm/evaluate.sh                                                 # the SOLAR run of the demo
#   RUN=runs/mine/solar DATA=test.jsonl sbatch --gpus-per-node=8 --cpus-per-gpu=8 slurm/evaluate.sh [--batch_size 32]
#
# Script arguments are passed to `pipeline.evaluation`. An export in RUN/hf is kept if it is of the newest checkpoint or
# was made for the best or a named one, and replaced if it is older. A restarted job resumes after the finished batches,
# with the export that they are of.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
source slurm/env.sh
source slurm/lib.sh
need_gpus

if [ -z "${RUN:-}" ]; then
  RUN=runs/demo/solar-seed42
  set -- --max_new_tokens 96 --batch_size 100 "$@"
fi
DATA=${DATA:-runs/demo/train.test.jsonl}
need "$RUN" "set RUN to the output_dir of a run"
need "$DATA" "set DATA to test records"

evaluation=(python -m pipeline.evaluation --model "$RUN/hf" --data "$DATA" --output "$RUN" "$@")
can_resume() { # whether an evaluation has begun with the present export: it keeps this export
  [ -e "$RUN/generations.partial" ] && on_one_rank "${evaluation[@]}" --can_resume | grep -x yes >/dev/null
}

# Without checkpoints RUN/hf is a model that this pipeline has not trained, such as the base of slurm/experiment.sh.
if [ ! -e "$RUN/hf" ] || { compgen -G "$RUN/checkpoint-*" >/dev/null && ! can_resume; }; then
  on_one_rank python -m pipeline.export --checkpoint "$RUN" --output "$RUN/hf" --update || finish $?
fi
# A run that is still training may have completed another checkpoint since.
on_all_ranks "${evaluation[@]}" --allow_stale true || finish $?
on_one_rank python -m pipeline.report --run "$RUN" || finish $?
finish 0
