#!/bin/bash
# Does alignment help this model? Submit base and variants of one recipe, with several seeds each, and a comparison.
# Print the job ids. Run it on the login node, from the root of the repository:
#
#   MODEL=models/Qwen2.5-0.5B-Instruct RECIPE=pipeline/recipes/qwen2.5-0.5b.yaml INPUT=train.jsonl DATA=test.jsonl \
#     OUTPUT=runs/qwen SEEDS="1 2 3" slurm/experiment.sh
#
# MODEL is a Hugging Face directory. DEV (optional) names records of a development split, on which each variant gets the
# same number of trials for its settings; the test split DATA is evaluated once for each run. ANSWERS (optional) names
# records with worked answers that are not in INPUT, on which the models' representations are measured. ARMS selects
# variants (default: all of pipeline/study/variants.yaml, which also has the trials), PRIMARY the languages whose mean
# decides (default: all). PREPARE_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS, CHOOSE_FLAGS, COMPARE_FLAGS and the corresponding
# ..._ARGS of the first three apply to every variant, as in submit.sh. Running the script again submits the jobs that
# have not succeeded, and those of added variants and seeds.
set -euo pipefail
[ -e slurm/chain.sh ] ||
  { echo "error: no slurm/chain.sh in $PWD; run this from the root of the repository" >&2; exit 2; }
for name in MODEL RECIPE INPUT DATA OUTPUT; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; see the comment at the top of $0" >&2; exit 2; }
done
source slurm/env.sh
source slurm/chain.sh

options=() # of python -m pipeline.study
add_option() { # NAME VALUE...: unless there is no value
  if [ $# -gt 1 ]; then options+=("--$1" "${@:2}"); fi
}
read -rd '' -a inputs <<<"$INPUT" || true
read -rd '' -a variants <<<"${ARMS:-}" || true
read -rd '' -a seeds <<<"${SEEDS:-1 2 3}" || true
read -rd '' -a primary <<<"${PRIMARY:-}" || true
add_option train "${inputs[@]}"
add_option variants "${variants[@]}"
add_option seeds "${seeds[@]}"
add_option primary "${primary[@]}"
for name in DEV ANSWERS; do
  if [ -n "${!name:-}" ]; then add_option "${name,,}" "${!name}"; fi
done
for name in PREPARE_ARGS TRAIN_ARGS EVALUATE_ARGS; do options+=("--${name,,}=${!name:-}"); done

# The jobs that remain, one call of the function below each.
jobs=$(python -m pipeline.study jobs --model "$MODEL" --recipe "$RECIPE" --test "$DATA" --output "$OUTPUT" "${options[@]}")

if [ -z "$jobs" ]; then echo "note: all jobs have succeeded; the results are in $OUTPUT/results.md" >&2; fi

# The jobs inherit the environment. Each gets its own value of these, or none.
unset RUN SHARDS TOKENIZER DERIVE WEIGHTS CHOICE
declare -A ids
job() { # KIND NAME AFTER VARIABLE=VALUE...: submits slurm/KIND.sh, which starts when the jobs AFTER have succeeded
  local kind=$1 name=$2 after=$3 dependencies="" earlier
  local -x "${@:4}"
  for earlier in $after; do dependencies+=":${ids[$earlier]}"; done
  if [ -n "$dependencies" ]; then
    submit_after "${dependencies#:}" "$kind" --job-name="$name" || return
  else
    submit "$kind" --job-name="$name" || return
  fi
  ids[$name]=${submitted[-1]}
}
eval "$jobs"
