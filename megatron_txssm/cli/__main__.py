"""`python -m megatron_txssm.cli`: `txssm` under a given interpreter."""

import sys

from megatron_txssm.cli.main import main

sys.exit(main())
