"""Why a job is pending, and what its owner can do about it."""

from megatron_txssm.slurm.client import Job

# Prefix of Slurm's reason, ignoring case and underscores -> what to do; {job} is the job's number.
_REASONS = {
    "jobhelduser": "it is held: scontrol release {job}",
    "job requeued in held state": "it was requeued and is held: scontrol release {job}",
    "jobheldadmin": "an administrator or Slurm holds it: scontrol release {job}; if refused, ask an administrator",
    "launch failed requeued held": (
        "its node could not start it, and Slurm holds it: scontrol release {job} once that node is repaired or "
        "excluded (scontrol update JobId={job} ExcNodeList=NODE)"
    ),
    "jobholdmaxrequeue": "Slurm has started it too often (MaxBatchRequeue) and holds it: scontrol release {job}",
    "dependencyneversatisfied": (
        "the job that it waits for has failed, so it can never start: scancel {job}, fix that one, submit again"
    ),
    "dependency": "nothing: it starts when the job before it has succeeded",
    "begintime": "nothing: after a requeue, Slurm waits some time before it starts a job again",
    "priority": "nothing: other jobs come first; squeue --start --jobs={job} estimates when it starts",
    "resources": "nothing: it waits for free nodes; squeue --start --jobs={job} estimates when it starts",
    "reqnodenotavail": (
        "nodes that it needs are down, drained or reserved (sinfo --list-reasons): wait, or request fewer, or another "
        "partition"
    ),
    # Slurm's sentence for the same reason.
    "nodes required for job are down": (
        "nodes that it needs are down, drained or reserved (sinfo --list-reasons): wait, or request fewer, or another "
        "partition"
    ),
    "nodedown": "a node that it needs is down (sinfo --list-reasons): wait, or request other nodes",
    "partitiondown": "its partition takes no jobs now: wait, or submit it to another --partition",
    "partitioninactive": "its partition starts no jobs now: wait, or submit it to another --partition",
    "partitiontimelimit": "its --time exceeds the limit of its partition: scancel {job}, and submit it with less",
    "partitionnodelimit": "its partition lacks, or does not allow, that many nodes: scancel {job}, and request fewer",
    "partitionconfig": "its partition does not allow what it requests: scancel {job}, and request less",
    "badconstraints": "no node has what it requests: scancel {job}, and submit it with other options",
    "invalid": "its account or QOS is not valid: scancel {job}, and submit it with --account NAME or --sbatch qos=NAME",
    "accountnotallowed": "its account may not use this partition: scancel {job}, and submit it with another --account",
    "qosnotallowed": "its QOS may not use this partition: scancel {job}, and submit it with --sbatch qos=NAME",
    "reservation": "it waits for its reservation: scontrol show reservation",
    "qos": "it exceeds a limit of its QOS: wait until your other jobs end, or request less (sacctmgr show qos)",
    "assoc": "it exceeds a limit of its account: wait until other jobs end, or request less (sacctmgr show assoc)",
    "max": "it exceeds a limit of its account or user: wait until other jobs end, or request less",
}


def what_it_waits_for(job: Job) -> str:
    """What to do about a pending job: "nothing: …", or a command; empty if unknown."""
    reason = job.reason.replace("_", " ").lower()
    found = next((text for begin, text in _REASONS.items() if reason.startswith(begin)), "")
    return found.format(job=job.job_id)


def needs_somebody(job: Job) -> bool:
    """Whether a job waits for a person to act."""
    todo = what_it_waits_for(job)
    return job.state == "PENDING" and bool(todo) and not todo.startswith("nothing")
