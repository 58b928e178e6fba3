# What all batch scripts share: they source this file, call `run COMMAND...` or `run_ranks COMMAND...`, then `finish`.
#
# The command is run by one srun, from the environment that slurm/settings.sh describes. When it
# ends, its exit code decides (see the table in slurm/README.md): 0 is done; 85, 86 and death by a signal requeue the
# job, which goes on where it was; anything else is the job's own exit code.
#
# The traps set variables and nothing more: bash 5.2 can die of a command substitution in a trap that another signal
# interrupts, which `scontrol requeue` sends.
# shellcheck shell=bash
set -uo pipefail

: "${SLURM_JOB_ID:?start this with sbatch}" "${LVDM_HOME:=$SLURM_SUBMIT_DIR}"
# sbatch hands on the submitting shell's variables; of a run that was started there, these would lead all jobs to one port.
unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# shellcheck source=slurm/settings.sh
source "${LVDM_SLURM_SETTINGS:-$LVDM_HOME/slurm/settings.sh}"

# SLURM_JOB_ID would not do for arrays: that of one of their tasks stands for the whole array in scontrol.
THIS_JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || THIS_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESTARTS=${SLURM_RESTART_COUNT:-0}

say() { # TEXT: a line in the job's log
    printf '%(%F %T)T %s %s: %s\n' -1 "$SLURM_JOB_NAME" "$THIS_JOB" "$*"
}

warned='' # --signal=B:USR1 reaches this script alone
trap 'warned=1' USR1
ended='' asked='' job='' state=''
trap 'ended=1' TERM # the tasks get it too and save; the script must outlive them

run() { # COMMAND...: once, with its output in the job's log; sets code
    launch 1 1 '' "$@"
}

run_ranks() { # COMMAND...: as the ranks a node that were asked for, else one on each GPU, with a log each; sets code
    launch "$SLURM_JOB_NUM_NODES" "${SLURM_NTASKS_PER_NODE:-${LVDM_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}" \
        "logs/$SLURM_JOB_NAME-$THIS_JOB" "$@"
}

launch() { # NODES TASKS_A_NODE FOLDER_OF_LOGS COMMAND...
    local nodes=$1 tasks=$2 logs=$3 cpus messages='' errors=2 output=()
    shift 3
    cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks))}
    ((cpus > 0)) || cpus=1
    # srun would take these from the job, against what it is told here
    unset SLURM_CPUS_PER_GPU SLURM_NTASKS SLURM_NPROCS
    enter_environment "$@"
    say "start $((RESTARTS + 1)): $nodes nodes ($SLURM_JOB_NODELIST) x $tasks tasks x $cpus CPUs," \
        "${SLURM_GPUS_ON_NODE:-no} GPUs a node"
    if [[ -n $logs ]]; then
        mkdir -p "$logs"
        messages=$logs/srun-$RESTARTS.log
        exec {errors}>"$messages"
        output=(--output="$logs/rank-%4t.log" --error="$logs/rank-%4t.log")
        say "each rank's output is in $logs"
    fi
    # --kill-on-bad-exit: a rank that fails ends the others, which might wait for it
    # --export: tasks get PATH and settings even if the job was submitted with --export=NONE
    srun --kill-on-bad-exit=1 --export=ALL --distribution=block --open-mode=append --nodes="$nodes" \
        --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" "${output[@]}" \
        "${CONTAINER[@]}" "${COMMAND[@]}" 2>&"$errors" &
    wait_for $!
    if [[ -n $messages ]] && ((code != 0)); then
        cat "$messages"
        cause_in "$messages"
        # faulthandler, which stands behind the watchdog, ends a rank whose Python cannot run, and can only do so with 1
        if ((code == 1)) && tail -q -n 300 "$logs"/rank-*.log | grep -qE '^Timeout \([0-9:.]+\)!$'; then
            code=86
        fi
        echo "the last lines of $logs/rank-0000.log:"
        tail -n 5 "$logs/rank-0000.log"
    fi
}

enter_environment() { # COMMAND...: sets COMMAND to what srun runs, and CONTAINER to its options
    local module mounts=$PWD
    COMMAND=("$@") CONTAINER=()
    export PYTHONPATH=$LVDM_HOME${PYTHONPATH:+:$PYTHONPATH} # a container has lvdm's requirements, not lvdm
    for module in $LVDM_MODULES; do
        module load "$module" || { say "cannot load module $module (LVDM_MODULES in slurm/settings.sh)"; exit 2; }
    done
    [[ $LVDM_HOME == "$PWD" ]] || mounts+=,$LVDM_HOME
    [[ -z $LVDM_CONTAINER_MOUNTS ]] || mounts+=,$LVDM_CONTAINER_MOUNTS
    case ${LVDM_CONTAINER:+$LVDM_CONTAINER_TOOL} in
        '')
            if [[ -f $LVDM_HOME/.venv/bin/activate ]]; then
                # shellcheck source=/dev/null
                source "$LVDM_HOME/.venv/bin/activate"
            fi ;;
        apptainer)
            COMMAND=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} --bind "$mounts" --pwd "$PWD" "$LVDM_CONTAINER" "$@") ;;
        pyxis)
            local each binds=''
            for each in ${mounts//,/ }; do binds+=${binds:+,}$each:$each; done
            CONTAINER=(--container-image="$LVDM_CONTAINER" --container-mounts="$binds" --container-workdir="$PWD") ;;
        *)
            say "LVDM_CONTAINER_TOOL=$LVDM_CONTAINER_TOOL in slurm/settings.sh is neither apptainer nor pyxis"
            exit 2 ;;
    esac
}

