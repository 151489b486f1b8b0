"""Recipes from files: extends, --set, typos, types, hostile text."""

from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.settings.yaml_text import dump_yaml, load_yaml

MINIMAL = """\
model: {layer_pattern: M-M-*-, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 4, state_num_groups: 2}
training: {seq_length: 64, global_batch_tokens: 256, train_iters: 5}
optimizer: {learning_rate: 1e-3}
data: {train: a/train, validation: a/validation, tokenizer_model: a/tok, vocab_size: 1000}
"""
# In the place of demo_cpu's tensor parallelism.
TWO_STAGES = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "minimal", MINIMAL)


def test_defaults_and_name_of_a_minimal_recipe(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.name == "minimal"
    assert recipe.model.layer_pattern == "M-M-*-"
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.train == ((1.0, "a/train"),)
    assert str(recipe.checkpoint_path) == "runs/minimal/checkpoints"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("optimiser: {learning_rate: 1}", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("model: {hiden_size: 1}", "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
        (
            "training: {learning_rate: 1}",
            "unknown key 'training.learning_rate'; did you mean 'optimizer.learning_rate'?",
        ),
        ("hidden_size: 8", "unknown key 'hidden_size'; did you mean 'model.hidden_size'?"),
        ("extend: base", "unknown key 'extend'; did you mean 'extends'?"),
        ("training: {precision: bf61}", "must be one of fp32, bf16; did you mean 'bf16'?"),
        ("model: 5", "model=5 must be a section with fields"),
    ],
)
def test_a_typo_is_answered_with_file_name_and_nearest_known(tmp_path: Path, text: str, wanted: str) -> None:
    write(tmp_path, "minimal", MINIMAL)
    section = text.split(":")[0]
    body = "".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(f"{section}:"))
    path = write(tmp_path, "typo", body + text + "\n")
    message = refusal(path)
    assert message.startswith(str(path))
    assert wanted in message


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("training.train_iter=3", "unknown key 'training.train_iter'; did you mean 'train_iters'?"),
        ("trainin.seed=3", "unknown key 'trainin'; did you mean 'training'?"),
        ("training.seed", "write it as section.field=value"),
        ("a.b.c=1", "write it as section.field=value"),
        ("=3", "write it as section.field=value"),
        ("training.seed=1.5", "training.seed=1.5 must be an integer"),
        ("training.seed=true", "training.seed=True must be an integer"),
        ("training.seed=-1", "must be at least 0"),
        ("optimizer.learning_rate=fast", "must be a number"),
        ("optimizer.learning_rate=.inf", "must be a number"),
        ("optimizer.learning_rate=0", "must be above 0"),
        ("optimizer.adam_beta1=1", "must be below 1"),
        ("parallel.sequence_parallel=yes", "must be true or false"),
        ("model.hidden_size=null", "must be an integer"),
        ("model=5", "must be a section"),
        ("extends=base", "unknown key 'extends'"),
        ("data.train=[[1]]", "must be a path prefix, or a list of"),
        ("data.train=[[-1, a]]", "must have weights above 0"),
        ("data.train=[[1, --yaml-cfg]]", "begins with a dash"),
        ("training.seed=[", "not valid YAML"),
        ("model.rope_scaling=dynamic", "contradicts a state accumulated under the old ones"),
        ("model.position_encoding=conv1d", "did you mean 'conv1d_d'?"),
        ("model.layer_pattern=M-X", "layer_pattern='M-X': 'X' is no layer"),
    ],
)
def test_a_wrong_override_is_refused_by_name(minimal: Path, override: str, wanted: str) -> None:
    message = refusal(minimal, override)
    assert message.startswith(f"--set {override}")
    assert wanted in message


