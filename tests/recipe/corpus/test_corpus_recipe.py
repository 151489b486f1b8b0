"""Corpus recipes: what is written is what is read, and a mistake is named with its place and its remedy."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_txssm.data.corpus.manifest import Plan, Slice, corpus_directory, write_plan
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import find_corpus_recipe, how_to_make, load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import CorpusRecipe, SubsetSource

BUILT_IN = sorted(path.stem for path in (Path(__file__).parents[3] / "recipes" / "corpora").glob("*.yaml"))

RECIPE: dict[str, Any] = {
    "output": "data/web",
    "tokenizer": {"model": "tokenizer.json"},
    "subsets": {"web": {"source": "pages"}},
}


def load(folder: Path, *overrides: str, **changes: Any) -> CorpusRecipe:
    path = folder / "web.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
    return load_corpus_recipe(path, overrides)


def load_subset(folder: Path, **fields: Any) -> SubsetSource:
    return load(folder, subsets={"web": {"source": "pages", **fields}}).subsets["web"]


def test_the_built_in_recipes_load_by_name() -> None:
    assert {"smollm_corpus", "python_library"} <= set(BUILT_IN)
    for name in BUILT_IN:
        recipe = load_corpus_recipe(name)
        assert recipe.name == name and recipe.description


def test_smollm_corpus_names_what_the_paper_uses() -> None:
    recipe = load_corpus_recipe("smollm_corpus")
    assert recipe.tokenizer.model == "EleutherAI/gpt-neox-20b"
    assert list(recipe.subsets) == ["fineweb-edu-dedup", "cosmopedia-v2", "python-edu"]
    assert recipe.subsets["python-edu"].blob_field == "blob_id"
    assert recipe.subsets["fineweb-edu-dedup"].blob_field is None


def test_a_recipe_of_the_working_directory_goes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes" / "corpora"
    folder.mkdir(parents=True)
    (folder / "smollm_corpus.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    assert list(load_corpus_recipe("smollm_corpus").subsets) == ["web"]


def test_what_a_file_does_not_say_has_its_default(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.name, recipe.output, recipe.path) == ("web", "data/web", Path("data/web"))
    assert recipe.tokenizer.type == "HuggingFaceTokenizer" and recipe.tokenizer.eod_token is None
    assert recipe.subsets["web"] == SubsetSource(source="pages")
    assert recipe.slurm.partition is None and recipe.slurm.max_array_size is None


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_yaml_of_a_built_in_recipe_reads_back_as_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_corpus_recipe(name)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_corpus_recipe(tmp_path / "again.yaml") == recipe


def test_the_yaml_of_a_recipe_with_every_field_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    subset = {
        "source": "hf://datasets/some one/ünïcode",
        "glob": "**/*.parquet",
        "max_files": 3,
        "text_field": "content.text",
        "blob_field": "id",
        "blob_url": "http://127.0.0.1:80/{blob_id}",
        "blob_decode_errors": "replace",
        "origin": "{a}: '{b.c}' # no comment",
        "filters": ["score >= 4", "lang == 'no'", "id != 007"],
        "limit": 10,
        "validation_fraction": 0.25,
        "max_broken_fraction": 1e-9,
    }
    slurm = {"partition": "007", "time": "12:30", "sbatch": ["account=lab", "exclusive"], "max_array_size": 100}
    tokenizer = {"type": "SentencePieceTokenizer", "model": "m.model", "eod_token": "null", "encoder": "reference"}
    recipe = load(tmp_path, name="2026", subsets={"0.5": subset}, slurm=slurm, tokenizer=tokenizer)
    assert dataclasses.asdict(recipe.subsets["0.5"]) | subset | {"filters": tuple(subset["filters"])} == (
        dataclasses.asdict(recipe.subsets["0.5"])
    )
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_corpus_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": {}}, "unknown key 'subset'; did you mean 'subsets'?"),
        ({"ouput": "x"}, "unknown key 'ouput'; did you mean 'output'?"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"tokenizer": {"modle": "x"}}, "unknown key 'tokenizer.modle'; did you mean 'model'?"),
        ({"slurm": {"partitions": "x"}}, "unknown key 'slurm.partitions'; did you mean 'partition'?"),
        (
            {"subsets": {"web": {"source": "x", "text_feild": "t"}}},
            "unknown key 'subsets.web.text_feild'; did you mean 'text_field'?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    assert re.sub(r", line \d+", "", str(caught.value)) == f"{tmp_path / 'web.yaml'}: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": 7}, "output=7 must be a string"),
        ({"output": None}, "output=None must be a string"),
        ({"tokenizer": "x.json"}, "tokenizer='x.json' must be a section with fields"),
        ({"tokenizer": {}}, "tokenizer.model is missing"),
        (
            {"tokenizer": {"model": "x", "type": "BPE"}},
            "tokenizer.type='BPE' must be one of HuggingFaceTokenizer, Sent",
        ),
        ({"subsets": {}}, "subsets={} must name one or more subsets"),
        ({"subsets": None}, "subsets=None must name one or more subsets"),
        ({"subsets": ["web"]}, "subsets=['web'] must name one or more subsets"),
        ({"subsets": {"web": None}}, "subsets.web.source is missing"),
        ({"subsets": {"web": "pages"}}, "subsets.web='pages' must be a section with fields"),
        ({"slurm": {"cpus_per_task": 0}}, "slurm.cpus_per_task=0 must be at least 1"),
        ({"slurm": {"workers": True}}, "slurm.workers=True must be an integer or null"),
        ({"slurm": {"sbatch": "account=lab"}}, "slurm.sbatch='account=lab' must be a list of strings"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    assert re.sub(r", line \d+", "", str(caught.value)).startswith(f"{tmp_path / 'web.yaml'}: {message}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("limit", 0, "must be at least 1"),
        ("limit", "many", "must be an integer or null"),
        ("max_files", 1.5, "must be an integer or null"),
        ("task_bytes", None, "must be an integer"),
        ("validation_fraction", 1, "must be below 1"),
        ("validation_fraction", -0.1, "must be at least 0"),
        ("max_broken_fraction", float("nan"), "must be a number"),
        ("blob_decode_errors", "surrogateescape", "must be one of strict, ignore, replace"),
        ("filters", "score >= 4", "must be a list of strings"),
        ("filters", [4], "must be a list of strings"),
    ],
)
def test_a_subset_field_of_the_wrong_kind_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"subsets.web.{field}=.* {message}"):
        load_subset(tmp_path, **{field: value})


def test_a_number_without_a_fraction_is_an_integer(tmp_path: Path) -> None:
    assert load_subset(tmp_path, task_bytes=5e8).task_bytes == 500_000_000


def test_set_changes_a_field_at_every_depth(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "output=elsewhere",
        "tokenizer.eod_token=<|endoftext|>",
        "slurm.partition=cpu",
        "subsets.web.limit=3",
        "subsets.web.filters=[score >= 4, lang == en]",
        "subsets.books={source: library, validation_fraction: 0}",
        "subsets.books.limit=1e3",
        "subsets.books.limit=5",
    )
    assert (recipe.output, recipe.tokenizer.eod_token, recipe.slurm.partition) == ("elsewhere", "<|endoftext|>", "cpu")
    assert recipe.subsets["web"] == SubsetSource(source="pages", limit=3, filters=("score >= 4", "lang == en"))
    assert recipe.subsets["books"] == SubsetSource(source="library", validation_fraction=0, limit=5)


def test_set_takes_what_is_typed_for_a_text_field_and_null_for_none(tmp_path: Path) -> None:
    recipe = load(tmp_path, "name=2026", "slurm.partition=007", "slurm.time=30", "subsets.web.text_field=1.0")
    assert (recipe.name, recipe.slurm.partition, recipe.slurm.time) == ("2026", "007", "30")
    assert recipe.subsets["web"].text_field == "1.0"
    recipe = load(tmp_path, "subsets.web.glob=*.parquet", "subsets.web.origin={a}/{b}", "subsets.web.source='x y'")
    web = recipe.subsets["web"]
    assert (web.glob, web.origin, web.source) == ("*.parquet", "{a}/{b}", "x y")
    for character in ("\udcff", "\0", "\x1b"):
        with pytest.raises(UserError, match="special characters are not allowed"):
            load(tmp_path, f"subsets.web.glob=*{character}")
    assert load(tmp_path, "slurm.partition=null", slurm={"partition": "cpu"}).slurm.partition is None
    # An empty section is written by deleting its last line.
    assert load(tmp_path, "slurm.partition=cpu", slurm=None).slurm.partition == "cpu"


def test_a_corpus_recipe_extends_another(tmp_path: Path) -> None:
    load(tmp_path, description="the first", subsets={"web": {"source": "pages", "limit": 3}, "books": {"source": "b"}})
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: web\noutput: data/leaf\nsubsets: {web: {limit: 5}, books: null, code: {source: c}}\n")
    recipe = load_corpus_recipe(leaf)
    assert (recipe.name, recipe.description, recipe.output) == ("leaf", "", "data/leaf")
    assert recipe.tokenizer == load(tmp_path).tokenizer
    assert recipe.subsets == {
        "web": SubsetSource(source="pages", limit=5),
        "code": SubsetSource(source="c"),
    }
    # Two corpora in one folder would overwrite each other.
    leaf.write_text("extends: web\n")
    with pytest.raises(UserError, match=r"leaf\.yaml: output is missing"):
        load_corpus_recipe(leaf)


def test_set_leaves_a_subset_out(tmp_path: Path) -> None:
    both = {"web": {"source": "pages"}, "books": {"source": "b"}}
    assert list(load(tmp_path, "subsets.web=null", subsets=both).subsets) == ["books"]
    with pytest.raises(UserError, match=r"web\.yaml: subsets is missing; name one or more"):
        load(tmp_path, "subsets.web=null")


def test_set_reaches_a_subset_whose_name_has_dots(tmp_path: Path) -> None:
    recipe = load(tmp_path, "subsets.fineweb-1.5.2.limit=3", subsets={"fineweb-1.5.2": {"source": "x"}})
    assert recipe.subsets["fineweb-1.5.2"].limit == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("subsets.web.limit", "write it as output=PATH, section.field=value or subsets.NAME.field=value"),
        ("=3", "write it as"),
        ("subsets..limit=3", "write it as"),
        ("a.b.c.d=3", "write it as"),
        ("output.x=3", "--set output.x=3: output={'x': 3} must be a string"),
        ("subsets=5", "subsets=5 must name one or more subsets"),
        ("subsets.web=5", "subsets.web=5 must be a section with fields"),
        ("subsets.web.limit=[", "--set subsets.web.limit=[, line 1: not valid YAML"),
        ("subsets.web.limt=3", "unknown key 'subsets.web.limt'; did you mean 'limit'?"),
        ("subsets.wbe.limit=3", "subsets.wbe.source is missing"),
        ("nope=3", "unknown key 'nope'"),
    ],
)
def test_a_mistaken_set_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, override)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "/etc", "", " ", "a b", "a\n", "$(rm)", "-rf", ".hidden", "ü"])
def test_a_name_that_would_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="must be letters, digits"):
        load(tmp_path, subsets={name: {"source": "pages"}})
    with pytest.raises(UserError, match="must be letters, digits"):
        load(tmp_path, name=name)


@pytest.mark.parametrize("name", ["tokenizer", "logs", "plan.json", "corpus.yaml"])
def test_a_subset_may_not_be_named_as_a_file_of_the_corpus(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="must have another name"):
        load(tmp_path, subsets={name: {"source": "pages"}})


@pytest.mark.parametrize(
    "bad", ["$(rm)", "a\nb", "a\n", "a;b", "`rm`", "'a'", '"a"', "a b", "a|b", "a&b", "", "ü", "a\\b"]
)
def test_a_slurm_word_that_a_shell_would_read_further_is_refused(tmp_path: Path, bad: str) -> None:
    for slurm in ({"partition": bad}, {"time": bad}, {"sbatch": ["exclusive", bad]}, {"sbatch": [f"comment={bad}\n"]}):
        with pytest.raises(UserError, match=r"slurm\.\w+(\[\d\])?=.* must be one word"):
            load(tmp_path, slurm=slurm)


@pytest.mark.parametrize("option", ["--account=lab", "-A", "=lab", "-Alab"])
def test_an_sbatch_option_is_its_long_name_without_dashes(tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=r"slurm.sbatch\[0\]=.* without dashes"):
        load(tmp_path, slurm={"sbatch": [option]})


def test_usual_slurm_words_are_taken(tmp_path: Path) -> None:
    words = ["account=lab", "constraint=a+b", "exclusive", "mail-user=me@x.org", "nodelist=n1,n2", "output=l/%A_%a.out"]
    recipe = load(tmp_path, slurm={"partition": "cpu,long", "time": "2-00:00:00", "sbatch": words})
    assert recipe.slurm.sbatch == tuple(words)


@pytest.mark.parametrize(
    "text", ["int_score >= 4", "metadata.language=='en'", " a<1 ", "id == <urn:uuid:1>", "a != b c", "_x > -1.5e3"]
)
def test_filters_are_a_field_an_operator_and_a_value(tmp_path: Path, text: str) -> None:
    assert load_subset(tmp_path, filters=[text]).filters == (text,)


@pytest.mark.parametrize(
    "text", ["", "score", "score 4", "score = 4", "score => 4", "score === 4", "4 < score", "a >= "]
)
def test_what_is_no_filter_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"subsets\.web\.filters: .* must be FIELD OPERATOR VALUE"):
        load_subset(tmp_path, filters=["a > 1", text])


@pytest.mark.parametrize("origin", ["", "url", "{}", "{ url }", "{1}", "}{"])
def test_an_origin_must_name_a_field(tmp_path: Path, origin: str) -> None:
    with pytest.raises(UserError, match=r"subsets\.web\.origin=.* must name a field"):
        load_subset(tmp_path, origin=origin)


def test_a_blob_url_must_have_a_place_for_the_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"blob_url='s3://bucket/' must contain \{blob_id\}"):
        load_subset(tmp_path, blob_url="s3://bucket/")


def test_a_name_that_is_no_recipe_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError) as caught:
        load_corpus_recipe("smolm_corpus")
    assert "no corpus recipe is named 'smolm_corpus'; did you mean 'smollm_corpus'?" in str(caught.value)
    assert "there are python_library, smollm_corpus" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a list\n", "a corpus recipe is a mapping of tokenizer, subsets, slurm"),
        (b"", "a corpus recipe is a mapping of tokenizer, subsets, slurm, not None"),
        (b"output: [\n", "line 2: not valid YAML"),
        (b"output: a\noutput: b\n", "line 2: not valid YAML: key 'output' appears twice"),
        (b"output: \xff\n", "cannot be read as a corpus recipe"),
        (b"output: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "web.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_corpus_recipe(tmp_path / "web.yaml")
    assert str(caught.value).startswith(str(tmp_path / "web.yaml")) and message in str(caught.value)


def test_a_missing_file_and_a_folder_without_a_corpus_are_named(tmp_path: Path) -> None:
    (tmp_path / "something.yaml").touch()
    with pytest.raises(
        UserError, match=r"somthing\.yaml: no such corpus recipe file; did you mean '.*/something\.yaml'\?"
    ):
        load_corpus_recipe(tmp_path / "somthing.yaml")
    with pytest.raises(UserError, match=r"holds no corpus \(no corpus\.yaml\)"):
        load_corpus_recipe(tmp_path)


def test_the_remedy_for_a_missing_corpus_is_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert how_to_make("data/smollm-corpus") == "make it: txssm data shard smollm_corpus"
    assert how_to_make(tmp_path / "data" / "smollm-corpus") == "make it: txssm data shard smollm_corpus"
    # One cannot shard it before the demo has written its texts.
    assert how_to_make(Path("runs/demo/data/vocab_1024")) == "make it: txssm demo"
    assert how_to_make("elsewhere").startswith("`txssm data shard RECIPE` makes one")
    # A recipe of the user's own, beside one that is broken.
    own = tmp_path / "recipes" / "corpora"
    own.mkdir(parents=True)
    (own / "broken.yaml").write_text("output: [\n")
    (own / "mine.yaml").write_text(load(tmp_path, output="my/corpus").to_yaml())
    assert how_to_make("my/corpus") == "make it: txssm data shard mine"
    (tmp_path / "my" / "corpora").mkdir(parents=True)
    (tmp_path / "my" / "corpora" / "plan.json").touch()
    assert how_to_make("my/corpus") == "did you mean 'corpora'?"


def test_a_corpus_directory_goes_on_where_it_lies_though_it_was_moved(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "corpus.yaml").write_text(load(tmp_path).to_yaml())
    write_plan(there, Plan({"web": ((Slice("a.parquet", 0, 1, 10),),)}))
    here = there.rename(tmp_path / "here")
    for name in (here, here / "corpus.yaml"):
        recipe = load_corpus_recipe(name)
        assert recipe.path == here and recipe.name == "web" and list(recipe.subsets) == ["web"]
    assert find_corpus_recipe(str(here)) == here / "corpus.yaml"
    assert corpus_directory(str(here)) == here
    assert load_corpus_recipe(here, ["output=other"]).output == "other"
