"""The study of scaling: four architectures at several sizes, each on equally many tokens per parameter."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import LAYERS, POSITIONS, TABLE_4
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import of_equal_size
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.studies.conduct import Study
from megatron_txssm.studies.data import corpus_overrides
from megatron_txssm.studies.study import check_comparable, runs_of
from megatron_txssm.studies.summary import Spread, VariantResult, keep_results, print_unfinished, summarize
from megatron_txssm.terminal import print_table

NAME = "scaling"
REFERENCE = "transxssm"
# d_model of the preset "small".
WIDTHS = (64, 96, 128)
TOKENS_PER_PARAMETER = {"small": 2.0, "paper": 20.0}
# Per parameter: a thousand times what models are trained on.
_MOST_TOKENS = 10**6
# Largest part by which the tokens per parameter of two sizes may differ.
_TOKENS_MAY_DIFFER = 0.05
# What architectures of one size may differ in.
VARIED = (
    *("model.layer_pattern", "model.ffn_hidden_size", "model.position_encoding"),
    *("model.attention_position_encoding", "model.state_gated"),
)


def scaling(
    preset: str = "small",
    *,
    folder: Path | None = None,
    corpus: str | None = None,
    tokens_per_parameter: float | None = None,
    overrides: Sequence[str] = (),
    command: str = "",
) -> Study:
    """The study of the paper's four architectures at three small sizes, or at the paper's two.

    tokens_per_parameter: of every model; default: TOKENS_PER_PARAMETER. The rest is as in
    `position_encoding.position_encoding`.
    """
    tokens = TOKENS_PER_PARAMETER[preset] if tokens_per_parameter is None else tokens_per_parameter
    if not 0 < tokens <= _MOST_TOKENS:
        raise UserError(f"--tokens-per-parameter {tokens:g} must be above 0, and at most {_MOST_TOKENS:,}")
    stated = [*corpus_overrides(preset, corpus, overrides), *overrides]
    return Study(
        name=NAME,
        folder=folder or default_folder(preset),
        variants=variants(preset, stated, tokens),
        check=check_sizes,
        show=show,
        facts={"preset": preset, "tokens_per_parameter": tokens, "command": command},
    )


def default_folder(preset: str) -> Path:
    return Path("runs", "studies", f"{NAME}-{preset}")


def variants(preset: str, overrides: Sequence[str], tokens_per_parameter: float) -> dict[str, Recipe]:
    """The recipes by architecture and size, such as "jamba_d64"; those of one size have the same length."""
    models, found = _small(overrides) if preset == "small" else _papers(overrides), {}
    for name, recipe in models.items():
        reference = models[_reference(name)]
        tokens = round(tokens_per_parameter * count_parameters(reference.sizes).total)
        if tokens < recipe.training.global_batch_tokens:
            raise UserError(
                f"--tokens-per-parameter {tokens_per_parameter:g} gives {name} {tokens:,} tokens, less than a step of "
                f"{recipe.training.global_batch_tokens:,}; state more"
            )
        found[name] = changed(recipe, {"training.train_tokens": tokens, "training.train_iters": None})
        validate(found[name])
    return found


def check_sizes(recipes: Sequence[Recipe]) -> None:
    """UserError if recipes of one d_model are not comparable, or sizes differ in their tokens per parameter."""
    tokens: list[tuple[float, str]] = []
    for width in {recipe.model.hidden_size for recipe in recipes}:
        of_size = [recipe for recipe in recipes if recipe.model.hidden_size == width]
        check_comparable(of_size, VARIED)
        (first, *_) = of_size
        trained = first.train_iters * first.training.global_batch_tokens
        # Of one size, tokens are equal and parameters nearly so.
        tokens.append((trained / count_parameters(first.sizes).total, first.name))
    (least, few), (most, many) = min(tokens), max(tokens)
    if most > (1 + _TOKENS_MAY_DIFFER) * least:
        raise UserError(
            f"{many} trains on {most:.2f} tokens per parameter, {few} on {least:.2f}; state "
            "--tokens-per-parameter and no length, or accept it with --allow-unequal"
        )


def _papers(overrides: Sequence[str]) -> dict[str, Recipe]:
    return {f"{name}_{scale}": load_recipe(f"{name}_{scale}", overrides) for scale in TABLE_4 for name in LAYERS}


def _small(overrides: Sequence[str]) -> dict[str, Recipe]:
    """One module of each architecture per width, with the parameters of TransXSSM's by the width of the FFN."""
    base, found = load_recipe("position_encoding_small", overrides), {}
    for width in WIDTHS:
        sizes = {"hidden_size": width, "ffn_hidden_size": 2 * width, "num_attention_heads": width // 32}
        state = {"state_head_dim": 32, "state_num_groups": 1}
        own = changed(base, {f"model.{name}": value for name, value in (sizes | state).items()})
        for name, layers in LAYERS.items():
            module = {"model.layer_pattern": layers[: len(own.layers)]}
            found[f"{name}_d{width}"] = of_equal_size(changed(own, module | POSITIONS[name]), own)
    return found


def _size(name: str) -> str:
    return name.rpartition("_")[2]


def _reference(name: str) -> str:
    return f"{REFERENCE}_{_size(name)}"


class Law(NamedTuple):
    """loss = coefficient * parameters ** -exponent; least squares over the logarithms."""

    coefficient: float
    exponent: float
    # Standard error of the exponent; NaN for two points.
    error: float

    def as_json(self) -> JsonObject:
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}

    @classmethod
    def through(cls, results: Sequence[VariantResult]) -> "Law | None":
        """Through every seed of every size; None for fewer than two sizes."""
        points = [(math.log(r.parameters), math.log(loss)) for r in results for loss in r.losses.values()]
        x, y = np.array(points).reshape(-1, 2).T
        if len(set(x)) < 2:
            return None
        slope, offset = np.polyfit(x, y, 1)
        squares = float(((y - slope * x - offset) ** 2).sum())
        spread = float(((x - x.mean()) ** 2).sum())
        error = math.sqrt(squares / (len(x) - 2) / spread) if len(x) > 2 else math.nan
        return cls(math.exp(offset), -float(slope), error)


