"""Answers OpenAI-style requests with a Hugging Face model, by transformers' own server with our class registered."""

import importlib.util
import sys
from pathlib import Path

from megatron_txssm.errors import UserError

_NEEDS = ("fastapi", "uvicorn", "openai")


def serve(folder: str | Path, *, host: str = "localhost", port: int = 8000) -> int:
    """Serve a folder of `convert.export` at an address, until a signal ends it; returns the exit code.

    The server takes its options from sys.argv, which is changed. UserError if the model or the server's packages are
    missing.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face model; make one with `txssm convert export RUN OUT`")
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'")
    # The server looks up model classes in the transformers module that it imported, which has no registry.
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main

    from megatron_txssm.hf import TransXSSMForCausalLM

    setattr(model_manager.transformers, "TransXSSMForCausalLM", TransXSSMForCausalLM)
    sys.argv[:] = ["txssm", "serve", str(folder), "--host", host, "--port", str(port)]
    main()
    return 0
