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

submitted=()
trap '[ ${#submitted[@]} = 0 ] || { scancel "${submitted[@]}"; echo "cancelled ${submitted[*]}" >&2; }' ERR

submit() { # NAME [SBATCH FLAG...]
  local name=$1 flags arguments id
  shift
  local flags_of=${name^^}_FLAGS arguments_of=${name^^}_ARGS
  read -ra flags <<<"${!flags_of:-}"
  read -ra arguments <<<"${!arguments_of:-}"
  id=$(sbatch --parsable "$@" "${flags[@]}" "slurm/$name.sh" "${arguments[@]}") || return
  submitted+=("${id%%;*}") # of a federation it says id;cluster
  echo "$name ${submitted[-1]}"
}

submit prepare
submit train --dependency="afterok:${submitted[-1]}" --kill-on-invalid-dep=yes
submit evaluate --dependency="afterok:${submitted[-1]}" --kill-on-invalid-dep=yes
