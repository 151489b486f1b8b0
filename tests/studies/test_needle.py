"""txssm eval needle: the texts and their needles, a whole evaluation of a small model, and what is refused."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_txssm.cli.main import main
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.studies import needle
from megatron_txssm.studies.haystack import Haystack
from tests.hf.tiny import tiny_model

MAX_LENGTH = 512
PROSE = "".join(f"Sentence {number} of the book says little. " for number in range(300))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny hybrid model, untrained, and its tokenizer."""
    made = tmp_path_factory.mktemp("needle")
    texts = [PROSE, "The secret number of the garden is 1234567. 08 9", "What is the secret number?"] * 20
    tokenizer = train_sentencepiece(texts, made / "tokenizer", 300)
    tiny_model(vocab_size=300, max_position_embeddings=MAX_LENGTH).save_pretrained(made / "model")
    export_tokenizer(TokenizerSource(type="SentencePieceTokenizer", model=str(tokenizer)), made / "model", texts[1])
    return made / "model"


@pytest.fixture
def haystack(model: Path) -> Haystack:
    return Haystack(Tokenizer.from_file(str(model / "tokenizer.json")), PROSE)


@pytest.mark.parametrize("length", [200, 256, 500])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_text_fills_its_length_and_holds_its_number_once(haystack: Haystack, length: int, number: int) -> None:
    found = haystack.question(length, 0.5, number)
    tokens = len(haystack.tokenizer.encode(found["context"] + found["answer"], add_special_tokens=False).ids)
    assert length - 16 <= tokens <= length, tokens
    secret = found["answer"].strip(" .")
    assert len(secret) == 7 and found["context"].count(secret) == 1


def test_the_needle_is_at_its_depth_between_two_sentences(haystack: Haystack) -> None:
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        prose = haystack.question(500, depth, 3)["context"].rpartition("\nWhat is")[0]
        place = prose.index("The secret number of")
        end = place + prose[place:].index(". ") + 2
        # Without it, the prose is that of every depth.
        places.append((place, prose[:place] + prose[end:]))
        assert place == 0 or prose[:place].endswith(". ") or depth == 1
    assert len({rest for _, rest in places}) == 1
    length = len(places[0][1])
    for depth, (place, _) in zip((0.0, 0.25, 0.5, 0.75, 1.0), places, strict=True):
        # A sentence has 40 characters.
        assert depth * length - 45 <= place <= depth * length + 1


def test_questions_are_the_same_each_time_and_differ_by_their_number(haystack: Haystack) -> None:
    assert haystack.question(200, 0.5, 1) == haystack.question(200, 0.5, 1)
    assert len({haystack.question(200, 0.5, number)["answer"] for number in range(20)}) == 20


def test_a_short_text_begins_again(model: Path) -> None:
    short = Haystack(Tokenizer.from_file(str(model / "tokenizer.json")), "One sentence. ")
    assert short.question(300, 1.0, 0)["context"].count("One sentence.") > 5


def test_a_length_without_room_is_refused(haystack: Haystack) -> None:
    with pytest.raises(UserError, match="--lengths 40 leaves no room for prose"):
        haystack.question(40, 0.5, 0)


def test_two_models_are_asked_and_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "needle", str(model), str(model), "--lengths", "200", "400", "--depths", "3", "--samples", "2"]
    assert main([*words, "--output", str(tmp_path / "out"), "--batch-size", "4"]) == 0
    found = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert found["lengths"] == [200, 400] and found["depths"] == [0, 0.5, 1]
    assert list(found["found"]) == ["model", "model_2"]
    wanted = {f"needle_{length}_{depth}" for length in (200, 400) for depth in (0, 50, 100)}
    assert all(scores.keys() == wanted for scores in found["found"].values())
    # Untrained.
    assert set(found["found"]["model"].values()) == {0.0}
    said = capsys.readouterr().out
    assert "depth 50%" in said and said.count("0%") >= 12 + 1
    assert (tmp_path / "out" / "needle.png").stat().st_size > 5000


def test_what_is_found_is_counted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers of another model: it knows a number in short texts alone."""
    from megatron_txssm.evaluation.harness import models

    def answers(logits: Any, question: models.Question) -> list[tuple[float, bool]]:
        return [(-1.0, len(question.tokens) < 300)]

    monkeypatch.setattr(models, "_answers", answers)
    words = ["eval", "needle", str(model), "--lengths", "200", "400", "--depths", "1", "--samples", "2"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "needle.json").read_text())["found"] == {
        "model": {"needle_200_0": 1.0, "needle_400_0": 0.0}
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "513"], "--lengths 513: {model} reads 512 tokens"),
        (["--lengths", "80", "--depths", "0"], "--depths 0 must be from 1 to 101"),
        (["--lengths", "80", "--depths", "102"], "--depths 102 must be from 1 to 101"),
        (["--lengths", "80", "--nproc", "2"], "--nproc and --port are for checkpoints"),
        (["--lengths", "80", "--text", "{model}"], "--text {model} cannot be read"),
        (["--lengths", "80", "--text", "{model}/../empty"], "is empty"),
    ],
)
def test_mistakes(
    model: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model.parent / "empty").write_text("\n")
    words = [word.format(model=model) for word in words]
    assert main(["eval", "needle", str(model), "--output", str(tmp_path / "out"), *words]) == 2
    assert message.format(model=model) in capsys.readouterr().err


def test_every_model_is_looked_at_before_the_first_is_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--lengths", "200", "--output", str(tmp_path / "out")]
    assert main(["eval", "needle", str(model), str(tmp_path / "none"), *words]) == 2
    assert "none: no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_stay_in_the_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a model that is named by two dots."""
    (model / "inside").mkdir(exist_ok=True)
    monkeypatch.chdir(model / "inside")
    output = tmp_path / "out"
    words = ["--lengths", "200", "--depths", "1", "--samples", "1", "--output", str(output)]
    assert main(["eval", "needle", "..", *words]) == 0
    assert (output / model.name / "tasks").is_dir() and not (tmp_path / "tasks").exists()


def test_a_folder_without_its_length_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    for content in (None, "[]", '{"max_position_embeddings": null}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert main(["eval", "needle", str(tmp_path), "--lengths", "200", "--output", str(tmp_path / "out")]) == 2
        assert "config.json has no max_position_embeddings" in capsys.readouterr().err


def test_a_full_disk_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("write_tasks", "show"):
        with monkeypatch.context() as patch:
            patch.setattr(needle, function, full)
            words = [str(model), "--lengths", "200", "--depths", "1", "--samples", "1"]
            assert main(["eval", "needle", *words, "--output", str(tmp_path)]) == 2
        assert f"error: {tmp_path} cannot be written (No space left on device)" in capsys.readouterr().err


def test_workers_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "is_worker", lambda: True)
    with pytest.raises(UserError, match="without srun or torchrun"):
        needle.evaluate_needle([model], tmp_path, lengths=[80])
