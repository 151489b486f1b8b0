"""The options of `txssm submit` that reach the job's supervisor."""

import argparse

# Option -> (default, unit, what it says).
LIMITS = {
    "start-timeout": (1800, "SECONDS", "end the trainer as hung if its first step takes longer"),
    "step-timeout": (1800, "SECONDS", "end the trainer as hung after so long without a step or a validation"),
    "save-timeout": (1800, "SECONDS", "end the trainer as hung if a checkpoint takes longer"),
    "stop-before": (120, "SECONDS", "before the time limit, the trainer saves and the job requeues itself"),
    "preflight-timeout": (300, "SECONDS", "leave out a node that has not answered by then; container images take long"),
    "restarts": (3, "N", "failures after which the trainer starts again within the job, before a requeue"),
    "max-requeues": (10, "N", "failures, restarts included, after which the job ends"),
}


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that `txssm submit` hands on."""
    for name, (default, unit, meaning) in LIMITS.items():
        meaning += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, metavar=unit, default=default, help=meaning)
