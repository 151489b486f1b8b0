#!/usr/bin/env python
"""Wall time and peak memory of `txssm convert export` for a recipe's model, with random weights.

    python tools/benchmark_export.py transxssm_1.3b
    python tools/benchmark_export.py transxssm_1.3b --verify --folder /scratch --max-file-gb 2

Saves a checkpoint of the model in one process (in the recipe's precision), exports it, and compares the peak memory
with a limit of 1.3 x the biggest file of either copy + 2 GB. With --verify, the proof's processes count, too, each of
which holds the model in fp32.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("--folder", type=Path, help="where both copies go for a while (default: the temporary folder)")
    parser.add_argument("--max-file-gb", type=float, default=2.0, metavar="GB", help="as of the export (default: 2)")
    parser.add_argument("--verify", action="store_true", help="with the proof")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.recipe, args.make)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="txssm-export-") as folder:
        checkpoints, out = Path(folder, "checkpoints"), Path(folder, "out")
        subprocess.run(
            [sys.executable, __file__, args.recipe, "--make", checkpoints], stdout=subprocess.DEVNULL, check=True
        )
        command = [sys.executable, "-m", "megatron_txssm.cli", "convert", "export", str(checkpoints), str(out)]
        command += ["--max-file-gb", str(args.max_file_gb), *([] if args.verify else ["--no-verify"])]
        begin = time.perf_counter()
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            return 1
        biggest = max(file.stat().st_size for file in [*checkpoints.rglob("*.distcp"), *out.glob("*.safetensors")])
        limit = 1.3 * biggest + 2e9
        print(f"wall time    {seconds:.1f} s")
        of = f"(limit {limit / 1e9:.2f} GB; biggest file {biggest / 1e9:.2f} GB)"
        print(f"peak memory  {usage.ru_maxrss * 1024 / 1e9:.2f} GB {of}")
        for file in sorted(out.glob("*.safetensors")):
            print(f"             {file.name} {file.stat().st_size / 1e9:.2f} GB")
    return 0


def make_checkpoint(recipe_name: str, out: Path) -> None:
    """Create a `release` checkpoint of random weights with Megatron."""
    from megatron_txssm.checkpoint.load import WEIGHTS_ONLY, build_model, one_process_recipe
    from megatron_txssm.recipe.changes import changed
    from megatron_txssm.recipe.loader import load_recipe

    out.mkdir(parents=True)
    recipe = changed(load_recipe(recipe_name), WEIGHTS_ONLY)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    model = build_model(one_process_recipe(recipe), [f"--save={out}", "--no-save-optim", "--no-save-rng"])
    import torch
    from megatron.training.checkpointing import save_checkpoint

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    save_checkpoint(0, [model], None, None, 0, release=True)


if __name__ == "__main__":
    sys.exit(main())
