"""The versions of transformers that this code supports; imported before anything that other versions lack."""

import inspect
from typing import Any

import transformers
from packaging.version import Version

OLDEST, NEWEST_TESTED, FIRST_REFUSED = "5.23", "5.24", "6"


def check_version(version: str) -> None:
    """ImportError for unsupported versions, a warning for versions newer than the last tested one."""
    release = Version(version).release[:2]
    if not Version(OLDEST).release <= release < Version(FIRST_REFUSED).release:
        wanted = f"transformers>={OLDEST},<{FIRST_REFUSED}"
        raise ImportError(f"TransXSSM needs {wanted}, and version {version} is installed; run: pip install '{wanted}'")
    if release > Version(NEWEST_TESTED).release:
        transformers.utils.logging.get_logger(__name__).warning(
            f"transformers {version} is newer than {NEWEST_TESTED}, the last version that TransXSSM was tested with; "
            "check that generate() gives the same output with use_cache=True and use_cache=False"
        )


check_version(transformers.__version__)

# generate()'s name for the cache, in a model's arguments and outputs: 5.24 renamed it.
_prepare: Any = getattr(transformers.GenerationMixin, "prepare_inputs_for_generation")  # noqa: B009
CACHE_NAME = "cache" if "cache" in inspect.signature(_prepare).parameters else "past_key_values"
