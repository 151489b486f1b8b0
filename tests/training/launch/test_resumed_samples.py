"""What a run reads: as many tokens as the corpus's tokenizer has; at a resume, by the tokenizer of before."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_txssm.data.tokenizer.kept_tokenizer import keep_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch.preflight import check_checkpoint, check_run, warnings
from megatron_txssm.training.saving import keep_recipe
from tests.data.corpus_fixture import make_corpus, make_recipe, random_documents


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The recipe of a run on a corpus of 300 tokens."""
    subsets = {"a": [random_documents(40, seed=0)]}
    return make_recipe(tmp_path, make_corpus(tmp_path / "corpus", subsets, validation=subsets))


def save(recipe: Recipe) -> Path:
    """What lies beside a checkpoint of step 5."""
    folder = recipe.checkpoint_path
    keep_recipe(recipe, folder)
    keep_tokenizer(recipe, folder)
    (folder / "iter_0000005").mkdir()
    (folder / "iter_0000005" / ".metadata").write_text("index")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def retrain_tokenizer(folder: Path) -> Path:
    """As many tokens, others."""
    return train_sentencepiece([f"class Other{n}: x = {n * 7}\n" for n in range(90)], folder / "other", vocab_size=300)


@pytest.mark.parametrize("stated", ["null", None])
def test_the_corpus_tells_the_number_of_tokens(file: Path, stated: str | None) -> None:
    file.write_text(file.read_text().replace("  vocab_size: 300\n", ""))
    recipe = load_recipe(file, [f"data.vocab_size={stated}"] if stated else [])
    assert recipe.data.vocab_size == 300
    # The run's own recipe needs no corpus to know it.
    folder = save(recipe)
    assert "vocab_size: 300" in (folder / "recipe.yaml").read_text()
    assert load_recipe(file, ["data.vocab_size=400"]).data.vocab_size == 400


def test_without_a_corpus_the_number_must_be_stated(file: Path) -> None:
    file.write_text(file.read_text().replace("  vocab_size: 300\n", ""))
    with pytest.raises(UserError, match=r"vocab_size is not stated, and data\.corpus=nowhere does not provide it"):
        load_recipe(file, ["data.corpus=nowhere"])
    with pytest.raises(UserError, match=r"data\.vocab_size is missing"):
        load_recipe(file, ["data.train=a", "data.validation=b", "data.tokenizer_type=NullTokenizer"])


def test_rows_that_no_token_uses_are_told(file: Path) -> None:
    assert list(warnings(load_recipe(file, ["data.vocab_size=310"]))) == []
    (said,) = warnings(load_recipe(file, ["data.vocab_size=50000", "model.hidden_size=64"]))
    assert said.startswith("data.vocab_size=50000, but the tokenizer of ") and "has 300 tokens: 3.2M weights" in said
    assert said.endswith("set data.vocab_size=null to have as many as the tokenizer")


def test_a_resume_under_another_tokenizer_is_refused(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["checkpoint.save_interval=5"])
    folder = save(recipe)
    check_checkpoint(recipe)
    # The same tokenizer in another place.
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(recipe.tokenizer_model or "").read_bytes())
    assert recipe.data.corpus is not None
    same = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer_model=str(copy)))
    check_checkpoint(same)
    other = retrain_tokenizer(tmp_path)
    Path(recipe.tokenizer_model or "").write_bytes(other.read_bytes())
    with pytest.raises(UserError) as error:
        check_checkpoint(recipe)
    assert str(error.value).startswith(f"{folder} holds checkpoints of a model with another tokenizer (SHA-256 ")
    # To start from its weights is another's decision.
    fresh = load_recipe(file, [f"run_directory={tmp_path}/fresh", f"checkpoint.load_from={json.dumps(str(folder))}"])
    check_checkpoint(fresh)
    (said,) = warnings(fresh)
    assert said.startswith(f"checkpoint.load_from={folder} is of a model with another tokenizer")


def test_a_resume_with_samples_of_another_length_is_explained(file: Path) -> None:
    recipe = load_recipe(file, ["checkpoint.save_interval=5"])
    save(recipe)
    longer = load_recipe(file, ["checkpoint.save_interval=5", f"training.seq_length={2 * recipe.training.seq_length}"])
    samples = recipe.global_batch_size
    wanted = rf"another schedule \(samples a step .*training.seq_length\): {samples} there, {samples // 2} here"
    with pytest.raises(UserError, match=wanted):
        check_run(longer, 1)


def test_a_length_that_puts_the_samples_in_another_order_is_told(file: Path) -> None:
    fields = ["checkpoint.save_interval=5", "optimizer.schedule_at_resume=recipe", "optimizer.warmup_fraction=0"]
    # An epoch is somewhat less than three steps.
    save(load_recipe(file, [*fields, "training.train_iters=1"]))
    for steps, told in ((2, []), (20, ["with this length, a is read another number of times"])):
        schedule, *others = warnings(load_recipe(file, [*fields, f"training.train_iters={steps}"]))
        assert f"training.train_iters: 1 there, {steps} here" in schedule
        assert [warning.partition(", and therefore")[0] for warning in others] == told
