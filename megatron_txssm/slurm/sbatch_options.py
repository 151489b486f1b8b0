"""sbatch options of sites and users: which exist, which a run sets itself, and which are costly to omit."""

import os
from collections.abc import Iterator, Mapping, Sequence

from megatron_txssm.errors import UserError, shown
from megatron_txssm.slurm.client import PLAIN_WORD
from megatron_txssm.slurm.time_limit import limit_seconds

# sbatch's long option -> its value; None for an option without a value, "" to omit it.
Options = Mapping[str, str | None]

_GPUS, _PROCESSES = "is set by --gpus-per-node", "is set by --nproc-per-node or --gpus-per-node"
_RUN_FOLDER = "is fixed: a run's jobs write to its folder"
_RESTARTS = "is fixed: a run's jobs restart by themselves, as often as --max-requeues allows"
# Options that give no job, several jobs, or one that runs something else; they have no replacement.
_NO_JOB = "array help parsable test-only usage version wait wrap"
# sbatch option that a run sets itself -> how.
OURS = {
    **dict.fromkeys(("nodes", "use-min-nodes"), "is set by --nodes"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"), _GPUS),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-gpu"), _PROCESSES),
    **dict.fromkeys(("ntasks-per-core", "ntasks-per-socket"), _PROCESSES),
    "signal": "is set by --stop-before",
    "dependency": "is set by --after",
    "job-name": "is set by the recipe's name",
    **dict.fromkeys(("output", "error", "open-mode"), _RUN_FOLDER),
    **dict.fromkeys(("requeue", "no-requeue", "no-kill", "kill-on-invalid-dep"), _RESTARTS),
    **dict.fromkeys(_NO_JOB.split(), ""),
}
# All other options of Slurm 20.02 to 25.11; those of newer versions are accepted, too.
_OTHERS = """
account acctg-freq batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments constraint
container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
distribution exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gres
gres-flags hint hold ignore-pbs input job-id licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu
mincpus network nice nodefile nodelist oom-kill-step overcommit oversubscribe partition power prefer priority profile
propagate qos quiet reboot reservation resv-ports segment sockets-per-node spread-job spread-segments stepmgr switches
thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid verbose wait-all-nodes wckey
"""


def parse_options(texts: Sequence[str], source: str) -> dict[str, str | None]:
    """Parse sbatch options such as `exclusive` or `cpus-per-task=12`; UserError names their `source`."""
    options = split_options(texts, source)
    for text, name in zip(texts, map(_name, texts), strict=True):
        if (ours := OURS.get(name)) == "":
            raise UserError(f"{source} {shown(text)} would change what kind of job this is; leave it out")
        if ours is not None:
            raise UserError(f"{source} {shown(text)} {ours}; leave it out")
        # sbatch accepts any unambiguous prefix of an option.
        whole = [known for known in (*OURS, *_OTHERS.split()) if known.startswith(name)]
        if whole and name not in _OTHERS.split():
            raise UserError(f"{source} {shown(text)} must be the whole name of an option: {' or '.join(sorted(whole))}")
    return options


def split_options(texts: Sequence[str], source: str) -> dict[str, str | None]:
    """Like `parse_options`, for a batch script's own options: every name is accepted."""
    options: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name[:1].isalpha() or not PLAIN_WORD.fullmatch(text):
            raise UserError(
                f"{source} {shown(text)} must be a long option of sbatch without its dashes, or NAME=VALUE, "
                "in one plain word"
            )
        options[name] = value if equals else None
    return options


def check_time(options: Options, stop_before: int) -> None:
    """UserError if the job would be told to stop as soon as it starts."""
    name, limit = "--time", options.get("time")
    if limit is None:
        name, limit = "SBATCH_TIMELIMIT", os.environ.get("SBATCH_TIMELIMIT", "")
    seconds = limit_seconds(limit)
    if seconds is not None and seconds <= stop_before:
        raise UserError(
            f"{name} {limit} is {seconds:.0f} s, and --stop-before {stop_before} makes the trainer save and stop "
            "that long before the end, so at once; state a longer limit or a smaller --stop-before"
        )


def costly_defaults(options: Options) -> Iterator[str]:
    """Options that a GPU job should state, each with the costly default."""

    def asked(*names: str) -> bool:
        variables = (f"SBATCH_{name.upper().replace('-', '_')}" for name in names)
        return any(options.get(name, "") != "" for name in names) or any(map(os.environ.get, variables))

    if not asked("cpus-per-task", "cpus-per-gpu", "tres-per-task", "exclusive"):
        yield "cpus-per-task=N (else Slurm gives each rank one core, for its data loaders, too)"
    if not asked("mem", "mem-per-cpu", "mem-per-gpu", "mem-per-node"):
        yield "mem=0 (else the partition's default memory)"
    if not asked("exclusive"):
        yield "exclusive (else other jobs run on the same nodes)"


def _name(text: str) -> str:
    return text.partition("=")[0]
