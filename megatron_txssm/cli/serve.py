"""txssm serve: transformers' own OpenAI-compatible server, with our model class registered."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.evaluation.serve import serve

EXAMPLES = (
    "txssm serve exports/demo",
    "txssm serve exports/transxssm_1.3b --host 0.0.0.0 --port 9000",
    "curl localhost:8000/v1/completions -H 'content-type: application/json' \\\n"
    '    -d \'{"model": "exports/demo", "prompt": "import os", "max_tokens": 50}\'',
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "serve", EXAMPLES)
    parser.add_argument("folder", metavar="HF", type=Path, help="a folder written by `txssm convert export`")
    parser.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")


def run(args: argparse.Namespace) -> int:
    return serve(args.folder, host=args.host, port=args.port)
