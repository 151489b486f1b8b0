"""The study of multi-query associative recall (arXiv:2312.04927): how many keys' values each architecture recalls."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject
from megatron_txssm.metrics import each_line
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import LAYERS, POSITIONS
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import of_equal_size
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.studies.conduct import Study
from megatron_txssm.studies.scaling import VARIED
from megatron_txssm.studies.study import StudyRun, check_comparable, runs_of
from megatron_txssm.studies.summary import Spread, keep_results, print_unfinished, summarize
from megatron_txssm.terminal import print_table

NAME = "mqar"
REFERENCE, RIVAL = "transxssm", "mamba2"
# Name -> its layers, and their positions, as the paper's architectures have them.
_ARCHITECTURES: dict[str, tuple[str, Changes]] = {
    REFERENCE: ("", POSITIONS["transxssm"]),
    "state_space_rope": (LAYERS["mamba2"], POSITIONS["transxssm"]),
    RIVAL: (LAYERS["mamba2"], POSITIONS["mamba2"]),
    "attention_rope": (LAYERS["llama3"], POSITIONS["llama3"]),
}
# Number of pairs -> seed -> share of right answers.
type Accuracies = dict[int, dict[int, float]]


def mqar(*, folder: Path | None = None, overrides: Sequence[str] = (), command: str = "") -> Study:
    """The study of four architectures on samples of associative recall; as in `position_encoding.position_encoding`."""
    return Study(
        name=NAME,
        folder=folder or default_folder(),
        variants=variants(overrides),
        check=partial(check_comparable, varied=VARIED),
        show=show,
        facts={"command": command},
    )


def default_folder() -> Path:
    return Path("runs", "studies", NAME)


def variants(overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes by architecture: the hybrid's, and the others with its parameters by the width of the FFN."""
    hybrid = load_recipe("mqar_small", overrides)
    if not hybrid.data.recall_pairs:
        raise UserError("data.recall_pairs=null leaves nothing to recall; state numbers of pairs, such as [4, 8]")
    found = {}
    for name, (layers, positions) in _ARCHITECTURES.items():
        own = {"model.layer_pattern": layers[: len(hybrid.layers)] or hybrid.model.layer_pattern}
        found[name] = of_equal_size(changed(hybrid, own | positions), hybrid, multiple=2)
        validate(found[name])
    return found


def show(folder: Path) -> None:
    """Print the accuracy by number of pairs as far as runs are finished; write results.json and results.png."""
    summary = summarize(folder, [*_ARCHITECTURES])
    found = accuracies(runs_of(folder))
    rows, about = [], {}
    for result in summary.results:
        of_variant = found[result.name]
        cells = [Spread.of([*of_seeds.values()]).text(".3f") for of_seeds in of_variant.values()]
        rows.append((result.name, f"{result.parameters:,}", str(len(result.losses)), *cells))
        about[result.name] = {**result.as_json(), "accuracy": _as_json(of_variant)}
    pairs = [*found[REFERENCE]]
    rows.append(("any value of the sample", "", "", *(f"{1 / count:.3f}" for count in pairs)))
    print_table(("model", ">params", ">seeds", *(f">{count} pairs" for count in pairs)), rows)
    print("share of right answers on held-out samples: mean ± standard deviation over the seeds.")
    print(said := verdict(pairs, found[REFERENCE], found[RIVAL]))
    print_unfinished(summary)
    keep_results(folder, summary, {"variants": about, "verdict": said})
    _plot(folder / "results.png", found)


def accuracies(runs: Sequence[StudyRun]) -> dict[str, Accuracies]:
    """By architecture: after the last step of every finished run."""
    pairs = runs[0].recipe.data.recall_pairs or ()
    found: dict[str, Accuracies] = {name: {count: {} for count in pairs} for name in _ARCHITECTURES}
    for run in runs:
        for count, share in zip(pairs, _final(run) if run.is_finished else (), strict=False):
            found[run.variant][count][run.number] = share
    return found


def _final(run: StudyRun) -> list[float]:
    """The validation sets' accuracies, in the order of the recipe, in the last line that has them."""
    found: list[float] = []
    for line in each_line(run.path / "metrics.jsonl"):
        if line.get("iteration") == run.recipe.train_iters:
            found = [share for key, share in line.items() if key.endswith(" accuracy")] or found
    return found


def verdict(pairs: Sequence[int], ours: Accuracies, theirs: Accuracies) -> str:
    """One sentence: at which numbers of pairs TransXSSM is ahead of Mamba-2, behind it, or neither.

    Ahead is a mean difference, seed by seed, of more than its standard deviation; with one seed, nothing is.
    """
    sides: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
    for count in pairs:
        both = sorted(ours[count].keys() & theirs[count].keys())
        mean, deviation = Spread.of([ours[count][seed] - theirs[count][seed] for seed in both])
        clear = not math.isnan(deviation) and abs(mean) > deviation
        side = "not told apart from" if not clear else "ahead of" if mean > 0 else "behind"
        sides[side].append(str(count))
    return f"{REFERENCE} is " + "; ".join(
        f"{side} {RIVAL} at {', '.join(counts)} pairs" for side, counts in sides.items() if counts
    )


def _as_json(of_variant: Accuracies) -> JsonObject:
    return {
        str(count): {**Spread.of([*of_seeds.values()]).as_json(), "by_seed": {str(k): v for k, v in of_seeds.items()}}
        for count, of_seeds in of_variant.items()
    }


def _plot(picture: Path, found: Mapping[str, Accuracies]) -> None:
    """A curve for each architecture: the share of right answers over the number of pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, (name, of_variant) in zip(COLOURS, found.items(), strict=False):
        means, deviations = zip(*(Spread.of([*shares.values()]) for shares in of_variant.values()), strict=True)
        axes.errorbar([*of_variant], means, yerr=deviations, fmt="o-", color=colour, capsize=3, label=name)
    pairs = [*found[REFERENCE]]
    axes.plot(pairs, [1 / count for count in pairs], ":", color="0.5", label="any value of the sample")
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(count) for count in pairs])
    axes.set(ylim=(0, 1.02), xlabel="key-value pairs", ylabel="share of right answers")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(figure, picture)
