#!/bin/bash
# Submit preparation, training and evaluation, each to start when the one before has succeeded; prints their job ids.
#
#   slurm/submit.sh                                                          # the demo
#   RECIPE=… INPUT=… TOKENIZER=… SHARDS=… RUN=… DATA=… TRAIN_FLAGS="--nodes=4 --gpus-per-node=8" slurm/submit.sh
#
# The variables are those of prepare.sh, train.sh and evaluate.sh. For each there are also PREPARE_FLAGS for sbatch and
# PREPARE_ARGS for the program, likewise TRAIN_… and EVALUATE_…: words, split at spaces.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; run this in the root of the repository" >&2; exit 2; }

source slurm/chain.sh

submit prepare
submit_after "${submitted[-1]}" train
submit_after "${submitted[-1]}" evaluate
