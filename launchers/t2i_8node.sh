#!/usr/bin/env bash
# Trains a text-to-image DiT on 8 nodes of 8 GPUs, fed by encoder servers on a node of their own.
#
#   cp launchers/site.env.example launchers/site.env      once; edit it, then `source launchers/site.env`
#   sbatch launchers/t2i_8node.sh
#   CONFIG=configs/t2i/query_adaln_0_5b.yaml OVERRIDES='seed=1 training.steps=20000' sbatch launchers/t2i_8node.sh
#
# The job requeues itself before the time limit, after preemption and after a failure, and goes on from
# its newest checkpoint; docs/slurm.md says how to watch it and what it does when something breaks.

# Trainers: one process per GPU.
#SBATCH --job-name=t2i
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

# Encoders: one server per GPU. `dsr-scale plan` says how many GPUs keep up with the trainers.
#SBATCH hetjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=24:00:00

set -uo pipefail
CONFIG=${CONFIG:-configs/t2i/query_adaln_2_4b.yaml}
read -ra OVERRIDES <<< "${OVERRIDES:-}"
# hetjob: the component above. colocated: on the trainers' GPUs. external: `sbatch launchers/encoders.sh`
# runs them; the job then gives the encoder node back.
ENCODERS=${ENCODERS:-hetjob}
REQUEUE=${REQUEUE:-1}
source "${SLURM_SUBMIT_DIR:-.}/launchers/common.sh"

if [ "$ENCODERS" != hetjob ]; then scancel "$SLURM_JOB_ID+1"; fi
run_job
