#!/usr/bin/env bash
# Runs one rank of the trainers and outlives it: its output goes to the attempt's directory, and how it ended.
#
#   srun … launchers/rank.sh dsr-scale train CONFIG
#
# A rank that is killed cannot say so; this one can. Slurm signals every process of a step, so it has to
# hear signals without dying of them. The first rank's output goes to the job's log as well.
set -uo pipefail
trap : TERM INT USR1

rank=$(printf '%05d' "$SLURM_PROCID")
node=${SLURMD_NODENAME:-$(hostname)}
log=$DSR_JOB/rank_$rank.log
# TMPDIR may be a directory of the host that a container does not have.
DSR_FAILURE=$(mktemp 2> /dev/null || mktemp -p /tmp) || exit
export DSR_FAILURE

if [ "$SLURM_PROCID" = 0 ]; then
    "$@" 2>&1 | (trap '' TERM INT USR1; exec tee -a "$log")
    status=${PIPESTATUS[0]}
else
    "$@" >> "$log" 2>&1
    status=$?
fi

printf '%d %s %d %s\n' "$SLURM_PROCID" "$node" "$status" "$(date +%s.%N)" > "$DSR_JOB/rank_$rank.end"
if [ -s "$DSR_FAILURE" ]; then
    # Where the shared disk is full, the job's log is what is left.
    cp "$DSR_FAILURE" "$DSR_JOB/rank_$rank.failure.json" || cat "$DSR_FAILURE" >&2
fi
rm -f "$DSR_FAILURE"
exit "$status"
