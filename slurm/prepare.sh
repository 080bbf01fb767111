#!/bin/bash
#SBATCH --job-name=solar-prepare
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
#
# Pack records into shards on the job's tasks, as MPI ranks. Submit from the root of the repository:
#
#   sbatch slurm/prepare.sh                                                  # generate and pack the demo data
#   INPUT="a.jsonl b.jsonl" TOKENIZER=Qwen/Qwen3-0.6B SHARDS=runs/mine/shards sbatch --ntasks=64 slurm/prepare.sh
#
# DERIVE (optional) packs what `python -m data_prep derive` makes of the records: shuffled_pairs or question_translation.
# Script arguments are passed to `python -m data_prep pack`. A restarted job resumes after the finished parts. If
# WEIGHTS=FILE and MODEL are set, IDF vocabulary weights for that model are written too, for loss.vocabulary_weights.
set -euo pipefail
[ -e slurm/lib.sh ] || { echo "error: no slurm/lib.sh in $PWD; submit from the root of the repository" >&2; exit 2; }
cpus_per_task=${SLURM_CPUS_PER_TASK:-1}
source slurm/env.sh
source slurm/lib.sh
tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}

if [ -z "${INPUT:-}" ]; then
  INPUT=runs/demo/train.jsonl TOKENIZER=runs/demo/tokenizer SHARDS=runs/demo/shards-records
  mkdir -p runs/demo
  test=runs/demo/train.test.jsonl
  [ -e "$test" ] || on_one_rank python -m data_prep demo --output "$INPUT" --test_output "$test" || finish $?
  [ -e "$TOKENIZER" ] ||
    on_one_rank python -m data_prep tokenizer --vocab_size 2048 --input "$INPUT" --output "$TOKENIZER" || finish $?
  set -- --max_seq_length 1024 "$@"
fi
read -rd '' -a inputs <<<"$INPUT" || true
for input in "${inputs[@]}"; do need "$input" "set INPUT to files of records"; done
[ -n "${TOKENIZER:-}" ] || fail "TOKENIZER is not set; set it to a tokenizer directory or Hub model ID"
[ -n "${SHARDS:-}" ] || fail "SHARDS is not set; set it to the directory to create"

if [ -n "${DERIVE:-}" ]; then
  mkdir -p "$(dirname "$SHARDS")"
  on_one_rank python -m data_prep derive "$DERIVE" --input "${inputs[@]}" --output "$SHARDS.jsonl" || finish $?
  inputs=("$SHARDS.jsonl")
fi
if ! srun --mpi=list 2>&1 | grep -qwe "$MPI_TYPE" -e "${MPI_TYPE%%_v[0-9]*}"; then
  echo "note: srun has no --mpi=$MPI_TYPE (MPI_TYPE in slurm/env.sh): packing on one rank" >&2
  MPI_TYPE=none tasks=1
fi
step --ntasks="$tasks" --cpus-per-task="$cpus_per_task" --mpi="$MPI_TYPE" python -m data_prep pack \
  --input "${inputs[@]}" --tokenizer "$TOKENIZER" --output "$SHARDS" "$@" || finish $?
if [ -n "${WEIGHTS:-}" ]; then
  [ -n "${MODEL:-}" ] || fail "WEIGHTS is set but MODEL is not; set MODEL to the model's directory or Hub model ID"
  on_one_rank python -m data_prep weights "$SHARDS" --model "$MODEL" --output "$WEIGHTS" || finish $?
fi
finish 0
