# What all batch scripts share: they source this file, call `run COMMAND...`, `run_ranks COMMAND...` or `run_into`, then
# `finish`.
#
# The command is run by one srun, from the environment that slurm/settings.sh describes. When it ends, its exit code
# decides (see the table in slurm/README.md): 0 is done; 85, 86 and death by a signal requeue the job, which goes on where
# it was, or begins anew at most BEGINS_ANEW times; anything else is the job's own exit code.
#
# The traps set variables and nothing more: bash 5.2 can die of a command substitution in a trap that another signal
# interrupts, which `scontrol requeue` sends.
# shellcheck shell=bash
set -uo pipefail

: "${SLURM_JOB_ID:?start this with sbatch}" "${LVDM_HOME:=$SLURM_SUBMIT_DIR}"
warned='' ended='' asked='' job='' state=''
trap 'warned=1' USR1 # --signal=B:USR1 reaches this script alone
trap 'ended=1' TERM # the tasks get it too and save; the script must outlive them
# sbatch hands on the submitting shell's variables; of a run that was started there, these would lead all jobs to one port.
unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# shellcheck source=slurm/settings.sh
source "${LVDM_SLURM_SETTINGS:-$LVDM_HOME/slurm/settings.sh}"

# SLURM_JOB_ID would not do for arrays: that of one of their tasks stands for the whole array in scontrol.
THIS_JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || THIS_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESTARTS=${SLURM_RESTART_COUNT:-0}

# What srun says when it is not the tasks that failed: a node, the network, SLURM's controller, munge.
PASSING='Task launch|Node failure|Socket timed out|Communication connection failure|Unable to confirm allocation|Unable to '
PASSING+='contact slurm controller|authentication error'
SLURMS="SLURM has ended the job and requeues it unless it was cancelled"

say() { # TEXT: a line in the job's log
    printf '%(%F %T)T %s %s: %s\n' -1 "$SLURM_JOB_NAME" "$THIS_JOB" "$*"
}

run() { # COMMAND...: once, with its output in the job's log; sets code
    launch 1 1 '' "$@"
}

run_ranks() { # COMMAND...: as the ranks a node that were asked for, else one on each GPU, with a log each; sets code
    launch "$SLURM_JOB_NUM_NODES" "${LVDM_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
        "logs/$SLURM_JOB_NAME-$THIS_JOB" "$@"
}

