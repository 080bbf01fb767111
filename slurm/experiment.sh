#!/bin/bash
# Does alignment help this model? Submit base, SFT and SOLAR on the same data and a comparison, and print the job ids.
# Run it on the login node, from the root of the repository:
#
#   MODEL=models/Qwen2.5-0.5B-Instruct RECIPE=pipeline/recipes/qwen2.5-0.5b.yaml INPUT=train.jsonl DATA=test.jsonl \
#     OUTPUT=runs/qwen slurm/experiment.sh
#
# MODEL is a Hugging Face directory. ANSWERS (optional) names records with worked answers that are not in INPUT, on
# which the models' representations are measured. ARMS selects variants: sft, solar, words. PREPARE_FLAGS, TRAIN_FLAGS,
# EVALUATE_FLAGS, COMPARE_FLAGS and the corresponding ..._ARGS apply to every variant, as in submit.sh. Running the
# script again reuses finished work.
set -euo pipefail
[ -e slurm/chain.sh ] ||
  { echo "error: no slurm/chain.sh in $PWD; run this from the root of the repository" >&2; exit 2; }
for name in MODEL RECIPE INPUT DATA OUTPUT; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; see the comment at the top of $0" >&2; exit 2; }
done
[ -e "$MODEL/config.json" ] || { echo "error: $MODEL: no model there; MODEL is a Hugging Face directory" >&2; exit 2; }
source slurm/chain.sh

# Recipe changes of each variant. The recipe's own loss has the form of the paper (solar). `words` is the variant that
# transferred knowledge in docs/results.md: only embeddings receive alignment gradients, tokens have IDF weights, and
# soft tokens mix the whole vocabulary.
export WEIGHTS=$OUTPUT/weights.safetensors SHARDS=$OUTPUT/shards TOKENIZER=${TOKENIZER:-$MODEL} MODEL INPUT DATA RECIPE
declare -A changes=(
  [sft]="--loss.alignment_weight 0"
  [solar]=""
  [words]="--loss.top_k null --loss.alignment_weight 10 --loss.detach [pivot,probabilities] \
    --loss.vocabulary_weights $WEIGHTS"
)
read -ra variants <<<"${ARMS:-sft solar words}"
for variant in "${variants[@]}"; do
  [ -n "${changes[$variant]+set}" ] ||
    { echo "error: ARMS: no variant $variant; choose from ${!changes[*]}" >&2; exit 2; }
done

mkdir -p "$OUTPUT/base"
ln -sfn "$(realpath "$MODEL")" "$OUTPUT/base/hf"
for variant in "${variants[@]}"; do mkdir -p "$OUTPUT/$variant"; done # evaluation requires it

submit prepare
prepared=${submitted[-1]}
RUN=$OUTPUT/base submit evaluate
evaluated=${submitted[-1]}
for variant in "${variants[@]}"; do
  common="--model.path $MODEL --data.shards $SHARDS --output_dir $OUTPUT/$variant"
  TRAIN_ARGS="$common ${changes[$variant]} ${TRAIN_ARGS:-}" submit_after "$prepared" train --job-name="train-$variant"
  RUN=$OUTPUT/$variant submit_after "${submitted[-1]}" evaluate --job-name="evaluate-$variant"
  evaluated+=":${submitted[-1]}"
done
RUNS="base ${variants[*]}" submit_after "$evaluated" compare
