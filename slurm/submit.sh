#!/usr/bin/env bash
# sbatch with this cluster's settings (slurm/settings.sh). Takes what sbatch takes; options given here win.
#
#   slurm/submit.sh --nodes=4 train.sbatch configs/t2v_256.yaml run.folder=runs/mine
#   slurm/submit.sh --array=0-15 encode.sbatch --config configs/t2v_256.yaml
#
# A script's name stands for the one in this folder. The job runs in the folder that this is called in. One option is
# not sbatch's: --ranks-per-node=N, for training and sampling with other than one rank on each GPU of settings.sh.
# --ntasks-per-node would not do with a range of nodes: with --nodes=1-4 --ntasks-per-node=2 sbatch takes two.
set -euo pipefail

refuse() { # WHY
    echo "submit: error: $1" >&2
    exit 2
}

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
LVDM_HOME=${here%/*}
export LVDM_HOME
# Called in a job, sbatch would hand on what SLURM says of that one: its array, its restarts, its CPUs.
for name in "${!SLURM_@}"; do
    case $name in
        SLURM_CONF | SLURM_CONF_SERVER | SLURM_CLUSTERS | SLURM_JWT) ;; # how to reach SLURM
        *) unset "$name" ;;
    esac
done
# shellcheck source=slurm/settings.sh
source "${LVDM_SLURM_SETTINGS:-$LVDM_HOME/slurm/settings.sh}"

script='' ranks=$LVDM_GPUS_PER_NODE given=()
while (($# > 0)) && [[ -z $script ]]; do
    case $1 in
        --ranks-per-node=*)
            ranks=${1#*=}
            [[ $ranks =~ ^[1-9][0-9]*$ ]] || refuse "$1 is no number of ranks" ;;
        --export=*) export SBATCH_EXPORT=${1#*=} ;;
        --ranks-per-node | --export) refuse "write $1=... with an equals sign" ;;
        --ntasks-per-node*) refuse "use --ranks-per-node=N in place of $1" ;;
        *.sbatch)
            if [[ ! -f $here/${1##*/} ]]; then # the value of an option, such as -J mine.sbatch
                given+=("$1")
            elif [[ $1 != */* || $1 -ef $here/${1##*/} ]]; then
                script=${1##*/}
            else
                refuse "$1 is not $here/${1##*/}; submit it with sbatch"
            fi ;;
        *) given+=("$1") ;;
    esac
    shift
done
gpus=0
case $script in
    train.sbatch | sample.sbatch) gpus=$ranks ;;
    encode.sbatch | evaluate.sbatch) gpus=1 ranks=1 ;;
    shards.sbatch | export.sbatch) ranks=1 ;;
    *)
        echo "usage: slurm/submit.sh [sbatch options] {train,encode,sample,evaluate,shards,export}.sbatch ..." >&2
        exit 2 ;;
esac
export LVDM_RANKS_PER_NODE=$((ranks > 0 ? ranks : 1))
if [[ ,${SBATCH_EXPORT:-ALL}, != *,ALL,* ]]; then # whatever else the job is not to get, it needs these
    [[ $SBATCH_EXPORT != NONE ]] || SBATCH_EXPORT=''
    for name in "${!LVDM_@}"; do SBATCH_EXPORT+=${SBATCH_EXPORT:+,}$name; done
fi
options=("--mincpus=$((LVDM_RANKS_PER_NODE * ${LVDM_CPUS_PER_RANK:-1}))")
((gpus == 0 || LVDM_GPUS_PER_NODE == 0)) || options+=("--gpus-per-node=$gpus")
exec sbatch "${options[@]}" "${given[@]}" "$here/$script" "$@"
