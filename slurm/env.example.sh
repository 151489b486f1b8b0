#!/usr/bin/env bash
# What a site sets, for `txssm submit` and inside every job. Copy to slurm/env.sh (git ignores it), or name a file in
# $TXSSM_ENV. It is a bash script: modules, variables, conda … may stand here. All of it is optional.

# --- for sbatch -------------------------------------------------------------------------------------------------------
#export SBATCH_ACCOUNT=lab
#export SBATCH_PARTITION=h100
#export SBATCH_TIMELIMIT=24:00:00
#export TXSSM_GPUS_PER_NODE=8
# Further options of training jobs, without their dashes: all of a node's memory and cores, no neighbours.
#export TXSSM_SBATCH_OPTIONS="exclusive mem=0 cpus-per-task=12"

# --- notification -------------------------------------------------------------------------------------------------------
# What happens to a run, as JSON to Slack, Mattermost and the like. The address is a secret: chmod 600 this file.
#export TXSSM_WEBHOOK=https://hooks.example.org/services/…

# --- the environment ----------------------------------------------------------------------------------------------------
# A job uses the Python that `txssm submit` ran with. In a container (here with pyxis) the steps use the container's; mount
# the run folders, the data and this checkout under their own paths.
#export TXSSM_SRUN_OPTIONS="--container-image=/images/txssm.sqsh --container-mounts=/scratch,/home"
#export TXSSM_STEP_PYTHON=/usr/bin/python
# Threads of a rank, for other than all cores of its task:
#export OMP_NUM_THREADS=4

# --- limits of the preflight; `off` checks nothing ------------------------------------------------------------------------
# Memory of a GPU in use before the run, its remapped rows, hardware errors (Xid) of the node's GPUs in the last hour.
#export TXSSM_PREFLIGHT_GPU_MEMORY_MB=2000
#export TXSSM_PREFLIGHT_REMAPPED_ROWS=512
#export TXSSM_PREFLIGHT_XIDS=0
# Least: files that the checkpoints' file system may still take, open files of a process, free /dev/shm (where there are GPUs).
#export TXSSM_PREFLIGHT_FREE_INODES=100000
#export TXSSM_PREFLIGHT_OPEN_FILES=65536
#export TXSSM_PREFLIGHT_SHM_MB=1024
# Least GB/s of an all-reduce over all ranks (bus bandwidth, as of nccl-tests). Measured on several nodes with GPUs anyway; on
# CPUs where it is set.
#export TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S=100

# --- caches, on the node's own disk ---------------------------------------------------------------------------------------
# Triton and torch.compile write here (default: $TMPDIR or /tmp).
#export TXSSM_LOCAL_DIR=/local/$USER

# --- network --------------------------------------------------------------------------------------------------------------
# The names are the site's: `ip link`, `ibstat`. Wrong ones cost bandwidth, or hang the first collective.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5
#export NCCL_DEBUG=WARN
# Without GPUs:
#export GLOO_SOCKET_IFNAME=eth0
