# This cluster's settings; edit them here, or copy the file and name the copy in LVDM_SLURM_SETTINGS.
# slurm/submit.sh reads it before sbatch, and every job when it starts. As it is, it asks for nothing that a cluster may
# not have: no account, the default partition, no GPUs, no container.
# shellcheck shell=bash disable=SC2034

# --- What sbatch is told (any SBATCH_ variable of `man sbatch`; options on the command line win). ---------------------
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00     # none: the partition's own; a job that runs into it is saved and goes on
# export SBATCH_CONSTRAINT=a100
# export SBATCH_MEM_PER_CPU=8G         # none: the cluster's default, which may be too little for loader workers

# --- A node. Training takes --nodes=N of them, with a rank on each GPU. -----------------------------------------------
LVDM_GPUS_PER_NODE=0                   # 0: train on CPUs, one rank a node, or as many as --ranks-per-node says
LVDM_CPUS_PER_RANK=1                   # CPUs of a rank and its loader workers, e.g. 12

# --- The software: a container, or else the .venv of the checkout. ----------------------------------------------------
LVDM_MODULES=                          # e.g. "cuda/12.4 apptainer"; loaded at the start of a job
LVDM_CONTAINER=                        # image: a .sif for apptainer, a .sqsh or docker://... for pyxis
LVDM_CONTAINER_TOOL=apptainer          # apptainer | pyxis
LVDM_CONTAINER_MOUNTS=                 # folders to show beside the checkout and the current one: "/data,/scratch"

# --- The network. Interfaces are found by NCCL and gloo themselves; name them where they choose a wrong one. ----------
# export NCCL_SOCKET_IFNAME=ib0        # for the first contact, and for traffic where there is no InfiniBand
# export GLOO_SOCKET_IFNAME=ib0        # for what ranks tell each other besides gradients
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# --- Requeueing. ------------------------------------------------------------------------------------------------------
: "${LVDM_MAX_REQUEUES:=100}"          # starts of a job after its first, SLURM's own requeues too (slurm/README.md)