wait_for() { # PID: until it is gone; sets code to its exit code
    # wait returns 128+n at each signal to this script, too
    [[ -z $warned ]] || kill -USR1 $$ # it came before there was anybody to tell; now it interrupts the wait
    while wait "$1"; code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do
        if [[ -n $warned ]]; then
            warned=''
            say "SLURM warns of the end; the tasks are told"
            scancel --signal=USR1 "$THIS_JOB"
        fi
        if [[ -n $ended ]]; then
            # A time limit is no reason for SLURM to requeue, and KillWait later it kills this script with the tasks.
            ended=''
            look_at_job
            [[ $job != *" Reason=TimeLimit "* ]] || ask_again "the time limit is reached"
        fi
    done
    local last
    wait "$1" 2>/dev/null
    last=$?
    ((last == 127)) || code=$last # the loop's may be that of a signal which came as the last task ended
}

cause_in() { # FILE: set code to that of the rank that failed first, from what srun said
    # srun's own code is the highest of all: that of ranks it killed because another had failed.
    local line first='' codes=' '
    while IFS= read -r line; do
        if [[ $line =~ tasks?\ [0-9,-]+:\ Exited\ with\ exit\ code\ ([0-9]+) ]]; then
            first=${first:-$line} codes+="${BASH_REMATCH[1]} "
        elif [[ $line =~ tasks?\ [0-9,-]+:\ [A-Z] ]]; then # Killed, Terminated, Segmentation fault ...
            first=${first:-$line}
        elif [[ $line =~ Task\ launch|Node\ failure|Socket\ timed\ out|Communication\ connection\ failure ]]; then
            first=${first:-$line}
        fi
    done <"$1"
    [[ -z $first ]] || say "the first to end: ${first#srun: error: }"
    case $first$codes in
        *' 2 '*) code=2 ;; # bad input stays bad, whatever else happened
        *': Killed '*) code=137 ;;
        *task*': Exited '*' 1 '*) code=1 ;; # a fault of one rank, and the others lost it
        *task*': Exited '*' 86 '*) code=86 ;;
        *task*': Exited '*' 85 '*) code=85 ;;
        *task*': Exited '*) code=${codes# } code=${code%% *} ;;
        *task*': '*) ((code > 128)) || code=143 ;; # another signal
        ?*' ') code=85 ;; # a node is gone
    esac
}

finish() { # end the job as code says
    case $code in
        0) say "done"; exit 0 ;;
        85) requeue "stopped to be started again" ;;
        86) requeue "it hung, and its watchdog ended it" ;;
        130) say "interrupted (exit code 130); not requeued" ;;
        *)
            if ((code > 128 && code <= 192)); then # 255 is ssh's and apptainer's own
                requeue "killed by signal $((code - 128))"
            else
                say "failed with exit code $code; not requeued"
            fi ;;
    esac
    exit "$code"
}

requeue() { # WHY
    [[ -z $asked ]] || return
    look_at_job
    # What SLURM ended, it requeues itself, unless somebody cancelled it, and then asking would bring it back.
    if [[ -n $state && $state != RUNNING && $job != *" Reason=TimeLimit "* ]]; then
        say "$1 (exit code $code); SLURM has ended the job and requeues it unless it was cancelled"
        return
    fi
    ask_again "$1 (exit code $code)"
}

look_at_job() { # sets job to what SLURM says of it, and state; empty if it says nothing
    local try
    for try in 1 2 3 4 5; do # its controller may be busy
        ! job=$(scontrol show job --oneliner "$THIS_JOB") || break
        sleep $((try * 5))
    done
    state=${job##* JobState=} state=${state%% *}
}

ask_again() { # WHY
    local try
    if [[ -n ${BEGINS_ANEW:-} && $job == *" Reason=TimeLimit "* ]]; then
        say "$1; not requeued, since it would begin anew: give a longer --time"
        return
    fi
    if ((RESTARTS >= LVDM_MAX_REQUEUES)); then
        say "$1; not requeued again after $RESTARTS times (LVDM_MAX_REQUEUES)"
        return
    fi
    say "$1; requeued"
    for try in 1 2 3 4 5; do
        if scontrol requeue "$THIS_JOB"; then
            asked=1
            return
        fi
        say "requeueing failed, attempt $try of 5"
        sleep $((try * 5))
    done
}
