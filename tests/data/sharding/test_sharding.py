"""Sharding end to end, as a user runs it: what Megatron reads is what the tokenizer says, whatever the workers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_txssm.data.corpus.manifest import is_held_out, open_corpus
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.recipe.corpus.tokenizer import tokenizer_model
from tests.data.corpora import SmolLMSources, make_smollm_corpus
from tests.data.corpus_recipes import (
    EOD_TOKEN,
    byte_level_bpe,
    corpus_bytes,
    run_data,
    smollm_recipe,
    write_byte_level_bpe,
    write_recipe,
)

NEOX = "TXSSM_NEOX_TOKENIZER"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SmolLMSources:
    return make_smollm_corpus(tmp_path_factory.mktemp("sources") / "smollm")


def documents_by_subset(directory: Path, split: str) -> dict[str, list[list[int]]]:
    """What Megatron's reader gives, shard after shard."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found: dict[str, list[list[int]]] = {}
    for name, subset in open_corpus(directory).subsets.items():
        found[name] = []
        for prefix, _ in subset.shards(split):
            dataset = IndexedDataset(prefix)
            assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
            found[name] += [np.asarray(dataset[index]).tolist() for index in range(len(dataset))]
    return found


def check_round_trip(directory: Path, sources: SmolLMSources, encode: Any, eod: Any) -> None:
    for split, held_out in (("train", False), ("validation", True)):
        found = documents_by_subset(directory, split)
        for name, texts in sources.texts.items():
            expected = [[*encode(text), eod] for text in texts if is_held_out(text, 0.1) == held_out]
            assert found[name] == expected, (name, split)
            assert expected


def test_byte_level_bpe(sources: SmolLMSources, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path))
    done = run_data("shard", str(recipe), "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokenizer: gigatoken" in done.stdout
    tokenizer = Tokenizer.from_str(byte_level_bpe())
    eod = tokenizer.token_to_id(EOD_TOKEN)
    check_round_trip(tmp_path / "corpus", sources, lambda text: tokenizer.encode(text).ids, eod)

    one_worker = corpus_bytes(tmp_path / "corpus")
    done = run_data("shard", str(recipe), "--workers", "2", "--set", f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert corpus_bytes(tmp_path / "two") == one_worker
    # Several tasks a subset, or the workers had nothing to share.
    assert len([path for path in one_worker if path.endswith(".train.bin")]) > 6

    # A second run does nothing, and says so.
    done = run_data("shard", str(tmp_path / "corpus"))
    assert done.returncode == 0 and "are already finished" in done.stdout
    assert corpus_bytes(tmp_path / "corpus") == one_worker

    done = run_data("verify", str(tmp_path / "corpus"))
    assert done.returncode == 0 and "match their manifests" in done.stdout, done.stdout + done.stderr


def test_the_sources_of_documents(sources: SmolLMSources, tmp_path: Path) -> None:
    """(file, row) of each document leads back to its text; the origin is the URL or the path in a repository."""
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path))
    assert run_data("shard", str(recipe)).returncode == 0
    for name, subset in open_corpus(tmp_path / "corpus").subsets.items():
        tables = {path.name: pq.read_table(path).to_pylist() for path in sources.folders[name].glob("*.parquet")}
        places = []
        for split in ("train", "validation"):
            for prefix, record in subset.shards(split):
                places += pq.read_table(f"{prefix}.parquet").to_pylist()
                assert record.documents == pq.read_metadata(f"{prefix}.parquet").num_rows
        assert len(places) == sum(map(len, tables.values())) == len({(p["file"], p["row"]) for p in places})
        for place in places:
            row = tables[place["file"]][place["row"]]
            expected = {
                "fineweb-edu-dedup": lambda row: row["metadata"]["url"],
                "python-edu": lambda row: row["repo_name"] + row["path"],
                "cosmopedia-v2": lambda row: None,
            }[name](row)
            assert place["origin"] == expected


@pytest.mark.parametrize("encoder", ["auto", "reference"])
def test_sentencepiece(sources: SmolLMSources, tmp_path: Path, encoder: str) -> None:
    from sentencepiece import SentencePieceProcessor

    texts = sources.texts["cosmopedia-v2"]
    model = train_sentencepiece(texts, tmp_path / "model", 800)
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(model), "encoder": encoder}
    recipe = smollm_recipe(tmp_path, sources, tokenizer)
    done = run_data("shard", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("tokenizer: gigatoken" if encoder == "auto" else "tokenizer: sentencepiece") in done.stdout
    processor = SentencePieceProcessor(model_file=str(model))
    check_round_trip(tmp_path / "corpus", sources, processor.encode, processor.eos_id())


@pytest.mark.skipif(NEOX not in os.environ, reason=f"set {NEOX} to the tokenizer.json of EleutherAI/gpt-neox-20b")
def test_gpt_neox_20b(sources: SmolLMSources, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    recipe = smollm_recipe(tmp_path, sources, {"model": os.environ[NEOX], "eod_token": EOD_TOKEN})
    assert run_data("shard", str(recipe)).returncode == 0
    corpus = open_corpus(tmp_path / "corpus")
    assert (corpus.tokenizer.eod, corpus.tokenizer.vocab_size) == (0, 50277)
    tokenizer = Tokenizer.from_file(os.environ[NEOX])
    check_round_trip(tmp_path / "corpus", sources, lambda text: tokenizer.encode(text).ids, 0)


def test_megatron_loads_the_tokenizer_that_made_the_tokens(sources: SmolLMSources, tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), max_files=1)
    assert run_data("shard", str(recipe)).returncode == 0
    corpus = open_corpus(tmp_path / "corpus")
    tokenizer = HuggingFaceTokenizer(tokenizer_model(corpus.directory, corpus.tokenizer))
    assert tokenizer.eod == corpus.tokenizer.eod
    (first, *_), text = (
        documents_by_subset(tmp_path / "corpus", "train")["cosmopedia-v2"],
        sources.texts["cosmopedia-v2"],
    )
    assert tokenizer.ids_to_text(first[:-1]) in text


def test_limit_filters_and_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [
        {"text": f"document {index} " * 3, "score": index % 5, "lang": "en" if index % 2 else "de"}
        for index in range(40)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        tmp_path,
        {
            "output": str(tmp_path / "corpus"),
            "tokenizer": write_byte_level_bpe(tmp_path),
            "subsets": {
                "web": {
                    "source": str(folder),
                    "filters": ["score >= 3", "lang == en"],
                    "limit": 6,
                    "validation_fraction": 0,
                }
            },
        },
    )
    assert run_data("shard", str(recipe)).returncode == 0
    places = pq.read_table(tmp_path / "corpus" / "web" / "00000.train.parquet").to_pylist()
    wanted = [index for index, row in enumerate(rows) if row["score"] >= 3 and row["lang"] == "en"][:6]
    assert [place["row"] for place in places] == wanted
    manifest = json.loads((tmp_path / "corpus" / "web" / "00000.json").read_text())
    assert manifest["filtered"] == wanted[-1] + 1 - 6 and manifest["rows"] == wanted[-1] + 1
