"""What is damaged, hostile or of another model: one sentence, exit code 2, nothing written, and nothing of it run."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_txssm.cli.main import main
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.convert.huggingface.model import load_hf_model
from megatron_txssm.hf.standalone import AUTO_MAP
from tests.convert.trained import ARCHITECTURES
from tests.convert.untrained import Evil, make_run

Damage = Callable[[Path], None]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of one architecture each; "several": in several files. Copy them before changing them."""
    folder = tmp_path_factory.mktemp("sources")
    made: dict[str, Path] = {}
    for name, architecture, options in (
        ("transxssm", "transxssm", []),
        ("llama", "llama3", []),
        ("granite", "jamba", ["--layout", "granitemoehybrid"]),
        ("several", "transxssm", ["--max-file-gb", "2e-5"]),
    ):
        (folder / name).mkdir()
        run = make_run(folder / name, ARCHITECTURES[architecture])
        made[name] = folder / name / "out"
        assert main(["convert", "export", str(run), str(made[name]), "--no-verify", *options]) == 0
    return made


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def change_json(name: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: void((folder / name).write_bytes(content))


def remove(*names: str) -> Damage:
    return lambda folder: void([(folder / name).unlink() for name in names])


def void(anything: object) -> None:
    pass


def cut(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(100_000)


def cut_the_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(100)


def pickle_in_disguise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Evil(folder.parent / "ran")))


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(Evil(folder.parent / "ran"), folder / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
DAMAGED: dict[str, tuple[str, Damage, list[str]]] = {
    "a tensor less": (
        "transxssm",
        change_tensors(lambda tensors: void(tensors.pop(NORM))),
        [f"is not the model that recipe run describes: {NORM} is missing"],
    ),
    "a tensor more": (
        "transxssm",
        change_tensors(lambda tensors: tensors.update(strange=torch.ones(1))),
        ["strange is no tensor of this model"],
    ),
    "a wrong shape": (
        "transxssm",
        change_tensors(lambda tensors: tensors.update({NORM: torch.ones(33)})),
        [f"{NORM} is [33], not [32]"],
    ),
    "integers": (
        "transxssm",
        change_tensors(lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)})),
        [f"{NORM} is stored as I8", "F32"],
    ),
    "cut short": ("transxssm", cut, [f"{WEIGHTS} is no whole safetensors file (", "copy it again"]),
    "cut in the header": ("transxssm", cut_the_header, [f"{WEIGHTS} is no whole safetensors file ("]),
    "empty": ("transxssm", write(WEIGHTS, b""), [f"{WEIGHTS} is no whole safetensors file ("]),
    "garbage": ("transxssm", write(WEIGHTS, bytes(range(256)) * 100), [f"{WEIGHTS} is no whole safetensors file ("]),
    "a pickle in disguise": ("transxssm", pickle_in_disguise, [f"{WEIGHTS} is no whole safetensors file ("]),
    "only a pickle": (
        "transxssm",
        only_a_pickle,
        [f"has no {WEIGHTS}", "pytorch_model.bin is a pickle, which could run code: save it as safetensors"],
    ),
    "no weights": ("transxssm", remove(WEIGHTS), [f"has no {WEIGHTS}"]),
    "an index to elsewhere": (
        "several",
        change_json(INDEX, weight_map={"a": "../../llama/out/model.safetensors"}),
        ["names '../../llama/out/model.safetensors', which is no safetensors file in its own folder"],
    ),
    "an index to the root": (
        "several",
        change_json(INDEX, weight_map={"a": "/etc/a.safetensors"}),
        ["'/etc/a.safetensors'"],
    ),
    "an index to a pickle": ("several", change_json(INDEX, weight_map={"a": "a.bin"}), ["names 'a.bin'"]),
    "an index to numbers": ("several", change_json(INDEX, weight_map={"a": 1}), [f"{INDEX} has no weight_map"]),
    "an index without a map": ("several", write(INDEX, b"{}"), [f"{INDEX} has no weight_map; copy it again"]),
    "a broken index": ("several", write(INDEX, b"{"), [f"{INDEX} cannot be read: ", "copy it again"]),
    "a file less": (
        "several",
        lambda folder: min(folder.glob("*-00002-of-*")).unlink(),
        ["model-00002-of-", "is missing; copy it again"],
    ),
    "a tensor elsewhere": (
        "several",
        lambda folder: void(shutil.copy(min(folder.glob("*-00003-of-*")), min(folder.glob("*-00002-of-*")))),
        ["model-00002-of-", "does not hold model.layers.0.", "which its index names; copy it again"],
    ),
    "a broken config": ("transxssm", write(CONFIG, b'{"model_type": '), [f"{CONFIG} cannot be read: "]),
    "a config with a list": (
        "transxssm",
        write(CONFIG, b"[]"),
        [f"{CONFIG} is not what it should be: it holds a list"],
    ),
    "no config": ("transxssm", remove(CONFIG), ["holds a model of type None"]),
    "another type": (
        "llama",
        change_json(CONFIG, model_type="mistral"),
        ["holds a model of type 'mistral'; only transxssm, llama, granitemoehybrid can be imported"],
    ),
    "a list as type": ("llama", change_json(CONFIG, model_type=["llama"]), ["holds a model of type ['llama']"]),
    "another type of ours": ("granite", change_json(CONFIG, model_type="llama"), ["has model_type='llama', not 'gran"]),
    "words for numbers": (
        "transxssm",
        change_json(CONFIG, hidden_size="many"),
        ["config.json is no transxssm configuration: "],
    ),
    "another epsilon": (
        "llama",
        change_json(CONFIG, rms_norm_eps=1e-6),
        ["has rms_norm_eps=1e-06, where recipe run asks for 0.001; name a recipe", "--recipe"],
    ),
    "another rotary base": (
        "llama",
        change_json(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        ["has rope_parameters=", "'rope_theta': 500000.0"],
    ),
    "limits of dt": (
        "granite",
        change_json(CONFIG, time_step_limit=[0.1, 0.2]),
        ["has time_step_limit=(0.1, 0.2)", "asks for (0.0, inf)"],
    ),
    "a quantized model": (
        "llama",
        change_json(CONFIG, quantization_config={"quant_method": "fp8"}),
        ["is a quantized model; import the one that it was made from"],
    ),
    "scaled positions": (
        "llama",
        change_json(
            CONFIG,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        ["has rope_parameters=", "'rope_type': 'llama3'"],
    ),
    "scaled positions, as they were written once": (
        "llama",
        change_json(
            CONFIG,
            rope_parameters=None,
            rope_theta=10000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        ["has rope_parameters=", "'rope_type': 'llama3'"],
    ),
    "a multiplier": ("granite", change_json(CONFIG, residual_multiplier=0.5), ["has residual_multiplier=0.5"]),
    "experts": ("granite", change_json(CONFIG, num_local_experts=4), ["has num_local_experts=4"]),
    "another activation": ("llama", change_json(CONFIG, hidden_act="gelu"), ["has hidden_act='gelu'"]),
    "layers of another kind": (
        "transxssm",
        change_json(CONFIG, layer_types=["full_attention"] + ["linear_attention"] * 3),
        ["has layer_types="],
    ),
    "a biased model and no recipe": (
        "llama",
        lambda folder: void((remove("recipe.yaml")(folder), change_json(CONFIG, attention_bias=True)(folder))),
        ["has attention_bias=True, where recipe in asks for False; no recipe can describe such a model"],
    ),
    "a broken recipe": ("transxssm", write("recipe.yaml", b"model: ["), ["recipe.yaml"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_broken_folder(sources: dict[str, Path], tmp_path: Path, case: str, refused: Any) -> None:
    source, damage, wanted = DAMAGED[case]
    shutil.copytree(sources[source], tmp_path / "in")
    damage(tmp_path / "in")
    refused(["convert", "import", tmp_path / "in", tmp_path / "out"], wanted)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "recipe", "wanted"),
    [
        ("transxssm", "llama", ["has head_dim=8, where recipe run asks for 16", "--recipe"]),
        (
            "llama",
            "transxssm",
            ["has layout llama, which cannot hold recipe run: it has state-space layers", "--recipe"],
        ),
        ("granite", "transxssm", ["--recipe"]),
        ("llama", "granite", []),
    ],
)
def test_a_recipe_of_another_model(
    sources: dict[str, Path], tmp_path: Path, source: str, recipe: str, wanted: list[str], refused: Any
) -> None:
    named = sources[recipe] / "recipe.yaml"
    refused(["convert", "import", sources[source], tmp_path / "out", "--recipe", named], wanted)


def test_a_recipe_that_is_not_there(sources: dict[str, Path], tmp_path: Path, refused: Any) -> None:
    words = ["convert", "import", sources["llama"], tmp_path / "out", "--recipe"]
    refused([*words, "nothing_at_all"], ["nothing_at_all"])
    refused([*words, tmp_path / "none.yaml"], ["none.yaml"])


def test_a_folder_that_is_none(sources: dict[str, Path], tmp_path: Path, refused: Any) -> None:
    refused(["convert", "import", tmp_path / "none", tmp_path / "out"], ["none is no folder; name one that holds"])
    file = sources["llama"] / WEIGHTS
    refused(["convert", "import", file, tmp_path / "out"], [f"{WEIGHTS} is no folder"])
    refused(["convert", "import", tmp_path, tmp_path / "out"], [f"has no {WEIGHTS}"])
    refused(
        ["convert", "verify", tmp_path / "none", sources["llama"]],
        ["none: no such folder; `txssm pretrain RECIPE` makes a run, `txssm convert export RUN OUT` a Hug"],
    )
    refused(["convert", "verify", sources["transxssm"], sources["llama"]], ["models of other sizes: in the second, "])


@pytest.fixture
def occupied(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Places where nothing can be written."""
    places = {name: tmp_path / name for name in ("folder", "file", "link")}
    places["folder"].mkdir()
    places["file"].touch()
    places["link"].symlink_to(tmp_path / "nowhere")
    yield places
    assert places["link"].is_symlink() and not (tmp_path / "nowhere").exists()


def test_a_place_that_is_taken(sources: dict[str, Path], occupied: dict[str, Path], refused: Any) -> None:
    for command, source in (("import", sources["llama"]), ("export", sources["llama"].parent / "run")):
        for name, place in occupied.items():
            refused(["convert", command, source, place], [f"{name} exists; name another OUT, or remove it"])
        # Root may write anywhere, but not below a file.
        wanted = [f"{occupied['file']} cannot be written: ", "name another OUT"]
        refused(["convert", command, source, occupied["file"] / "out"], wanted)


def test_code_beside_the_weights_is_not_run(sources: dict[str, Path], tmp_path: Path) -> None:
    """Neither by an import nor by the proof, which loads the folder with transformers."""
    folder, mark = tmp_path / "in", tmp_path / "ran"
    shutil.copytree(sources["transxssm"], folder)
    assert json.loads((folder / CONFIG).read_text())["auto_map"] == AUTO_MAP
    for name in {place.partition(".")[0] for place in AUTO_MAP.values()}:
        code = f"import os\nos.mkdir({str(mark)!r})\n"
        (folder / f"{name}.py").write_text(code)
    model = load_hf_model(open_hf_folder(folder))
    assert type(model).__module__ == "megatron_txssm.hf.modeling_transxssm"
    assert not mark.exists()
