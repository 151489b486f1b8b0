"""txssm convert as a user runs it, with its proofs: export, import, train on, verify."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_txssm.convert.proof.proof import sample_text
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.hf.standalone import code_files
from tests.convert.trained import ARCHITECTURES, Trained, train
from tests.support.tiny_run import sets, txssm

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Story:
    """A run, its export, and a checkpoint made of that; the corpus was away while they were made."""

    model: Trained
    exported: Path
    imported: Path
    # What the two commands printed.
    said: tuple[str, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    # Without padding rows, which take part in Megatron's loss and come back as others.
    model = Trained("tiny", folder, 1, ARCHITECTURES["transxssm"], {}, 304)
    train([model], folder)
    (folder / "corpus").rename(folder / "away")
    exported, imported = folder / "exports" / "tiny", folder / "imports" / "tiny"
    done = [
        txssm("convert", "export", str(model.run), str(exported)),
        txssm("convert", "import", str(exported), str(imported)),
    ]
    (folder / "away").rename(folder / "corpus")
    assert [end.code for end in done] == [0, 0], [end.stderr for end in done]
    return Story(model, exported, imported, (done[0].stdout, done[1].stdout))


def proof(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verification.json").read_text())


def test_both_ways_are_proven(story: Story) -> None:
    tensors = 1 + 3 * 11 + 6 + 1
    for folder, said in zip((story.exported, story.imported), story.said, strict=True):
        found = proof(folder)
        assert found["passed"] is True
        assert found["tensors"]["compared"] == tensors == len(found["tensors"]["sha256"])
        assert found["tensors"]["different"] == {} and found["tensors"]["rounded"] == 0
        logits = found["logits"]
        assert (logits["tokens"], logits["decoded"], logits["text"]) == (512, 32, "the Python manual")
        assert logits["max_difference"] <= 1e-5 and 0 < logits["decoding_difference"] <= 1e-5
        assert logits["largest_logit"] > 0.5 and logits["same_likeliest_token"] > 0.99
        [generation] = found["generation"]
        assert generation["different"] == {} and generation["ways"] == ["in a padded batch", "with a cache"]
        assert "generate  the same 8 tokens behind two texts without a cache and in a padded batch and with" in said
        assert found["versions"].keys() == {"megatron_txssm", "megatron-core", "torch", "transformers"}
        assert f"tensors   {tensors} of {tensors} identical\n" in said and "logits    largest difference" in said
    assert proof(story.exported)["tensors"]["sha256"] == proof(story.imported)["tensors"]["sha256"]


def test_a_whole_model_lies_there(story: Story) -> None:
    files = {file.name for file in story.exported.iterdir()}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    wanted |= {"model.safetensors", "recipe.yaml", "README.md", "export.json", "verification.json"}
    assert files == wanted | code_files().keys()
    assert set(json.loads((story.exported / "export.json").read_text())["sha256"]) == files - {"export.json"}
    card = (story.exported / "README.md").read_text()
    assert "Verified against Megatron's own model" in card and "identical" in card
    # Else transformers asks, and waits for an answer.
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        assert f'{name}.from_pretrained("tiny", trust_remote_code=True)' in card
    config = json.loads((story.exported / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (1, 304)
    assert sorted(file.name for file in story.imported.iterdir()) == [
        *("latest_checkpointed_iteration.txt", "recipe.yaml", "release", "tokenizer", "verification.json")
    ]
    assert str(story.model.folder / "tiny") not in (story.imported / "recipe.yaml").read_text(), "the run's folder"
    for folder in (story.exported, story.imported):
        assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "no partial folder"


def test_its_tokenizer_is_the_runs(story: Story) -> None:
    ours = AutoTokenizer.from_pretrained(story.exported)
    pieces = load_tokenizer(story.model.folder / "corpus" / "tokenizer" / "tokenizer.model")
    assert ours(sample_text())["input_ids"] == pieces.EncodeAsIds(sample_text())
    kept = story.imported / "tokenizer" / "tokenizer.model"
    assert kept.read_bytes() == (story.model.folder / "corpus" / "tokenizer" / "tokenizer.model").read_bytes()


def first_loss(story: Story, load_from: Path, run: Path) -> float:
    fields = [f"checkpoint.load_from={load_from}", f"run_directory={run}", "training.train_iters=1"]
    done = txssm("pretrain", str(story.model.recipe), *sets([*fields, "checkpoint.save_interval=1"]))
    assert done.code == 0, done.stderr
    [_, entry] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert entry["iteration"] == 1
    return entry["lm loss"]


def test_training_goes_on_where_the_old_checkpoint_would(story: Story, tmp_path: Path) -> None:
    losses = [
        first_loss(story, source, tmp_path / name)
        for name, source in (("new", story.imported), ("old", story.model.checkpoints))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < 5.7, "below that of chance, log(304)"


def test_one_changed_weight_is_named(story: Story, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(story.exported, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.3.self_attn.k_proj.weight"][3, 5] += 0.5
    save_file(tensors, changed / "model.safetensors")
    done = txssm("convert", "verify", str(story.model.run), str(changed), "--json", str(tmp_path / "proof.json"))
    assert done.code == 1 and done.stdout.endswith("NOT the same model\n")
    name = "decoder.layers.6.self_attention.linear_qkv.weight"
    assert f"tensors   40 of 41 identical\n          {name}: differs by up to 0.5\n" in done.stdout
    found = json.loads((tmp_path / "proof.json").read_text())
    assert not found["passed"] and list(found["tensors"]["different"]) == [name]
    assert found["logits"]["max_difference"] > 1e-4
    done = txssm("convert", "verify", str(story.exported), str(story.exported))
    assert done.code == 0 and done.stdout.endswith("the same model\n"), done.stderr
