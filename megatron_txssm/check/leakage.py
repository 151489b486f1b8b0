"""txssm check leakage: whether a document affects the computation of the next one, in any layout."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.check.layouts import ONE_PROCESS, Layout
from megatron_txssm.check.parity import DIFFERENT, legal_layouts, listed
from megatron_txssm.check.shrink import shrink
from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.files import unwound_by_signals
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import print_table, progress_bar


@dataclass(frozen=True)
class Leaks:
    """A layout's results by mode ("isolated", "packed"): logits compared, logits changed, and the largest change."""

    of_mode: dict[str, dict[str, float]] | None
    failure: str | None = None

    @property
    def isolated(self) -> bool:
        """No logit changed after the first document; without isolation some did, so leaks are detectable."""
        return self.of_mode is not None and self.of_mode["isolated"]["changed"] == 0 < self.of_mode["packed"]["changed"]


@unwound_by_signals()
def check_leakage(
    recipe: str | Path,
    *,
    nproc: int = 4,
    overrides: Sequence[str] = (),
    layouts: Sequence[str] = (),
    seed: int = 0,
    packings: int = 200,
) -> int:
    """Find logits that another document of the sample changes, in each layout; 0 if there are none, else DIFFERENT.

    The samples are `packings` random ones, by `seed`. The rest is as in `parity.check_parity`.
    """
    require_positive(nproc=nproc, packings=packings)
    loaded = load_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory(prefix="txssm-check-") as name:
        folder = Path(name)
        small = shrink(loaded, folder / "tokens", nproc=nproc, steps=1)
        legal, refused = legal_layouts(loaded, small, nproc, layouts)
        if not layouts:
            legal = [Layout("one_process", 1, ONE_PROCESS), *(layout for layout in legal if _matters(layout))]
        if not legal:
            raise UserError(f"--nproc {nproc}: no layout of {loaded.name} to check:\n{listed(refused)}")
        print(
            f"{loaded.name}, made small: {len(small.layers)} layers ({small.layers}), samples of "
            f"{small.training.seq_length} tokens, {packings} random packings, each with two first documents",
            flush=True,
        )
        leaks = _run(small, legal, folder, packings, seed)
    _print_table(leaks)
    if not loaded.data.isolate_documents:
        print(f"\n{loaded.name} trains with data.isolate_documents=false: as in the column of leaks")
    leaky = [layout.name for layout, found in leaks.items() if not found.isolated]
    if leaky:
        print(f"\nNOT isolated under data.isolate_documents=true: {', '.join(leaky)}")
        return DIFFERENT
    print("\ndata.isolate_documents=true isolates documents, bit for bit: all layouts")
    return 0


def _matters(layout: Layout) -> bool:
    """False for data parallelism and recomputation, which do not affect the forward pass."""
    return not any(part.startswith(("dp", "recompute")) for part in layout.name.split("_"))


def _run(small: Recipe, layouts: Sequence[Layout], folder: Path, packings: int, seed: int) -> dict[Layout, Leaks]:
    from megatron_txssm.check.runs import LeakageRun, run_all

    runs = {layout: LeakageRun(folder / layout.name, layout.of(small), packings, seed) for layout in layouts}
    with progress_bar("looking for leaks", len(runs)) as advance:
        for size in sorted({layout.processes for layout in layouts}):
            batch = [run for layout, run in runs.items() if layout.processes == size]
            run_all(size, batch, advance=advance)
    return {layout: _leaks(run.failure(), run.result) for layout, run in runs.items()}


def _leaks(failure: str | None, result: Path) -> Leaks:
    return Leaks(None, failure) if failure else Leaks(json.loads(result.read_text(encoding="utf-8")))


def _print_table(leaks: dict[Layout, Leaks]) -> None:
    rows = []
    for layout, found in leaks.items():
        cells = ["", "", ""]
        if found.of_mode:
            isolated, packed = found.of_mode["isolated"], found.of_mode["packed"]
            share = packed["changed"] / packed["compared"]
            cells = [
                f"{isolated['compared']:,.0f}",
                f"{isolated['changed']:,.0f}",
                f"{share:.1%}, by up to {packed['largest']:.1e}",
            ]
        verdict = "isolated" if found.isolated else "FAILED" if found.failure else "LEAKS"
        rows.append((layout.name, str(layout.processes), verdict, *cells))
    numbers = (">logits compared", ">changed, isolated", ">changed, not isolated")
    print_table(("layout", ">processes", "verdict", *numbers), rows)
    for layout, found in leaks.items():
        if found.failure:
            print(f"{layout.name}: {found.failure}")
