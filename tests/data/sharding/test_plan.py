"""The plan: every row of the sources in exactly one task, whatever the files' order and sizes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import Slice, read_plan
from megatron_txssm.data.sharding import plan
from megatron_txssm.data.sharding.broken_rows import BrokenRows
from megatron_txssm.data.sharding.plan import list_files, make_plan, plan_subset
from megatron_txssm.data.sharding.readers import RowReader
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import SubsetSource
from tests.data.in_process import manifest_of, run_tasks_here, shard, web_recipe

Files = Sequence[tuple[str, int]]


def planned(files: Files, **fields: Any) -> list[list[tuple[str, int, int, int]]]:
    """(file, part, parts, bytes) of each task's slices."""
    tasks = plan_subset("web", SubsetSource(source="pages", **fields), list(files))
    return [[(piece.file, piece.part, piece.parts, piece.bytes) for piece in task] for task in tasks]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * len(name))


def test_small_files_share_a_task_up_to_task_bytes() -> None:
    files = [("a.jsonl", 40), ("b.parquet", 60), ("c.jsonl", 1), ("d.jsonl", 99), ("e.jsonl", 100)]
    assert planned(files, task_bytes=100) == [
        [("a.jsonl", 0, 1, 40), ("b.parquet", 0, 1, 60)],
        [("c.jsonl", 0, 1, 1), ("d.jsonl", 0, 1, 99)],
        [("e.jsonl", 0, 1, 100)],
    ]


def test_a_large_parquet_file_is_divided_and_a_large_file_of_lines_is_not() -> None:
    files = [("a.jsonl", 10), ("b.parquet", 250), ("c.jsonl.gz", 1000), ("d.parquet", 100)]
    assert planned(files, task_bytes=100) == [
        [("a.jsonl", 0, 1, 10)],
        [("b.parquet", 0, 3, 83)],
        [("b.parquet", 1, 3, 83)],
        [("b.parquet", 2, 3, 83)],
        [("c.jsonl.gz", 0, 1, 1000)],
        [("d.parquet", 0, 1, 100)],
    ]


def test_files_without_a_known_size_share_tasks_of_a_thousand() -> None:
    tasks = planned([(f"{number:05d}.parquet", 0) for number in range(2500)])
    assert [len(task) for task in tasks] == [1000, 1000, 500]


def test_more_tasks_than_a_file_name_can_number_are_refused() -> None:
    with pytest.raises(UserError, match=r"subsets\.web\.task_bytes=10 makes 100,000 tasks; raise it"):
        planned([("a.parquet", 1_000_000)], task_bytes=10)


def test_no_file_and_no_part_is_lost_or_planned_twice() -> None:
    draw = random.Random(0)
    for _ in range(50):
        suffixes = draw.choices((".parquet", ".jsonl", ".jsonl.zst"), k=30)
        files = [(f"{number:02d}{suffix}", draw.randrange(1000)) for number, suffix in enumerate(suffixes)]
        task_bytes = draw.randrange(1, 500)
        pieces = [piece for task in planned(files, task_bytes=task_bytes) for piece in task]
        expected = []
        for name, size in files:
            parts = max(1, -(-size // task_bytes)) if name.endswith(".parquet") else 1
            expected += [(name, part, parts) for part in range(parts)]
        assert [piece[:3] for piece in pieces] == expected
        assert all(task for task in planned(files, task_bytes=task_bytes))


@pytest.mark.parametrize("row_group_size", [1, 3, 7, 100])
def test_the_parts_of_a_file_hold_each_of_its_rows_once(tmp_path: Path, row_group_size: int) -> None:
    for rows in (0, 1, 2, 6, 7, 29, 300):
        texts = [f"document {number}" for number in range(rows)]
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "a.parquet", row_group_size)
        for parts in (1, 2, 3, 7, 29, 31):
            found, lengths = [], []
            for part in range(parts):
                broken = BrokenRows("web", max_broken_fraction=0)
                pieces = (Slice("a.parquet", part, parts, 10),)
                documents = list(RowReader(SubsetSource(source=str(tmp_path)), pieces, broken).run())
                assert broken.rows == len(documents) and not broken.counts
                found += [(document.text, document.metadata["row"]) for document in documents]
                lengths.append(len(documents))
            assert found == [(text, number) for number, text in enumerate(texts)], (rows, parts)
            assert max(lengths) - min(lengths) <= 1


def test_files_come_in_the_order_of_their_names_whatever_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    names = [f"part/{number:03d}.parquet" for number in range(20)] + ["a.jsonl", "z.jsonl"]
    listings = []

    class Bucket:
        def find(self, root: str, detail: bool) -> dict[str, dict[str, int]]:
            shuffled = random.Random(len(listings)).sample(names, len(names))
            listings.append(shuffled)
            return {f"{root}/{name}": {"size": 7} for name in shuffled}

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda source: (Bucket(), f"bucket/{source}"))
    for _ in range(5):
        assert list_files("web", SubsetSource(source="pages")) == [(name, 7) for name in sorted(names)]
    assert listings[0] != listings[1]