def show(folder: Path) -> None:
    """Print losses by size and the fitted laws, as far as runs are finished; write results.json and results.png."""
    runs = sorted(runs_of(folder), key=lambda run: run.recipe.model.hidden_size)
    sizes = list(dict.fromkeys(_size(run.variant) for run in runs))
    summary = summarize(folder, [f"{name}_{size}" for size in sizes for name in LAYERS])
    results = {result.name: result for result in summary.results}
    laws = {name: Law.through([results[f"{name}_{size}"] for size in sizes]) for name in LAYERS}
    rows: list[tuple[str, ...]] = []
    variants: JsonObject = {}
    for name, result in results.items():
        behind, loss = result.behind(results[_reference(name)]), Spread.of([*result.losses.values()])
        cells = (f"{result.parameters:,}", str(len(result.losses)), loss.text(".4f"), result.perplexity.text(".3f"))
        rows.append((name, *cells, behind.text("+.4f")))
        variants[name] = {**result.as_json(), f"loss_minus_{REFERENCE}": behind.as_json()}
    print_table(("model", ">params", ">seeds", ">loss", ">perplexity", f">loss - {REFERENCE}"), rows)
    fitted = {name: law for name, law in laws.items() if law is not None}
    for name, law in fitted.items():
        print(f"{name}: loss = {law.coefficient:.3f} * parameters ** -{Spread(law.exponent, law.error).text('.4f')}")
    print("± standard deviation over seeds; of an exponent, its standard error. A law holds between these sizes only.")
    print_unfinished(summary)
    keep_results(folder, summary, {"variants": variants, "laws": {name: law.as_json() for name, law in fitted.items()}})
    _plot(folder / "results.png", [[results[f"{name}_{size}"] for size in sizes] for name in LAYERS], fitted)


def _plot(picture: Path, architectures: Sequence[Sequence[VariantResult]], laws: Mapping[str, Law]) -> None:
    """Loss over parameters, both logarithmic: means with their deviations, and the laws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, name, results in zip(COLOURS, LAYERS, architectures, strict=False):
        x = np.array([result.parameters for result in results], float)
        means, deviations = zip(*(Spread.of([*result.losses.values()]) for result in results), strict=True)
        axes.errorbar(x, means, yerr=deviations, fmt="o", color=colour, capsize=3, label=name)
        if (law := laws.get(name)) is not None:
            axes.plot(x, law.coefficient * x**-law.exponent, color=colour, linewidth=1.0)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="validation loss (nats/token)")
    axes.grid(True, which="both", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(figure, picture)
