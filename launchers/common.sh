# shellcheck shell=bash
# What the launchers share; sourced by each, run by none. Decisions (requeue, exclude, shrink, stop) are
# made by `dsr-scale job`, from files; this file carries facts to it and does what it says.
#
# Set by the launcher: CONFIG, OVERRIDES (array). Set by the site: launchers/site.env.

cd "${SLURM_SUBMIT_DIR:-.}" || exit
# shellcheck source=/dev/null
if [ -f "${SITE:=launchers/site.env}" ]; then source "$SITE"; fi
# shellcheck source=/dev/null
if [ -n "${ACTIVATE:-}" ] && [ "${CONTAINER:-none}" = none ]; then source "$ACTIVATE"; fi

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

# --- containers: the same command with and without -------------------------------------------------
INSIDE=()        # put before a command
SRUN_INSIDE=()   # options of srun
case ${CONTAINER:-none} in
    none) ;;
    apptainer) INSIDE=(apptainer exec --nv --bind "$PWD${TMPDIR:+,$TMPDIR}${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER_IMAGE") ;;
    pyxis) SRUN_INSIDE=(--container-image="$CONTAINER_IMAGE" --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --container-workdir="$PWD") ;;
    *) say "found: CONTAINER=$CONTAINER; required: none, pyxis or apptainer; what to do: correct $SITE"; exit 2 ;;
esac

# A command on the node of the batch script, inside the container.
here() {
    if [ ${#SRUN_INSIDE[@]} -gt 0 ]; then
        # By its name the image is unpacked once.
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${SRUN_INSIDE[@]}" \
            --container-name="dsr-$SLURM_JOB_ID" "$@"
    else
        "${INSIDE[@]}" "$@"
    fi
}

# --- what Slurm knows ------------------------------------------------------------------------------
TASKS_PER_NODE=${SLURM_TASKS_PER_NODE%%(*}
# srun does not take --cpus-per-task over from sbatch; a heterogeneous job has one for each part.
CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}}
ENCODER_CPUS=${SLURM_CPUS_PER_TASK_HET_GROUP_1:-$CPUS_PER_TASK}
TRAINER_JOB=${SLURM_JOB_ID_HET_GROUP_0:-$SLURM_JOB_ID}
HET=()           # options that choose the trainers' part of a heterogeneous job
[ -n "${SLURM_HET_SIZE:-}" ] && HET=(--het-group=0)
GRACE_S=$(sed -n 's/^#SBATCH --signal=B:USR1@//p' "$0" | head -n 1)

of_job() {
    local record=''
    # A controller that restarts does not answer for a while; nothing may be concluded from that.
    for _ in 1 2 3 4 5 6; do
        record=$(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null) && break
        sleep 5
    done
    grep -E "^JobId=$TRAINER_JOB " <<< "$record" | grep -oE " $1=[^ ]*" | head -n 1 | cut -d= -f2
}
hosts() { scontrol show hostnames "$1" | paste -sd, -; }
# Nodes of the trainers that Slurm has not taken away; they are fewer than at the start once one is lost.
trainer_nodes() { hosts "$(of_job NodeList)"; }
count() { awk -F, '{ print NF }' <<< "$1"; }
# Names of nodes need not resolve; the addresses that Slurm itself uses are always right.
address_of() { scontrol show node -o "$1" | grep -oE ' NodeAddr=[^ ]*' | cut -d= -f2; }
missing_from() { comm -23 <(tr ',' '\n' <<< "$1" | sort) <(tr ',' '\n' <<< "$2" | sort) | paste -sd, -; }

if [ -n "${NETWORK_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
# Without it a library with threads of its own takes all cores of the node, in every rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS_PER_TASK}

# --- signals: asked to stop ------------------------------------------------------------------------
STOPPED=none     # time_limit, preempted, cancelled, or encoders: they cannot start
STEP=            # process of the srun that is running
stop_asked() {
    STOPPED=$1
    say "asked to stop: $1"
    # srun hands this signal to its tasks; TERM it would turn into a kill. Cancelling tells the tasks itself.
    if [ -n "$STEP" ] && [ "$1" != cancelled ]; then kill -USR1 "$STEP" 2> /dev/null || true; fi
}
# Slurm's state says whether a job was cancelled; a preempted one is running until its grace is over.
on_term() {
    if [ -n "${DSR_JOB:-}" ] && [ "$(of_job Reason)" = TimeLimit ]; then
        say "the time limit came before the save was done: raise the seconds of --signal"
        STOPPED=time_limit
        conclude 143
        follow
    fi
    case $(of_job JobState) in
        RUNNING | '') stop_asked preempted ;;
        *) stop_asked cancelled ;;
    esac
}
trap 'stop_asked time_limit' USR1
trap on_term TERM
trap 'stop_asked encoders' USR2

