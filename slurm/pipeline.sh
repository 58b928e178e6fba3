#!/usr/bin/env bash
# Submit a chain of jobs, each after the success of the one before:
# shards -> autoencoder -> latents -> training -> export -> samples -> scores.
#
#   slurm/pipeline.sh slurm/quickstart.plan
#   slurm/pipeline.sh slurm/quickstart.plan --from training     (the stages from there on, after a fault was mended)
#
# A plan is a list of the stages in Bash, as slurm/quickstart.plan; copy it and change what you like:
#
#   stage NAME [sbatch options] SCRIPT ARGUMENTS...             a job after all of the stage before
#   beside NAME [sbatch options] SCRIPT ARGUMENTS...            one more job of the same stage, at the same time
#
# A job that is requeued keeps the chain waiting; one that fails takes the later ones out of the queue.
set -euo pipefail

here=${BASH_SOURCE[0]%/*}
plan=${1:-}
from=''
case $#:${2:-} in
    1:) ;;
    3:--from) from=$3 ;;
    *) echo "usage: slurm/pipeline.sh PLAN [--from STAGE]" >&2; exit 2 ;;
esac
[[ -r $plan ]] || { echo "pipeline: error: no plan $plan" >&2; exit 2; }

title=${plan##*/} title=${title%.*}
before='' group='' every=() skipping=$from

stage() {
    local name=$1
    [[ $name != "$from" ]] || skipping=''
    before=$group group=''
    submit "$@"
}

beside() {
    submit "$@"
}

submit() { # NAME [sbatch options] SCRIPT ARGUMENTS...
    local name=$1 job options=()
    shift
    [[ -z $skipping ]] || return 0
    [[ -z $before ]] || options+=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
    if ! job=$("$here/submit.sh" --parsable --job-name="$title-$name" "${options[@]}" "$@"); then
        ((${#every[@]} == 0)) || scancel "${every[@]}"
        echo "pipeline: error: stage $name was refused; the stages before it are cancelled" >&2
        exit 2
    fi
    job=${job%%;*} # a cluster's name may follow
    every+=("$job")
    group+=${group:+:}$job
    printf '%-24s job %-8s %s\n' "$title-$name" "$job" "${before:+after ${before//:/, }}"
}

# shellcheck source=/dev/null
source "$plan"
((${#every[@]} > 0)) || { echo "pipeline: error: $plan has no stage ${from:-at all}" >&2; exit 2; }
cat <<END

watch:   squeue --me --format='%.12i %.24j %.10T %.10M %R'
logs:    slurm-$title-*.log, and logs/ for what each rank says
runs:    python tools/runs.py FOLDER
cancel:  scancel ${every[*]}
END
