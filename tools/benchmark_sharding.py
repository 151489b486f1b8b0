#!/usr/bin/env python3
"""Speed and memory of `txssm data shard` and its rivals, in one run on one machine.

All must give identical tokens; otherwise the exit code is 1. Times are in seconds for whole commands, including
start-up; gigatoken's are for its call alone.

Rivals: datatrove's MegatronDocumentTokenizer; Megatron-LM's classic preprocessing (a pool of processes, a Hugging Face
tokenizer per document, IndexedDatasetBuilder); gigatoken alone, with texts and ids in memory. The text is Python source
code of the interpreter and its installed packages.

    .venv/bin/python tools/benchmark_sharding.py --tokenizer gpt-neox-20b/tokenizer.json --megabytes 100 --workers 2
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FILES = 8
EOD_TOKEN = "<|endoftext|>"
LONGEST_TEXT = 30_000
# Seconds; shorter runs are repeated.
SHORT = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--eod-token", default=EOD_TOKEN)
    parser.add_argument("--megabytes", type=int, default=100, help="of text (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", action="store_true", help="instead: peak memory at this size and at 8 times of it")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark_sharding_"))
    try:
        (compare_memory if args.memory else compare_speed)(args, folder)
    finally:
        shutil.rmtree(folder)


def compare_speed(args: argparse.Namespace, folder: Path) -> None:
    size = write_sources(folder / "source", args.megabytes * 1_000_000)
    tokenizer = write_tokenizer(args, folder)
    rivals: dict[str, Callable[[], str | None]] = {
        "txssm data shard": lambda: shard(folder / "source", folder / "ours", tokenizer, args),
        "gigatoken alone, in memory": lambda: gigatoken_alone(folder / "source", args),
        "datatrove MegatronDocumentTokenizer": lambda: datatrove(folder, tokenizer, args),
        "Megatron-LM classic": lambda: megatron_classic(folder, tokenizer, args),
    }
    print(f"{size / 1e6:.0f} MB of text in {FILES} parquet files, {args.workers} workers")
    first, digests = None, set()
    for name, run in rivals.items():
        seconds, digest = timed(run)
        first = first or seconds
        # gigatoken alone writes no tokens.
        digests |= {digest} - {None, ""}
        same = f"  tokens {digest[:12]}" if digest else ""
        print(
            f"{name:38} {seconds:8.2f} s {size / 1e6 / seconds:8.2f} MB/s  ours is {seconds / first:6.2f} x{same}",
            flush=True,
        )
    if len(digests) > 1:
        raise SystemExit("error: the tokens differ; the seconds above compare nothing")


def compare_memory(args: argparse.Namespace, folder: Path) -> None:
    """Print the largest resident size of any process, at two sizes of the corpus."""
    write_sources(folder / "source", args.megabytes * 1_000_000)
    tokenizer = write_tokenizer(args, folder)
    for copies in (1, 8):
        source = folder / f"source_{copies}"
        source.mkdir()
        for copy in range(copies):
            for path in (folder / "source").glob("*.parquet"):
                (source / f"{copy}_{path.name}").symlink_to(path)
        command = shard_command(source, folder / f"ours_{copies}", tokenizer, args, task_bytes=10**12)
        peak = peak_memory(command)
        print(f"{copies} x {args.megabytes} MB, one task: peak {peak / 2**20:.0f} MiB", flush=True)


def timed(run: Callable[[], str | None]) -> tuple[float, str | None]:
    """(seconds, result); the median of three for short runs."""
    seconds, result = once(run)
    if seconds < SHORT:
        seconds = sorted([seconds, once(run)[0], once(run)[0]])[1]
    return seconds, result


def once(run: Callable[[], str | None]) -> tuple[float, str | None]:
    # Flush earlier writes, so that the next run does not pay for them.
    os.sync()
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    # Runs that prepare their input report their own seconds.
    if isinstance(result, str) and "\n" in result:
        stated, _, result = result.partition("\n")
        seconds = float(stated)
    return seconds, result


def write_sources(folder: Path, size: int) -> int:
    """Write Parquet files of distinct documents; returns the bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    texts, total = [], 0
    for text in python_sources():
        if total >= size:
            break
        texts.append(text)
        total += len(text.encode())
    for number in range(FILES):
        part = texts[number::FILES]
        table = pa.table({"text": part, "id": [f"{number}-{index}" for index in range(len(part))]})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=1000)
    return total


def python_sources() -> Iterator[str]:
    paths = sorted({p for key in ("stdlib", "purelib", "platlib") for p in Path(sysconfig.get_path(key)).rglob("*.py")})
    random.Random(0).shuffle(paths)
    seen = set()
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")[:LONGEST_TEXT]
        if text.strip() and text not in seen:
            seen.add(text)
            yield text


