"""Blends of a corpus: shares, epochs, Megatron's arguments, and what a recipe's corpus is checked for."""

import argparse
import json
import os
import shlex
from pathlib import Path

import pytest

from megatron_txssm.cli import data_blend
from megatron_txssm.data.corpus.blend import check_corpus, corpus_arguments, recipe_blend
from megatron_txssm.data.corpus.shard import write_shard
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments
from tests.data.corpus_fixture import make_corpus, make_recipe

# Tokens of each document, the end included; the recipe trains on 20 steps of 512 tokens.
WEB = [[[7] * 99] * 30, [[7] * 99] * 10]
BOOKS = [[[7] * 49] * 100]
STAGES = "data.stages=[{tokens: 5000, weights: {web: 3, books: 1}}, {weights: {books: 2}}]"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    corpus = make_corpus(folder / "corpus", {"web": WEB, "books": BOOKS}, {"web": [[[7] * 39], [[7] * 119]]})
    return make_recipe(folder, corpus)


def blend(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    data_blend.add_arguments(parser)
    args = parser.parse_args(list(map(str, words)))
    assert data_blend.run(args) == 0


def arguments(recipe_file: Path, *overrides: str) -> argparse.Namespace:
    return parse_megatron_arguments(megatron_arguments(load_recipe(recipe_file, overrides)))


def test_without_weights_every_token_is_as_likely(recipe_file: Path) -> None:
    (stage,) = recipe_blend(load_recipe(recipe_file)).stages
    assert (stage.tokens, stage.weights) == (10240, {"web": 4000 / 9000, "books": 5000 / 9000})
    corpus = recipe_file.parent / "corpus"
    weights = arguments(recipe_file).train_data_path[::2]
    assert list(map(float, weights)) == pytest.approx([3000 / 9000, 1000 / 9000, 5000 / 9000], rel=1e-12)
    assert arguments(recipe_file).train_data_path[1::2] == [
        f"{corpus}/web/00000.train",
        f"{corpus}/web/00001.train",
        f"{corpus}/books/00000.train",
    ]


def test_a_weight_is_divided_over_the_shards_with_every_digit(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.weights={books: 1, web: 2}"])
    shares = recipe_blend(recipe).shares(recipe_blend(recipe).average)
    assert [(share.subset, share.available) for share in shares] == [("books", 5000), ("web", 4000)]
    assert [share.drawn for share in shares] == pytest.approx([10240 / 3, 10240 * 2 / 3])
    assert shares[1].epochs == pytest.approx(10240 * 2 / 3 / 4000)
    words = arguments(recipe_file, "data.weights={books: 1, web: 2}").train_data_path
    assert [Path(prefix).parent.name for prefix in words[1::2]] == ["books", "web", "web"]
    assert list(map(float, words[::2])) == pytest.approx([1 / 3, 1 / 2, 1 / 6], rel=1e-15)


def test_stages_are_whole_steps_and_average_into_megatrons_blend(recipe_file: Path) -> None:
    args = arguments(recipe_file, STAGES)
    # 5,000 tokens are 10 of the 20 steps, of 16 samples.
    assert [stage["samples"] for stage in json.loads(args.blend_stages)] == [160, 160]
    first, second = (stage["weights"] for stage in json.loads(args.blend_stages))
    assert first == pytest.approx([0.75 * 0.75, 0.75 * 0.25, 0.25])
    assert second == [0, 0, 1]
    assert list(map(float, args.train_data_path[::2])) == pytest.approx([0.75 * 0.375, 0.25 * 0.375, 0.625])


def test_validation_leaves_out_subsets_without_it(recipe_file: Path) -> None:
    corpus = recipe_file.parent / "corpus"
    prefixes = [f"{corpus}/web/00000.validation", f"{corpus}/web/00001.validation"]
    assert arguments(recipe_file).valid_data_path is None
    words = arguments(recipe_file, STAGES, "logging.eval_iters=2").valid_data_path
    assert words[1::2] == prefixes
    # Megatron takes them in any unit.
    assert float(words[0]) / float(words[2]) == pytest.approx(40 / 120)
    # Validation sets that are read whole have no weights.
    assert arguments(recipe_file, "logging.eval_iters=null").valid_data_path == prefixes


def test_the_tokenizer_is_the_corpuss(recipe_file: Path) -> None:
    model = f"{recipe_file.parent}/corpus/tokenizer/tokenizer.model"
    args = arguments(recipe_file)
    assert (args.tokenizer_type, args.tokenizer_model) == ("SentencePieceTokenizer", model)
    check_corpus(load_recipe(recipe_file))
    check_corpus(load_recipe(recipe_file, [f"data.tokenizer_model={model}"]))


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.corpus=/nowhere"], "data.corpus: /nowhere holds no corpus"),
        (["data.weights={webb: 1}"], "the weights name 'webb', but .* holds web, books; did you mean 'web'?"),
        (["data.stages=[{tokens: 600, weights: {web: 1}}, {weights: {book: 1}}]"], "did you mean 'books'?"),
        (
            ["data.tokenizer_type=HuggingFaceTokenizer"],
            "was made with a SentencePieceTokenizer; leave data.tokenizer_type",
        ),
        (["data.tokenizer_model={folder}/recipe.yaml"], "is not the tokenizer that .* was made with; leave"),
        (["data.vocab_size=299"], "data.vocab_size=299 is less than the 300 tokens of .*; set data.vocab_size=300"),
        (
            ["logging.eval_iters=1", "data.weights={books: 1}"],
            "no validation documents in books; set logging.eval_iters=0",
        ),
        (
            ["logging.eval_iters=null", "training.seq_length=64"],
            "web/00000.validation.bin holds 40 tokens, less than one.*; set logging.eval_iters to a number",
        ),
        (
            ["logging.eval_iters=null", "training.seq_length=64", "megatron.skip_train=true"],
            "less than one sample of seq_length=64 and the token after it; state a smaller length",
        ),
    ],
)
def test_a_corpus_that_does_not_fit_is_named(recipe_file: Path, overrides: list[str], wanted: str) -> None:
    words = [override.replace("{folder}", str(recipe_file.parent)) for override in overrides]
    with pytest.raises(UserError, match=wanted.replace("?", r"\?")):
        check_corpus(load_recipe(recipe_file, words))


