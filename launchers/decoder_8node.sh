#!/usr/bin/env bash
# Trains the decoder of a representation autoencoder on 8 nodes of 8 GPUs; each GPU encodes its own images.
#
#   sbatch launchers/decoder_8node.sh
#   CONFIG=configs/decoder/dinov2_b.yaml OVERRIDES='seed=1' sbatch launchers/decoder_8node.sh
#   sbatch --nodes=1 launchers/decoder_8node.sh
#
# Everything else is as in launchers/t2i_8node.sh and docs/slurm.md.

#SBATCH --job-name=decoder
#SBATCH --nodes=8
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
CONFIG=${CONFIG:-configs/decoder/siglip2_b_registers.yaml}
read -ra OVERRIDES <<< "${OVERRIDES:-}"
# external: encoder.mode=inline, or `sbatch launchers/encoders.sh` for encoder.mode=service. colocated: servers
# on the trainers' GPUs.
ENCODERS=${ENCODERS:-external}
REQUEUE=${REQUEUE:-1}
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

run_job
