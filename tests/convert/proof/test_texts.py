"""Which texts a proof compares: one; with experts, up to three, as one may hold a tie between two experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.convert.proof import proof as proof_module
from megatron_txssm.convert.proof.proof import Logits, Tensors, prove_equal
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from tests.convert.trained import ARCHITECTURES, EXPERT_ARCHITECTURES
from tests.convert.untrained import make_run
from tests.data.corpus_fixture import make_corpus, random_documents

PASSED = Logits("", 512, 1.0, 0.0, 0.0, 1.0, 32, 0.0)
FAILED = replace(PASSED, max_difference=0.1)


@pytest.mark.parametrize("tokenizer", [True, False], ids=["with a tokenizer", "without one"])
@pytest.mark.parametrize(
    ("architecture", "outcomes", "passed"),
    [
        ("transxssm", [FAILED], False),
        ("experts", [PASSED], True),
        ("experts", [FAILED, PASSED], True),
        ("experts", [FAILED, FAILED, FAILED], False),
    ],
    ids=["no experts", "at once", "at the second", "never"],
)
def test_a_model_with_experts_has_three_texts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    outcomes: list[Logits],
    passed: bool,
    tokenizer: bool,
) -> None:
    saved = open_checkpoint(make_run(tmp_path, (ARCHITECTURES | EXPERT_ARCHITECTURES)[architecture]))
    if tokenizer:
        make_corpus(tmp_path / "corpus", {"web": [random_documents(1, seed=0)]})
        (saved.checkpoints / "tokenizer").symlink_to(tmp_path / "corpus" / "tokenizer")
    read: list[list[int]] = []

    def compare(a: Any, b: Any, tokens: list[int], text: str, rounded: Any) -> tuple[Logits, tuple[()]]:
        read.append(tokens)
        return replace(outcomes[len(read) - 1], text=text), ()

    monkeypatch.setattr(proof_module, "compare_logits", compare)
    found = prove_equal(saved, saved)
    assert found.passed is passed and len(read) == len(outcomes)
    assert all(len(tokens) == 512 for tokens in read)
    if tokenizer:
        pieces = load_tokenizer(saved.checkpoints / "tokenizer" / "tokenizer.model")
        text = pieces.EncodeAsIds(proof_module.sample_text())
        assert [token for tokens in read for token in tokens] == text[: 512 * len(read)]
        names = ["the Python manual", "the Python manual from token 512 on", "the Python manual from token 1024 on"]
        assert found.logits is not None and found.logits.text == names[len(read) - 1]
    else:
        assert len(set(map(tuple, read))) == len(read), "no text twice"


def test_other_tensors_have_no_second_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = open_checkpoint(make_run(tmp_path, EXPERT_ARCHITECTURES["experts"]))
    calls: list[Any] = []
    monkeypatch.setattr(proof_module, "compare_logits", lambda *arguments: calls.append(arguments) or (PASSED, ()))
    monkeypatch.setattr(proof_module, "compare_tensors", lambda *arguments: Tensors(1, {"w": "differs by up to 1"}))
    assert not prove_equal(saved, saved).passed and len(calls) == 1


@pytest.mark.parametrize(("base", "count"), [(None, 512), (8, 512), (448, 512), (449, 513), (4096, 4160), (4097, 512)])
def test_a_proof_reads_beyond_the_base_of_the_scaling(tmp_path: Path, base: int | None, count: int) -> None:
    model = ARCHITECTURES["transxssm"] | {"length_scaling_base": base}
    saved = open_checkpoint(make_run(tmp_path, model))
    tokens, text = proof_module._tokens_for(saved, number=1)
    assert (len(tokens), text) == (count, "random tokens")


def test_the_manual_is_long_enough_for_three_such_texts() -> None:
    count = proof_module.FARTHEST_BASE + 2 * proof_module.DECODED
    assert len(proof_module.sample_text(3 * 8 * count)) == 3 * 8 * count
