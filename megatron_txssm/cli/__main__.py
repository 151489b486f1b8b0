"""`python -m megatron_txssm.cli`: what `txssm` runs, for an interpreter that is named."""

import sys

from megatron_txssm.cli.main import main

sys.exit(main())
