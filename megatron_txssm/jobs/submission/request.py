"""The arguments of `submit`, and the checks that need nothing else."""

import os
import shlex
from dataclasses import dataclass, fields

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.limits import DEFAULTS, Limits
from megatron_txssm.jobs.submission.allocation import Allocation
from megatron_txssm.slurm.sbatch_options import check_time, parse_options

# Fields of `Request` whose option has another name.
_OPTIONS = {"overrides": "--set", "freeze_code": "--no-freeze-code"}


@dataclass(frozen=True)
class Request:
    """The arguments of `megatron_txssm.jobs.submit.submit`, which documents them."""

    recipe: str
    nodes: int
    gpus_per_node: int | None = None
    nproc_per_node: int | None = None
    spare: int = 0
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    sbatch: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    chain: bool = False
    corpus: str | None = None
    dry_run: bool = False
    freeze_code: bool = True
    limits: Limits = DEFAULTS

    def check(self) -> None:
        """UserError for the first argument that is invalid on every cluster."""
        for name, smallest in {"nodes": 1, "spare": 0}.items():
            if (value := getattr(self, name)) < smallest:
                raise UserError(f"--{name} {value} must be at least {smallest}")
        self.limits.check()
        for job in self.after:
            if not job.isdecimal():
                raise UserError(f"--after {job!r} must be the number of a job")
        if self.corpus and not self.chain:
            raise UserError(f"--corpus {self.corpus} goes with --chain")

    @property
    def allocation(self) -> Allocation:
        """With the site's number of GPUs if the request states none; UserError if the site states none either."""
        gpus, nproc = self.gpus_per_node, self.nproc_per_node
        if gpus is None and nproc is None:
            site = os.environ.get("TXSSM_GPUS_PER_NODE")
            if site is None or not site.isdecimal():
                raise UserError(
                    "state --gpus-per-node, or --nproc-per-node for nodes without GPUs (or TXSSM_GPUS_PER_NODE in "
                    "slurm/env.sh)"
                )
            gpus = int(site)
        if gpus and nproc and gpus != nproc:
            raise UserError(
                f"--nproc-per-node {nproc} is not --gpus-per-node {gpus}: each process has one GPU; state one"
            )
        found = Allocation(self.nodes, nproc_per_node=nproc or gpus or 0, gpus_per_node=gpus or 0, spare=self.spare)
        if found.nproc_per_node < 1:
            raise UserError(f"{found.nproc_per_node} processes per node must be at least 1")
        return found

    @property
    def sbatch_options(self) -> dict[str, str | None]:
        """The site's options, overridden by the request's; UserError for one that sbatch, or a run, cannot use."""
        options = parse_options(os.environ.get("TXSSM_SBATCH_OPTIONS", "").split(), "TXSSM_SBATCH_OPTIONS")
        options |= parse_options(self.sbatch, "--sbatch")
        for name in ("time", "partition", "account"):
            if (value := getattr(self, name)) is not None:
                if not value:
                    raise UserError(f"--{name} is empty; leave it out for the default")
                options[name] = value
        check_time(options, self.limits.stop_before)
        return options

    @property
    def command(self) -> str:
        """The equivalent `txssm submit` command."""
        words = ["txssm", "submit", self.recipe]
        for each in fields(self):
            value, option = getattr(self, each.name), _OPTIONS.get(each.name, f"--{each.name.replace('_', '-')}")
            if each.name in ("recipe", "limits") or value == each.default:
                continue
            if isinstance(value, tuple):
                words += [f"{option}={text}" for text in value]
            else:
                words.append(option if isinstance(value, bool) else f"{option}={value}")
        return shlex.join([*words, *(word for word in self.limits.words if word not in DEFAULTS.words)])
