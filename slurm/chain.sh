# shellcheck shell=bash
# Submit dependent jobs from the login node; if one sbatch fails, cancel the jobs submitted before it.
# Sourced by submit.sh and experiment.sh.

submitted=()
trap '[ ${#submitted[@]} = 0 ] || { scancel "${submitted[@]}"; echo "cancelled ${submitted[*]}" >&2; }' ERR

submit() { # NAME [SBATCH FLAG...]: passes NAME_FLAGS to sbatch and NAME_ARGS to the script; prints NAME and job id
  local name=$1 flags arguments id
  shift
  local flags_of=${name^^}_FLAGS arguments_of=${name^^}_ARGS
  read -rd '' -a flags <<<"${!flags_of:-}" || true
  read -rd '' -a arguments <<<"${!arguments_of:-}" || true
  # SBATCH_EXPORT may keep RECIPE, INPUT and the like from the job, which would then run the demo.
  id=$(sbatch --parsable --export=ALL "$@" "${flags[@]}" "slurm/$name.sh" "${arguments[@]}") || return
  submitted+=("${id%%;*}") # in a federation, sbatch prints id;cluster
  echo "$name ${submitted[-1]}"
}

submit_after() { # IDS NAME [SBATCH FLAG...]: starts when all of IDS (colon-separated) have succeeded
  local ids=$1
  shift
  submit "$@" --dependency="afterok:$ids" --kill-on-invalid-dep=yes || return
}
