#!/usr/bin/env python3
"""Checks muP by training a recipe's model at several widths, with muP and without.

Coordinate check: the mean absolute activation of each kind of sub-layer after some steps. Under muP, a wider model's
are as large as a narrower one's; otherwise they grow. Prints each at each width, and the slope of its logarithm over
the width's. Exits with 1 if a slope exceeds the bound under muP.

Transfer: with --learning-rates, the training loss after some steps at each width and learning rate instead, the mean of
the last tenth of the steps. Under muP, the best learning rate is the same at each width.

.venv/bin/python tools/check_mup.py                                    # a minute on one core
.venv/bin/python tools/check_mup.py --set model.layer_pattern=MEM-*E --set model.num_experts=4
.venv/bin/python tools/check_mup.py --set model.position_encoding=conv1d_d --set model.state_gated=true
.venv/bin/python tools/check_mup.py --widths 64 128 256 --steps 100 --learning-rates 4e-3 8e-3 1.6e-2 \\
  --set data.corpus=runs/demo/data/vocab_1024 --set data.vocab_size=1024 --set optimizer.decay_style=cosine
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from typing import Any

from megatron_txssm.check.tokens import VOCAB_SIZE, write_tokens
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.arguments import megatron_arguments
from megatron_txssm.session.hooks import Call, Listener, listening
from megatron_txssm.terminal import print_table, progress_bar

# Small heads, so that the narrowest model has several.
SIZES = (
    "model.layer_pattern=M-M-*-",
    "model.kv_channels=16",
    "model.state_head_dim=16",
    "model.state_size=16",
    "model.state_num_groups=2",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "training.seq_length=64",
    "training.micro_batch_size=8",
    "training.global_batch_tokens=512",
    "optimizer.decay_style=constant",
    "optimizer.warmup_fraction=0",
    f"data.vocab_size={VOCAB_SIZE}",
    "data.tokenizer_type=NullTokenizer",
    "checkpoint.save_interval=null",
    "logging.eval_iters=0",
    "logging.log_interval=1",
    "logging.tensorboard=false",
)
# Module -> kind of sub-layer.
KINDS = {
    "embedding": "embedding",
    "mixer": "state-space",
    "self_attention": "attention",
    "mlp": "FFN or experts",
    "decoder": "last norm",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo_cpu", metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="N", help="base first")
    parser.add_argument("--steps", type=int, default=10, metavar="N")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[], metavar="X", help="check transfer")
    parser.add_argument("--bound", type=float, default=0.2, metavar="X", help="largest slope under muP (default: 0.2)")
    args = parser.parse_args(argv)
    base, rates = args.widths[0], args.learning_rates or [None]
    runs = [(mup, width, rate) for mup in (True, False) for width in args.widths for rate in rates]
    found: dict[tuple[bool, int, float | None], Recorder] = {}
    with one_process() as folder, progress_bar("training", len(runs)) as advance:
        tokens = write_tokens(folder / "tokens")
        made = (f"data.train={tokens}", f"data.validation={tokens}")
        recipe = load_recipe(args.recipe, [*SIZES, *made, *args.overrides])
        # The activations after the last step are those of one more.
        steps = args.steps + (not args.learning_rates)
        for mup, width, rate in runs:
            # The base is the same model with and without.
            known = found.get((True, width, rate)) if width == base else None
            found[mup, width, rate] = known or train(widened(recipe, width, base, mup, rate), steps)
            advance(1)
    exceeded: list[str] = []
    for mup in (True, False):
        print(f"\n{'muP' if mup else 'without muP'}, after {args.steps} steps")
        if args.learning_rates:
            recorders = [[found[mup, width, rate] for rate in args.learning_rates] for width in args.widths]
            print_losses(recorders, args.widths, args.learning_rates)
        else:
            slopes = print_activations([found[mup, width, None] for width in args.widths], args.widths)
            exceeded += [kind for kind, rise in slopes.items() if mup and abs(rise) > args.bound]
    if not args.learning_rates:
        print(f"\nslopes above {args.bound:g} under muP: {', '.join(exceeded) or 'none'}")
    return 1 if exceeded else 0


def widened(recipe: Recipe, width: int, base: int, mup: bool, learning_rate: float | None = None) -> Recipe:
    """The model with this hidden_size: heads and FFN channels in proportion, each head as wide as before."""
    model = recipe.model
    in_proportion = (
        *("ffn_hidden_size", "num_attention_heads", "num_query_groups", "state_num_heads"),
        *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    )
    stated = {name: value for name in in_proportion if (value := getattr(model, name)) is not None}
    changes: Changes = {
        **{f"model.{name}": value * width // model.hidden_size for name, value in stated.items()},
        "model.hidden_size": width,
        "model.kv_channels": recipe.kv_channels,
        "model.mup_base_hidden_size": base if mup else None,
        "optimizer.learning_rate": learning_rate or recipe.optimizer.learning_rate,
    }
    return changed(recipe, changes)


@contextlib.contextmanager
def one_process() -> Iterator[Path]:
    """This process as the only rank, silent; a temporary folder."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as name, open(Path(name) / "log", "w", encoding="utf-8") as log_file:
        with contextlib.redirect_stdout(log_file):
            yield Path(name)


