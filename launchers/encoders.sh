#!/usr/bin/env bash
# Encoder servers as a job of their own, for one or several training jobs with ENCODERS=external.
#
#   CONFIG=configs/t2i/query_adaln_2_4b.yaml OVERRIDES='encoder.registry=/shared/encoders' sbatch launchers/encoders.sh
#
# Trainers find them in the registry: of the run directory, or of encoder.registry, which both jobs must then
# be given. Servers that die are started again; the job may be cancelled at any time, trainers wait for the next.

#SBATCH --job-name=encoders
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -uo pipefail
CONFIG=${CONFIG:-configs/t2i/query_adaln_2_4b.yaml}
read -ra OVERRIDES <<< "${OVERRIDES:-}"
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

: "${ENCODER_LISTEN:=0.0.0.0:0}"
keep_encoders --nodes="$SLURM_JOB_NUM_NODES" &
ENCODER_LOOP=$!
trap 'stop_encoders; exit 0' TERM
trap 'stop_encoders; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'say "the encoders cannot start, see above"; exit 2' USR2
wait "$ENCODER_LOOP"
