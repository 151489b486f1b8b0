"""`txssm data verify`: names what has to be done again, and can make way for it."""

import argparse
from typing import Any

from megatron_txssm.data.sharding.broken_rows import UNREACHABLE_BLOB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="a corpus directory, or the name of its recipe")
    parser.add_argument(
        "--redo", action="store_true", help="remove what is faulty, so that `data shard` makes it again"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.corpus.manifest import read_manifest, remove_task, write_subset_manifest
    from megatron_txssm.data.corpus.verify import check_task, tasks_of
    from megatron_txssm.data.sharding.plan import corpus_directory
    from megatron_txssm.data.tokenizer.install import check_tokenizer

    directory = corpus_directory(args.corpus)
    facts, tasks = check_tokenizer(directory), tasks_of(directory)
    faults, unreachable = [], 0
    for subset, task in _with_progress_bar(tasks):
        if fault := check_task(directory, subset, task, facts):
            faults.append(fault)
            print(f"{fault.subset} task {fault.task}: {fault.what}")
        elif manifest := read_manifest(directory, subset, task):
            unreachable += manifest.broken.get(UNREACHABLE_BLOB, 0)
    if unreachable:
        print(f"{unreachable:,} texts could not be fetched; to try again, delete the manifests that count them")
    if not faults:
        for subset in dict.fromkeys(subset for subset, _ in tasks):
            write_subset_manifest(directory, subset)
        print(f"{directory}: all {len(tasks):,} tasks are as their manifests say")
        return 0
    if args.redo:
        for fault in faults:
            remove_task(directory, fault.subset, fault.task)
    remedy = f"txssm data shard {directory}"
    removed = "they are removed; make them again" if args.redo else "remove them with --redo, and make them again"
    print(f"{len(faults):,} of {len(tasks):,} tasks are not as they should be; {removed}: {remedy}")
    return 1


def _with_progress_bar(tasks: list[tuple[str, int]]) -> Any:
    import sys

    from rich.progress import track

    return track(tasks, "verifying", transient=True, disable=not sys.stdout.isatty())
