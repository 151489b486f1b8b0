"""The demo: from text to a trained model that generates, on one machine without a GPU."""

import math
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch.preflight import check_checkpoint, saved_step
from megatron_txssm.training.processes import launch, worker_command

if TYPE_CHECKING:
    from megatron_txssm.data.corpus.manifest import Corpus

RECIPE = "demo_cpu"
PROMPT = "def read_file(path):\n"


def run_demo(overrides: Sequence[str] = ()) -> int:
    """Make data, train, stop, resume, compare, generate; finished parts are not repeated. Returns the exit code.

    overrides: fields of the demo's recipe, as "a.b=c".
    """
    recipe = load_recipe(RECIPE, overrides)
    print("1/5  text: this Python's own library, tokenised by a SentencePiece model trained on it", flush=True)
    corpus = prepare_data(recipe)
    # The recipe names the default corpus; another vocabulary or run directory has its own.
    overrides = [*overrides, f"data.corpus={corpus.directory}"]
    recipe = load_recipe(RECIPE, overrides)
    check_checkpoint(recipe)
    if latest_step(recipe) >= recipe.train_iters:
        start_afresh(recipe)
    half = recipe.train_iters // 2
    for number, what, stop in (
        (2, f"train to step {half}, save, stop", [f"megatron.exit_interval={half}"]),
        (3, f"resume from the checkpoint, train to step {recipe.train_iters}", []),
    ):
        print(f"{number}/5  {what}", flush=True)
        if stop and latest_step(recipe) >= half:
            print("     already finished")
            continue
        code = train(overrides + stop)
        if code != 0:
            return code

    print("4/5  compare with n-gram models of the same training tokens", flush=True)
    report(recipe, corpus)
    print("5/5  let it write", flush=True)
    return write(recipe)


def prepare_data(recipe: Recipe) -> "Corpus":
    """Make the recipe's data, unless it exists."""
    from megatron_txssm.demo.corpus import prepare_demo_corpus

    return prepare_demo_corpus(recipe.run_path / "data", vocab_size=recipe.data.vocab_size)


def latest_step(recipe: Recipe) -> int:
    """The newest checkpoint's step; 0 without a checkpoint."""
    return saved_step(recipe.checkpoint_path) or 0


def start_afresh(recipe: Recipe) -> None:
    """Remove a finished demo's outputs, but not its data. UserError if the checkpoints are another run's."""
    made_by = recipe.checkpoint_path / "recipe.yaml"
    if not made_by.is_file() or load_recipe(made_by).name != RECIPE:
        raise UserError(f"{recipe.checkpoint_path} holds another run's checkpoints; use another run_directory")
    for folder in (recipe.checkpoint_path, recipe.run_path / "tensorboard", recipe.run_path / "logs"):
        shutil.rmtree(folder, ignore_errors=True)
    (recipe.run_path / "metrics.jsonl").unlink(missing_ok=True)


def train(overrides: list[str]) -> int:
    recipe = load_recipe(RECIPE, overrides)
    return launch(recipe, None, worker_command("pretrain", RECIPE, overrides=overrides))


def report(recipe: Recipe, corpus: "Corpus") -> None:
    """Print the model's and the n-grams' validation losses, and draw the loss curve."""
    import numpy as np

    from megatron_txssm.data.corpus.shard import read_tokens
    from megatron_txssm.demo.ngram import bigram_loss, unigram_loss
    from megatron_txssm.reporting.plot import plot_runs
    from megatron_txssm.reporting.series import read_series

    train, validation = (
        np.concatenate([read_tokens(p) for subset in corpus.subsets.values() for p, _ in subset.shards(split)])
        for split in ("train", "validation")
    )
    vocab_size = corpus.tokenizer.vocab_size
    losses = {
        "TransXSSM": read_series(recipe.run_path).validation["validation"].loss[-1],
        "interpolated bigram": bigram_loss(train, validation, vocab_size),
        "unigram": unigram_loss(train, validation, vocab_size),
    }
    print("     validation loss          nats/token  perplexity")
    for name, loss in losses.items():
        print(f"     {name:22} {loss:12.3f} {math.exp(loss):11.1f}")
    baselines = {name: loss for name, loss in losses.items() if name != "TransXSSM"}
    curve = plot_runs([recipe.run_path], recipe.run_path / "loss.png", baselines=baselines, title=recipe.name)
    print(f"     loss curve: {curve}")


def write(recipe: Recipe) -> int:
    """Generate in a separate process, as a user would: Megatron can be initialised only once per process."""
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "megatron_txssm.cli",
        "generate",
        str(recipe.checkpoint_path),
        "--prompt",
        PROMPT,
    ]
    return subprocess.run(command).returncode
