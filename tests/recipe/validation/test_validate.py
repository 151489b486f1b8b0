"""Contradictions between fields: each gives one message with name, value and remedy."""

from pathlib import Path

import pytest

from megatron_txssm.checkpoint.load import one_process_recipe
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.sizes import data_parallel_size
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import megatron_arguments
from megatron_txssm.training.launch.preflight import check_files

# Instead of a corpus, which would have to exist.
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")


@pytest.mark.parametrize(
    ("name", "overrides", "wanted"),
    [
        (
            "llama3_320m",
            ["parallel.tensor_model_parallel_size=8"],
            "num_attention_heads=12 is not divisible by tensor_model_parallel_size=8; use one of 1, 2, 3, 4, 6, 12",
        ),
        (
            "transxssm_320m",
            ["parallel.tensor_model_parallel_size=12", "data.make_vocab_size_divisible_by=12"],
            "state_num_groups=4 is not divisible by tensor_model_parallel_size=12; use one of 1, 2, 4",
        ),
        (
            "transxssm_320m",
            ["model.ablation=no_norm"],
            "ablation=no_norm is not possible with Transformer Engine, whose norms are parts of linear layers; set "
            "training.transformer_impl: local",
        ),
        (
            "transxssm_320m_moe",
            ["model.ablation=no_residual"],
            "or prediction depths; leave them out, or set ablation: null",
        ),
        (
            "transxssm_320m",
            ["model.state_num_groups=5"],
            "state_num_groups=5 does not divide the state-space heads (12)",
        ),
        ("transxssm_320m", ["model.layer_pattern=M-||*-"], "a stage without layers at '|'"),
        ("transxssm_320m", ["model.layer_pattern=M-X"], "'X' is no layer"),
        ("transxssm_320m", ["model.state_size=127"], "state_size=127 is odd"),
        ("transxssm_320m", ["model.state_head_dim=100"], "hidden_size=768 is not divisible by state_head_dim=100"),
        (
            "transxssm_320m",
            ["model.num_attention_heads=10"],
            "hidden_size=768 is not divisible by num_attention_heads=10",
        ),
        (
            "transxssm_320m",
            ["model.num_query_groups=5"],
            "num_attention_heads=12 is not divisible by num_query_groups=5",
        ),
        (
            "llama3_320m",
            ["model.num_query_groups=1", "parallel.tensor_model_parallel_size=2"],
            "num_query_groups=1 is not divisible by tensor_model_parallel_size=2",
        ),
        (
            "llama3_320m",
            ["model.ffn_hidden_size=4098", "parallel.tensor_model_parallel_size=2"],
            "ffn_hidden_size=4098 leaves 2049 channels to each tensor-parallel process, an odd number, which "
            "Megatron's SwiGLU warm-up cannot halve; use 4100",
        ),
        ("transxssm_320m", ["model.kv_channels=63"], "set kv_channels=64"),
        ("transxssm_320m", ["model.rope_scaling=linear"], "needs rotary_interpolation_factor"),
        (
            "transxssm_320m",
            ["megatron.cuda_graph_impl=full_iteration"],
            "set megatron.check_for_nan_in_loss_and_grad=false",
        ),
        (
            "llama3_320m",
            [
                "megatron.cuda_graph_impl=full_iteration",
                "megatron.check_for_nan_in_loss_and_grad=false",
                "megatron.cuda_graph_warmup_steps=0",
            ],
            "megatron.cuda_graph_warmup_steps=0 must be at least 1",
        ),
        (
            "llama3_320m",
            [
                "megatron.cuda_graph_impl=full_iteration",
                "megatron.check_for_nan_in_loss_and_grad=false",
                "data.isolate_documents=true",
            ],
            "data.isolate_documents=true they change with each step",
        ),
        (
            "transxssm_320m",
            ["megatron.optimizer_cpu_offload=true"],
            "Megatron 0.19.2 cannot offload parameters that are themselves fp32, such as A_log",
        ),
        ("transxssm_320m", ["model.rotary_interpolation_factor=2"], "set rope_scaling: linear"),
        (
            "transxssm_320m",
            ["parallel.pipeline_model_parallel_size=5"],
            "the 48 layers of layer_pattern are not divisible by pipeline_model_parallel_size=5; use 1, 2, 3, 4, 6, ",
        ),
        (
            "transxssm_320m",
            ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_stages=5"],
            "are not divisible by pipeline_model_parallel_size=4 x virtual_pipeline_stages=5",
        ),
        ("transxssm_320m", ["parallel.virtual_pipeline_stages=2"], "needs pipeline_model_parallel_size above 1"),
        (
            "transxssm_320m",
            ["model.layer_pattern=M-*-/*-", "training.fp8=hybrid"],
            "training.fp8=hybrid is not supported with prediction depths (/ in layer_pattern) yet; leave one of them",
        ),
        (
            "transxssm_320m",
            [
                "model.layer_pattern=M-*-/*-",
                "training.mask_end_of_document=true",
                "parallel.context_parallel_size=2",
            ],
            "training.mask_end_of_document=true weights the losses of prediction depths (/ in layer_pattern) by the "
            "tokens of each context-parallel process; set context_parallel_size: 1",
        ),
        (
            "transxssm_320m",
            [
                "model.layer_pattern=M-*-/*-",
                "model.hidden_size=769",
                "model.kv_channels=64",
                "model.state_num_heads=12",
                "parallel.tensor_model_parallel_size=2",
            ],
            "hidden_size=769 is not divisible by tensor_model_parallel_size=2; use one of 1, 769",
        ),
        (
            "transxssm_320m",
            ["model.layer_pattern=M-*-M-", "parallel.pipeline_model_parallel_size=4"],
            "the 6 layers of layer_pattern are not divisible by pipeline_model_parallel_size=4; use 1, 2, 3, 6 stages, "
            "or divide the pattern by |",
        ),
        (
            "transxssm_320m",
            ["model.layer_pattern=M-|*-|M-", "parallel.pipeline_model_parallel_size=2"],
            "pipeline_model_parallel_size=2 needs 2 stages, and layer_pattern is divided by | into 3; change one of "
            "them, or write the pattern without | to divide it evenly",
        ),
        (
            "transxssm_320m",
            [
                "model.layer_pattern=M-|*-",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_stages=2",
            ],
            "pipeline_model_parallel_size=2 x virtual_pipeline_stages=2 needs 4 stages, and layer_pattern is divided "
            "by | into 2",
        ),
        (
            "transxssm_320m",
            ["parallel.context_parallel_size=3"],
            "seq_length=4096 is not divisible by 2 x context_parallel_size=3",
        ),
        (
            "transxssm_320m",
            ["parallel.context_parallel_size=8", "parallel.state_context_parallel=all_to_all"],
            "state_num_groups=4 is not divisible by tensor_model_parallel_size=1 x context_parallel_size=8; "
            "use state_context_parallel: state_passing, or more groups",
        ),
        (
            "jamba_320m",
            ["parallel.context_parallel_size=2", "training.seq_length=8", "training.global_batch_tokens=64"],
            "context_parallel_size=2 leaves pieces of 2 tokens, fewer than the 3 that the convolution reaches back",
        ),
        (
            "demo_cpu",
            ["training.seq_length=257", "training.global_batch_tokens=2056"],
            "seq_length / context_parallel_size=257 is not divisible",
        ),
        ("demo_cpu", ["training.global_batch_tokens=5000"], "is not a multiple of seq_length=256; the nearest is 5120"),
        (
            "demo_cpu",
            ["training.micro_batch_size=3"],
            "is not divisible by micro_batch_size=3; use one of 1, 2, 4, 8",
        ),
        ("demo_cpu", ["training.train_iters=null"], "state either training.train_tokens or training.train_iters"),
        (
            "demo_cpu",
            ["parallel.tensor_model_parallel_size=2", "data.make_vocab_size_divisible_by=3"],
            "make_vocab_size_divisible_by=3 is not divisible by tensor_model_parallel_size=2; use a multiple of 2",
        ),
        ("demo_cpu", ["optimizer.decay_style=WSD"], "decay_style=WSD needs optimizer.wsd_decay_fraction"),
        ("demo_cpu", ["checkpoint.keep_every=320"], "keep_every=320 has no effect without keep_last"),
        (
            "demo_cpu",
            ["checkpoint.keep_last=2", "checkpoint.keep_every=200"],
            "keep_every=200 is not divisible by save_interval=160; use a multiple of 160",
        ),
        ("demo_cpu", ["optimizer.wsd_decay_fraction=0.1"], "has no effect with decay_style=cosine"),
        (
            "demo_cpu",
            ["model.mtp_loss_scaling_factor=0.3"],
            "mtp_loss_scaling_factor=0.3 has no effect, as layer_pattern has no prediction depths; write /*- at its "
            "end for one, or leave mtp_loss_scaling_factor out (default: 0.1)",
        ),
        (
            "demo_cpu",
            ["optimizer.decay_style=WSD", "optimizer.wsd_decay_fraction=0.95"],
            "optimizer.warmup_fraction=0.1 and wsd_decay_fraction=0.95 add up to more than all steps",
        ),
        ("demo_cpu", ["data.train=null", "data.corpus=null"], "data.corpus is missing"),
        (
            "demo_cpu",
            ["megatron.mock_data=true"],
            "logging.eval_iters=null validates on all data, and megatron.mock_data has 200 million tokens; set "
            "logging.eval_iters to a number of batches, such as 10",
        ),
        (
            "transxssm_320m",
            ["megatron.mock_data=true", "data.tokenizer_type=HuggingFaceTokenizer"],
            "data.tokenizer_model is missing for tokenizer_type=HuggingFaceTokenizer",
        ),
        ("transxssm_320m", ["data.validation=a"], "data.validation needs data.train; a corpus has its own"),
        ("transxssm_320m", ["data.split='9,1,0'"], "data.split='9,1,0' needs data.blend; a corpus"),
        (
            "transxssm_320m",
            ["data.train=a", "data.validation=a", "data.tokenizer_model=b", "data.weights={a: 1}"],
            "data.weights needs data.corpus",
        ),
        (
            "transxssm_320m",
            ["data.stages=[{tokens: 7e9, weights: {a: 1}}, {weights: {b: 1}}]"],
            "6676 steps before the last stage leave none of the 6104 to it; shorten the stages or train longer",
        ),
        (
            "mqar_small",
            ["data.recall_pairs=[2, 32]"],
            "data.recall_pairs with 32 pairs needs training.seq_length of at least 128, not 64; raise it, or state "
            "fewer pairs",
        ),
        ("mqar_small", ["data.recall_pairs=[8, 2, 8]"], "data.recall_pairs=[8, 2, 8] has a number of pairs twice"),
        ("mqar_small", ["data.vocab_size=33"], "needs data.vocab_size of at least 34, not 33"),
        ("mqar_small", ["logging.eval_iters=5"], "every number of pairs is; set logging.eval_iters=null"),
        ("mqar_small", ["model.layer_pattern=M-*-/*-"], "leave out what follows the /"),
        ("demo_cpu", ["data.train=a", "data.validation=null"], "data.validation is missing"),
        ("demo_cpu", ["data.blend=x"], "data.blend needs data.split"),
        ("demo_cpu", ["data.blend=x", "data.split='98,1,1'"], "data.split='98,1,1' has a test set, which Megatron"),
        ("demo_cpu", ["data.split='9,1,0'"], "data.split='9,1,0' needs data.blend"),
        (
            "demo_cpu",
            ["data.train=a", "data.validation=a", "data.tokenizer_model=null"],
            "data.tokenizer_model is missing",
        ),
    ],
)
def test_a_contradiction_names_value_and_remedy(name: str, overrides: list[str], wanted: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(name, overrides)
    assert wanted in str(error.value)


def test_a_test_set_of_a_few_batches_or_beside_an_evaluation() -> None:
    blend = ["data.corpus=null", "data.blend=x", "data.tokenizer_type=NullTokenizer"]
    for split, other in (
        ("99,1,0.0", "name=a"),
        ("98,1,1", "logging.eval_iters=3"),
        ("98,1,1", "megatron.skip_train=true"),
    ):
        load_recipe("demo_cpu", [*blend, f"data.split='{split}'", other])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo_cpu", ["parallel.tensor_model_parallel_size=1"]),
        ("demo_cpu", ["megatron.mock_data=true", "logging.eval_iters=10"]),
        ("transxssm_320m", ["megatron.mock_data=true"]),
        ("demo_cpu", ["data.train=a", "data.validation=null", "data.tokenizer_model=b", "logging.eval_iters=0"]),
        ("transxssm_320m", ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]),
        ("transxssm_1.3b", ["parallel.tensor_model_parallel_size=8"]),
        ("transxssm_320m", ["model.state_size=127", "model.position_encoding=a_t"]),
        ("transxssm_320m", ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_stages=6"]),
        ("transxssm_320m", ["model.rope_scaling=linear", "model.rotary_interpolation_factor=4"]),
        # At the limit: pieces of exactly the 3 tokens that the convolution reaches back; one step for the last stage.
        (
            "jamba_320m",
            ["parallel.context_parallel_size=2", "training.seq_length=12", "training.global_batch_tokens=96"],
        ),
        (
            "transxssm_320m",
            [
                "training.train_tokens=null",
                "training.train_iters=2",
                "data.stages=[{tokens: 1e6, weights: {a: 1}}, {weights: {b: 1}}]",
            ],
        ),
        # A model with only attention has no state-space heads to check.
        ("llama3_320m", ["model.state_head_dim=100"]),
    ],
)
def test_what_works_together_is_accepted(name: str, overrides: list[str]) -> None:
    assert load_recipe(name, overrides).name == name


