#!/bin/bash
# Submit preparation, training and evaluation, each dependent on the success of the previous job; prints the job ids.
#
#   slurm/submit.sh                                                          # the demo
#   RECIPE=… INPUT=… TOKENIZER=… SHARDS=… RUN=… DATA=… TRAIN_FLAGS="--nodes=4 --gpus-per-node=8" slurm/submit.sh
#
# The variables are those of prepare.sh, train.sh and evaluate.sh. PREPARE_FLAGS are passed to sbatch and PREPARE_ARGS
# to the program, split at spaces; likewise TRAIN_FLAGS, TRAIN_ARGS, EVALUATE_FLAGS and EVALUATE_ARGS.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; run this from the root of the repository" >&2; exit 2; }

source slurm/chain.sh

submit prepare
submit_after "${submitted[-1]}" train
submit_after "${submitted[-1]}" evaluate
