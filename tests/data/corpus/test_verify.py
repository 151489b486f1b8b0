"""Whatever is damaged is named with its task, and `--redo` makes way for those tasks alone, with the same bytes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import open_corpus
from megatron_txssm.data.corpus.shard import ShardWriter
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.tokenizer import read_tokenizer_facts
from tests.data.corpora import library_texts
from tests.data.corpus_recipes import corpus_bytes, write_byte_level_bpe, write_recipe
from tests.data.in_process import run_tasks_here, shard

TASKS = {"books": 2, "web": 3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subsets; only `books` holds documents out."""
    folder = tmp_path_factory.mktemp("original")
    for seed, (subset, tasks) in enumerate(TASKS.items()):
        (folder / subset).mkdir()
        for task in range(tasks):
            texts = library_texts(25, seed=10 * seed + task)
            lines = "".join(json.dumps({"text": text[:400]}) + "\n" for text in texts)
            (folder / subset / f"{task}.jsonl").write_text(lines)
    recipe = write_recipe(
        folder,
        {
            "output": str(folder / "corpus"),
            "tokenizer": write_byte_level_bpe(folder),
            "subsets": {
                "books": {"source": str(folder / "books"), "task_bytes": 1, "validation_fraction": 0.4},
                "web": {"source": str(folder / "web"), "task_bytes": 1, "validation_fraction": 0},
            },
        },
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tasks_here(monkeypatch)
        assert shard(recipe) == 0
    names = {path.name for path in (folder / "corpus").glob("*/*.bin")}
    assert {"00000.train.bin", "00001.validation.bin", "00002.train.bin"} <= names
    return folder / "corpus"


@pytest.fixture
def corpus(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_tasks_here(monkeypatch)
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def verify(corpus: Path, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, list[str]]:
    """(exit code, lines of the output) of `txssm data verify`."""
    capsys.readouterr()
    code = main(["data", "verify", str(corpus), *words])
    return code, capsys.readouterr().out.splitlines()


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def flip_a_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def set_token(corpus: Path, subset: str, task: int, place: int, token: int) -> None:
    """Change a token, and the manifest, so that only a look at the tokens themselves can tell."""
    path = corpus / subset / f"{task:05d}.train.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[place] = token
    tokens.tofile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(
        corpus / subset / f"{task:05d}.json", lambda data: data["shards"]["train"]["sha256"].update({".bin": digest})
    )


def eod_of(corpus: Path) -> int:
    return read_tokenizer_facts(corpus).eod


def first_place(corpus: Path, subset: str, task: int, *, of_eod: bool) -> int:
    tokens = np.fromfile(corpus / subset / f"{task:05d}.train.bin", np.uint16)
    return int(np.argmax((tokens == eod_of(corpus)) == of_eod))


def flipped_bin(corpus: Path) -> None:
    flip_a_byte(corpus / "web" / "00001.train.bin", 100)


def flipped_validation_bin(corpus: Path) -> None:
    flip_a_byte(corpus / "books" / "00001.validation.bin", -1)


def flipped_parquet(corpus: Path) -> None:
    flip_a_byte(corpus / "web" / "00002.train.parquet", 10)


def truncated_bin(corpus: Path) -> None:
    path = corpus / "web" / "00000.train.bin"
    path.write_bytes(path.read_bytes()[:-2])


def empty_bin(corpus: Path) -> None:
    (corpus / "web" / "00000.train.bin").write_bytes(b"")


def idx_of_another_shard(corpus: Path) -> None:
    shutil.copy(corpus / "web" / "00001.train.idx", corpus / "web" / "00000.train.idx")


def damaged_idx(corpus: Path) -> None:
    flip_a_byte(corpus / "web" / "00000.train.idx", 40)


def missing_bin(corpus: Path) -> None:
    (corpus / "books" / "00000.train.bin").unlink()


def missing_idx(corpus: Path) -> None:
    (corpus / "books" / "00000.validation.idx").unlink()


def missing_parquet(corpus: Path) -> None:
    (corpus / "web" / "00001.train.parquet").unlink()


def missing_manifest(corpus: Path) -> None:
    (corpus / "web" / "00001.json").unlink()


def edited_counts(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data["shards"]["train"].update(documents=24))


def edited_tokens(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data["shards"]["train"].update(tokens=1))


def edited_ends(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data["shards"]["train"].update(inner_eods=3))


def edited_sizes(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data["shards"]["train"]["sizes"].pop(".idx"))


def edited_hashes(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data["shards"]["train"]["sha256"].pop(".bin"))


def manifest_without_shards(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data.update(shards={}))


def manifest_of_another_task(corpus: Path) -> None:
    shutil.copy(corpus / "web" / "00002.json", corpus / "web" / "00001.json")


def manifest_of_another_subset(corpus: Path) -> None:
    shutil.copy(corpus / "books" / "00001.json", corpus / "web" / "00001.json")


def manifest_that_is_no_json(corpus: Path) -> None:
    (corpus / "web" / "00001.json").write_text('{"format": 1,')


def manifest_that_is_a_list(corpus: Path) -> None:
    (corpus / "web" / "00001.json").write_text("[]")


def manifest_with_a_list_of_shards(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data.update(shards=[]))


def manifest_of_another_version(corpus: Path) -> None:
    edit_json(corpus / "web" / "00001.json", lambda data: data.update(format=99))


def other_fingerprint(corpus: Path) -> None:
    edit_json(corpus / "books" / "00001.json", lambda data: data.update(tokenizer="0" * 64))


def other_sources(corpus: Path) -> None:
    edit_json(corpus / "web" / "00002.json", lambda data: data["sources"][0].update(file="9.jsonl"))


def stray_bin(corpus: Path) -> None:
    shutil.copy(corpus / "web" / "00001.train.bin", corpus / "web" / "00001.validation.bin")


def missing_eod(corpus: Path) -> None:
    set_token(corpus, "web", 1, first_place(corpus, "web", 1, of_eod=True), 5)


def additional_eod(corpus: Path) -> None:
    set_token(corpus, "web", 1, first_place(corpus, "web", 1, of_eod=False), eod_of(corpus))


def token_outside_the_vocabulary(corpus: Path) -> None:
    set_token(corpus, "web", 1, first_place(corpus, "web", 1, of_eod=False), 1200)


@pytest.mark.parametrize(
    ("damage", "task", "what"),
    [
        (flipped_bin, "web task 1", "00001.train.bin has changed since it was written (SHA-256)"),
        (flipped_validation_bin, "books task 1", "00001.validation.bin has changed"),
        (flipped_parquet, "web task 2", "00002.train.parquet has changed"),
        (truncated_bin, "web task 0", "bytes, its manifest says"),
        (empty_bin, "web task 0", "00000.train.bin has 0 bytes, its manifest says"),
        (idx_of_another_shard, "web task 0", "00000.train.idx has "),
        (damaged_idx, "web task 0", "00000.train.idx has changed"),
        (missing_bin, "books task 0", "00000.train.bin is missing"),
        (missing_idx, "books task 0", "00000.validation.idx is missing"),
        (missing_parquet, "web task 1", "00001.train.parquet is missing"),
        (missing_manifest, "web task 1", "is not finished"),
        (edited_counts, "web task 1", "holds 25 documents"),
        (edited_tokens, "web task 1", "its manifest says otherwise"),
        (edited_ends, "web task 1", "end-of-document tokens, its manifest says"),
        (edited_sizes, "web task 1", "00001.train.idx has "),
        (edited_hashes, "web task 1", "00001.train.bin has changed"),
        (manifest_without_shards, "web task 1", "00001.train.bin belongs to no manifest"),
        (manifest_of_another_task, "web task 1", "00001.json: not a task's manifest (it belongs to web task 2)"),
        (manifest_of_another_subset, "web task 1", "it belongs to books task 1"),
        (manifest_that_is_no_json, "web task 1", "00001.json: not a task's manifest"),
        (manifest_that_is_a_list, "web task 1", "00001.json: not a task's manifest"),
        (manifest_with_a_list_of_shards, "web task 1", "00001.json: not a task's manifest"),
        (manifest_of_another_version, "web task 1", "00001.json: format 99, this version reads 1"),
        (other_fingerprint, "books task 1", f"was tokenised by another tokenizer ({'0' * 64})"),
        (other_sources, "web task 2", "its manifest names other sources than the plan"),
        (stray_bin, "web task 1", "00001.validation.bin belongs to no manifest"),
        (missing_eod, "web task 1", "does not end with the end-of-document token"),
        (additional_eod, "web task 1", "holds 28 end-of-document tokens, its manifest says 27"),
        (token_outside_the_vocabulary, "web task 1", "holds token 1200, outside the vocabulary of 1200"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named_and_undone(
    original: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture,
    damage: Callable[[Path], None],
    task: str,
    what: str,
) -> None:
    damage(corpus)
    code, lines = verify(corpus, capsys)
    assert code == 1
    assert lines[0].startswith(f"{task}: ") and what in lines[0]
    remedy = f"txssm data shard {corpus}"
    assert lines[1:] == ["1 of 5 tasks failed verification; remove them with --redo, then redo them: " + remedy]

    before = corpus_bytes(corpus)
    code, lines = verify(corpus, capsys, "--redo")
    assert code == 1 and "they were removed; redo them" in lines[-1]
    subset, _, number = task.split(" ")
    mine = {path for path in before if path.startswith(f"{subset}/{int(number):05d}.")}
    after = corpus_bytes(corpus)
    assert before.keys() - after.keys() == mine | {f"{subset}/manifest.json"}
    assert all(before[path] == content for path, content in after.items())

    assert main(["data", "shard", str(corpus), "--workers", "1"]) == 0
    assert corpus_bytes(corpus) == corpus_bytes(original)
    assert verify(corpus, capsys) == (0, [f"{corpus}: all 5 tasks match their manifests"])


def test_all_faulty_tasks_are_named_and_only_they_are_made_again(
    original: Path, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    for damage in (flipped_validation_bin, truncated_bin, missing_parquet):
        damage(corpus)
    kept = (corpus / "web" / "00002.json").stat().st_mtime_ns
    code, lines = verify(corpus, capsys, "--redo")
    assert code == 1 and [line.partition(":")[0] for line in lines[:3]] == ["books task 1", "web task 0", "web task 1"]
    assert lines[3].startswith("3 of 5 tasks failed verification; they were removed")
    with pytest.raises(
        UserError, match="1 of the 2 tasks of books are not finished; finish them with `txssm data shard"
    ):
        open_corpus(corpus)
    assert main(["data", "shard", str(corpus / "corpus.yaml"), "--workers", "1"]) == 0
    assert corpus_bytes(corpus) == corpus_bytes(original)
    assert (corpus / "web" / "00002.json").stat().st_mtime_ns == kept


def test_what_verify_reads_it_leaves_as_it_is(original: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    for words in ([], ["--redo"]):
        code, lines = verify(corpus, capsys, *words)
        assert (code, lines) == (0, [f"{corpus}: all 5 tasks match their manifests"])
        assert corpus_bytes(corpus) == corpus_bytes(original)


def test_a_lost_sum_of_a_subset_is_written_again(original: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    (corpus / "web" / "manifest.json").unlink()
    assert verify(corpus, capsys)[0] == 0
    assert corpus_bytes(corpus) == corpus_bytes(original)


def test_a_plan_that_was_changed_makes_the_tasks_faulty_that_it_changes(
    corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    edit_json(corpus / "plan.json", lambda data: data["tasks"]["web"].reverse())
    code, lines = verify(corpus, capsys)
    assert code == 1 and lines[:2] == [
        "web task 0: its manifest names other sources than the plan",
        "web task 2: its manifest names other sources than the plan",
    ]
    assert lines[2].startswith("2 of 5 tasks")


def test_texts_that_could_not_be_fetched_are_counted_but_no_fault(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    for task in (0, 2):
        edit_json(corpus / "web" / f"{task:05d}.json", lambda data: data.update(broken={"unreachable blob": 600}))
    code, lines = verify(corpus, capsys)
    assert code == 0
    assert lines[0] == "1,200 texts could not be fetched; to try again, delete the manifests that count them"


def test_a_document_too_many_in_a_whole_shard_is_seen(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """Another writer's shard, sound in itself, under this task's name."""
    facts = read_tokenizer_facts(corpus)
    writer = ShardWriter(corpus / "web" / "00001.train", facts.vocab_size, facts.eod)
    writer.write(np.arange(5, 45), np.array([1] * 40))
    writer.publish()
    code, lines = verify(corpus, capsys)
    assert code == 1 and lines[0].startswith("web task 1: ") and "its manifest says" in lines[0]


def test_what_is_no_corpus_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in (tmp_path, tmp_path / "missing", "missing"):
        assert main(["data", "verify", str(name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