def test_overrides_take_the_types_of_their_fields(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        [
            "optimizer.learning_rate=1e-4",
            "training.train_tokens=2e9",
            "model.num_query_groups=2",
            "data.train=[[3, x], [1, y]]",
            "data.tokenizer_model=007",
            "name=1e4",
            "parallel.use_distributed_optimizer=true",
            "run_directory=runs/x=y",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.training.train_tokens == 2_000_000_000
    # It replaces the other way to state the length.
    assert recipe.training.train_iters is None
    assert recipe.model.num_query_groups == 2
    assert recipe.data.train == ((3.0, "x"), (1.0, "y"))
    assert recipe.data.tokenizer_model == "007"
    assert recipe.name == "1e4"
    assert recipe.parallel.use_distributed_optimizer is True
    assert recipe.run_directory == "runs/x=y"


def test_later_overrides_win_and_null_gives_back_the_default_meaning(minimal: Path) -> None:
    recipe = load_recipe(
        minimal, ["model.kv_channels=64", "model.kv_channels=null", "megatron.overlap_grad_reduce=null"]
    )
    assert recipe.model.kv_channels is None
    assert recipe.kv_channels == 32


def test_extends_states_only_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    write(tmp_path, "root", MINIMAL + "description: the root\nmegatron: {log_throughput: true, profile_ranks: [1]}\n")
    write(tmp_path, "middle", "extends: root\nmodel: {hidden_size: 256}\nmegatron: {profile_ranks: [2]}\n")
    path = write(folder, "leaf", "extends: ../middle.yaml\nmodel: {num_attention_heads: 16}\n")
    recipe = load_recipe(path)
    assert (recipe.model.num_attention_heads, recipe.model.hidden_size, recipe.model.ffn_hidden_size) == (16, 256, 256)
    assert recipe.megatron == {"log_throughput": True, "profile_ranks": [2]}
    # A recipe's name and description are its own.
    assert (recipe.name, recipe.description) == ("leaf", "")


def test_the_other_way_of_stating_the_data_replaces_the_inherited_one(tmp_path: Path) -> None:
    write(tmp_path, "root", MINIMAL)
    path = write(tmp_path, "leaf", "extends: root\ndata: {blend: c, split: '9,1,0'}\n")
    assert load_recipe(path).data.train is None


def test_a_corpus_and_files_of_ones_own_replace_each_other(tmp_path: Path) -> None:
    write(tmp_path, "root", MINIMAL)
    corpus = write(tmp_path, "corpus", "extends: root\ndata: {corpus: c, weights: {a: 2, b: 1}}\n")
    data = load_recipe(corpus).data
    assert (data.train, data.validation, data.corpus, data.weights) == (None, None, "c", {"a": 2.0, "b": 1.0})
    # The same corpus at another path has the same subsets.
    assert load_recipe(corpus, ["data.corpus=d"]).data.weights == {"a": 2.0, "b": 1.0}
    data = load_recipe(corpus, ["data.train=a", "data.validation=b"]).data
    assert (data.corpus, data.weights) == (None, None)
    data = load_recipe(corpus, ["data.blend=a", "data.split='9,1,0'"]).data
    assert (data.corpus, data.weights, data.train) == (None, None, None)


def test_mock_data_and_real_data_replace_each_other(tmp_path: Path) -> None:
    write(tmp_path, "root", MINIMAL)
    corpus = write(tmp_path, "corpus", "extends: root\ndata: {corpus: c, weights: {a: 2, b: 1}}\n")
    path = write(tmp_path, "mock", "extends: corpus\nmegatron: {mock_data: true}\n")
    for mock in (load_recipe(path), load_recipe(corpus, ["megatron.mock-data=true"])):
        assert (mock.data.corpus, mock.data.weights) == (None, None)
        assert load_recipe(write(tmp_path, "resolved", mock.to_yaml())) == mock
    for fields in (["data.train=a", "data.validation=b"], ["data.blend=a", "data.split='9,1,0'"], ["data.corpus=c"]):
        assert "mock_data" not in load_recipe(path, fields).megatron
    # What is switched off replaces nothing.
    assert load_recipe(corpus, ["megatron.mock_data=false"]).data.corpus == "c"
    both = write(tmp_path, "both", "extends: root\ndata: {corpus: c}\nmegatron: {mock_data: true}\n")
    assert "megatron.mock_data and data.corpus exclude each other; state one" in refusal(both)


def test_weights_and_stages_replace_each_other(tmp_path: Path) -> None:
    write(tmp_path, "root", MINIMAL.replace("train: a/train, validation: a/validation", "corpus: c, weights: {a: 1}"))
    text = "extends: root\ndata: {stages: [{tokens: 512, weights: {a: 1}}, {weights: {a: 1, b: 3}}]}\n"
    path = write(tmp_path, "leaf", text)
    recipe = load_recipe(path)
    assert recipe.data.weights is None
    assert recipe.data.stages == (
        {"tokens": 512, "weights": {"a": 1.0}},
        {"tokens": None, "weights": {"a": 1.0, "b": 3.0}},
    )
    assert load_recipe(write(tmp_path, "resolved", recipe.to_yaml())) == recipe
    assert load_recipe(path, ["data.weights={b: 1}"]).data.stages is None
    both = refusal(write(tmp_path, "both", text.replace("data: {", "data: {weights: {a: 1}, ")))
    assert "data.weights and data.stages exclude each other" in both


def test_an_extends_cycle_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b\n")
    write(tmp_path, "b", "extends: c\n")
    path = write(tmp_path, "c", "extends: a\n")
    assert "extends itself: c.yaml -> a.yaml -> b.yaml -> c.yaml" in refusal(path)
    assert "extends itself" in refusal(write(tmp_path, "self", "extends: self\n"))


def test_a_mistake_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    root = write(tmp_path, "root", MINIMAL + "loging: {}\n")
    assert refusal(write(tmp_path, "leaf", "extends: root\n")).startswith(str(root))


@pytest.mark.parametrize(
    ("text", "line", "wanted"),
    [
        ("model:\n  # so many\n  hidden_size: few\n", 3, "model.hidden_size='few' must be an integer"),
        ("data: {}\nmodel:\n\n  hiden_size: 8\n", 4, "unknown key 'model.hiden_size'"),
        ("data: {}\n\nmodels: {}\n", 3, "unknown key 'models'"),
        ("name: a\nmodel: 5\n", 2, "model=5 must be a section"),
        ("megatron:\n  overlap_grad_reduce: true\n  no_such: 1\n", 3, "Megatron has no such argument"),
        ("name: a\nextends: [a]\n", 2, "must be the path or name of one recipe"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, wanted: str) -> None:
    path = write(tmp_path, "mistaken", text)
    assert refusal(path).startswith(f"{path}, line {line}: ")
    assert wanted in refusal(path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "a recipe is a mapping"),
        ("- 1\n", "a recipe is a mapping"),
        ("model:\n  hidden_size: 1\n  hidden_size: 2\n", "line 3: not valid YAML: key 'hidden_size' appears twice"),
        ("model: {}\nmodel: {}\n", "key 'model' appears twice"),
        ("name: a\n  b: [\n", "line 2: not valid YAML"),
        ("1: 2\n", "key 1 is not a string"),
        ("name: !!python/object/apply:os.system ['touch hacked']\n", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "aliases (*name) are not allowed"),
        ("name: " + "[" * 5000 + "\n", "not valid YAML"),
        ("name: a\x00b\n", "not valid YAML"),
        ("extends: [a]\n", "must be the path or name of one recipe"),
        ("extends: nowhere.yaml\n", "no such recipe file"),
        ("extends: transxssm_320\n", "did you mean 'transxssm_320m'?"),
        ("abstract: true\n", "abstract"),
        ("megatron: {x: {y: 1}}\n", "must be one value or a list of values"),
        ("model: {layer_pattern: M-}\n", "model.hidden_size is missing"),
        ("training: {seed: " + "9" * 5000 + "}\n", "not valid YAML"),
    ],
)
def test_hostile_or_broken_text_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wanted in refusal(write(tmp_path, "bad", text))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a recipe" in refusal(tmp_path / "binary.yaml")
    assert "no such recipe file" in refusal(tmp_path / "missing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read as a recipe" in refusal(tmp_path / "folder.yaml")


def test_a_misspelt_file_and_a_folder_are_told_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo_cpu\n")
    assert f"did you mean '{tmp_path}/mine.yaml'?" in refusal(tmp_path / "mien.yaml")
    assert f"name a file in it: {tmp_path}/mine.yaml" in refusal(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("bsae.yaml", "no such recipe file as {folder}/bsae.yaml; did you mean '{folder}/base.yaml'?"),
        ("demo_cpuu", "no recipe is named 'demo_cpuu'; did you mean 'demo_cpu'?"),
    ],
)
def test_a_missing_base_names_the_file_that_extends_it(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo_cpu\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {base}\n")
    expected = f"{tmp_path}/mine.yaml, line 1: extends='{base}': {message.format(folder=tmp_path)}"
    assert refusal(tmp_path / "mine.yaml").startswith(expected)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "-x", "a b", "", "."])
def test_a_name_that_leaves_runs_is_refused(minimal: Path, name: str) -> None:
    assert "as it names a folder" in refusal(minimal, f"name='{name}'")


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_yaml_gives_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, "resolved", recipe.to_yaml())) == recipe


