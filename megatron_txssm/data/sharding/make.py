"""Makes a corpus: what all of its tasks share, then the tasks, on this machine."""

import time

from megatron_txssm.data.corpus.manifest import Plan
from megatron_txssm.data.corpus.status import CorpusStatus
from megatron_txssm.data.sharding.progress import print_status, progress, tasks_text
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus_recipe import CorpusRecipe


def prepare(recipe: CorpusRecipe) -> Plan:
    """Make what all tasks share, unless it is there: the frozen recipe, the tokenizer, the plan."""
    from megatron_txssm.data.sharding.plan import freeze_recipe, make_plan
    from megatron_txssm.data.tokenizer.install import check_tokenizer, install_tokenizer
    from megatron_txssm.files import remove_abandoned

    folder = recipe.path / "tokenizer"
    for place in (recipe.path, folder, *(recipe.path / subset for subset in recipe.subsets)):
        remove_abandoned(place)
    try:
        freeze_recipe(recipe)
        # What an earlier command left that did not come as far as the plan may be another recipe's.
        if not (recipe.path / "plan.json").exists() or not (folder / "facts.json").exists():
            install_tokenizer(recipe.tokenizer, folder)
        check_tokenizer(recipe.path)
        return make_plan(recipe)
    except OSError as error:
        where = error.filename2 or error.filename or recipe.path
        raise UserError(
            f"{where}: {error.strerror or error}; free the disk, mend the path, or use another output"
        ) from None


def shard(recipe: CorpusRecipe, workers: int) -> int:
    """Finish the corpus on this machine; returns the exit code."""
    from megatron_txssm.data.sharding.workers import start_worker_server

    start_worker_server()
    from megatron_txssm.data.sharding.run_local import run_locally, unfinished

    plan = prepare(recipe)
    status = CorpusStatus(recipe.path)
    before = status.read()
    if not sum(len(unfinished(recipe, plan, subset)) for subset in recipe.subsets):
        print(f"{recipe.path}: all {sum(s.tasks for s in before)} tasks were finished before")
        return 0
    start = time.monotonic()
    try:
        with progress(status):
            run_locally(recipe, plan, workers)
    except KeyboardInterrupt:
        after = status.read()
        print(f"stopped; {tasks_text(after)} are finished, and the same command goes on")
        return 130
    after, seconds = status.read(), time.monotonic() - start
    text = sum(s.text_bytes for s in after) - sum(s.text_bytes for s in before)
    print_status(after)
    print(
        f"{recipe.path}: {tasks_text(after)}; {text / 1e6:,.1f} MB in {seconds:.1f} s, {text / 1e6 / seconds:.1f} MB/s"
    )
    return 0
