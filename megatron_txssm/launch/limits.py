"""The options of `txssm submit` that reach the job's supervisor."""

import argparse

# Option -> (default, unit, what it says).
LIMITS = {
    "start-timeout": (1800, "SECONDS", "without a first step for so long, the trainer is ended as hung"),
    "step-timeout": (1800, "SECONDS", "the same without a step or a validation"),
    "save-timeout": (1800, "SECONDS", "the same while a checkpoint is written"),
    "stop-before": (120, "SECONDS", "before the time limit, the trainer saves and the job requeues itself"),
    "preflight-timeout": (300, "SECONDS", "a node that has not answered by then is left out; an image may take long"),
    "restarts": (3, "N", "of the trainer within the job, after failures behind new steps, before a requeue"),
    "max-requeues": (10, "N", "after failures; preemptions and time limits are not counted"),
}


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that `txssm submit` hands on."""
    for name, (default, unit, meaning) in LIMITS.items():
        meaning += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, metavar=unit, default=default, help=meaning)
