#!/usr/bin/env bash
# Trains a text-to-image DiT on one node of 8 GPUs; encoder servers share the GPUs with the trainers.
#
#   sbatch launchers/t2i_1node.sh
#   CONFIG=… OVERRIDES='key=value …' ENCODERS=external sbatch launchers/t2i_1node.sh
#
# Everything else is as in launchers/t2i_8node.sh and docs/slurm.md.

#SBATCH --job-name=t2i-1node
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -uo pipefail
CONFIG=${CONFIG:-configs/t2i/query_adaln_0_5b.yaml}
read -ra OVERRIDES <<< "${OVERRIDES:-}"
# colocated: on the trainers' GPUs. external: `sbatch launchers/encoders.sh`, or encoder.mode=inline.
ENCODERS=${ENCODERS:-colocated}
REQUEUE=${REQUEUE:-1}
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

run_job
