"""What `txssm why` says of spikes: what was done, and the documents of their batches."""

import re
from pathlib import Path

from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.guard.spike_documents import SPIKES, by_file, explain_spikes
from megatron_txssm.training.guard.spikes import Spike, record_spike
from megatron_txssm.training.lineage import Part, TrainingData
from tests.data.corpus_fixture import make_corpus, make_recipe, numbered_documents


def spike_at(step: int) -> Spike:
    return Spike(step, "skip", 9.0, 12.0, 3.5, 0.5, world_size=2, time=1.0)


def test_the_documents_of_a_spike_are_those_of_its_step(tmp_path: Path) -> None:
    tasks = [numbered_documents(60, seed=0), numbered_documents(60, seed=1, first=6000)]
    recipe = load_recipe(make_recipe(tmp_path, make_corpus(tmp_path / "corpus", {"a": tasks})))
    recipe.run_path.mkdir()
    assert list(explain_spikes(recipe.run_path, recipe)) == []
    for step in range(3, 5 + SPIKES):
        record_spike(recipe.run_path, spike_at(step))
    lines = list(explain_spikes(recipe.run_path, recipe))
    assert lines[0][0] == "spikes" and lines[0][1].startswith(f"{2 + SPIKES} steps, the last {SPIKES} of which follow")
    begin = lines.index(("spike", str(spike_at(5)).removeprefix("spike at ")))
    end = [name for name, _ in lines].index("spike", begin + 1)
    parts = [part for sample in TrainingData(recipe, 2).trace(5) for part in sample.documents]
    said = {text.partition(": ")[0]: text for name, text in lines[begin + 1 : end] if name == "  documents"}
    assert set(said) == {f"a {part.file}" for part in parts}
    for part in parts:
        rows = re.search(r": rows? ([\d, ]+)( and \d+ more)? \(", said[f"a {part.file}"])
        assert rows and (rows[2] or part.row in map(int, rows[1].split(", ")))
    assert lines[-1][1].endswith(f"txssm data trace {recipe.run_path}/recipe.yaml --step {4 + SPIKES}")


def test_without_a_corpus_the_reason_is_said(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}", "megatron.mock_data=true", "logging.eval_iters=0"])
    record_spike(tmp_path, spike_at(7))
    spike, documents, _ = explain_spikes(tmp_path, recipe)
    assert spike == ("spike", str(spike_at(7)).removeprefix("spike at "))
    assert documents[1].startswith("unknown: demo_cpu has no data.corpus")


def test_a_batch_of_many_documents_is_short() -> None:
    parts = [
        Part("web", "0", row, (0, 1 + file), (0, 1 + file), f"{file}.parquet", row)
        for file in range(10)
        for row in range(10)
    ]
    lines = list(by_file(parts))
    assert lines[0] == "web 9.parquet: rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more (100 tokens)"
    assert lines[-1] == "and 2 more files" and len(lines) == 9
    assert list(by_file(parts[:1])) == ["web 0.parquet: row 0 (1 tokens)"]
