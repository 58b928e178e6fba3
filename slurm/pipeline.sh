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

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
plan=${1:-}
from=''
case $#:${2:-}:${3:-} in
    1::) ;;
    3:--from:?*) from=$3 ;;
    *) echo "usage: slurm/pipeline.sh PLAN [--from STAGE]" >&2; exit 2 ;;
esac
[[ -r $plan ]] || { echo "pipeline: error: no plan $plan" >&2; exit 2; }

title=${plan##*/} title=${title%.*}
before='' group='' every=() skipping=$from stage='' hint='' line=0

stage() {
    stage=${1:-}
    [[ $stage != "$from" ]] || skipping=''
    before=$group group=''
    submit "$@"
}

beside() {
    [[ ${1:-} != "$from" ]] || hint="; it is beside $stage: give that"
    submit "$@"
}

submit() { # NAME [sbatch options] SCRIPT ARGUMENTS...
    local name=${1:-} job options=()
    line=${BASH_LINENO[1]} # of the plan
    [[ -z $skipping ]] || return 0
    [[ -z $before ]] || options+=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
    job=$("$here/submit.sh" --parsable --job-name="$title-$name" "${options[@]}" "${@:2}")
    job=${job%%;*} # a cluster's name may follow
    every+=("$job")
    group+=${group:+:}$job
    printf '%-24s job %-8s %s\n' "$title-$name" "$job" "${before:+after ${before//:/, }}"
}

give_up() { # the jobs of half a plan would wait for nothing
    ((${#every[@]} == 0)) || scancel "${every[@]}"
    echo "pipeline: error: $plan is wrong in line $line or behind it; none of its jobs is left" >&2
    exit 2
}

trap give_up EXIT
# shellcheck source=/dev/null
source "$plan"
trap - EXIT
((${#every[@]} > 0)) || { echo "pipeline: error: $plan has no stage ${from:-at all}$hint" >&2; exit 2; }
cat <<END

watch:   squeue --me --format='%.12i %.24j %.10T %.10M %R'
logs:    slurm-$title-*.log, and logs/ for what each rank says
runs:    python tools/runs.py FOLDER
cancel:  scancel ${every[*]}
END