@pytest.mark.parametrize(
    ("pattern", "pipeline", "virtual", "rendered"),
    [
        ("M-*-", 1, None, "M-*-"),
        ("M-*-", 2, None, "M-|*-"),
        ("M-*-", 2, 2, "M|-|*|-"),
        ("MM*|-", 2, None, "MM*|-"),
        ("M|*-M|-|*", 2, 2, "M|*-M|-|*"),
        # The same stages, one per process.
        ("M|*-M|-|*", 4, None, "M|*-M|-|*"),
        # One process needs no stages.
        ("MM*|-", 1, None, "MM*-"),
    ],
)
def test_stages_of_a_pattern_fit_the_pipeline(pattern: str, pipeline: int, virtual: int | None, rendered: str) -> None:
    parallel = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": pipeline}
    overrides = [f"parallel.{name}={size}" for name, size in parallel.items()]
    overrides += [f"parallel.virtual_pipeline_stages={virtual}"] if virtual else []
    recipe = load_recipe("demo_cpu", [*overrides, *OWN_DATA, f"model.layer_pattern={pattern}"])
    words = megatron_arguments(recipe)
    assert words[words.index("--hybrid-layer-pattern") + 1] == rendered
    assert not {"--num-layers", "--num-virtual-stages-per-pipeline-rank"} & set(words)