def write_tokenizer(args: argparse.Namespace, folder: Path) -> Path:
    (folder / "tokenizer").mkdir()
    shutil.copyfile(args.tokenizer, folder / "tokenizer" / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": args.eod_token}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer"


def shard_command(source: Path, output: Path, tokenizer: Path, args: argparse.Namespace, task_bytes: int) -> list[str]:
    subset = {"source": str(source), "validation_fraction": 0, "task_bytes": task_bytes}
    recipe = output.with_suffix(".yaml")
    # JSON is YAML.
    recipe.write_text(
        json.dumps({"output": str(output), "tokenizer": {"model": str(tokenizer)}, "subsets": {"web": subset}})
    )
    return [
        sys.executable,
        "-m",
        "megatron_txssm.cli",
        "data",
        "shard",
        str(recipe),
        "--workers",
        str(args.workers),
    ]


def shard(source: Path, output: Path, tokenizer: Path, args: argparse.Namespace) -> str:
    shutil.rmtree(output, ignore_errors=True)
    # One task per file, as in datatrove.
    task_bytes = max(path.stat().st_size for path in source.iterdir())
    command = shard_command(source, output, tokenizer, args, task_bytes)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return digest_of(sorted(output.glob("web/*.train.bin")))


def gigatoken_alone(source: Path, args: argparse.Namespace) -> str:
    """Texts are read before the clock starts; uses all threads."""
    script = """
import sys, time, glob, gigatoken, pyarrow.parquet as pq
texts = [text for path in sorted(glob.glob(sys.argv[1])) for text in pq.read_table(path)["text"].to_pylist()]
tokenizer = gigatoken.Tokenizer(sys.argv[2])
begin = time.perf_counter()
tokenizer.encode_batch(texts, parallel=True)
print(time.perf_counter() - begin)
"""
    command = [sys.executable, "-c", script, str(source / "*.parquet"), args.tokenizer]
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.workers)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip() + "\n"


def datatrove(folder: Path, tokenizer: Path, args: argparse.Namespace) -> str:
    script = """
import sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    source, output, tokenizer, eod, tasks, workers = sys.argv[1:]
    LocalPipelineExecutor(
        [ParquetReader(source), MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eod)],
        tasks=int(tasks), workers=int(workers), logging_dir=output + "_logs",
    ).run()
"""
    path = folder / "datatrove_run.py"
    path.write_text(script)
    words = [folder / "source", folder / "datatrove", tokenizer / "tokenizer.json", args.eod_token, FILES, args.workers]
    environment = os.environ | {"RAYON_NUM_THREADS": "1"} if args.workers > 1 else os.environ
    command = [sys.executable, str(path), *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return digest_of(sorted((folder / "datatrove").glob("*.bin")))


def megatron_classic(folder: Path, tokenizer: Path, args: argparse.Namespace) -> str:
    """As in tools/preprocess_data.py: JSON lines, a pool that encodes line by line, one writer."""
    import pyarrow.parquet as pq

    script = """
import json, multiprocessing, os, sys
import numpy, torch
from megatron_txssm.platform import prepare_platform
prepare_platform()
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoTokenizer
source, output, name, workers = sys.argv[1:]

def start():
    global tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(name)

def encode(line):
    return [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]

if __name__ == "__main__":
    builder = IndexedDatasetBuilder(output + ".bin", dtype=numpy.uint16)
    with multiprocessing.Pool(int(workers), start) as pool, open(source, encoding="utf-8") as lines:
        for ids in pool.imap(encode, lines, 32):
            builder.add_item(torch.IntTensor(ids))
            builder.end_document()
    builder.finalize(output + ".idx")
"""
    lines, path = folder / "lines.jsonl", folder / "classic_run.py"
    path.write_text(script)
    with lines.open("w", encoding="utf-8") as stream:
        for source in sorted((folder / "source").glob("*.parquet")):
            for text in pq.read_table(source)["text"].to_pylist():
                stream.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, str(path), str(lines), str(folder / "classic"), str(tokenizer), str(args.workers)]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return f"{time.perf_counter() - begin}\n{digest_of([folder / 'classic.bin'])}"


def digest_of(paths: list[Path]) -> str:
    """SHA-256 of the tokens of all shards, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def peak_memory(command: list[str]) -> int:
    """The largest resident size, in bytes, of any process of a command, polled every 20 ms."""
    import psutil

    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        for child in (process, *process.children(recursive=True)):
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.Error:
                continue
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return peak


if __name__ == "__main__":
    main()
