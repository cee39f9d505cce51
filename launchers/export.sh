#!/usr/bin/env bash
# Exports a run's newest checkpoint, of any number of ranks, to a bundle for one device. Needs no GPU.
#
#   RUN=runs/query_adaln_2_4b sbatch launchers/export.sh
#   RUN=… BUNDLE=… OPTIONS='--step 30000 --weights ema --dtype bf16' sbatch launchers/export.sh

#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -uo pipefail
: "${RUN:?set RUN to a run directory: RUN=runs/NAME sbatch launchers/export.sh}"
read -ra OPTIONS <<< "${OPTIONS:-}"
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

here dsr-scale export "$RUN" "${BUNDLE:-$RUN/bundle}" "${OPTIONS[@]}"