def test_the_number_of_processes_is_checked_where_it_is_known() -> None:
    recipe = load_recipe("demo_cpu", ["training.global_batch_tokens=4096", "training.micro_batch_size=8"])
    validate(recipe, world_size=4)
    assert data_parallel_size(recipe, 4) == 2
    with pytest.raises(
        UserError, match="3 processes cannot be divided into tensor_model_parallel_size=2; start a mult"
    ):
        validate(recipe, world_size=3)
    with pytest.raises(UserError, match="use micro_batch_size of one of 1, 2"):
        validate(recipe, world_size=8)
    with pytest.raises(UserError, match="change global_batch_tokens"):
        validate(recipe, world_size=6)


def test_the_interleaved_schedule_needs_whole_rounds_of_micro_batches() -> None:
    layout = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_stages=2"]
    batch = ["training.global_batch_tokens=4096", "training.micro_batch_size=16"]
    recipe = load_recipe("demo_cpu", [*layout, *batch, "parallel.tensor_model_parallel_size=1"])
    with pytest.raises(UserError, match="interleaved schedule needs a multiple"):
        validate(recipe, world_size=2)


def test_missing_data_is_reported_before_megatron_starts(tmp_path, monkeypatch) -> None:
    pytest.importorskip("megatron_txssm.data.corpus.shard")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/demo/data/vocab_1024 holds no corpus"):
        check_files(load_recipe("demo_cpu"))


def test_a_changed_recipe_is_refused_by_its_file() -> None:
    odd = changed(load_recipe("transxssm_320m"), {"model.kv_channels": 63})
    with pytest.raises(UserError, match=r"^there/recipe\.yaml: attention heads have 63 channels"):
        one_process_recipe(odd, Path("there/recipe.yaml"))
    with pytest.raises(UserError, match=r"^attention heads have 63 channels"):
        validate(odd)
