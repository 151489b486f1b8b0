"""Runs stock Megatron-LM's pretraining script with our arguments in its parser.

Stock Megatron-LM (the release of our megatron-core) can train our model with only our stack spec:

    torchrun … pretrain_hybrid.py --spec megatron_txssm.model.layer_specs transxssm_stack_spec \\
        --hybrid-layer-pattern M-M-M-*- …

Its own --mamba-* arguments set the sizes. Settings unknown to its parser have our defaults (arguments.DEFAULTS:
Unified RoPE). To set these as well, start the same script through this
module:

    torchrun … -m megatron_txssm.model.stock pretrain_hybrid.py \\
        --spec megatron_txssm.model.layer_specs transxssm_stack_spec --hybrid-layer-pattern M-M-M-*- \\
        --position-encoding a_t …

The script runs unchanged. Either way add --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope, as all our recipes do. Initial weights are then Megatron's own, which differ between
tensor-parallel sizes: only `txssm pretrain` initialises by name.
"""

import functools
import os
import runpy
import sys
from argparse import ArgumentParser

from megatron_txssm.platform import prepare_platform

USAGE = "usage: torchrun … -m megatron_txssm.model.stock SCRIPT [its arguments]"


def main() -> None:
    """Run `sys.argv[1]` as Python would, with our arguments in Megatron's parser."""
    if len(sys.argv) < 2:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"error: no file {script}; give the path of Megatron-LM's pretrain_hybrid.py\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    _refuse_what_its_loop_ignores(sys.argv[2:])
    platform_arguments = prepare_platform()
    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    register_arguments()
    sys.argv[:] = [*sys.argv[1:], *platform_arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def _refuse_what_its_loop_ignores(arguments: list[str]) -> None:
    """Exit on arguments that only the data loading of `txssm pretrain` implements."""
    for argument in arguments:
        if argument.partition("=")[0] in ("--isolate-documents", "--blend-stages"):
            print(f"error: {argument} only works with `txssm pretrain`; leave it out here", file=sys.stderr)
            sys.exit(2)


def register_arguments() -> None:
    """Add our argument group to every parser that Megatron creates from now on."""
    from megatron.training import arguments

    from megatron_txssm.model.arguments import add_transxssm_arguments

    stock = arguments.add_megatron_arguments

    @functools.wraps(stock)
    def with_ours(parser: ArgumentParser) -> ArgumentParser:
        return add_transxssm_arguments(stock(parser))

    arguments.add_megatron_arguments = with_ours


if __name__ == "__main__":
    main()
