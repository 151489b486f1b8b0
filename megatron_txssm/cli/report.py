"""txssm report: runs as one HTML page."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_verb

EXAMPLES = (
    "txssm report runs/demo",
    "txssm report transxssm_1.3b transxssm_1.3b_muon --out compared.html",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "report", EXAMPLES)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run folder, a name under runs/, or the number of one of its jobs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="where to write the page (default: RUN/report.html; of several runs, report.html in this folder)",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.reporting.report import report

    return report(args.runs, out=args.out)
