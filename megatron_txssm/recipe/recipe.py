"""A complete recipe, and the sizes and paths that follow from its fields."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, STATE_SPACE, blocks, layers, prediction_depths
from megatron_txssm.architecture.parameters import ExpertSizes, ModelSizes
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.choices import TokenizerType
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.tokenizer import read_tokenizer_facts, tokenizer_model
from megatron_txssm.recipe.megatron_arguments.section import passing
from megatron_txssm.recipe.schema import (
    Checkpoint,
    Data,
    Evaluation,
    Guard,
    Logging,
    Model,
    Optimizer,
    Parallel,
    Training,
)
from megatron_txssm.recipe.settings.paths import each_path, escaped, frozen
from megatron_txssm.recipe.settings.setting import section_fields, setting, step_numbers
from megatron_txssm.recipe.settings.yaml_text import dump_yaml


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete recipe. `loader.load_recipe` creates and checks it."""

    name: str = setting("of the run; by default the file's name")
    description: str = setting("one line for the table of recipes", default="")
    run_directory: str | None = setting("for everything a run writes; null: runs/<name>", default=None, path=True)
    model: Model
    parallel: Parallel
    training: Training
    optimizer: Optimizer
    data: Data
    checkpoint: Checkpoint
    guard: Guard = field(default_factory=Guard)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging
    # Other Megatron arguments, by their names in Megatron's namespace.
    megatron: dict[str, Any] = field(default_factory=dict)

    @property
    def run_path(self) -> Path:
        return Path(self.run_directory or f"runs/{self.name}")

    @property
    def checkpoint_path(self) -> Path:
        return Path(self.checkpoint.directory) if self.checkpoint.directory else self.run_path / "checkpoints"

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.training.global_batch_tokens // self.training.seq_length

    @property
    def train_iters(self) -> int:
        """Optimizer steps."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        return math.ceil((self.training.train_tokens or 0) / self.training.global_batch_tokens)

    @property
    def wsd_decay_iters(self) -> int | None:
        """The last optimizer steps, in which WSD lowers the learning rate."""
        share = self.optimizer.wsd_decay_fraction
        return None if share is None else max(1, round(share * self.train_iters))

    @property
    def stage_iters(self) -> tuple[int, ...]:
        """Optimizer steps of each of `data.stages`; the last takes the remainder, which may be negative."""
        lengths = [stage["tokens"] or 0 for stage in (self.data.stages or ())[:-1]]
        stated = [max(1, round(tokens / self.training.global_batch_tokens)) for tokens in lengths]
        return (*stated, self.train_iters - sum(stated))

    @property
    def skip_steps(self) -> frozenset[int]:
        """The steps of `data.skip_steps`, one by one."""
        return frozenset(number for entry in self.data.skip_steps or () for number in step_numbers(entry))

    @property
    def cache_path(self) -> str | None:
        """Folder of Megatron's shuffled indices: as stated; the run's if the data are read-only; None: the data's."""
        data = self.data
        if data.cache_path is not None:
            return data.cache_path
        prefixes = [prefix for blend in (data.train, data.validation, data.blend) for _, prefix in blend or ()]
        folders = {Path(prefix).parent for prefix in prefixes}
        if data.corpus is not None:
            folders |= {path.parent for path in Path(data.corpus).glob("*/manifest.json")}
        read_only = any(folder.is_dir() and not os.access(folder, os.W_OK) for folder in folders)
        return str(self.run_path / "data_cache") if read_only else None

    @property
    def tokenizer_type(self) -> TokenizerType:
        """Megatron's tokenizer class: as stated, otherwise the corpus's."""
        if self.data.tokenizer_type is not None:
            return self.data.tokenizer_type
        if self.data.corpus is not None:
            return read_tokenizer_facts(Path(self.data.corpus)).type
        # Made-up data need no tokenizer.
        made_up = (self.data.recall_pairs or self.megatron.get("mock_data")) and self.data.tokenizer_model is None
        return "NullTokenizer" if made_up else "HuggingFaceTokenizer"

    @property
    def tokenizer_model(self) -> str | None:
        """The tokenizer's name or path: as stated, otherwise the corpus's."""
        if self.data.tokenizer_model is not None or self.data.corpus is None:
            return self.data.tokenizer_model
        directory = Path(self.data.corpus)
        return tokenizer_model(directory, read_tokenizer_facts(directory))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.data.make_vocab_size_divisible_by
        return math.ceil(self.data.vocab_size / multiple) * multiple

    @property
    def layers(self) -> str:
        """All layers in order, one symbol each (architecture/layer_pattern.py)."""
        return layers(self.model.layer_pattern)

    @property
    def prediction_depths(self) -> list[str]:
        """The layers of each depth of multi-token prediction."""
        return prediction_depths(self.model.layer_pattern)

    @property
    def blocks(self) -> str:
        """The mixer of each block, if the layers are blocks of a mixer and an FFN or experts; otherwise UserError."""
        if (found := blocks(self.layers)) is None:
            raise UserError(
                f"model.layer_pattern={self.model.layer_pattern} is not a sequence of blocks, each a "
                "mixer (M or *) and an FFN (- or E), of which Hugging Face models are built"
            )
        return found

    @property
    def pipeline_stages(self) -> int:
        """All stages of the pipeline, virtual ones included."""
        return self.parallel.pipeline_model_parallel_size * (self.parallel.virtual_pipeline_stages or 1)

    @property
    def has_attention(self) -> bool:
        return ATTENTION in self.model.layer_pattern

    @property
    def has_state_space(self) -> bool:
        return STATE_SPACE in self.model.layer_pattern

    @property
    def has_experts(self) -> bool:
        return EXPERTS in self.model.layer_pattern

    @property
    def kv_channels(self) -> int:
        return self.model.kv_channels or self.model.hidden_size // self.model.num_attention_heads

    @property
    def state_space(self) -> StateSpaceConfig | None:
        """The mixer's configuration; None without state-space layers."""
        if not self.has_state_space:
            return None
        model = self.model
        return StateSpaceConfig(
            hidden_size=model.hidden_size,
            num_heads=model.state_num_heads or model.hidden_size // model.state_head_dim,
            head_dim=model.state_head_dim,
            state_size=model.state_size,
            num_groups=model.state_num_groups,
            position_encoding=model.position_encoding,
            gated=model.state_gated,
            dt_bias=model.state_dt_bias,
            chunk_size=model.chunk_size,
            ssd_backend=model.ssd_backend,
            length_scaling_base=model.length_scaling_base,
            context_parallel_method=self.parallel.state_context_parallel,
        )

    @property
    def experts(self) -> ExpertSizes | None:
        """The sizes of a layer of experts; None without one."""
        model = self.model
        if not self.has_experts:
            return None
        return ExpertSizes(
            num_experts=model.num_experts or 0,
            topk=model.moe_router_topk,
            ffn_hidden_size=model.moe_ffn_hidden_size or model.ffn_hidden_size,
            shared_ffn_hidden_size=model.moe_shared_expert_intermediate_size or 0,
        )

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that determine parameters, FLOPs and conversion."""
        model = self.model
        return ModelSizes(
            layers=self.layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            kv_channels=self.kv_channels,
            vocab_size=self.padded_vocab_size,
            tie_embeddings=model.tie_embeddings,
            state_space=self.state_space,
            experts=self.experts,
            prediction_depths=tuple(self.prediction_depths),
            logits_multiplier=(model.mup_base_hidden_size or model.hidden_size) / model.hidden_size,
            pre_norms=model.ablation != "no_norm",
        )

    def to_yaml(self) -> str:
        """Every field with its value: the text gives this recipe without the files that it extends."""
        return dump_recipe(with_paths(self, escaped))

    def frozen(self, folder: Path) -> str:
        """`to_yaml` for a file in `folder`, independent of the current folder and movable with the run's folder."""
        run = Path(os.path.abspath(self.run_path))
        stated = dataclasses.replace(self, run_directory=str(run))
        return dump_recipe(with_paths(stated, lambda path: frozen(path, Path(os.path.abspath(folder)), run)))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field stated."""
    return dump_yaml(dataclasses.asdict(recipe))


def with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """The recipe with every path changed; a tokenizer's name on the Hub is not a path."""

    def changed(values: Any) -> dict[str, Any]:
        fields = (field for field in section_fields(type(values)) if field.setting.path)
        return {field.name: each_path(getattr(values, field.name), change) for field in fields}

    data = changed(recipe.data)
    model = recipe.data.tokenizer_model
    if model and not os.path.exists(model):
        data["tokenizer_model"] = escaped(model)
    known = passing()
    return dataclasses.replace(
        recipe,
        **changed(recipe),
        data=dataclasses.replace(recipe.data, **data),
        checkpoint=dataclasses.replace(recipe.checkpoint, **changed(recipe.checkpoint)),
        evaluation=dataclasses.replace(recipe.evaluation, **changed(recipe.evaluation)),
        megatron={k: each_path(v, change) if known[k].kind == "path" else v for k, v in recipe.megatron.items()},
    )
