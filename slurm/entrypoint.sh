#!/usr/bin/env bash
# Runs in every job: loads the site's settings, puts caches on node-local disk, then runs one stage.
#   entrypoint.sh pretrain RECIPE [--set a.b=c …]
#   entrypoint.sh shard EXECUTOR          one element of a job array of `txssm data shard --slurm`
#   entrypoint.sh convert RUN OUT
#   entrypoint.sh evaluate RUN
#   entrypoint.sh harness RUN --data FOLDER
set -euo pipefail

stage=$1
shift
home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
settings=${TXSSM_ENV:-$home/slurm/env.sh}
if [[ -e $settings ]]; then
  # Sourced as `txssm submit` sources it: every variable it sets is exported, and unset variables are allowed, because
  # environment modules use them.
  set -a +u
  # shellcheck source=slurm/env.example.sh
  source "$(realpath -- "$settings")"
  set +a -u
elif [[ -n ${TXSSM_ENV:-} ]]; then
  echo "entrypoint.sh: TXSSM_ENV=$TXSSM_ENV: no such file" >&2
  exit 2
fi
# With sbatch --export, srun would not pass the variables set here to the steps.
unset SLURM_EXPORT_ENV
# Import the code beside this script (a checkout, or a run's frozen copy) before any installed copy, and never from the
# current folder.
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# Otherwise each rank would start a thread for every core it sees. Slurm's default is one core per task.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
python=${TXSSM_PYTHON:-$home/.venv/bin/python}
step_python=${TXSSM_STEP_PYTHON:-$python}
# Hundreds of processes writing one cache at once would overload a network file system.
caches=${TXSSM_LOCAL_DIR:-${TMPDIR:-/tmp}}/txssm-$(id -un)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}

say() { printf '%(%Y-%m-%dT%H:%M:%S)T %s\n' -1 "$*"; }

# Runs a command as a step. A step killed by a signal (out of memory, node lost) is retried twice; a step that fails by
# itself would fail again. (When Slurm stops the job, it stops this shell, too.)
step() {
  local code=0 try options=()
  # Split into words: it may hold several options, such as those of a container.
  read -ra options <<<"${TXSSM_SRUN_OPTIONS:-}"
  say "START $stage: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${options[@]}" "$@" || code=$?
  say "END $stage: exit code $code"
  if ((code > 128 && ${SLURM_RESTART_COUNT:-0} < 2)); then
    say "requeueing job $SLURM_JOB_ID"
    # Wait up to a quarter of an hour for slurmctld to come back.
    for ((try = 0; try < 60; try++)); do
      scontrol requeue "$SLURM_JOB_ID" && break
      sleep 15
    done
  fi
  exit "$code"
}

# Runs the supervisor and restarts it if a signal kills it (usually the host running out of memory); otherwise the job
# would end with it. Slurm's SIGTERM is forwarded to the supervisor.
supervise() {
  local code stopped='' tries=0 pid=''
  trap 'stopped=yes; [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true' TERM
  while :; do
    "$python" -m megatron_txssm.jobs.supervisor.supervisor "$@" &
    pid=$!
    # SIGTERM may have arrived before the supervisor started.
    [[ -z $stopped ]] || kill -TERM "$pid" 2>/dev/null || true
    # A trap interrupts `wait`, so wait again while the process exists.
    while code=0 && { wait "$pid" || code=$?; } && kill -0 "$pid" 2>/dev/null; do :; done
    if ((code <= 128 || ++tries > 3)) || [[ $stopped ]]; then exit "$code"; fi
    say "END supervisor: killed by signal $((code - 128))"
  done
}

case $stage in
  pretrain) supervise "$@" ;;
  shard) step "$step_python" -m megatron_txssm.data.sharding.array_task "$@" ;;
  convert) step "$step_python" -m megatron_txssm.cli convert export "$@" ;;
  evaluate) step "$step_python" -m megatron_txssm.cli eval loss "$@" ;;
  harness) step "$step_python" -m megatron_txssm.cli eval harness "$@" ;;
  *)
    echo "entrypoint.sh: unknown stage '$stage'; use pretrain, shard, convert, evaluate or harness" >&2
    exit 2
    ;;
esac
