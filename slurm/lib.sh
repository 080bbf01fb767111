# shellcheck shell=bash
# Shared by the job scripts: start ranks, and end or requeue the job by their exit status. Sourced after env.sh.

fail() { # user error: status 2, never requeued
  echo "error: $*" >&2
  exit 2
}

need_gpus() { # refuse to run a model on the CPUs of a node with GPUs, which is hardly ever meant
  if [ -z "${SLURM_GPUS_ON_NODE:-}$asked_for_cpus" ] && compgen -G "${GPU_DEVICES:-/dev/nvidia[0-9]*}" >/dev/null; then
    fail "the node has GPUs, but the job has none; submit with --gpus-per-node, or set DS_ACCELERATOR=cpu to use CPUs"
  fi
}

need() { # PATH HINT
  [ -e "$1" ] || fail "$1: no such file; $2"
}

# sbatch passes on the SLURM_* variables of its shell. If that shell is in another job, as after salloc, those that Slurm
# does not set for this job are of the other one.
drop_variables_of_other_job() {
  local facts
  facts=$(scontrol -d -o show job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID ") || return 0
  [[ $facts == *" ArrayTaskId="* ]] || unset "${!SLURM_ARRAY_@}"
  [[ $facts != *" JOB_GRES=(null) "* ]] || unset "${!SLURM_GPUS@}"
  [[ $facts != *" NtasksPerN:B:S:C=0:"* ]] || unset SLURM_NTASKS_PER_NODE
  [[ $facts != *" NumTasks="* || $facts == *" NumTasks=${SLURM_NTASKS:-} "* ]] || unset SLURM_NTASKS
}
drop_variables_of_other_job

# One rank per GPU, or per task (--ntasks-per-node) on nodes without GPUs.
ranks_per_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
# Nodes can have different numbers of CPUs, as in 6,2(x3): every rank gets as many as on the node with the fewest.
# shellcheck disable=SC2153  # Slurm sets it
cpus_of_node=$SLURM_CPUS_ON_NODE
while read -rd , count; do
  if [ "${count%(*}" -lt "$cpus_of_node" ]; then cpus_of_node=${count%(*}; fi
done <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE},"
cpus_per_rank=$((cpus_of_node / ranks_per_node)) overcommit=()
if [ "$cpus_per_rank" -lt 1 ]; then
  echo "note: $ranks_per_node ranks share $cpus_of_node CPU(s) of a node; request more, e.g. --cpus-per-gpu=8" >&2
  cpus_per_rank=1 overcommit=(--overcommit)
fi
asked_for_cpus=${DS_ACCELERATOR:-}
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then export DS_ACCELERATOR=cpu; fi
# Compiled kernels belong on a local disk: in a shared home directory, all ranks would lock and write the same files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_rank} PYTHONUNBUFFERED=1
export TQDM_MININTERVAL=30 # seconds between progress lines in the job's log

# Rendezvous on the first node, at a port below the ephemeral range that differs between jobs on one node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${MASTER_ADDR%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

# srun takes its options from these variables of the job. The steps below set their number of tasks explicitly, use all
# GPUs and the memory of their nodes, and need the environment; each rank selects its GPU among those that it sees. Of a
# total (--gpus), which the job keeps, a step on one node would ask for all.
one_node=(--nodes=1 --ntasks=1 --mpi=none ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"})
unset SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_TRES SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU \
  SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_EXPORT_ENV SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU \
  SLURM_MEM_PER_NODE

step() { # srun with the common flags: a rank that exits first after saving must not get the others killed
  srun --kill-on-bad-exit=0 --wait=60 "${SRUN_ARGS[@]}" "$@"
}

on_all_ranks() { # COMMAND: one task per rank, so that signals and exit statuses pass through no launcher
  step --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks_per_node)) \
    --ntasks-per-node="$ranks_per_node" --cpus-per-task="$cpus_per_rank" --mpi=none --label "${overcommit[@]}" "$@"
}

on_one_rank() { # COMMAND
  step "${one_node[@]}" --cpus-per-task="$SLURM_CPUS_ON_NODE" "$@"
}

# Number of failures in a row, over the restarts of this job. The trainer removes the file when it records its start: from
# then on, it detects a crash loop itself.
export FAILED_STARTS_FILE=$PWD/slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID.failures

# A rank with a user error creates this file. The others may be waiting to connect to it until srun kills them, and
# srun's status would be 137.
export USER_ERROR_FILE=$PWD/slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID.user_error
rm -f "$USER_ERROR_FILE"

try_scontrol() { # ARGUMENTS: repeat for a minute, since a busy controller or one that restarts does not answer
  local attempt
  for attempt in 1 2 3 4 5 6; do
    [ "$attempt" = 1 ] || sleep "${SCONTROL_RETRY_SECONDS:-10}"
    if scontrol "$@"; then return 0; fi
  done
  return 1
}

finish() { # STATUS: 0, 2 and 77 end the job, 75 requeues it, and any other status requeues it three times in a row
  local failures=0
  case $1 in
  0 | 75 | 77) ;;
  *) if [ -e "$USER_ERROR_FILE" ]; then set -- 2; fi ;;
  esac
  rm -f "$USER_ERROR_FILE"
  case $1 in
  0 | 2 | 75 | 77) rm -f "$FAILED_STARTS_FILE" ;;
  *)
    failures=$(($(cat "$FAILED_STARTS_FILE" 2>/dev/null || echo 0) + 1))
    echo "$failures" >"$FAILED_STARTS_FILE" || failures=4
    ;;
  esac
  case $1 in 0 | 2 | 77) exit "$1" ;; esac
  # Requeue a task of an array by its own name: the job id of the last task also names the whole array.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  local message="job $job ended with status $1" facts state
  facts=$(try_scontrol -o show job "$job") || facts=" JobState=RUNNING " # the controller does not answer: try to requeue
  state=$(sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p' <<<"$facts")
  if [ "$state" != RUNNING ]; then
    echo "$message and is $state: not requeued" >&2
  elif [[ $facts == *" Requeue=0 "* ]]; then
    echo "$message and cannot be requeued (submitted with --no-requeue?)" >&2
  elif [ "$failures" -gt 3 ]; then
    rm -f "$FAILED_STARTS_FILE"
    echo "$message, restarted 3 times after failures: not requeued; fix the cause shown above and submit it again" >&2
  else
    echo "$message: requeue" >&2 # before the command, which ends this script
    try_scontrol requeue "$job" || echo "job $job could not be requeued; submit it again" >&2
  fi
  exit "$1"
}

need_packages() { # checks the environment of the ranks, which may be a container (SRUN_ARGS)
  local check status=0 run=()
  check='import importlib.util as util, sys; names = "torch", "deepspeed", "transformers", "pyarrow"
sys.exit(3 if any(util.find_spec(name) is None for name in names) else 0)'
  [ ${#SRUN_ARGS[@]} = 0 ] || run=(step "${one_node[@]}")
  "${run[@]}" python -c "$check" || status=$?
  case $status in
  3 | 127) fail "python has no torch, deepspeed, transformers or pyarrow; run: make install, or load your environment in slurm/env.sh" ;;
  esac
}
need_packages
