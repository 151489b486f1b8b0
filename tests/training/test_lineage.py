"""The way back from a step to its documents, against a search of the whole corpus for what the loader delivers."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.start import megatron_initialized
from megatron_txssm.training import trace
from megatron_txssm.training.lineage import Part, TracedSample, TrainingData
from tests.data.corpus_fixture import FIRST_TOKEN, make_corpus, make_recipe, numbered_documents, random_documents

EOD = 1
# Shards of each subset; "a" is read more than once.
DOCUMENTS = {"a": (60, 30), "b": (80, 40, 60)}
BLENDS = {
    "one blend": ["data.weights={a: 3, b: 2}"],
    "stages": [
        "data.stages=[{tokens: 5120, weights: {a: 3, b: 1}}, {tokens: 1500, weights: {b: 1}}, {weights: {a: 1}}]"
    ],
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which every token but the end of a document stands at one place only."""
    folder = tmp_path_factory.mktemp("lineage")
    first, subsets = FIRST_TOKEN, {}
    for name, counts in DOCUMENTS.items():
        subsets[name] = []
        for count in counts:
            subsets[name].append(numbered_documents(count, seed=first, first=first))
            first = subsets[name][-1][-1][-1] + 1
    validation = {"a": [[[5] * 200]] * 2}
    return make_recipe(folder, make_corpus(folder / "corpus", subsets, validation))


class Loaders:
    """The batches of every data-parallel rank, from Megatron's own loader over the training's own datasets."""

    def __init__(self, recipe: Recipe, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron.training.training import build_train_valid_test_datasets

        from megatron_txssm.training.forward_step import datasets_provider

        self.recipe, self.ranks, self.monkeypatch = recipe, ranks, monkeypatch
        with megatron_initialized(recipe, ranks) as self.args:
            self.datasets = build_train_valid_test_datasets(datasets_provider)
        assert self.datasets[1] is not None

    def sample(self, step: int, rank: int, micro_batch: int, position: int) -> list[int]:
        """The tokens of a sample, and the one after them."""
        batch = self.step(step, rank)[micro_batch]
        tokens, labels = batch["tokens"][position].tolist(), batch["labels"][position].tolist()
        assert tokens[1:] == labels[:-1]
        return [*tokens, labels[-1]]

    def step(self, step: int, rank: int) -> list[dict[str, Any]]:
        """What a rank reads in a step."""
        from megatron.training.datasets import data_samplers

        self.args.num_workers = 0
        self.monkeypatch.setattr(data_samplers, "get_args", lambda: self.args)
        self.monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_rank", lambda: rank)
        self.monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_world_size", lambda: self.ranks)
        consumed = (step - 1) * self.recipe.global_batch_size
        loader: Any = iter(data_samplers.build_pretraining_data_loader(self.datasets[0], consumed))  # pyright: ignore
        micro_batches = self.recipe.global_batch_size // (self.recipe.training.micro_batch_size * self.ranks)
        return [next(loader) for _ in range(micro_batches)]


def search(tokens: list[int], corpus: Path) -> Iterator[tuple[str, str, int] | None]:
    """(subset, file, row) of each piece between two ends of a document, None for an end that stands alone."""
    ends = [number for number, token in enumerate(tokens) if token == EOD]
    starts = [0, *(end + 1 for end in ends)]
    for start, stop in zip(starts, [*(end + 1 for end in ends), len(tokens)], strict=True):
        if start == stop:
            continue
        piece = np.array(tokens[start:stop], dtype=np.uint16)
        yield None if piece.tolist() == [EOD] else find(piece, corpus)


def find(piece: np.ndarray, corpus: Path) -> tuple[str, str, int]:
    """The only place where a piece stands; the row from the fixture's rule: document n is row 3n."""
    found = []
    for path in sorted(corpus.glob("*/*.train.bin")):
        stream = np.fromfile(path, dtype=np.uint16)
        for at in np.flatnonzero(stream == piece[0]):
            if np.array_equal(stream[at : at + len(piece)], piece):
                document = int((stream[:at] == EOD).sum())
                found.append((path.parent.name, f"{path.parent.name}/{int(path.name[:5])}.parquet", 3 * document))
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("blend", BLENDS)
def test_the_trace_agrees_with_a_search_of_the_corpus(
    recipe_file: Path, blend: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file, [*BLENDS[blend], "logging.eval_iters=2"])
    loaders, data = Loaders(recipe, ranks, monkeypatch), TrainingData(recipe, ranks)
    assert data.data_parallel_size == ranks
    draw, whole = random.Random(ranks), 0
    for _ in range(100):
        step, number = draw.randrange(1, recipe.train_iters + 1), draw.randrange(recipe.global_batch_size)
        (sample,) = data.trace(step, [number])
        tokens = loaders.sample(step, sample.data_parallel_rank, sample.micro_batch, sample.position)
        expected = list(search(tokens, data.corpus))
        assert len(expected) == len(sample.documents)
        for part, source in zip(sample.documents, expected, strict=True):
            # An end alone does not say whose it is.
            if source is not None:
                assert (part.subset, part.file, part.row) == source
            check_ranges(part, tokens, data.corpus)
            whole += source is not None
    assert whole > 100


def check_ranges(part: Any, tokens: list[int], corpus: Path) -> None:
    """The stated tokens of the document are the stated tokens of the sample."""
    stream = np.fromfile(corpus / part.subset / f"{part.shard}.bin", dtype=np.uint16)
    start = 0 if part.document == 0 else int(np.flatnonzero(stream == EOD)[part.document - 1]) + 1
    (first, last), (begin, end) = part.sample_tokens, part.document_tokens
    assert stream[start + begin : start + end].tolist() == tokens[first:last]


def test_a_step_names_every_sample_of_every_rank_once(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(recipe_file, BLENDS["stages"] + ["logging.eval_iters=2"])
    traced = TrainingData(recipe, 4).trace(11)
    assert [sample.sample for sample in traced] == list(range(16))
    places = {(sample.data_parallel_rank, sample.micro_batch, sample.position) for sample in traced}
    assert places == {(rank, micro, position) for rank in range(4) for micro in range(2) for position in range(2)}
    assert {part.subset for sample in traced for part in sample.documents} == {"b"}
    # Every second task has no origins.
    part = next(part for sample in traced for part in sample.documents if part.shard == "00001.train")
    assert part.origin is None
    part = next(part for sample in traced for part in sample.documents if part.shard == "00002.train")
    assert part.origin == f"https://b/{part.document}"
    assert {sample.data_parallel_rank for sample in TrainingData(recipe, 1).trace(11)} == {0}
    # The layout changes who reads a sample, not what is in it.
    assert [sample.documents for sample in TrainingData(recipe, 1).trace(11)] == [s.documents for s in traced]


@pytest.mark.parametrize(
    ("overrides", "nproc", "step", "samples", "wanted"),
    [
        ([], 1, 0, None, "--step 0 is not a step of corpus; use 1 to 20"),
        ([], 1, 21, None, "--step 21 is not a step of corpus; use 1 to 20"),
        ([], 1, 1, [16], "--sample 16 is not in the global batch; use 0 to 15"),
        ([], 1, 1, [-1], "--sample -1 is not in the global batch"),
        ([], 3, 1, None, "not divisible by micro_batch_size=2 x 3 data-parallel processes"),
        (["data.train=a", "data.tokenizer_model=b"], 1, 1, None, "has no data.corpus"),
    ],
)
def test_what_cannot_be_traced_is_named(
    recipe_file: Path, overrides: list[str], nproc: int, step: int, samples: list[int] | None, wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted):
        TrainingData(load_recipe(recipe_file, overrides), nproc).trace(step, samples)


def test_a_lost_table_of_sources_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"a": [numbered_documents(60, seed=0)]})
    data = TrainingData(load_recipe(make_recipe(tmp_path, corpus)), 1)
    # A corpus of one shard needs no blend.
    assert {part.shard for sample in data.trace(20) for part in sample.documents} == {"00000.train"}
    (corpus / "a" / "00000.train.parquet").unlink()
    with pytest.raises(UserError, match=r"00000.train.parquet: not readable as the sources of a shard"):
        data.trace(1)


