"""Stock Megatron-LM's own pretraining script, with our arguments in its parser.

Stock Megatron-LM (the release of our megatron-core) trains our model without anything of ours but the block spec:

    torchrun … pretrain_gpt.py --spec megatron_txssm.model.layer_specs transxssm_block_spec …

Its own --mamba-* arguments set the sizes, and what its parser has no argument for has our default
(arguments.DEFAULTS: Unified RoPE, seven state-space layers to one of attention). To set these as well, start the same
script through this module:

    torchrun … -m megatron_txssm.model.stock pretrain_gpt.py \\
        --spec megatron_txssm.model.layer_specs transxssm_block_spec --position-encoding a_t --layer-pattern SSSA …

The script runs unchanged. Either way add --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope, as every recipe of ours does. Initial weights are Megatron's own there, another draw
at every tensor-parallel size: our initialisation by name belongs to `txssm pretrain`.
"""

import functools
import os
import runpy
import sys
from argparse import ArgumentParser

from megatron_txssm.platform import prepare_platform

USAGE = "usage: torchrun … -m megatron_txssm.model.stock SCRIPT [its arguments]"


def main() -> None:
    """Run `sys.argv[1]` as Python would run it, where Megatron's parser knows our arguments."""
    if len(sys.argv) < 2:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"error: no file {script}; give the path of Megatron-LM's pretrain_gpt.py\n{USAGE}", file=sys.stderr)
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
    """Exit where an argument of ours asks for what `txssm pretrain` does with the data."""
    for argument in arguments:
        if argument.partition("=")[0] in ("--isolate-documents", "--blend-stages"):
            print(f"error: {argument} is obeyed by `txssm pretrain` only; leave it out here", file=sys.stderr)
            sys.exit(2)


def register_arguments() -> None:
    """From now on every parser that Megatron makes for itself has our argument group."""
    from megatron.training import arguments

    from megatron_txssm.model.arguments import add_transxssm_arguments

    stock = arguments.add_megatron_arguments

    @functools.wraps(stock)
    def with_ours(parser: ArgumentParser) -> ArgumentParser:
        return add_transxssm_arguments(stock(parser))

    arguments.add_megatron_arguments = with_ours


if __name__ == "__main__":
    main()
