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

here=${BASH_SOURCE[0]%/*}
LVDM_HOME=$(cd "$here/.." && pwd)
export LVDM_HOME
# shellcheck source=slurm/settings.sh
source "${LVDM_SLURM_SETTINGS:-$LVDM_HOME/slurm/settings.sh}"

script='' ranks=$LVDM_GPUS_PER_NODE given=()
while (($# > 0)) && [[ -z $script ]]; do
    case $1 in
        *.sbatch) script=${1##*/} ;;
        --ranks-per-node=*) ranks=${1#*=} ;;
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
options=("--mincpus=$((LVDM_RANKS_PER_NODE * ${LVDM_CPUS_PER_RANK:-1}))")
((gpus == 0 || LVDM_GPUS_PER_NODE == 0)) || options+=("--gpus-per-node=$gpus")
exec sbatch "${options[@]}" "${given[@]}" "$LVDM_HOME/slurm/$script" "$@"
