#!/bin/bash
# What a job's output holds after each kind of end, in the words of the Slurm that is installed: how the texts beside
# this file were made, on a cluster of tools/slurm_sandbox up 3 (for newer versions, in a root of Debian's packages).
#   eval "$(tools/slurm_sandbox env)"; tests/slurm/slurm_words/record.sh >tests/slurm/slurm_words/VERSION.txt
folder=$(mktemp -d)
cd "$folder" || exit
cat >task.sh <<'END'
#!/bin/bash
case $1:$SLURM_PROCID in
  kill9:1) sleep 3; kill -9 $$ ;;
  segv:1) sleep 3; kill -SEGV $$ ;;
  exit1:1) sleep 3; exit 1 ;;
  exit3both:*) sleep 3; exit 3 ;;
  graceful:*) trap 'sleep 1; exit 0' TERM ;;
esac
touch up
for _ in $(seq 900); do sleep 0.1; done
END
cat >job.sh <<'END'
#!/bin/bash
echo "START $(date +%FT%T) restart ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then exit 0; fi
trap 'echo told' TERM
srun --kill-on-bad-exit=1 --job-name=train ./task.sh "$1" &
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
echo "END srun $code"
exit $code
END
printf '#!/bin/bash\nsleep 2\n' >urgent.sh
chmod +x ./*.sh

# NAME TASK COMMAND [OPTION...]: COMMAND is run when the tasks are up, JOB in it is the job's number.
record() {
  local name=$1 task=$2 command=$3 job
  rm -f up
  job=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output="$name.out" "${@:4}" job.sh "$task")
  if [[ $command ]]; then
    until [[ -e up ]]; do sleep 0.1; done
    sleep 1
    eval "${command//JOB/$job}" >/dev/null
  fi
  sleep 8 # a requeued job is pending for a moment only
  while squeue --noheader --jobs="$job" --format=%T,%r 2>/dev/null | grep -Ev "held" | grep -Eq "PENDING|RUNNING|COMPLETING"; do
    sleep 0.5
  done
  echo "=== $name"
  cat "$name.out"
}
urgent="sbatch --output=/dev/null --partition=high --nodes=3 --exclusive urgent.sh"
for task in kill9 segv exit1 exit3both; do record $task $task ""; done
record scancel_step forever "scancel JOB.0"
record scancel_step_graceful graceful "scancel JOB.0"
record signal_step_term graceful "scancel --signal=TERM JOB.0"
record signal_step_kill forever "scancel --signal=KILL JOB.0"
record scancel_job forever "scancel JOB"
record scancel_job_graceful graceful "scancel JOB"
record scancel_full graceful "scancel --full JOB"
record requeue forever "scontrol requeue JOB"
record requeuehold forever "scontrol requeuehold JOB"
record preempted forever "$urgent" --exclusive
record preempted_graceful graceful "$urgent" --exclusive
scontrol update PartitionName=main PreemptMode=CANCEL
record preempt_cancel forever "$urgent" --exclusive
record preempt_cancel_graceful graceful "$urgent" --exclusive
scontrol update PartitionName=main PreemptMode=REQUEUE
record timelimit forever "" --time=1
