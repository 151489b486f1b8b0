"""txssm generate: how a token is chosen, what the command prints, and what it refuses."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_txssm.cli.main import main
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.evaluation import generate as generate_command
from megatron_txssm.evaluation.decoding import sample
from megatron_txssm.evaluation.sampling import Sampling
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from tests.convert.untrained import make_run
from tests.hf.tiny import generate, tiny_model

PROMPT = "a token's own position"


def counts(logits: list[float], draws: int = 4000, text: tuple[int, ...] = (), **sampling: float) -> list[float]:
    """How often each token is drawn, as a share."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0} | sampling
    drawn = [sample(torch.tensor(logits), Sampling(**options), generator, list(text)) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)).div(draws).tolist()


def softmax(logits: list[float]) -> list[float]:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()


LOGITS = [2.0, 1.0, 0.0, -1.0]


def test_tokens_are_drawn_by_their_probability() -> None:
    # 4,000 draws: a deviation of 0.008 at most.
    assert counts(LOGITS) == pytest.approx(softmax(LOGITS), abs=0.03)
    assert counts(LOGITS, temperature=2.0) == pytest.approx(softmax([1.0, 0.5, 0.0, -0.5]), abs=0.03)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert counts(LOGITS, draws=20, temperature=0) == [1, 0, 0, 0]


def test_top_k_and_top_p_leave_the_tail_out() -> None:
    share = softmax(LOGITS[:2])
    assert counts(LOGITS, top_k=2) == pytest.approx([*share, 0, 0], abs=0.03)
    # The likeliest has 0.64, the first two together 0.88.
    assert counts(LOGITS, top_p=0.7) == pytest.approx([*share, 0, 0], abs=0.03)
    assert counts(LOGITS, draws=200, top_p=0.6) == [1, 0, 0, 0]
    assert counts(LOGITS, draws=200, top_p=1e-9) == [1, 0, 0, 0], "one token remains"


def test_a_repetition_penalty_weighs_on_what_stands_in_the_text() -> None:
    expected = softmax([1.0, 1.0, 0.0, -2.0])
    assert counts(LOGITS, text=(0, 3, 3), repetition_penalty=2.0) == pytest.approx(expected, abs=0.03)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a tokenizer as `txssm convert export` leaves them."""
    made = tmp_path_factory.mktemp("generate")
    texts = [line for line in Path(torch.__file__).with_name("functional.py").read_text().splitlines() if line.strip()]
    tokenizer = train_sentencepiece(texts, made / "tokenizer", 400)
    tiny_model(vocab_size=400).save_pretrained(made / "model")
    export_tokenizer(TokenizerSource(type="SentencePieceTokenizer", model=str(tokenizer)), made / "model", PROMPT)
    return made / "model"


def test_the_command_prints_what_the_model_generates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--max-new-tokens", "12"]
    assert main(["generate", str(folder), "--prompt", PROMPT, *options]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = generate(tiny_model(vocab_size=400), tokenizer(PROMPT, return_tensors="pt").input_ids, max_new_tokens=12)
    said = capsys.readouterr().out
    assert f"TransXSSMForCausalLM, {tiny_model(vocab_size=400).num_parameters():,} parameters\n" in said
    assert f"\n\n{tokenizer.decode(ids[0])}\n\n" in said
    assert "12 new tokens, " in said and said.endswith(" tokens/s\n")


def test_a_seed_gives_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(folder), "--prompt", PROMPT, "--seed", seed, "--temperature", "2"]) == 0
        texts.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan must be at least 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0.0 must be above 0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0 must be above 0"),
        (["--prompt", "a", "--step", "7"], "--step 7 is of checkpoints, but "),
        (["--prompt", "a", "--hub"], "a name on the Hugging Face hub is ORGANISATION/MODEL"),
    ],
)
def test_a_wrong_option(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], wanted: str) -> None:
    assert main(["generate", str(folder), *options]) == 2
    assert wanted in capsys.readouterr().err


def test_standard_input_is_read_once_the_model_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []
    monkeypatch.setattr(generate_command, "_by_megatron", lambda request: prompts.append(request.prompt) or 0)
    monkeypatch.setattr("sys.stdin", io.StringIO("a text"))
    assert main(["generate", str(tmp_path / "none"), "--prompt", "-"]) == 2
    run = make_run(tmp_path)
    assert main(["generate", str(run), "--prompt", "-"]) == 0
    assert prompts == ["a text"]
    assert main(["generate", str(run), "--prompt", "-"]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no checkpoint; name a run's folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "nothing known"}')
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("runs/demo", "runs/demo: no such folder; `txssm demo` makes runs/demo (add --hub for a name on the Hugging"),
        ("exports/mine", "no such folder; `txssm convert export runs/mine exports/mine` makes it (add --hub for"),
        ("runs/transxssm_320m", "no such folder; `txssm pretrain transxssm_320m` makes runs/transxssm_320m"),
        ("./runs/other", "no such folder; `txssm pretrain RECIPE` makes a run, `txssm convert export RUN OUT` a Hug"),
        ("x" * 300, "no such folder; `txssm pretrain RECIPE` makes a run"),
    ],
)
def test_what_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, wanted: str
) -> None:
    """Whether or not the folder above it is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate_command, "write", lambda *args: pytest.fail("it was asked for"))
    for _ in range(2):
        assert main(["generate", name, "--prompt", "a"]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1
        (tmp_path / "runs").mkdir(exist_ok=True)


def test_a_misspelt_run_is_told_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert main(["generate", "runs/tny", "--prompt", "a"]) == 2
    assert "runs/tny: no such folder; did you mean 'tiny'? (add --hub for" in capsys.readouterr().err


def test_a_name_on_the_hub_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(generate_command, "write", lambda request, *rest: asked.append(request.model) or 0)
    assert main(["generate", "--hub", "org/name-1.5", "--prompt", "a"]) == 0
    assert asked == ["org/name-1.5"]


def test_a_step_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    chosen = []
    monkeypatch.setattr(
        generate_command, "_by_megatron", lambda request: chosen.append((request.model, request.step)) or 0
    )
    for options in ([], ["--step", "1"]):
        assert main(["generate", str(run), "--prompt", "a", *options]) == 0
    assert chosen == [(run / "checkpoints", 2), (run / "checkpoints", 1)]
    assert main(["generate", str(run), "--prompt", "a", "--step", "3"]) == 2
    assert "has no step 3, which --step 3 names; use --step with one of 1, 2" in capsys.readouterr().err
