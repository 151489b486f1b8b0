"""One corpus of several: what training, status, verify and shard see of it, and what never reaches the originals."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus import combine
from megatron_txssm.data.corpus.manifest import open_corpus
from megatron_txssm.data.corpus.shard import read_tokens
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from tests.data.corpus_recipes import corpus_bytes
from tests.data.in_process import run_tasks_here, shard, web_recipe


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a and b, each of two tasks of a subset `web`."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tasks_here(monkeypatch)
        for name in ("a", "b"):
            make_corpus(folder / name, [f"{name} {number} some words" for number in range(20)])
    return folder


def make_corpus(folder: Path, texts: list[str], **fields: object) -> None:
    source = folder / "source"
    source.mkdir(parents=True)
    for task in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[task::2]]
        (source / f"{task}.jsonl").write_text("".join(lines))
    recipe = web_recipe(folder, source, task_bytes=1, **{"validation_fraction": 0.3, **fields})
    assert shard(recipe) == 0


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """Copies of both, a/corpus and b/corpus, that a test may change."""
    return Path(shutil.copytree(originals, tmp_path / "here"))


def data(*words: str | Path) -> int:
    return main(["data", *map(str, words)])


def test_a_combined_corpus_holds_the_same_bytes_and_every_command_reads_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = folder / "a/corpus", folder / "b/corpus", folder / "out"
    assert data("combine", out, a, f"{b}=more") == 0
    assert "more-web" in capsys.readouterr().out
    corpus = open_corpus(out)
    assert list(corpus.subsets) == ["web", "more-web"]
    for original, name in ((a, "web"), (b, "more-web")):
        theirs = open_corpus(original).subsets["web"]
        for split in ("train", "validation"):
            assert [r for _, r in theirs.shards(split)] == [r for _, r in corpus.subsets[name].shards(split)]
            for (prefix, _), (linked, _) in zip(theirs.shards(split), corpus.subsets[name].shards(split), strict=True):
                assert read_tokens(prefix).tolist() == read_tokens(linked).tolist()
    # No shard is copied, and no link is to a place that a move of all of them changes.
    shards = [path for path in out.rglob("*") if path.suffix in (".bin", ".idx", ".parquet")]
    assert len(shards) == sum(path.suffix in (".bin", ".idx", ".parquet") for path in folder.glob("[ab]/corpus/*/*"))
    assert all(path.is_symlink() and not os.path.isabs(os.readlink(path)) for path in shards)
    assert data("verify", out) == 0 and data("status", out) == 0
    assert "all 4 tasks match their manifests" in capsys.readouterr().out
    assert data("blend", out, "--tokens", "1e6", "--megatron-args") == 0
    words = capsys.readouterr().out
    assert f"{out}/web/00000.train" in words and f"{out}/more-web/00001.train" in words


def test_it_is_moved_with_its_corpora_and_combined_again(folder: Path, tmp_path: Path) -> None:
    assert data("combine", folder / "one", folder / "a/corpus", f"{folder}/b/corpus=b") == 0
    assert data("combine", folder / "deep/er/two", folder / "one", f"{folder}/a/corpus=again") == 0
    shutil.rmtree(folder / "one")
    moved = folder.rename(tmp_path / "moved")
    corpus = open_corpus(moved / "deep/er/two")
    assert list(corpus.subsets) == ["web", "b-web", "again-web"]
    for subset in corpus.subsets.values():
        assert sum(len(read_tokens(prefix)) for prefix, _ in subset.shards("train")) == subset.tokens("train") > 0


def test_what_is_done_again_or_added_does_not_reach_the_corpora_it_is_made_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tasks_here(monkeypatch)
    a, out = folder / "a/corpus", folder / "out"
    before = corpus_bytes(a)
    assert data("combine", out, a, f"{folder}/b/corpus=b") == 0
    combined = corpus_bytes(out)
    (out / "web/00000.train.bin").unlink()
    (out / "web/00000.train.bin").write_bytes(b"damaged")
    assert data("verify", out, "--redo") == 1 and not (out / "web/00000.train.idx").is_symlink()
    assert corpus_bytes(a) == before
    assert shard(out) == 0
    assert corpus_bytes(out) == combined and corpus_bytes(a) == before
    assert not (out / "web/00000.train.bin").is_symlink() and (out / "web/00001.train.bin").is_symlink()


def test_subsets_of_one_name_are_refused_with_both_corpora_and_the_remedy(folder: Path) -> None:
    a, b = folder / "a/corpus", folder / "b/corpus"
    with pytest.raises(UserError, match=rf"web is in both {a} and {b}; .*{b}=NAME makes it NAME-web"):
        combine.combine(folder / "out", [combine.Source(a), combine.Source(b)])
    for prefix in ("", "no/folder"):
        with pytest.raises(UserError, match="must be letters"):
            combine.combine(folder / "out", [combine.Source(a), combine.Source(b, prefix)])
    with pytest.raises(UserError, match="exists"):
        combine.combine(a, [combine.Source(a), combine.Source(b, "b")])
    assert main(["data", "combine", str(folder / "out"), str(a)]) == 2
    assert not (folder / "out").exists()


def test_another_tokenizer_or_unfinished_tasks_are_refused(folder: Path) -> None:
    a, b = combine.Source(folder / "a/corpus"), combine.Source(folder / "b/corpus", "b")
    facts = b.directory / "tokenizer/facts.json"
    as_made = facts.read_text()
    facts.write_text(json.dumps(json.loads(as_made) | {"eod": 7}))
    with pytest.raises(UserError, match=r"different tokenizers \(eod 0 and 7\)"):
        combine.combine(folder / "out", [a, b])
    facts.write_text(as_made)
    (b.directory / "web/00001.json").unlink()
    with pytest.raises(UserError, match="1 of the 2 tasks of web are not finished"):
        combine.combine(folder / "out", [a, b])
    assert not (folder / "out").exists()


def test_what_stops_in_the_middle_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(combine, "write_plan", stopped)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        combine.combine(folder / "out", [combine.Source(folder / "a/corpus"), combine.Source(folder / "b/corpus", "b")])
    assert sorted(path.name for path in folder.iterdir()) == before


def test_corpora_that_cannot_be_written_are_combined(folder: Path) -> None:
    a, b, out = folder / "a/corpus", folder / "b/corpus", folder / "out"
    before = [corpus_bytes(a), corpus_bytes(b)]
    for path in sorted([*a.rglob("*"), *b.rglob("*")], reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert data("combine", out, a, f"{b}=b") == 0
        # What Megatron and further commands write lies in folders of its own.
        for place in (out, out / "web", out / "b-web", out / "tokenizer"):
            assert not place.is_symlink() and place.stat().st_mode & 0o200
        assert (out / "tokenizer/tokenizer.json").stat().st_mode & 0o200
        assert list(load_corpus_recipe(out).subsets) == ["web", "b-web"]
    finally:
        for path in [a, b, *a.rglob("*"), *b.rglob("*")]:
            path.chmod(0o755)
    assert [corpus_bytes(a), corpus_bytes(b)] == before