def test_the_command_prints_sources_and_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(200, seed=0)
    corpus = make_corpus(tmp_path / "corpus", {"a": [documents[:120], documents[120:]]})
    recipe_file = make_recipe(tmp_path, corpus)
    words = [str(recipe_file), "--step", "2", "--sample", "5", "--nproc", "2"]
    # In a process of its own: Megatron's words, which go past Python's stdout, too, must not stand among ours.
    command = [sys.executable, "-m", "megatron_txssm.cli", "data", "trace", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert (found["step"], found["processes"], found["data_parallel_size"]) == (2, 2, 2)
    (sample,) = found["samples"]
    # Samples 4 to 7 are the second micro-batches of ranks 0 and 1.
    assert (sample["sample"], sample["data_parallel_rank"], sample["micro_batch"], sample["position"]) == (5, 0, 1, 1)
    tokenizer = load_tokenizer(corpus / "tokenizer" / "tokenizer.model")
    for part in sample["documents"]:
        task = int(part["shard"][:5])
        assert part["row"] == 3 * part["document"] and part["file"] == f"a/{task}.parquet"
        begin, end = part["document_tokens"]
        ids = [*documents[120 * task + part["document"]], EOD][begin:end]
        assert part["text"] == tokenizer.decode(ids)
    assert main(["data", "trace", *words]) == 0
    printed = capfd.readouterr().out
    for part in sample["documents"]:
        assert f"--- a {part['file']}:{part['row']}" in printed and part["text"] in printed


def test_in_a_narrow_terminal_a_trace_is_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    part = Part(
        "fineweb-edu-dedup", "00012.train", 7, (0, 4), (65, 69), "train-00000-of-00234.parquet", 498, "https://x"
    )
    traced = [TracedSample(1, 0, 2, 3, (part,))]
    recipe: Any = SimpleNamespace(name="small", training=SimpleNamespace(seq_length=32))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    trace._print_table(recipe, 2, 1, traced)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "sample 1: rank 0, micro-batch 2, position 3",
        "  tokens 0-3: fineweb-edu-dedup train-00000-of-00234.parquet:498",
        "    https://x",
        "    00012.train, document 7, its tokens 65-68",
    ]
    monkeypatch.setenv("COLUMNS", "200")
    trace._print_table(recipe, 2, 1, traced)
    assert capsys.readouterr().out.splitlines()[2].split()[-3:] == ["00012.train", "7", "65-68"]
