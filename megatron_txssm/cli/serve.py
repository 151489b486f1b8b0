"""txssm serve: transformers' own OpenAI-compatible server, with our class among those it can load."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from megatron_txssm.cli.parsing import add_verb
from megatron_txssm.errors import UserError

EXAMPLES = (
    "txssm serve exports/demo",
    "txssm serve exports/transxssm_1.3b --host 0.0.0.0 --port 9000",
    "curl localhost:8000/v1/completions -H 'content-type: application/json' \\\n"
    '    -d \'{"model": "exports/demo", "prompt": "import os", "max_tokens": 50}\'',
)
_NEEDS = ("fastapi", "uvicorn", "openai")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "serve", EXAMPLES)
    parser.add_argument("folder", metavar="HF", type=Path, help="a folder of `txssm convert export`")
    parser.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")


def run(args: argparse.Namespace) -> int:
    if not (args.folder / "config.json").is_file():
        raise UserError(f"{args.folder} is no Hugging Face model; make one with `txssm convert export RUN OUT`")
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'")
    # The server looks a model's class up in the module that it knows as transformers, which has no registry.
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main

    from megatron_txssm.hf import TransXSSMForCausalLM

    setattr(model_manager.transformers, "TransXSSMForCausalLM", TransXSSMForCausalLM)
    sys.argv[:] = ["txssm", "serve", str(args.folder), "--host", args.host, "--port", str(args.port)]
    main()
    return 0
