"""Files beside exported weights: configuration, code, tokenizer, model card."""

import json
import sys
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import LAYERS
from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.format import ARCHITECTURES
from megatron_txssm.convert.huggingface.weights import Export
from megatron_txssm.convert.logged_losses import losses_at
from megatron_txssm.convert.proof.proof import Proof, sample_text, versions
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer, padding_id
from megatron_txssm.data.tokenizer.kept_tokenizer import tokenizer_source
from megatron_txssm.errors import UserError, readable
from megatron_txssm.files import JsonObject
from megatron_txssm.hf.standalone import AUTO_MAP, write_code
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts

# Older versions applied the gated norm over all groups at once.
_GRANITE_VERSIONS = "Needs transformers 5.23 or newer: with several groups of B and C, older ones give other logits. "


def write_tokenizer(export: Export, folder: Path) -> TokenizerFacts | None:
    """Write the run's tokenizer; returns its facts. None, with a warning, if it is not available."""
    saved = export.saved
    try:
        source = tokenizer_source(saved.recipe, saved.checkpoints)
        if source is not None:
            facts, tokens = export_tokenizer(source, folder, sample_text(), saved.recipe.data.vocab_size)
            if max(tokens) < saved.recipe.data.vocab_size:
                return facts
            raise UserError(f"its ids reach {max(tokens)}, beyond vocab_size={saved.recipe.data.vocab_size}")
    except UserError as error:
        print(readable(f"warning: no tokenizer is exported: {error}"), file=sys.stderr)
        for file in folder.glob("tokenizer*"):
            file.unlink()
    return None


def write_configuration(export: Export, facts: TokenizerFacts | None, folder: Path) -> None:
    """Write config.json, generation_config.json and, for our class, its code; nothing for Megatron's own format."""
    dtypes = [tensor.dtype for tensor in export.tensors.values()]
    config = hf_config(export.saved.recipe, export.format, str(max(dtypes, key=dtypes.count)).removeprefix("torch."))
    if not config:
        return
    import transformers

    eod = None if facts is None else facts.eod
    # In training, documents follow one another, so the token that ends a document also begins the next.
    tokens = {"bos_token_id": eod, "eos_token_id": eod}
    version = {"transformers_version": transformers.__version__}
    if export.format == "transxssm":
        config |= {"auto_map": AUTO_MAP}
        write_code(folder)
    _write(folder / "config.json", config | tokens | version)
    # Not in config.json: the embedding row of the padding token named there would never be trained.
    padding = {"pad_token_id": None if facts is None else padding_id(folder), "use_cache": config["use_cache"]}
    _write(folder / "generation_config.json", tokens | padding | version)


def write_model_card(export: Export, folder: Path, name: str, proof: Proof | None) -> None:
    """Write README.md: what was trained, how far, how the conversion was checked; `name`: the name to load it by."""
    lines = _card(export, name, proof, (folder / "tokenizer.json").is_file())
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _card(export: Export, name: str, proof: Proof | None, has_tokenizer: bool) -> list[str]:
    recipe, step = export.saved.recipe, export.saved.step
    loaded = export.format in ARCHITECTURES
    lines = ["---", *(["library_name: transformers"] if loaded else []), "pipeline_tag: text-generation", "tags:"]
    lines += [
        "- transxssm",
        "- state-space-model" if recipe.has_state_space else "- transformer",
        "---",
        "",
        f"# {recipe.name}",
        "",
    ]
    kinds = ", ".join(f"{layer} {name}" for layer, name in LAYERS.items() if layer in recipe.layers)
    inactive = count_parameters(recipe.sizes).inactive
    active = f", of which each token uses {export.numel - inactive:,}" if inactive else ""
    lines += [recipe.description[:1].upper() + recipe.description[1:] + "."] if recipe.description else []
    lines += [
        f"{export.numel:,} parameters{active}; layers: {recipe.layers} ({kinds}); "
        "pretrained with megatron_txssm ([TransXSSM, arXiv:2506.09507](https://arxiv.org/abs/2506.09507)).",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {figure} | {value} |" for figure, value in _figures(export).items()),
        "",
    ]
    if loaded and has_tokenizer:
        # For the tokenizer, too: transformers reads config.json first, which names code.
        remote = ", trust_remote_code=True" if export.format == "transxssm" else ""
        lines += [
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})',
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{remote})',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            "```",
            "",
        ]
    lines += ["## Conversion", "", f"Layout `{export.format}`, from the checkpoint of step {step}. "]
    if export.format == "granitemoehybrid":
        lines[-1] += _GRANITE_VERSIONS
    if proof is None:
        lines[-1] += "Not verified (`--no-verify`)."
    else:
        lines[-1] += f"Verified against Megatron's own model, on transformers {versions()['transformers']}:"
        lines += ["", "```", *proof.summary(), "```"]
    return lines


def _figures(export: Export) -> dict[str, str]:
    recipe, step = export.saved.recipe, export.saved.step
    figures = {
        "steps": f"{step:,} of {recipe.train_iters:,}",
        "tokens": f"{step * recipe.training.global_batch_tokens:,}",
        "tokens per step": f"{recipe.training.global_batch_tokens:,}, in samples of {recipe.training.seq_length:,}",
        "precision": recipe.training.precision,
        "peak learning rate": f"{recipe.optimizer.learning_rate:g}",
    }
    losses = losses_at(export.saved.checkpoints.parent, step)
    return figures | {name: f"{loss:.4f} nats per token" for name, loss in losses.items()}


def _write(file: Path, content: JsonObject) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
