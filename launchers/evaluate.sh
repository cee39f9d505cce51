#!/usr/bin/env bash
# Judges a bundle on one GPU: PROMPTS draws a file of prompts, with fixed seeds, to one picture; METRICS
# computes numbers (docs/evaluation.md).
#
#   BUNDLE=runs/query_adaln_2_4b/bundle PROMPTS=prompts.txt sbatch launchers/evaluate.sh
#   BUNDLE=… PROMPTS=… OPTIONS='--guidance 4 --steps 50 --seed 1' sbatch launchers/evaluate.sh
#   BUNDLE=… METRICS=fid,clip_score OPTIONS='--prompts-file captions.txt --samples 30000 --reference real/' \
#       sbatch --time=08:00:00 launchers/evaluate.sh
#   BUNDLE=… METRICS=geneval OPTIONS='--geneval evaluation_metadata.jsonl' sbatch launchers/evaluate.sh
#
# PROMPTS holds one caption per line; METRICS are names separated by commas. OPTIONS are those of dsr-scale
# sample, or evaluate; OUT is the picture, or the directory of evaluation.json.

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -uo pipefail
: "${BUNDLE:?set BUNDLE to what dsr-scale export wrote}"
case ${PROMPTS:+prompts}${METRICS:+metrics} in
    prompts) JUDGE=(sample "$BUNDLE" --prompts-file "$PROMPTS" --out "${OUT:-$BUNDLE/samples.png}") ;;
    metrics) JUDGE=(evaluate "$BUNDLE" --metrics "$METRICS" --out "${OUT:-$BUNDLE/evaluation}") ;;
    *) echo "set either PROMPTS to a file with one caption per line, or METRICS to names of metrics" >&2; exit 2 ;;
esac
read -ra OPTIONS <<< "${OPTIONS:-}"
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

here dsr-scale "${JUDGE[@]}" "${OPTIONS[@]}"