def train(recipe: Recipe, steps: int) -> "Recorder":
    """What was recorded of so many steps."""
    from megatron_txssm.platform import prepare_platform

    platform_arguments = prepare_platform()
    import torch.distributed
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.compat import forget_training, mend_megatron
    from megatron_txssm.session.start import initialize_arguments, model_config
    from megatron_txssm.training.forward_step import datasets_provider, forward_step

    mend_megatron()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    recipe = changed(recipe, {"training.train_iters": steps, "training.train_tokens": None})
    args = initialize_arguments([*megatron_arguments(recipe), *platform_arguments])
    recorder = Recorder()
    with listening(recorder):
        config = pretrain_cfg_container_from_args(args, model_config(args))
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    forget_training()
    return recorder


class Recorder(Listener):
    """Keeps the loss of each step, and the mean absolute output of each kind of sub-layer in its forward passes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.activations: dict[str, list[float]] = defaultdict(list)
        self.of_step: dict[str, list[float]] = defaultdict(list)

    def after_setup(self, call: Call, made: tuple[list[Any], Any, Any]) -> None:
        from megatron.core.utils import unwrap_model

        model: Any = unwrap_model(made[0][0])
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if last in KINDS:
                module.register_forward_hook(lambda _, inputs, output, kind=KINDS[last]: self.add({kind: output}))
            elif last == "in_proj":
                module.register_forward_hook(lambda module, inputs, output: self.add(self.parts(module, output)))
        multiplier = model.config.mup_output_mult
        model.output_layer.register_forward_hook(lambda _, inputs, output: self.add({"logits": output[0] * multiplier}))

    def parts(self, in_proj: Any, output: Any) -> dict[str, Any]:
        """The in-projection's output by component, without padding."""
        sizes = in_proj.weight.partition_sizes
        names = ["z", "x", "B", "C", "dt"][-(len(sizes) - 1) :]
        return {f"{name} of state-space": part for name, part in zip(names, output[0].split(sizes, -1), strict=False)}

    def add(self, outputs: dict[str, Any]) -> None:
        for kind, output in outputs.items():
            tensor = output[0] if isinstance(output, tuple) else output
            self.of_step[kind].append(float(tensor.detach().abs().mean()))

    def after_log(self, call: Call, result: Any) -> None:
        self.losses.append(float(call.loss_dict["lm loss"]))
        for kind, values in self.of_step.items():
            self.activations[kind].append(statistics.mean(values))
        self.of_step.clear()


def print_activations(found: Sequence[Recorder], widths: Sequence[int]) -> dict[str, float]:
    """The table of one parametrization; the slope of each kind of sub-layer after the last step."""
    rows, slopes = [], {}
    for kind in found[0].activations:
        first, last = ([recorder.activations[kind][step] for recorder in found] for step in (0, -1))
        slopes[kind] = slope(widths, last)
        rows.append([kind, *(f"{value:.3g}" for value in last), f"{slopes[kind]:+.2f}", f"{slope(widths, first):+.2f}"])
    print_table(["mean |activation|, at width", *map(str, widths), "slope", "before step 1"], rows)
    return slopes


def print_losses(found: Sequence[Sequence[Recorder]], widths: Sequence[int], rates: Sequence[float]) -> None:
    """The table of one parametrization, with a mark at the best learning rate of each width."""
    rows = []
    for width, recorders in zip(widths, found, strict=True):
        losses = [statistics.mean(each.losses[-max(1, len(each.losses) // 10) :]) for each in recorders]
        rows.append([str(width), *(f"{loss:.3f}{'*' if loss == min(losses) else ''}" for loss in losses)])
    print_table(["loss, at width and learning rate", *(f"{rate:g}" for rate in rates)], rows)


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of the power of the width that fits the values best, by least squares of logarithms."""
    return statistics.linear_regression([log(width) for width in widths], [log(value) for value in values]).slope


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
