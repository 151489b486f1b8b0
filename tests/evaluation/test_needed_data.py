"""Which data sets tasks read, and whether a folder has them: refused before a job is queued."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.needed_data import DataSet, check_tasks, data_sets
from megatron_txssm.evaluation.harness.stated import check_stated_tasks
from megatron_txssm.evaluation.harness.tasks import task_manager
from megatron_txssm.recipe.changes import Changes, changed
from tests.support.recipes import TINY

LAMBADA = "EleutherAI/lambada_openai"


def put(data: Path, name: str, **files: str) -> None:
    """Files of a data set; in their names, _ stands for a dot."""
    (data / name).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (data / name / file.replace("_", ".")).write_text(text)


def card(*configs: dict[str, Any]) -> str:
    return f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n# A data set\n---\n"


def test_the_data_sets_of_a_group_and_of_a_task() -> None:
    index: Any = task_manager(["mmlu", "arc_easy", "piqa"]).task_index
    assert [*data_sets("arc_easy", index)] == [DataSet("allenai/ai2_arc", "ARC-Easy")]
    assert [*data_sets("piqa", index)] == [DataSet("baber/piqa", None)]
    found = [*data_sets("mmlu", index)]
    assert len(found) == 57 and DataSet("cais/mmlu", "anatomy") in found


def test_what_a_folder_lacks_is_named_with_the_command(tmp_path: Path) -> None:
    data = tmp_path / "my data"
    data.mkdir()
    put(data, "baber/piqa", README_md="# only the card", _incomplete="")
    put(data, LAMBADA, test_jsonl="{}")
    with pytest.raises(UserError) as raised:
        check_tasks(["lambada_openai", "piqa", "mmlu"], data)
    command = f"txssm eval fetch {shlex.quote(str(data))} --tasks piqa mmlu"
    assert str(raised.value) == (
        f"--data {data}: task piqa reads baber/piqa and 57 more, which it does not have; on a machine that reaches the "
        f"hub, use `{command}`"
    )
    check_tasks(["lambada_openai"], data)
    check_tasks(["piqa"], None)


def test_the_files_of_the_configuration_must_be_there(tmp_path: Path) -> None:
    """As far as the card lists them."""
    test, train = {"split": "test", "path": "en/test-*.parquet"}, {"split": "train", "path": ["en/train-*.parquet"]}
    listed = {"config_name": "default", "data_files": [test, train]}
    place = tmp_path / LAMBADA
    put(tmp_path, LAMBADA, README_md=card(listed, {"config_name": "de", "data_files": "de/*.parquet"}))
    put(tmp_path, f"{LAMBADA}/de", **{"train-1_parquet": "", "test-1_parquet": ""})
    put(tmp_path, f"{LAMBADA}/en", **{"train-1_parquet": ""})
    with pytest.raises(UserError, match=rf"task lambada_openai reads {LAMBADA} \(default\), which it does not have"):
        check_tasks(["lambada_openai"], tmp_path)
    (place / "en" / "test-1.parquet").touch()
    check_tasks(["lambada_openai"], tmp_path)
    # Whatever a card says that lists no files of this configuration, or what only the hub can find.
    for wrong in (
        "configs: 3",
        "configs: [3]",
        "configs: [",
        "- 1",
        json.dumps({"configs": [listed | {"data_files": [3]}]}),
    ):
        (place / "README.md").write_text(f"---\n{wrong}\n---\n")
        check_tasks(["lambada_openai"], tmp_path)
    (place / "README.md").write_text(card(listed | {"data_files": ["hf://x/**.parquet", "/absolute", "en**"]}))
    check_tasks(["lambada_openai"], tmp_path)


def test_a_file_of_tasks(tmp_path: Path) -> None:
    """Its code is not run; a group's fields are those of its members, too."""
    file, data = tmp_path / "own.yaml", tmp_path / "data"
    data.mkdir()
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    task = "task: mine\ndataset_path: some/thing\ndataset_name: a\ndoc_to_text: !function code.text\n"
    file.write_text(task)
    assert [*data_sets(str(file), {})] == [DataSet("some/thing", "a")]
    with pytest.raises(UserError, match=rf"own.yaml reads some/thing \(a\), .*--tasks {file}`$"):
        check_tasks([str(file)], data)
    (tmp_path / "group.yaml").write_text(
        "group: both\ndataset_path: some/thing\n"
        "task: [{task: one, dataset_name: b}, two, {group: inner, task: [three]}, piqa, "
        "{task: piqa, dataset_path: other/thing}]\n"
    )
    index: Any = task_manager(["piqa"]).task_index
    found = [str(each) for each in data_sets(str(tmp_path / "group.yaml"), index)]
    assert found == ["some/thing (b)", "some/thing", "some/thing", "some/thing", "other/thing"]
    for no_hub in (
        "task: mine\ndataset_path: json\n",
        f"{task}custom_dataset: !function code.data\n",
        f"{task}class: x\n",
    ):
        file.write_text(no_hub)
        check_tasks([str(file)], data)
    for text in ("task: [", "task: [3]\ngroup: x\n", "3", "task: x\ninclude: none.yaml\n"):
        file.write_text(text)
        with pytest.raises(
            UserError, match=r"^--tasks .*own.yaml: lm_eval cannot use this file \([A-Z]\w+: .*\); mend"
        ):
            check_tasks([str(file)], data)


def test_rulers_texts_need_nltks_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(UserError, match=r"task ruler_vt reads nltk's punkt_tab, .* --tasks ruler_vt ruler_cwe`"):
        check_tasks(["ruler_vt", "ruler_cwe"], tmp_path)
    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    check_tasks(["ruler_vt"], tmp_path)


def test_a_recipe_is_refused_only_if_its_data_will_be_read(tmp_path: Path) -> None:
    fields: Changes = {"evaluation.tasks": ("piqa",), "evaluation.data": str(tmp_path)}
    recipe = changed(TINY, fields)
    with pytest.raises(
        UserError, match=rf"^evaluation.data {tmp_path}: task piqa reads baber/piqa, .*`txssm eval fetch "
    ):
        check_stated_tasks(recipe)
    check_stated_tasks(recipe, afterwards=False)
    with pytest.raises(UserError, match="task piqa reads baber/piqa"):
        check_stated_tasks(changed(recipe, {"evaluation.interval": 20}), afterwards=False)
    # Refused by check_task_files.
    check_stated_tasks(changed(recipe, {"evaluation.data": str(tmp_path / "none")}))
    check_stated_tasks(changed(recipe, {"evaluation.tasks": None}))


def test_an_evaluation_is_refused_before_it_is_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    words = ["--submit", "--nodes", "1", "--nproc-per-node", "1", "--dry-run", "--data", str(tmp_path)]
    assert main(["eval", "harness", str(model), *words, "--tasks", "piqa"]) == 2
    assert f"--data {tmp_path}: task piqa reads baber/piqa" in capsys.readouterr().err
