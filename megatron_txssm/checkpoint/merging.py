"""Merges checkpoints of a run into a model of their own: a weighted mean of their weights."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_txssm import __version__
from megatron_txssm.checkpoint.merge_weights import DECAYS, ema_weights, mean_weights, wsd_weights
from megatron_txssm.checkpoint.saved_model import SavedModel, find_checkpoints, open_checkpoint, recipe_beside
from megatron_txssm.checkpoint.steps import MERGE, Step, candidates, write_tracker
from megatron_txssm.choices import WsdDecayShape
from megatron_txssm.errors import UserError
from megatron_txssm.files import check_absent, complete_folder, unwound_by_signals, write_json
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.environment import adopt_slurm_step
from megatron_txssm.terminal import doing, print_table, progress_bar

Shape = Literal["mean", "wsd", "ema"]


@unwound_by_signals()
def merge(
    run: str | Path,
    out: str | Path | None = None,
    *,
    steps: Sequence[int] = (),
    last: int | None = None,
    shape: Shape = "mean",
    decay_shape: WsdDecayShape | None = None,
    ema_decay: float | None = None,
    overwrite: bool = False,
) -> int:
    """Write the weighted mean of a run's checkpoints to the new run folder `out`; returns the exit code.

    run: a run's folder, or its checkpoints. out: None: RUN/merged/SHAPE_FIRST_to_LAST. Either `steps`, or the `last`
    so many checkpoints. shape: merge_weights.py; for "wsd", the shape of the decay (None: the recipe's), for "ema" the
    factor for each interval between checkpoints (None: 0.8). overwrite: replace an earlier merge. Of several tasks of
    a Slurm step, only the first does it. UserError if these checkpoints cannot be merged.
    """
    adopt_slurm_step()
    if os.environ.get("RANK", "0") != "0":
        return 0
    _check_used(shape, decay_shape, ema_decay)
    run = Path(run)
    checkpoints = find_checkpoints(run)
    chosen = _chosen(checkpoints, steps, last)
    home = checkpoints.parent if run == checkpoints else run
    out = Path(out) if out else home / "merged" / f"{shape}_{chosen[0]}_to_{chosen[-1]}"
    replaced = overwrite and out.exists()
    _check_is_merge(out) if replaced else check_absent(out)
    if out.resolve().is_relative_to(checkpoints.resolve()):
        raise UserError(f"--out {out} is inside {checkpoints}, where runs remove old checkpoints; name another")
    recipe = recipe_beside(checkpoints)
    decay_shape = decay_shape or recipe.optimizer.wsd_decay_shape
    ema_decay = 0.8 if ema_decay is None else ema_decay
    weights = _weights(chosen, shape, decay_shape, ema_decay)
    with doing("verifying the checkpoints"):
        parts = [open_checkpoint(checkpoints, step, "--steps") for step in chosen]
    _check_alike(parts)
    if shape == "wsd" and (note := _decays_already(recipe, chosen[-1])):
        print(f"note: {note}")
    settings = {"wsd": {"decay_shape": decay_shape}, "ema": {"ema_decay": ema_decay}}.get(shape, {})
    what = {"shape": shape, **settings, "run": recipe.name, "version": __version__}
    _write(out, parts, weights, recipe, what, replaced=replaced)
    _report(out, parts, weights)
    return 0


def _check_used(shape: Shape, decay_shape: WsdDecayShape | None, ema_decay: float | None) -> None:
    for of, option, value in (("wsd", "--decay-shape", decay_shape), ("ema", "--ema-decay", ema_decay)):
        if value is not None and shape != of:
            raise UserError(f"{option} {value} has no effect with --shape {shape}; use --shape {of}, or leave it out")


def _chosen(checkpoints: Path, steps: Sequence[int], last: int | None) -> list[int]:
    """The steps to merge, ascending; UserError if there are fewer than two."""
    if bool(steps) == (last is not None):
        raise UserError("state either --steps, such as --steps 100,200, or --last N")
    there = sorted(step.number for step in candidates(checkpoints)[0])
    if last is not None and not 2 <= last <= len(there):
        raise UserError(
            f"--last {last} must be from 2 to the number of checkpoints, and {checkpoints} holds {len(there)}; a run "
            "keeps more of them with a larger checkpoint.keep_last"
        )
    chosen = sorted(set(steps)) if last is None else there[-last:]
    if len(chosen) < 2:
        raise UserError(f"--steps {','.join(map(str, steps))}: a merge is of at least two checkpoints; name another")
    return chosen


def _check_is_merge(out: Path) -> None:
    if not list((out / "checkpoints").glob(f"iter_*/{MERGE}")):
        raise UserError(f"{out} is no merge, which --overwrite could replace; name another --out")


def _check_alike(parts: Sequence[SavedModel]) -> None:
    """UserError for checkpoints whose tensors differ in size; `open_checkpoint` has compared them with the recipe."""
    last = parts[-1]
    if last.has_former_names:
        raise UserError(
            f"step {last.step} was saved by a version that named tensors otherwise; end with a step that this version "
            "has saved: the same `txssm pretrain` goes on from there"
        )
    for part in parts:
        for name, entry in last.entries.items():
            if part.entries[name].size != entry.size:
                raise UserError(
                    f"{name} is {list(part.entries[name].size)} in step {part.step} and {list(entry.size)} in step "
                    f"{last.step}; merge checkpoints of one model"
                )


def _decays_already(recipe: Recipe, step: int) -> str:
    """A note if the learning rate falls before this step, so that a merge imitates a second decay."""
    style = recipe.optimizer.decay_style
    if style == "constant" or (style == "WSD" and step <= recipe.train_iters - (recipe.wsd_decay_iters or 0)):
        return ""
    return (
        f"optimizer.decay_style={style} lowers the learning rate before step {step}, and this merge imitates a decay "
        "of a constant one; merge earlier steps, or use --shape mean"
    )


def _weights(steps: Sequence[int], shape: Shape, decay: WsdDecayShape, ema_decay: float) -> list[float]:
    if shape == "wsd":
        if decay not in DECAYS:
            raise UserError(f"--decay-shape {decay} is unknown; use one of {', '.join(DECAYS)}")
        return wsd_weights(steps, decay)
    if shape == "ema":
        return ema_weights(steps, ema_decay)
    if shape == "mean":
        return mean_weights(steps)
    raise UserError(f"--shape {shape} is unknown; use one of mean, wsd, ema")


def _write(
    out: Path,
    parts: Sequence[SavedModel],
    weights: Sequence[float],
    recipe: Recipe,
    what: dict[str, object],
    *,
    replaced: bool,
) -> None:
    """Write the run folder `out`, completely or not at all."""
    from megatron_txssm.checkpoint.merged_files import seal, write_mean

    last = parts[-1]
    nbytes = sum(last.nbytes(name) for name in last.entries)
    place = out.with_name(f".{out.name}.new") if replaced else out
    if replaced:
        shutil.rmtree(place, ignore_errors=True)
    with complete_folder(place, nbytes) as folder:
        made = Step(last.step, folder / "checkpoints" / last.folder.name)
        made.folder.mkdir(parents=True)
        with progress_bar("merging", sum(p.nbytes(n) for p in parts for n in p.entries), of_bytes=True) as advance:
            hashes = write_mean(made.folder, parts, weights, advance)
        listed = zip(parts, weights, hashes, strict=True)
        table = [{"step": part.step, "weight": weight, "sha256": digest} for part, weight, digest in listed]
        write_json(made.folder / MERGE, {**what, "parts": table})
        seal(made.folder)
        beside = made.folder.parent
        (beside / "recipe.yaml").write_text(recipe.frozen(Path(os.path.abspath(out / "checkpoints"))), encoding="utf-8")
        if (tokenizer := last.checkpoints / "tokenizer").is_dir():
            shutil.copytree(tokenizer, beside / "tokenizer")
        write_tracker(beside, made)
    if replaced:
        shutil.rmtree(out)
        place.rename(out)


def _report(out: Path, parts: Sequence[SavedModel], weights: Sequence[float]) -> None:
    rows = [(str(part.step), f"{weight:.4f}") for part, weight in zip(parts, weights, strict=True)]
    print_table((">step", ">weight"), rows)
    size = sum(parts[-1].nbytes(name) for name in parts[-1].entries)
    print(f"{out}: the mean of {len(parts)} checkpoints, {size:,} bytes, without optimizer state")
    print(f"loss: txssm eval loss {out}; to train on from it: --set checkpoint.load_from={out / 'checkpoints'}")