def test_listed_are_files_that_can_be_read_with_their_sizes(tmp_path: Path) -> None:
    names = ["b.parquet", "a/deep/c.jsonl.zst", "a.jsonl.gz", "c.parq", "d.json.gz", "README.md", "x.bin", "y.json"]
    touch(tmp_path, *names)
    expected = sorted(name for name in names if name.split(".", 1)[1] not in ("md", "bin", "json"))
    assert list_files("web", SubsetSource(source=str(tmp_path))) == [(name, len(name)) for name in expected]


def test_linked_folders_are_followed_and_hidden_ones_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    touch(tmp_path, "elsewhere/deep/b.jsonl", "elsewhere/.cache/e.jsonl", "f.jsonl")
    touch(source, "a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "sub/._a.jsonl", "sub/.git/x.jsonl")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "g.jsonl").symlink_to(tmp_path / "f.jsonl")
    (source / "sub" / "round").symlink_to(source)
    (source / "to_nothing.jsonl").symlink_to(tmp_path / "missing")
    listed = dict(list_files("web", SubsetSource(source=str(source))))
    assert listed == {"a.jsonl": 7, "g.jsonl": 7, "linked/deep/b.jsonl": 22, "to_nothing.jsonl": 0}
    (source / "linked").unlink()
    with pytest.raises(UserError, match=r"; 3 are hidden and ignored, such as .ipynb_checkpoints/a-checkpoint.jsonl"):
        list_files("web", SubsetSource(source=str(source), glob="b*"))


def test_glob_and_max_files_choose_among_them(tmp_path: Path) -> None:
    touch(tmp_path, "2.parquet", "1.parquet", "sub/0.parquet", "1.jsonl")

    def names(**fields: Any) -> list[str]:
        return [name for name, _ in list_files("web", SubsetSource(source=str(tmp_path), **fields))]

    assert names(glob="**/*.parquet") == ["1.parquet", "2.parquet", "sub/0.parquet"]
    assert names(glob="sub/*") == ["sub/0.parquet"]
    assert names(glob="[01].*") == ["1.jsonl", "1.parquet"]
    assert names(max_files=2) == ["1.jsonl", "1.parquet"]
    assert names(glob="*.parquet", max_files=1) == ["1.parquet"]


@pytest.mark.parametrize(
    ("source", "glob", "message"),
    [
        ("missing", "**/*.*", "holds no .parquet, .parq, .jsonl,"),
        ("missing", "**/*.*", "; it is empty, or not a folder"),
        ("README.md", "**/*.*", "; it is empty, or not a folder"),
        (".", "*.md", "matches glob='*.md'; 1 match '*.md', such as README.md"),
        ("nosuch://bucket", "**/*.*", "cannot be listed: Protocol not known: nosuch"),
    ],
)
def test_a_source_without_files_is_named(tmp_path: Path, source: str, glob: str, message: str) -> None:
    touch(tmp_path, "README.md", "a.jsonl")
    where = source if "://" in source else str(tmp_path / source)
    with pytest.raises(UserError) as caught:
        list_files("web", SubsetSource(source=where, glob=glob))
    assert str(caught.value).startswith(f"subsets.web.source={where} ") and message in str(caught.value)


def test_a_source_that_fails_is_a_clear_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = web_recipe(tmp_path, tmp_path / "missing")
    assert main(["data", "shard", str(recipe), "--plan"]) == 2
    assert "error: subsets.web.source=" in capsys.readouterr().err


def test_the_plan_command_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("a.jsonl", 700_000), ("b.parquet", 2_500_000), ("c.jsonl", 300_000)):
        (source / name).write_bytes(bytes(size))
    recipe = web_recipe(tmp_path, source, task_bytes=1_000_000, filters=["score > 3", "lang == en"])
    assert main(["data", "shard", str(recipe), "--plan"]) == 0
    # a; b in three; c: c does not share a's task, since b stands between them.
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("web "))
    assert lines[-1] == "web: only rows with score > 3 and lang == en"
    assert row == ["web", "3", "0.00", "GB", "5", "1", "MB"]
    assert not (tmp_path / "corpus").exists()


def test_the_same_sources_give_the_same_plan_and_files_that_come_later_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    touch(source, "b.jsonl", "c.jsonl")
    recipe = load_corpus_recipe(web_recipe(tmp_path, source))
    before = make_plan(recipe)
    written = (tmp_path / "corpus" / "plan.json").read_bytes()
    touch(source, "a.jsonl", "d.jsonl")
    assert make_plan(recipe) == before == read_plan(tmp_path / "corpus")
    assert (tmp_path / "corpus" / "plan.json").read_bytes() == written
    (source / "a.jsonl").unlink()
    (source / "d.jsonl").unlink()
    again = load_corpus_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    assert make_plan(again) == before
    assert (tmp_path / "again" / "plan.json").read_bytes() == written