def test_a_corpus_that_is_not_whole_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"web": WEB})
    recipe = load_recipe(make_recipe(tmp_path, corpus))
    check_corpus(recipe)
    prefix = corpus / "web" / "00001.train"
    write_shard([[7] * 98] * 10, prefix, 60_000, eod=1)
    with pytest.raises(
        UserError, match=r"00001.train.bin holds 990 tokens in 10 documents, its manifest says 1000 in 10"
    ):
        check_corpus(recipe)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"00001.train.bin: 0 bytes, but"):
        check_corpus(recipe)
    (corpus / "web" / "00001.json").unlink()
    with pytest.raises(UserError, match=r"data.corpus: .*1 of the 2 tasks of web are not finished"):
        check_corpus(recipe)
    with pytest.raises(UserError, match=r"data.corpus: .*1 of the 2 tasks of web are not finished"):
        megatron_arguments(recipe)


def test_the_command_shows_every_stage_and_warns_of_repetition(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend(recipe_file, "--set", STAGES, "--tokens", "51200")
    output = capsys.readouterr()
    rows = [line.split() for line in output.out.splitlines()]
    assert ["1", "web", "0.7500", "4,000", "3,840", "0.96"] in rows
    assert ["2", "books", "1.0000", "5,000", "46,080", "9.22"] in rows
    assert ["books", "0.9250", "5,000", "47,360", "9.47"] in rows
    assert output.err.startswith("warning: books is read 9.5 times; beyond 4") and "web" not in output.err


def test_the_command_prints_megatrons_arguments(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blend(recipe_file, "--set", STAGES, "--megatron-args")
    assert shlex.split(capsys.readouterr().out) == corpus_arguments(load_recipe(recipe_file, [STAGES]))
    blend(recipe_file.parent / "corpus", "--megatron-args")
    words = shlex.split(capsys.readouterr().out)
    assert words[:7] == corpus_arguments(load_recipe(recipe_file))
    assert words[7] == "--valid-data-path" and len(words) == 12


def test_the_command_names_mistakes(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = recipe_file.parent / "corpus"
    with pytest.raises(UserError, match="names its token files itself"):
        blend(recipe_file, "--set", "data.train=a", "--set", "data.tokenizer_model=b")
    with pytest.raises(UserError, match="is a corpus, not a recipe; name a recipe instead"):
        blend(corpus, "--set", "data.weights={web: 1}")
    with pytest.raises(SystemExit):
        blend(corpus, "--tokens", "1.5")
    assert "'1.5' must be a number of tokens, such as 6.4e9" in capsys.readouterr().err


def test_the_indices_of_a_corpus_that_cannot_be_written_to_go_to_the_run(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arguments(recipe_file).data_cache_path is None
    # Root may write to any folder that is not on a read-only file system.
    read_only = recipe_file.parent / "corpus" / "books"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != read_only)
    assert arguments(recipe_file).data_cache_path == str(recipe_file.parent / "run" / "data_cache")
    assert arguments(recipe_file, "data.cache_path=elsewhere").data_cache_path == "elsewhere"
    own = ["data.corpus=null", f"data.train={read_only}/00000.train", "data.tokenizer_type=NullTokenizer"]
    assert load_recipe(recipe_file, own).cache_path == str(recipe_file.parent / "run" / "data_cache")


def test_a_subset_without_a_weight_may_be_in_the_making(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, make_corpus(tmp_path / "corpus", {"web": WEB, "books": BOOKS}))
    (tmp_path / "corpus" / "books" / "00000.json").unlink()
    assert list(recipe_blend(load_recipe(recipe, ["data.weights={web: 1}"])).corpus.subsets) == ["web"]
    for weights in ("data.weights=null", "data.weights={web: 1, books: 1}"):
        with pytest.raises(UserError, match="1 of the 1 tasks of books are not finished"):
            recipe_blend(load_recipe(recipe, [weights]))
    with pytest.raises(UserError, match=r"the weights name 'wbe', but .* holds web, books"):
        recipe_blend(load_recipe(recipe, ["data.weights={wbe: 1}"]))


def test_what_a_recipe_would_draw_needs_no_corpus(
    recipe_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = ["--set", "data.corpus=data/smollm-corpus", "--set"]
    blend(recipe_file, *missing, STAGES)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 5,000 tokens are 10 steps of 512.
    assert lines[:3] == [["stage", "1,", "5,120", "tokens:"], ["web", "0.7500", "3,840"], ["books", "0.2500", "1,280"]]
    assert lines[3:5] == [["stage", "2,", "5,120", "tokens:"], ["books", "1.0000", "5,120"]]
    assert " ".join(lines[5]).endswith("holds no corpus (no plan.json); make it: txssm data shard smollm_corpus")
    # Without weights, or for Megatron's arguments, nothing can be said.
    for corpus, command in (("data/smollm-corpus", "data shard smollm_corpus"), ("runs/demo/data/vocab_1024", "demo")):
        with pytest.raises(UserError, match=f"^data.corpus: {corpus} holds no corpus .*; make it: txssm {command}$"):
            blend(recipe_file, "--set", f"data.corpus={corpus}")
    with pytest.raises(UserError, match="`txssm data shard RECIPE` makes one"):
        blend(recipe_file, "--set", "data.corpus=elsewhere", "--set", STAGES, "--megatron-args")
