#!/usr/bin/env bash
# What every job runs: the site's settings, caches on the node's own disk, then one stage.
#   entrypoint.sh pretrain RECIPE [--set a.b=c …]
#   entrypoint.sh shard EXECUTOR          one element of a job array of `txssm data shard --slurm`
#   entrypoint.sh convert RUN OUT
#   entrypoint.sh evaluate RUN
set -euo pipefail

stage=$1
shift
home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
settings=${TXSSM_ENV:-$home/slurm/env.sh}
if [[ -e $settings ]]; then
  # As `txssm submit` reads it: what it sets is for all that follows, and modules use what is not set.
  set -a +u
  # shellcheck source=slurm/env.example.sh
  source "$(realpath -- "$settings")"
  set +a -u
elif [[ -n ${TXSSM_ENV:-} ]]; then
  echo "entrypoint.sh: TXSSM_ENV=$TXSSM_ENV: no such file" >&2
  exit 2
fi
# Under sbatch --export, srun would keep from the steps what is set here.
unset SLURM_EXPORT_ENV
# The code beside this script, a checkout or a run's frozen copy, and neither what the Python has installed nor what lies
# in the current folder.
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# Else each rank would start as many threads as it sees cores. Slurm's default is one core a task.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
python=${TXSSM_PYTHON:-$home/.venv/bin/python}
step_python=${TXSSM_STEP_PYTHON:-$python}
# Network file systems bear no caches that hundreds of processes write at once.
caches=${TXSSM_LOCAL_DIR:-${TMPDIR:-/tmp}}/txssm-$(id -un)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}

say() { printf '%(%Y-%m-%dT%H:%M:%S)T %s\n' -1 "$*"; }

# Runs a command as a step. One that a signal killed, for its memory or with its node, is worth two more tries; what
# fails by itself would fail again. (When Slurm stops the job, it stops this shell, too.)
step() {
  local code=0 try options=()
  # Words, not one word: options of a container, for instance.
  read -ra options <<<"${TXSSM_SRUN_OPTIONS:-}"
  say "START $stage: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${options[@]}" "$@" || code=$?
  say "END $stage: exit code $code"
  if ((code > 128 && ${SLURM_RESTART_COUNT:-0} < 2)); then
    say "requeueing job $SLURM_JOB_ID"
    # A slurmctld that is away for a quarter of an hour is waited for.
    for ((try = 0; try < 60; try++)); do
      scontrol requeue "$SLURM_JOB_ID" && break
      sleep 15
    done
  fi
  exit "$code"
}

# Runs the supervisor, once more where a signal killed it (for its host's memory, mostly): the job would end with it.
# Slurm's SIGTERM is the supervisor's to answer.
supervise() {
  local code stopped='' tries=0 pid=''
  trap 'stopped=yes; [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true' TERM
  while :; do
    "$python" -m megatron_txssm.jobs.supervisor.supervisor "$@" &
    pid=$!
    # It may have come before there was anybody to tell.
    [[ -z $stopped ]] || kill -TERM "$pid" 2>/dev/null || true
    # A trap interrupts `wait`.
    while code=0 && { wait "$pid" || code=$?; } && kill -0 "$pid" 2>/dev/null; do :; done
    if ((code <= 128 || ++tries > 3)) || [[ $stopped ]]; then exit "$code"; fi
    say "END supervisor: killed by signal $((code - 128))"
  done
}

case $stage in
  pretrain) supervise "$@" ;;
  shard) step "$step_python" -m megatron_txssm.data.sharding.array_task "$@" ;;
  convert) step "$step_python" -m megatron_txssm.cli convert export "$@" ;;
  evaluate) step "$step_python" -m megatron_txssm.cli evaluate "$@" ;;
  *)
    echo "entrypoint.sh: unknown stage '$stage'; use pretrain, shard, convert or evaluate" >&2
    exit 2
    ;;
esac