def test_a_corpus_goes_on_from_its_plan_though_its_sources_gained_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tasks_here(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    (source / "b.jsonl").write_text('{"text": "one"}\n')
    recipe = web_recipe(tmp_path, source)
    assert shard(recipe) == 0
    (source / "a.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "corpus" / "web" / "00000.json").unlink()
    assert shard(recipe) == 0
    assert manifest_of(tmp_path / "corpus").sources == (Slice("b.jsonl", 0, 1, len('{"text": "one"}\n')),)
    assert not (tmp_path / "corpus" / "web" / "00001.json").exists()


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("subsets.web.task_bytes=7", "subsets.web.task_bytes: 500000000 there, 7 here"),
        ("subsets.web.glob=*.parquet", "subsets.web.glob: '**/*.*' there, '*.parquet' here"),
        ("subsets.web.filters=[a > 1]", "subsets.web.filters: () there, ('a > 1',) here"),
        ("tokenizer.eod_token=x", "tokenizer.eod_token: '<|endoftext|>' there, 'x' here"),
    ],
)
def test_a_corpus_is_not_gone_on_with_under_another_recipe(tmp_path: Path, override: str, difference: str) -> None:
    source = tmp_path / "source"
    touch(source, "a.jsonl")
    recipe = web_recipe(tmp_path, source)
    begun = load_corpus_recipe(recipe)
    plan.freeze_recipe(begun)
    make_plan(begun)
    kept = (tmp_path / "corpus" / "corpus.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        plan.freeze_recipe(load_corpus_recipe(recipe, [override]))
    assert "was begun with another recipe" in str(caught.value) and difference in str(caught.value)
    assert (tmp_path / "corpus" / "corpus.yaml").read_bytes() == kept


def test_a_subset_may_be_added_and_only_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_tasks_here(monkeypatch)
    for name in ("web", "books"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"text": f"some words of {name}"}) + "\n")
    recipe, corpus = web_recipe(tmp_path, tmp_path / "web"), tmp_path / "corpus"
    assert shard(recipe) == 0
    before = {path: path.read_bytes() for path in (corpus / "web").iterdir()}
    # A mistake in the new one is corrected by the next command.
    assert shard(corpus, "--set", "subsets.boks={source: missing}") == 2
    assert "subsets.boks.source=missing holds no" in capsys.readouterr().err
    added = ["--set", f"subsets.books={{source: {tmp_path / 'books'}, validation_fraction: 0}}"]
    assert shard(recipe, *added) == 0
    assert list(read_plan(corpus).tasks) == ["web", "books"] and manifest_of(corpus, subset="books").rows == 1
    assert {path: path.read_bytes() for path in (corpus / "web").iterdir()} == before
    # The corpus has the new recipe; the old one would leave a subset out.
    assert shard(corpus) == 0 and shard(recipe) == 2
    assert "was begun with another recipe (subset 'books' is missing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "subsets.web.max_broken_fraction=0.5",
        "subsets.web.source=x",
        "slurm.partition=cpu",
        "subsets.web.blob_threads=2",
    ],
)
def test_what_changes_no_shard_may_change_under_way(tmp_path: Path, override: str) -> None:
    source = tmp_path / "source"
    touch(source, "a.jsonl")
    recipe = web_recipe(tmp_path, source)
    begun = load_corpus_recipe(recipe)
    plan.freeze_recipe(begun)
    make_plan(begun)
    plan.freeze_recipe(load_corpus_recipe(recipe, [override]))
    assert load_corpus_recipe(tmp_path / "corpus") == load_corpus_recipe(recipe, [override])


@pytest.mark.parametrize("content", ["{}", "[]", '{"tasks": []}', '{"tasks": {"web": [[[1]]]}}', "no JSON", '{"tas'])
def test_a_damaged_plan_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: not a plan"):
        read_plan(tmp_path)


def test_the_plan_of_a_large_corpus_is_small(tmp_path: Path) -> None:
    """250 billion tokens: a plan that every task reads must not be read for seconds."""
    recipe = load_corpus_recipe(web_recipe(tmp_path, tmp_path))
    files = [(f"train-{number:05d}-of-00234.parquet", 2_200_000_000) for number in range(234)]
    tasks = plan_subset("web", recipe.subsets["web"], files)
    assert len(tasks) == 234 * 5
    plan.write_plan(tmp_path / "corpus", plan.Plan({"web": tasks}))
    path = tmp_path / "corpus" / "plan.json"
    assert path.stat().st_size < 100_000 and json.loads(path.read_bytes())["format"] == 1
    assert read_plan(tmp_path / "corpus").tasks["web"] == tasks
    assert sum(read_plan(tmp_path / "corpus").bytes("web", task) for task in range(len(tasks))) == 234 * 2_200_000_000
