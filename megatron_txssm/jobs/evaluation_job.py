"""One Slurm job that evaluates a trained model, by itself."""

import contextlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.files import alone_in, write_file_atomically, write_json
from megatron_txssm.home import HOME
from megatron_txssm.jobs.submission.record import make_record
from megatron_txssm.jobs.submission.request import Request
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.batch_script import load_site_settings, render
from megatron_txssm.slurm.submission import SubmissionRecord
from megatron_txssm.versions import git_commit


def submit_evaluation(
    stage: str, request: Request, job_words: Callable[[int], tuple[Path, list[str]]], command: str
) -> int:
    """Queue slurm/STAGE.sbatch, or print it with `request.dry_run`; returns the exit code.

    `job_words`: number of processes -> the job's folder, for its script, log and submission.json, and its arguments;
    it checks them. `command`: submits the job again. UserError names the first problem; nothing is written or queued
    then.
    """
    request.check()
    load_site_settings()
    options, allocation = request.sbatch_options, request.allocation
    folder, words = job_words(allocation.world_size)
    if "\\" in str(folder):
        raise UserError(f"{str(folder)!r} contains a backslash, which sbatch changes in a log's path; use another")
    if (folder / "recipe.yaml").exists():
        # Its submission.json would be overwritten.
        raise UserError(f"{folder} is a run's folder; name another with --output, such as {folder}/evaluation/harness")
    name = re.sub(r"[^\w.-]", "-", f"{Path(request.recipe).resolve().name}-{stage}", flags=re.ASCII)
    script = render(stage, {"job-name": name[-60:], **options, **allocation.options}, words)
    if not request.dry_run or shutil.which("sbatch"):
        _check_free(folder)
        slurm.check_submission(script)
    if request.dry_run:
        print(f"# {folder}/{stage}.sbatch\n{script}")
        print(f"{request.recipe}: {allocation}; checked, nothing written, nothing queued")
        return 0
    record = make_record(command, request, allocation, git_commit(HOME), HOME)
    with alone_in(folder, "--output"):
        # Another process may have submitted since.
        _check_free(folder)
        job = _queue(folder, stage, script, record)
    print(
        f"{stage}: job {job} ({allocation})\n  script {folder}/{stage}.sbatch\n  output {folder}/logs/{stage}-{job}.out"
    )
    print(f"follow with: txssm logs -f {shlex.quote(str(folder))}")
    return 0


def _queue(folder: Path, stage: str, script: str, record: SubmissionRecord) -> str:
    """Write the script, queue it, and record it; a job that cannot be recorded is cancelled. Returns its number."""
    path = folder / f"{stage}.sbatch"
    try:
        (folder / "logs").mkdir(exist_ok=True)
        write_file_atomically(path, script.encode())
        # An option, since a line of a script holds only plain words; sbatch would expand a single %.
        log = f"{folder}/logs/{stage}".replace("%", "%%") + "-%j.out"
        job = slurm.submit(path.resolve(), f"--output={log}")
        try:
            write_json(folder / "submission.json", record | {"jobs": {stage: [job]}})
        except BaseException:
            with contextlib.suppress(UserError):  # it has ended already
                slurm.run_slurm("scancel", job)
            raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name a folder with --output") from None
    return job


def _check_free(folder: Path) -> None:
    """UserError if a job of this folder is queued, which would write the same files."""
    for job in slurm.queue():
        if not job.is_over and job.script.parent == folder.resolve():
            raise UserError(
                f"{folder} already has job {job.job_id} ({job.state}); wait for its end, or name another --output"
            )