run_into() { # OUT I COMMAND...: run it with another path as its word I, which becomes OUT when it is whole; sets code
    # Begun anew, the job neither goes on with half of it nor takes for its own what somebody else made.
    local out=${1%/} i=$2 command=("${@:3}") part
    part=$(dirname -- "$out")/.part-$SLURM_JOB_ID
    if [[ ! -e $part/whole ]]; then
        if [[ -e $out ]]; then
            say "$out is there already; remove it or choose another"
            exit 2
        fi
        rm -rf -- "$part"
        mkdir -p -- "$part" || exit 2
        command[i]=$part/${out##*/}
        run "${command[@]}"
        ((code != 0)) || touch -- "$part/whole"
    fi
    if [[ -e $part/whole ]]; then # an earlier start may have been killed before it moved it, or after
        code=0
        [[ ! -e $part/${out##*/} ]] || mv -T -- "$part/${out##*/}" "$out" || code=2
    fi
    rm -rf -- "$part"
}

launch() { # NODES TASKS_A_NODE FOLDER_OF_LOGS COMMAND...
    local nodes=$1 tasks=$2 logs=$3 cpus=0 each log messages output size
    local -A sizes=() # of the logs before this start, which are appended to
    shift 3
    for each in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do # such as 8(x2),4; the smallest node must do
        each=${each%(*}
        ((cpus > 0 && cpus <= each)) || cpus=$each
    done
    cpus=${SLURM_CPUS_PER_TASK:-$((cpus / tasks))}
    ((cpus > 0)) || cpus=1
    # srun would take these from the job, against what it is told here
    unset SLURM_CPUS_PER_GPU SLURM_NTASKS SLURM_NPROCS
    enter_environment "$@"
    say "start $((RESTARTS + 1)): $nodes nodes ($SLURM_JOB_NODELIST) x $tasks tasks x $cpus CPUs," \
        "${SLURM_GPUS_ON_NODE:-no} GPUs a node"
    if [[ -n $logs ]]; then
        mkdir -p "$logs"
        while read -r size log; do sizes[$log]=$size; done < <(stat -c '%s %n' "$logs"/rank-*.log 2>/dev/null)
        messages=$logs/srun-$RESTARTS.log
        output=(--output="$logs/rank-%4t.log" --error="$logs/rank-%4t.log")
        say "each rank's output is in $logs"
    else
        messages=$(mktemp)
        output=(--output=/dev/stdout) # of the task, so that on stderr there is srun alone
    fi
    # --kill-on-bad-exit: a rank that fails ends the others, which might wait for it
    # --export: tasks get PATH and settings even if the job was submitted with --export=NONE
    srun --kill-on-bad-exit=1 --export=ALL --distribution=block --open-mode=append --nodes="$nodes" \
        --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" "${output[@]}" \
        "${CONTAINER[@]}" "${COMMAND[@]}" 2>"$messages" &
    wait_for $!
    if ((code != 0)); then
        cat "$messages"
        cause_in "$messages"
    fi
    if [[ -z $logs ]]; then
        rm -f "$messages"
    elif ((code != 0)); then
        # faulthandler, which stands behind the watchdog, ends a rank whose Python cannot run, and can only do so with 1
        ((code != 1)) || ! said_now "$logs"/rank-*.log | grep -E '^Timeout \([0-9:.]+\)!$' >/dev/null || code=86
        printf -v log '%s/rank-%04d.log' "$logs" "$rank"
        echo "the last lines of $log:"
        said_now "$log" | tail -n 5
    fi
}

said_now() { # LOG...: what this start wrote to them
    local log
    for log; do [[ ! -f $log ]] || tail -c "+$((${sizes[$log]:-0} + 1))" "$log"; done
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

wait_for() { # PID: until it is gone, and do meanwhile what signals to this script ask for; sets code to its exit code
    # A signal interrupts wait; the sleep is for those that come while nobody waits.
    while sleep 5 & wait -n "$1" "$!"; kill -0 "$1" 2>/dev/null; do
        if [[ -n $warned ]]; then
            say "SLURM warns of the end; the tasks are told"
            ! scancel --signal=USR1 "$THIS_JOB" || warned='' # it fails while there are no tasks yet
        fi
        if [[ -n $ended ]]; then
            ended=''
            look_at_job
            # KillWait from now SLURM kills this script with the tasks.
            ! left_to_us || ask_again "$why"
        fi
    done
    trap '' USR1 TERM # nobody is left to be told, and wait would give their number
    wait "$1"
    code=$?
}

cause_in() { # FILE: what srun said; sets code to that of the rank that failed first, and rank to whose log says why
    # srun's own code is the highest of all: that of ranks it killed because another had failed.
    local line first='' codes=' '
    rank=0
    while IFS= read -r line; do
        if [[ $line =~ tasks?\ ([0-9]+)[0-9,-]*:\ [A-Z] ]]; then # Exited, Killed, Segmentation fault ...
            [[ -n $first && $line != *' code 2' ]] || rank=${BASH_REMATCH[1]}
            [[ $line != *': Exited with exit code '* ]] || codes+="${line##* } "
        elif [[ ! $line =~ $PASSING ]]; then
            continue
        fi
        first=${first:-$line}
    done <"$1"
    [[ -z $first ]] || say "the first to end: ${first#srun: error: }"
    if [[ $codes == *' 2 '* ]]; then
        code=2 # bad input stays bad, whatever else happened
    elif [[ $first == *': Killed'* ]]; then
        code=137
    elif [[ $first == *': Exited '* ]]; then # a fault of one rank, 1, and the others lost it
        for code in 1 86 85 $codes; do [[ $codes != *" $code "* ]] || break; done
    elif [[ $first =~ $PASSING ]]; then
        code=85
    elif [[ -n $first ]] && ((code <= 128)); then
        code=143 # another signal
    fi
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
    ! is_slurms || { say "$1 (exit code $code); $SLURMS"; return; }
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

left_to_us() { # whether SLURM ended the job without requeueing it, and nobody cancelled it; sets why
    local end=${job##* EndTime=}
    case $job in
        *" Reason=TimeLimit "*) why="the time limit is reached" ;;
        # PreemptMode=CANCEL; at the start of a GraceTime it is earlier than the end, also of a job cancelled meanwhile
        *" PreemptTime=${end%% *} "*) why="preempted" ;;
        *) return 1 ;;
    esac
}

is_slurms() { # whether SLURM has ended the job, and asking could bring back one that somebody cancelled
    [[ -n $state && $state != RUNNING ]] && ! left_to_us
}

ask_again() { # WHY: once, whatever comes of it
    local try most=${BEGINS_ANEW:-$LVDM_MAX_REQUEUES}
    asked=1
    if [[ -n ${BEGINS_ANEW:-} && $job == *" Reason=TimeLimit "* ]]; then
        say "$1; not requeued, since it would begin anew: give a longer --time"
        return
    fi
    ((most <= LVDM_MAX_REQUEUES)) || most=$LVDM_MAX_REQUEUES
    if ((RESTARTS >= most)); then
        say "$1; not requeued again after $RESTARTS times (${BEGINS_ANEW:+it begins anew; }LVDM_MAX_REQUEUES)"
        return
    fi
    say "$1; requeued"
    for try in 1 2 3 4 5; do
        ! scontrol requeue "$THIS_JOB" || return
        say "requeueing failed, attempt $try of 5"
        sleep $((try * 5))
        look_at_job
        ! is_slurms || { say "$SLURMS"; return; }
    done
}
