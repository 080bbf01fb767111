#!/bin/bash
# Does alignment help this model? Submit base, SFT and SOLAR on the same data, and their comparison; prints the job ids.
# Run on the login node, in the root of the repository:
#
#   MODEL=models/Qwen2.5-0.5B-Instruct RECIPE=pipeline/recipes/qwen2.5-0.5b.yaml INPUT=train.jsonl DATA=test.jsonl \
#     OUTPUT=runs/qwen slurm/experiment.sh
#
# MODEL is a Hugging Face directory. ANSWERS, if given, are records with worked answers, none of INPUT: on them the
# models' representations are measured. ARMS: some of sft, solar, words. The flags of submit.sh hold for every arm:
# PREPARE_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS, COMPARE_FLAGS, and the same with ARGS. Restarted, finished work is taken.
set -euo pipefail
[ -e slurm/chain.sh ] || { echo "error: no slurm/chain.sh in $PWD; run this in the root of the repository" >&2; exit 2; }
for name in MODEL RECIPE INPUT DATA OUTPUT; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; see the head of $0" >&2; exit 2; }
done
[ -e "$MODEL/config.json" ] || { echo "error: $MODEL: no model there; MODEL is a Hugging Face directory" >&2; exit 2; }
source slurm/chain.sh

# What each arm changes in the recipe, whose own loss is the method's literal reading. `words` is what moved knowledge in
# docs/results.md: only embeddings follow, and tokens count by how telling they are.
export WEIGHTS=$OUTPUT/weights.safetensors SHARDS=$OUTPUT/shards TOKENIZER=${TOKENIZER:-$MODEL} MODEL INPUT DATA RECIPE
declare -A changes=(
  [sft]="--loss.alignment_weight 0"
  [solar]=""
  [words]="--loss.alignment_weight 10 --loss.detach [pivot,probabilities] --loss.vocabulary_weights $WEIGHTS"
)
read -ra arms <<<"${ARMS:-sft solar words}"
for arm in "${arms[@]}"; do
  [ -n "${changes[$arm]+set}" ] || { echo "error: ARMS: no arm $arm; there are ${!changes[*]}" >&2; exit 2; }
done

mkdir -p "$OUTPUT/base"
ln -sfn "$(realpath "$MODEL")" "$OUTPUT/base/hf"
for arm in "${arms[@]}"; do mkdir -p "$OUTPUT/$arm"; done # evaluation wants the folder of its run

submit prepare
prepared=${submitted[-1]}
RUN=$OUTPUT/base submit evaluate
evaluated=${submitted[-1]}
for arm in "${arms[@]}"; do
  common="--model.path $MODEL --data.shards $SHARDS --output_dir $OUTPUT/$arm"
  TRAIN_ARGS="$common ${changes[$arm]} ${TRAIN_ARGS:-}" submit_after "$prepared" train --job-name="train-$arm"
  RUN=$OUTPUT/$arm submit_after "${submitted[-1]}" evaluate --job-name="evaluate-$arm"
  evaluated+=":${submitted[-1]}"
done
RUNS="base ${arms[*]}" submit_after "$evaluated" compare