# Runs a command that a trap may interrupt; its status.
interruptible() {
    "$@" &
    STEP=$!
    local status
    while :; do
        wait "$STEP"
        status=$?
        kill -0 "$STEP" 2> /dev/null || break
    done
    STEP=
    return "$status"
}

# --- encoders --------------------------------------------------------------------------------------
# Starts servers again for as long as they die; status 0 means that they were told to end, 2 that a
# person has to put something right.
keep_encoders() {
    local status began wait_s=1
    while :; do
        began=$SECONDS
        status=0
        srun --job-name=encoders --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="$ENCODER_CPUS" "${SRUN_INSIDE[@]}" "$@" "${INSIDE[@]}" \
            dsr-scale serve "$CONFIG" "${OVERRIDES[@]}" encoder.server.listen="$ENCODER_LISTEN" || status=$?
        [ "$status" = 0 ] && return
        if [ "$status" = 2 ]; then
            # Trainers would wait for encoder.give_up_after_s, and then do it all again.
            kill -USR2 $$
            return
        fi
        # One that lived ten minutes begins anew.
        if ((SECONDS - began > 600)); then wait_s=1; fi
        say "encoders ended with status $status; started again in $wait_s s, trainers wait"
        sleep "$wait_s"
        if ((wait_s < 60)); then wait_s=$((wait_s * 2)); fi
    done
}
start_encoders() {
    : "${ENCODER_LISTEN:=0.0.0.0:0}"
    case $ENCODERS in
        hetjob) keep_encoders --het-group=1 & ;;
        colocated) keep_encoders "${HET[@]}" --overlap --nodes="$(count "$(trainer_nodes)")" & ;;
        external) return ;;
        *) say "found: ENCODERS=$ENCODERS; required: hetjob, colocated or external"; exit 2 ;;
    esac
    ENCODER_LOOP=$!
}
stop_encoders() {
    [ -n "${ENCODER_LOOP:-}" ] || return 0
    kill "$ENCODER_LOOP" 2> /dev/null || true
    local step
    for step in $(squeue --noheader --steps --job="$SLURM_JOB_ID" --format='%i %j' | awk '$2 == "encoders" { print $1 }'); do
        scancel --signal=TERM "$step"
    done
    # They let requests end, leave the registry, and are killed with the job if that takes too long.
    local deadline=$((SECONDS + 25))
    while ((SECONDS < deadline)) && squeue --noheader --steps --job="$SLURM_JOB_ID" --format=%j | grep -qx encoders; do sleep 0.5; done
}

# --- trainers --------------------------------------------------------------------------------------
# Both functions take the place of the shell that runs them, so that a signal to it reaches srun.
srun_log() { (trap '' TERM INT; exec tee -a "$DSR_JOB/srun.log" >&2); }
trainers() {
    exec srun "${HET[@]}" --job-name=trainers --nodes="$NODES" --ntasks="$((NODES * TASKS_PER_NODE))" --ntasks-per-node="$TASKS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 "${SRUN_INSIDE[@]}" \
        launchers/rank.sh "${INSIDE[@]}" dsr-scale train "$CONFIG" "${OVERRIDES[@]}" 2> >(srun_log)
}
preflight() {
    local shared=()
    if [ "$ENCODERS" = colocated ]; then shared=(--colocated); fi
    exec srun "${HET[@]}" --job-name=preflight --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
        --cpus-per-task="$((CPUS_PER_TASK * TASKS_PER_NODE))" --kill-on-bad-exit=0 "${SRUN_INSIDE[@]}" "${INSIDE[@]}" \
        dsr-scale preflight "$CONFIG" "${OVERRIDES[@]}" --gpus-per-node "${GPUS_PER_NODE:-$TASKS_PER_NODE}" "${shared[@]}" \
        ${REQUIRE_ENCODERS:+--require-encoders} 2> >(srun_log)
}

# How many of the nodes that are there to use.
choose_nodes() {
    NODES=$(here dsr-scale job nodes "$CONFIG" "${OVERRIDES[@]}" --available "$(count "$(trainer_nodes)")" \
        --gpus-per-node "$TASKS_PER_NODE" --encoders "$ENCODERS")
}

