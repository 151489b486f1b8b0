"""Submits runs: all checks precede the first write, and all files are written before a job is queued."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME
from megatron_txssm.jobs.attempts import attempts
from megatron_txssm.jobs.limits import DEFAULTS, Limits
from megatron_txssm.jobs.submission.allocation import Allocation
from megatron_txssm.jobs.submission.frozen_code import FrozenCode
from megatron_txssm.jobs.submission.record import make_record
from megatron_txssm.jobs.submission.request import Request
from megatron_txssm.jobs.submission.submission import Submission, check_free
from megatron_txssm.jobs.supervisor.settings import Settings
from megatron_txssm.planning.check_build import check_build
from megatron_txssm.recipe.corpus.tokenizer import NoCorpus
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.evaluation_checks import check_task_files
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.batch_script import load_site_settings, render
from megatron_txssm.slurm.sbatch_options import Options, costly_defaults
from megatron_txssm.training.launch.preflight import check_checkpoint, check_room, check_run, is_finished, warnings
from megatron_txssm.versions import git_commit

if TYPE_CHECKING:
    from megatron_txssm.recipe.corpus.schema import CorpusRecipe


def submit(
    recipe: str | Path,
    *,
    nodes: int,
    gpus_per_node: int | None = None,
    nproc_per_node: int | None = None,
    spare: int = 0,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    sbatch: Sequence[str] = (),
    overrides: Sequence[str] = (),
    after: Sequence[str | int] = (),
    chain: bool = False,
    corpus: str | None = None,
    dry_run: bool = False,
    freeze_code: bool = True,
    limits: Limits = DEFAULTS,
    command: str | None = None,
    check: Callable[[Recipe], None] | None = None,
) -> int:
    """Queue a recipe's pretraining on the Slurm cluster of this machine.

        submit("transxssm_1.3b", nodes=4, gpus_per_node=8, time="24:00:00")
        submit("transxssm_320m", nodes=1, gpus_per_node=8, chain=True, limits=Limits(step_timeout=600))

    First the recipe, the data and the checkpoint are checked, Slurm validates the batch scripts, and the model is built
    once on fake tensors. Then the resolved
    recipe, the scripts and a copy of the code are written to the run folder, and the job is queued. It restarts by
    itself after its time limit, a preemption or a failure. The site's settings (slurm/env.sh, or the file that
    $TXSSM_ENV names) are loaded into this process's environment.

    Args:
        recipe: a name that `txssm recipes` lists, or a YAML file
        nodes: number of nodes to train on
        gpus_per_node: GPUs per node, one process each; default: $TXSSM_GPUS_PER_NODE, unless `nproc_per_node` is given
        nproc_per_node: processes per node, for nodes without GPUs
        spare: additional nodes, which replace nodes that fail
        time: the job's time limit in sbatch's format
        partition: default: $SBATCH_PARTITION, or the cluster's
        account: default: $SBATCH_ACCOUNT, or the user's
        sbatch: other long options of sbatch without the dashes, such as "exclusive" or "mem=0"
        overrides: recipe fields to change, such as "training.train_iters=20"
        after: numbers of jobs that must succeed before this one starts
        chain: shard the corpus, pretrain, convert and evaluate, each as its own job, then score evaluation.tasks
        corpus: the corpus recipe that `chain` shards; default: the one whose output is the recipe's data.corpus
        dry_run: check, and print the batch scripts; write and queue nothing
        freeze_code: run a copy of the code in the run folder; if false, each start runs the checkout as it is then
        limits: timeouts in seconds, and numbers of restarts and requeues
        command: the command that submits the run again; default: `txssm submit` with these arguments
        check: raises UserError for a recipe that must not be queued; the command line's is
            `evaluation.harness.stated.check_stated_tasks`

    Returns the exit code, 0, also if the run is already finished. UserError names the first problem; nothing is written
    or queued then.
    """
    request = Request(
        str(recipe),
        nodes,
        gpus_per_node=gpus_per_node,
        nproc_per_node=nproc_per_node,
        spare=spare,
        time=time,
        partition=partition,
        account=account,
        sbatch=tuple(sbatch),
        overrides=tuple(overrides),
        after=tuple(map(str, after)),
        chain=chain,
        corpus=corpus,
        dry_run=dry_run,
        freeze_code=freeze_code,
        limits=limits,
    )
    request.check()
    load_site_settings()
    submission = plan_submission(request, command or request.command, check)
    if submission is None:
        return 0
    return submission.show() if dry_run else submission.submit()


def plan_submission(request: Request, command: str, check: Callable[[Recipe], None] | None = None) -> Submission | None:
    """The checked submission; None if the run is finished. UserError names the first problem."""
    options, allocation = request.sbatch_options, request.allocation
    recipe = load_recipe(request.recipe, request.overrides)
    corpus = _corpus_to_shard(recipe, request.corpus) if request.chain else None
    _check_recipe(recipe, corpus, allocation, request.dry_run)
    if request.chain:
        check_task_files(recipe)
    if is_finished(recipe) and not request.chain:
        print(f"{recipe.name}: already finished; {recipe.checkpoint_path} holds step {recipe.train_iters}")
        return None
    run = recipe.run_path.resolve()
    if not slurm.PLAIN_PATH.fullmatch(str(run)):
        raise UserError(f"run_directory={str(run)!r} contains characters that a batch script cannot; use another")
    commit = git_commit(HOME)
    code = FrozenCode(HOME, run, commit) if request.freeze_code else None
    home = code.path if code else HOME
    scripts = _scripts(recipe, home, allocation, options, request)
    _check_cluster(recipe, scripts, request.dry_run)
    if check is not None:
        check(recipe)
    check_build(recipe, allocation.world_size)
    if allocation.gpus_per_node and (costly := list(costly_defaults(options))):
        print(
            f"warning: this job does not ask for {', '.join(costly)}; unless the cluster sets it anyway, add "
            "--sbatch OPTION, or set TXSSM_SBATCH_OPTIONS in slurm/env.sh",
            file=sys.stderr,
        )
    record = make_record(command, request, allocation, commit, home)
    return Submission(recipe, allocation, scripts, request.after, record, corpus, code)


def _check_recipe(recipe: Recipe, corpus: "CorpusRecipe | None", allocation: Allocation, dry_run: bool) -> None:
    """UserError if the recipe cannot run on the allocation; `corpus`: sharded before the training."""
    if corpus is not None:
        from megatron_txssm.data.sharding.plan import check_local_sources

        check_local_sources(corpus)
        # The shards do not exist yet; the job checks them.
        validate(recipe, allocation.world_size)
        return
    try:
        check_run(recipe, allocation.world_size)
    except NoCorpus as error:
        if not dry_run:
            raise UserError(f"{error} (or let --chain shard it first)") from None
        print(f"warning: a submission would be refused: {error}", file=sys.stderr)
        check_checkpoint(recipe)
    for warning in warnings(recipe):
        print(f"warning: {warning}", file=sys.stderr)


def _check_cluster(recipe: Recipe, scripts: Mapping[str, str], dry_run: bool) -> None:
    """UserError if the disk lacks space, a record is damaged, the run already has a job, or Slurm rejects a script."""
    check_room(recipe)
    if dry_run and not shutil.which("sbatch"):
        print("there is no sbatch on this machine: not checked against a cluster", file=sys.stderr)
        return
    check_free(recipe)
    # Only read: the job would refuse what is damaged.
    attempts(recipe.run_path)
    for script in scripts.values():
        slurm.check_submission(script)


def _scripts(recipe: Recipe, home: Path, allocation: Allocation, options: Options, request: Request) -> dict[str, str]:
    """Stage -> batch script. `home`: folder of the code that they run."""
    run = recipe.run_path.resolve()
    # With spare nodes, the supervisor needs the number of nodes to train on.
    settings = Settings(f"{run}/recipe.yaml", nodes=request.nodes if request.spare else 0, limits=request.limits)

    def script(stage: str, more: Options, *words: str) -> str:
        names = {"job-name": f"{recipe.name}-{stage}"[:60], "output": f"{run}/logs/{stage}-%j.out"}
        return render(stage, {**names, **options, **more}, words, home)

    told = {"signal": f"TERM@{request.limits.stop_before}"}
    scripts = {"pretrain": script("pretrain", allocation.options | told, *settings.words)}
    if request.chain:
        if (run / "export").exists():
            raise UserError(
                f"{run / 'export'} exists; --chain would write the converted model there: move or remove it"
            )
        scripts["convert"] = script("convert", {}, str(run), f"{run}/export")
        one_each = replace(allocation, spare=0).options
        scripts["evaluate"] = script("evaluate", one_each, str(run))
        if recipe.evaluation.tasks:
            scripts["harness"] = script("harness", one_each, str(run), "--trust-recipe")
    return scripts


def _corpus_to_shard(recipe: Recipe, name: str | None) -> "CorpusRecipe | None":
    """The corpus recipe whose output is the recipe's data.corpus; None if that is already sharded."""
    from megatron_txssm.recipe.corpus.loader import CORPUS_RECIPES, load_corpus_recipe
    from megatron_txssm.recipe.corpus.schema import KEPT_RECIPE

    if recipe.data.corpus is None:
        raise UserError("--chain shards data.corpus, but the recipe names other data; leave --chain out")
    directory = Path(recipe.data.corpus)
    if _is_sharded(directory):
        return None
    begun = [str(directory)] if (directory / KEPT_RECIPE).exists() else CORPUS_RECIPES.names()
    candidates = begun if name is None else [name]
    for corpus in map(load_corpus_recipe, candidates):
        if corpus.path.resolve() == directory.resolve():
            return corpus
    raise UserError(
        f"none of the corpus recipes {', '.join(candidates)} makes data.corpus={directory}; "
        "state one that does: --corpus RECIPE"
    )


def _is_sharded(directory: Path) -> bool:
    from megatron_txssm.data.corpus.manifest import read_plan

    if not (directory / "plan.json").exists():
        return False
    return all((directory / subset / "manifest.json").exists() for subset in read_plan(directory).tasks)