def test_text_that_looks_like_a_number_survives_the_round_trip(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        minimal, ["name=1e4", "data.tokenizer_model='null'", "data.cache_path='true'", "data.train='7'"]
    )
    assert load_recipe(write(tmp_path, "resolved", recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1E5", -1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_048_576", 1_048_576),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2025-01-01", "2025-01-01"),
        ("true", True),
        ("~", None),
        ("1e4x", "1e4x"),
        ("e5", "e5"),
    ],
)
def test_scalars_are_read_as_people_write_them(text: str, value: object) -> None:
    read = load_yaml(text, "test")
    assert (type(read), read) == (type(value), value)
    assert load_yaml(dump_yaml({"a": read}), "test") == {"a": read}


@pytest.mark.parametrize("text", ["*-*-", "*-", "*-M-|*-", "**"])
def test_a_pattern_that_begins_with_attention_must_be_quoted(tmp_path: Path, text: str) -> None:
    """YAML reads * as an alias."""
    model = f"extends: demo_cpu\nmodel:\n  layer_pattern: {text}\n"
    message = refusal(write(tmp_path, "bare", model))
    assert message.startswith(f"{tmp_path}/bare.yaml, line 3: not valid YAML: ")
    assert message.endswith("; quote a text that begins with *, such as '*-*-'")
    assert load_yaml(f"layer_pattern: '{text}'", "test") == {"layer_pattern": text}
    assert load_recipe("demo_cpu", [f"model.layer_pattern={text}", *TWO_STAGES]).model.layer_pattern == text


@pytest.mark.parametrize("style", ["|", ">", "|-", ">+"])
def test_a_pattern_of_several_lines(tmp_path: Path, style: str) -> None:
    text = f"extends: demo_cpu\nmodel:\n  layer_pattern: {style}\n    M-M- |\n    *-M-\n\n"
    recipe = load_recipe(write(tmp_path, "lines", text), TWO_STAGES)
    assert recipe.layers == "M-M-*-M-"
    assert load_recipe(write(tmp_path, "resolved", recipe.to_yaml())) == recipe


def test_recipes_of_the_current_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes", "mine", "extends: demo_cpu\n")
    monkeypatch.chdir(tmp_path)
    assert "mine" in recipe_names()
    assert "base" not in recipe_names()
    assert load_recipe("mine").model == load_recipe("demo_cpu").model