# One attempt on the nodes that are there: record, preflight, training, verdict.
attempt() {
    local status=0
    ATTEMPT_NODES=$(trainer_nodes)
    choose_nodes || exit
    DSR_JOB=$(here dsr-scale job begin "$CONFIG" "${OVERRIDES[@]}" --job-id "$SLURM_JOB_ID" --nodes "$ATTEMPT_NODES" \
        --grace-s "${GRACE_S:-0}") || exit
    export DSR_JOB
    # A container does not see the copy that Slurm runs.
    cp "$0" "$DSR_JOB/record/launcher.sh"
    DSR_NODE_ADDRESSES=$(for node in ${ATTEMPT_NODES//,/ }; do printf '%s=%s ' "$node" "$(address_of "$node")"; done)
    MASTER_ADDR=$(address_of "${ATTEMPT_NODES%%,*}")
    export DSR_NODE_ADDRESSES MASTER_ADDR
    say "attempt in $DSR_JOB: $NODES nodes of $ATTEMPT_NODES"
    interruptible preflight || status=$?
    if [ "$STOPPED" != none ]; then
        status=138
    elif [ "$status" = 0 ]; then
        interruptible trainers || status=$?
    fi
    conclude "$status"
}

# Why the attempt ended, with status $1, and what follows: sets ACTION, REASON and STATUS.
conclude() {
    local left lost='' bad=''
    STATUS=$1
    left=$(trainer_nodes)
    if [ -n "$left" ]; then lost=$(missing_from "$ATTEMPT_NODES" "$left"); else left=$ATTEMPT_NODES; fi
    if [ -f "$DSR_JOB/preflight/bad_nodes" ]; then bad=$(paste -sd, "$DSR_JOB/preflight/bad_nodes"); fi
    ACTION=stop REASON="dsr-scale job end gave no answer, see $DSR_JOB"
    eval "$(here dsr-scale job end "$CONFIG" "${OVERRIDES[@]}" --attempt "$DSR_JOB" --status "$STATUS" --stopped "$STOPPED" \
        --lost-nodes "$lost" --bad-nodes "$bad" --remaining "$(count "$left")" --gpus-per-node "$TASKS_PER_NODE" \
        --srun-log "$DSR_JOB/srun.log")"
}

# Ends the job as ACTION says.
follow() {
    case $ACTION in
        finished) say "finished"; exit 0 ;;
        requeue)
            if [ "${REQUEUE:-1}" = 1 ]; then
                say "requeued: $REASON"
                requeue
            else
                say "not requeued because of REQUEUE=$REQUEUE; submit again to go on: $REASON"
            fi ;;
        *) say "stopped: $REASON" ;;
    esac
    exit "$((STATUS ? STATUS : 1))"
}

# Nodes that earlier attempts of this job excluded.
excluded() { here dsr-scale job excluded "$CONFIG" "${OVERRIDES[@]}" --job-id "$SLURM_JOB_ID"; }

# Back into the queue, without the excluded nodes. The list can be changed only once the job is pending, and
# Slurm ends this script as soon as it is: what is left is done while being ended.
requeue() {
    trap '' TERM
    local job nodes before
    nodes=$(excluded)
    before=$(of_job ExcNodeList | sed 's/(null)//')
    for _ in 1 2 3 4 5 6; do
        scontrol requeue "$SLURM_JOB_ID" && break
        sleep 5
    done
    if [ -n "$nodes" ]; then
        for job in "$TRAINER_JOB" ${SLURM_JOB_ID_HET_GROUP_1:-}; do
            scontrol update JobId="$job" ExcNodeList="${before:+$before,}$nodes"
        done
    fi
}
# Slurm 22.05 refuses or ignores the list of a job that has just lost a node. That node is down; where it came
# back and was given to the job again, the list is taken now.
leave_excluded_nodes() {
    # Not for ever: where Slurm keeps to its choice, the preflight judges the node.
    ((${SLURM_RESTART_COUNT:-0} % 3)) || return 0
    local again
    again=$(comm -12 <(excluded | tr ',' '\n' | sort) <(trainer_nodes | tr ',' '\n' | sort) | paste -sd, -)
    [ -n "$again" ] || return 0
    say "$again is excluded and was allocated again: back into the queue"
    requeue
    exit 1
}

# The whole job: attempts until the run is finished, has to wait in the queue, or needs a person.
run_job() {
    [ -n "${SLURM_RESTART_COUNT:-}" ] && say "job $SLURM_JOB_ID was queued again, $SLURM_RESTART_COUNT times so far"
    say "$TASKS_PER_NODE trainers on each of $(trainer_nodes), encoders: $ENCODERS"
    leave_excluded_nodes
    choose_nodes || exit
    here dsr-scale plan "$CONFIG" "${OVERRIDES[@]}" --devices "$((NODES * TASKS_PER_NODE))" || exit
    start_encoders
    while :; do
        attempt
        [ "$ACTION" = restart ] || break
        say "starting again on the nodes that are left: $REASON"
    done
    stop_encoders
    follow
}
