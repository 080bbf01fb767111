# shellcheck shell=bash
# How jobs that follow one another are submitted from the login node. Sourced by submit.sh and experiment.sh.

submitted=()
trap '[ ${#submitted[@]} = 0 ] || { scancel "${submitted[@]}"; echo "cancelled ${submitted[*]}" >&2; }' ERR

submit() { # NAME [SBATCH FLAG...]: with NAME_FLAGS for sbatch and NAME_ARGS for the script; prints NAME and job id
  local name=$1 flags arguments id
  shift
  local flags_of=${name^^}_FLAGS arguments_of=${name^^}_ARGS
  read -ra flags <<<"${!flags_of:-}"
  read -ra arguments <<<"${!arguments_of:-}"
  id=$(sbatch --parsable "$@" "${flags[@]}" "slurm/$name.sh" "${arguments[@]}") || return
  submitted+=("${id%%;*}") # of a federation it says id;cluster
  echo "$name ${submitted[-1]}"
}

submit_after() { # IDS NAME [SBATCH FLAG...]: to start when all of IDS (joined by colons) have succeeded
  local ids=$1
  shift
  submit "$@" --dependency="afterok:$ids" --kill-on-invalid-dep=yes || return
}
