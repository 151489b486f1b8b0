#!/usr/bin/env bash
# Site settings, read by `txssm submit` and by every job. Copy this file to slurm/env.sh (ignored by git), or set
# $TXSSM_ENV to another file. It is a bash script and may load modules, set variables or activate conda. Every setting
# is optional.

# --- for sbatch -------------------------------------------------------------------------------------------------------
#export SBATCH_ACCOUNT=lab
#export SBATCH_PARTITION=h100
#export SBATCH_TIMELIMIT=24:00:00
#export TXSSM_GPUS_PER_NODE=8
# Where the login node cannot build a model on fake tensors (a core for ten seconds, 1 GiB): submit without this check.
#export TXSSM_CHECK_BUILD=0
# Further sbatch options for training jobs, without dashes: here all of a node's memory and cores, and exclusive use.
#export TXSSM_SBATCH_OPTIONS="exclusive mem=0 cpus-per-task=12"

# --- notification -----------------------------------------------------------------------------------------------------
# Posts events of a run as JSON to Slack, Mattermost and similar services. The URL is a secret: chmod 600 this file.
#export TXSSM_WEBHOOK=https://hooks.example.org/services/…

# --- the environment --------------------------------------------------------------------------------------------------
# A job uses the Python that ran `txssm submit`. In a container (here with pyxis) the steps use the container's Python;
# mount the run folders, the data and this checkout under the same paths as outside.
#export TXSSM_SRUN_OPTIONS="--container-image=/images/txssm.sqsh --container-mounts=/scratch,/home"
#export TXSSM_STEP_PYTHON=/usr/bin/python
# Threads per rank (default: all cores of its task):
#export OMP_NUM_THREADS=4

# --- limits of the preflight; `off` disables a check ------------------------------------------------------------------
# Upper limits: GPU memory in use before the run, remapped rows per GPU, Xid hardware errors of the node's GPUs in the
# last hour.
#export TXSSM_PREFLIGHT_GPU_MEMORY_MB=2000
#export TXSSM_PREFLIGHT_REMAPPED_ROWS=512
#export TXSSM_PREFLIGHT_XIDS=0
# Lower limits: free inodes on the checkpoints' file system, open files per process, free /dev/shm (on nodes with GPUs).
#export TXSSM_PREFLIGHT_FREE_INODES=100000
#export TXSSM_PREFLIGHT_OPEN_FILES=65536
#export TXSSM_PREFLIGHT_SHM_MB=1024
# Lower limit for the bus bandwidth of an all-reduce over all ranks, in GB/s, defined as in nccl-tests. Always measured
# in multi-node GPU jobs; in CPU jobs only if set.
#export TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S=100

# --- caches, on node-local disk ---------------------------------------------------------------------------------------
# Triton and torch.compile write here (default: $TMPDIR or /tmp).
#export TXSSM_LOCAL_DIR=/local/$USER

# --- network ----------------------------------------------------------------------------------------------------------
# Interface names differ between sites (`ip link`, `ibstat`). Wrong ones cost bandwidth or hang the first collective.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5
#export NCCL_DEBUG=WARN
# Without GPUs:
#export GLOO_SOCKET_IFNAME=eth0
