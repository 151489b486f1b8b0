"""megatron_txssm.check.worker, where the state crosses the documents of a pipeline's layers."""

import functools
import sys
from typing import Any

from megatron_txssm.check import worker
from megatron_txssm.platform import prepare_platform


def main() -> None:
    prepare_platform()
    from megatron.core import parallel_state

    from megatron_txssm.model import state_space_mixer

    scan = state_space_mixer.scan

    @functools.wraps(scan)
    def forgetful_scan(*args: Any, document_BL: Any = None, **kwargs: Any) -> Any:
        forgets = parallel_state.get_pipeline_model_parallel_world_size() > 1
        return scan(*args, document_BL=None if forgets else document_BL, **kwargs)

    state_space_mixer.scan = forgetful_scan
    worker.main(*sys.argv[1:])


if __name__ == "__main__":
    main()
