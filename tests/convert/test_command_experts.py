"""A run with experts as a user has it: trained, evaluated, generated from, exported in two formats with proofs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.convert.trained import EXPERT_ARCHITECTURES, MODEL
from tests.data.corpus_fixture import make_corpus, make_recipe, random_documents
from tests.support.tiny_run import Done, sets, txssm

pytestmark = pytest.mark.slow

# Experts with a shared one in every block, of which both formats are.
STATED = MODEL | EXPERT_ARCHITECTURES["jamba_experts"]
FIELDS = (
    *(f"model.{name}={value}" for name, value in STATED.items()),
    *("training.train_iters=3", "training.global_batch_tokens=256", "optimizer.learning_rate=1e-2"),
    *("checkpoint.save_interval=3", "logging.eval_iters=null"),
)
PARALLEL = ("parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=2")
FORMATS = ("transxssm", "granitemoehybrid")


@dataclass(frozen=True)
class Story:
    folder: Path
    # What each conversion printed, by its new folder's name.
    said: dict[str, str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def proof(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "verification.json").read_text())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("experts")
    corpus = make_corpus(folder / "corpus", *({"web": [random_documents(n, seed=n)]} for n in (40, 9)))
    recipe = make_recipe(folder, corpus)
    succeeded(txssm("pretrain", str(recipe), "--nproc", "2", *sets([*FIELDS, *PARALLEL])))
    said = {}
    for format in FORMATS:
        exported = folder / format
        said[format] = succeeded(txssm("convert", "export", str(folder / "run"), str(exported), "--layout", format))
    imported = folder / "imported"
    said["imported"] = succeeded(txssm("convert", "import", str(folder / "granitemoehybrid"), str(imported)))
    return Story(folder, said)


def succeeded(done: Done) -> str:
    assert done.code == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [*FORMATS, "imported"])
def test_conversions_are_proven(story: Story, name: str) -> None:
    found = story.proof(name)
    assert found["passed"] is True and found["tensors"]["different"] == {}
    names = found["tensors"]["sha256"]
    assert sum("mlp.experts.experts.linear_fc" in tensor for tensor in names) == 2 * 4
    logits = found["logits"]
    assert (logits["tokens"], logits["decoded"]) == (512, 32) and logits["largest_logit"] > 0.5
    assert logits["max_difference"] <= 1e-5 and 0 < logits["decoding_difference"] <= 1e-5
    [generation] = found["generation"]
    assert generation["different"] == {} and generation["ways"] == ["in a padded batch", "with a cache"]
    assert "generate  the same 8 tokens" in story.said[name]
    assert names == story.proof("transxssm")["tensors"]["sha256"]


def test_megatron_and_transformers_continue_a_text_alike(story: Story) -> None:
    """With each side's own cache, in fp32."""
    options = ["--prompt", "pa ra", "--temperature", "0", "--max-new-tokens", "24"]
    printed = [succeeded(txssm("generate", str(story.folder / name), *options)) for name in ("run", *FORMATS)]
    # Between the model's name and the figures.
    by_megatron, *by_transformers = ("\n\n".join(said.split("\n\n")[1:-1]) for said in printed)
    assert by_transformers[0] == by_transformers[1] and by_megatron.startswith("pa ra"), printed
    # Of bytes that are no text, transformers shows none, SentencePiece those that are letters by themselves.
    for ours, theirs in zip(by_megatron, by_transformers[0], strict=True):
        assert theirs in (ours, "\N{REPLACEMENT CHARACTER}"), printed


def test_the_evaluation_without_expert_parallelism_is_what_the_run_logged(story: Story) -> None:
    [*_, last] = map(json.loads, (story.run / "metrics.jsonl").read_text().splitlines())
    succeeded(txssm("eval", "loss", str(story.run), *sets(["parallel.expert_model_parallel_size=1"])))
    found = json.loads((story.run / "evaluation" / "validation.json").read_text())
    assert found["sets"]["web"]["loss"] == pytest.approx(last["validation lm loss"], abs=1e-6)


def test_the_model_card_says_what_a_token_uses(story: Story) -> None:
    card = (story.folder / "transxssm" / "README.md").read_text()
    total = json.loads((story.folder / "transxssm" / "export.json").read_text())["parameters"]
    # Of six experts in each of four layers, a token uses three.
    assert f"{total:,} parameters, of which each token uses {total - 4 * 3 * 3 * 24 * 32:,}; layers: " in card
    assert "(M state-space, * attention, E experts)" in card
