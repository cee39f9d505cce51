#!/usr/bin/env bash
# Draws a file of prompts from a bundle on one GPU, with fixed seeds: one picture to judge a run by.
#
#   BUNDLE=runs/query_adaln_2_4b/bundle PROMPTS=prompts.txt sbatch launchers/evaluate.sh
#   BUNDLE=… PROMPTS=… OPTIONS='--guidance 4 --steps 50 --seed 1' sbatch launchers/evaluate.sh
#
# PROMPTS holds one caption per line.

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
: "${PROMPTS:?set PROMPTS to a file with one caption per line}"
read -ra OPTIONS <<< "${OPTIONS:-}"
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

here dsr-scale sample "$BUNDLE" --prompts-file "$PROMPTS" --out "${OUT:-$BUNDLE/samples.png}" "${OPTIONS[@]}"
