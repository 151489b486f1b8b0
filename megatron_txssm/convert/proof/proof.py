"""Proves a conversion: same tensors bit for bit, same logits in one pass and token by token, same generated text.

Logits on real text come from Megatron's own model and from transformers' model of the folder. The two have separate
embedding, projections, norms, attention, convolution and caches. Our class shares scan and rotation with the Megatron
model; these have their own tests (tests/ops).
"""

import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_txssm import __version__
from megatron_txssm.checkpoint.saved_model import SavedModel, open_checkpoint
from megatron_txssm.checkpoint.tensors import NamedTensors, Weights, compare_shapes
from megatron_txssm.convert.formats.format import ARCHITECTURES
from megatron_txssm.convert.from_transformer import FromTransformer
from megatron_txssm.convert.huggingface.folder import HfFolder, open_hf_folder
from megatron_txssm.convert.huggingface.weights import sha256_of
from megatron_txssm.convert.proof.greedy import Generation
from megatron_txssm.convert.proof.worker import TOLERANCE, run_task
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import doing
from megatron_txssm.versions import package_versions

TOKENS, DECODED = 512, 32
# The largest model.length_scaling_base beyond which the proof reads: attention on a CPU keeps its square.
FARTHEST_BASE = 4096
# Texts of which one must pass in a model with experts. Where a token's logits for two experts are equal up to rounding,
# the sides may choose differently, and then the rest of the text differs. That is rare, and changes with the text.
TEXTS_WITH_EXPERTS = 3

Source = SavedModel | HfFolder


class NotTheSame(Exception):
    """The conversion changed the model; the message is the proof's summary."""


@dataclass(frozen=True)
class Tensors:
    """Megatron's tensors of both sides, compared by their SHA-256."""

    compared: int
    # Name -> why it differs.
    different: dict[str, str] = field(default_factory=dict)
    # Number of tensors that one side stores in a coarser dtype, in which they are compared.
    rounded: int = 0
    # Name -> hash of the equal tensors.
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Logits:
    """fp32 logits of both sides over the same tokens."""

    text: str
    tokens: int
    largest_logit: float
    max_difference: float
    mean_difference: float
    same_likeliest_token: float
    # The last `decoded` tokens one at a time against one pass over all: largest difference on either side.
    decoded: int
    decoding_difference: float
    tolerance: float = TOLERANCE

    @property
    def limit(self) -> float:
        return self.tolerance * max(1.0, self.largest_logit)

    @property
    def passed(self) -> bool:
        # A NaN fails either comparison.
        return self.max_difference <= self.limit and self.decoding_difference <= self.limit


@dataclass(frozen=True)
class Proof:
    """The content of verification.json."""

    tensors: Tensors
    # None: of a model that computes something else.
    logits: Logits | None
    # For the sides loaded by transformers.
    generation: tuple[Generation, ...] = ()

    @property
    def passed(self) -> bool:
        generated = all(side.passed for side in self.generation)
        return not self.tensors.different and (self.logits is None or self.logits.passed) and generated

    def to_json(self) -> JsonObject:
        return {
            "passed": self.passed,
            "logits": asdict(self.logits) | {"limit": self.logits.limit} if self.logits else None,
            "generation": [asdict(side) for side in self.generation],
            "tensors": asdict(self.tensors),
            "versions": {**versions()},
        }

    def summary(self) -> Iterator[str]:
        """A few lines for the terminal."""
        tensors, logits = self.tensors, self.logits
        same = tensors.compared - len(tensors.different)
        as_rounded = f", {tensors.rounded} of them rounded to the coarser dtype" if tensors.rounded else ""
        yield f"tensors   {same} of {tensors.compared} identical{as_rounded}"
        yield from (f"          {name}: {why}" for name, why in list(tensors.different.items())[:10])
        if logits is None:
            return
        yield (
            f"logits    largest difference {logits.max_difference:.1e}, mean {logits.mean_difference:.1e}, over "
            f"{logits.tokens} tokens of {logits.text} (allowed: {logits.limit:.1e}; logits up to "
            f"{logits.largest_logit:.1f})"
        )
        yield (
            f"decoding  largest difference {logits.decoding_difference:.1e} between {logits.decoded} single steps and "
            "one pass"
        )
        yield from (side.summary() for side in self.generation)


def versions() -> dict[str, str]:
    """Versions of the packages compared; "none" for a package on Python's path that is not installed."""
    return {"megatron_txssm": __version__, **package_versions(("megatron-core", "torch", "transformers"))}


def compare_tensors(
    a: Weights, b: Weights, names: list[str], known: dict[str, str] | None = None, inexact: Collection[str] = ()
) -> Tensors:
    """Compare the hashes of all tensors, one at a time.

    `known`: hashes of a's tensors, in b's dtype, which are not computed again. Tensors in `inexact` may differ in the
    last bits of fp32.
    """
    import torch

    different: dict[str, str] = {}
    same: dict[str, str] = {}
    rounded = 0
    for name in names:
        tensor = b.read([name])[name]
        digest = None if known is None else known[name]
        if digest is None or (name in inexact and sha256_of(tensor) != digest):
            ours = a.read([name])[name]
            if ours.dtype != tensor.dtype:
                coarse = min(ours.dtype, tensor.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
                ours, tensor, rounded = ours.to(coarse), tensor.to(coarse), rounded + 1
            if name in inexact and torch.allclose(ours, tensor, rtol=1e-6, atol=0):
                tensor = ours
            digest = sha256_of(ours)
        if sha256_of(tensor) == digest:
            same[name] = digest
        else:
            difference = (a.read([name])[name].double() - tensor.double()).abs().max().item()
            different[name] = f"differs by up to {difference:.3g}"
    return Tensors(len(names), different, rounded, same)


def compare_logits(
    a: Source, b: Source, tokens: list[int], text: str, round_to: str | None = None
) -> tuple[Logits, tuple[Generation, ...]]:
    """Compare the two models, run one after the other so that only one is in memory."""
    from safetensors.torch import load_file

    decoded = min(DECODED, len(tokens) // 2)
    with tempfile.TemporaryDirectory(prefix="txssm-verify-") as folder:
        sides: list[NamedTensors] = []
        generation: list[Generation] = []
        for name, side in (("a", a), ("b", b)):
            out = Path(folder) / f"{name}.safetensors"
            common: dict[str, Any] = {"tokens": tokens, "decoded": decoded, "round_to": round_to, "out": out}
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(side.recipe.to_yaml(), encoding="utf-8")
            common |= {"recipe": recipe}
            if isinstance(side, SavedModel):
                run_task("megatron_logits", checkpoints=side.checkpoints, step=side.step, **common)
            else:
                generated = out.with_suffix(".json") if side.format in ARCHITECTURES else None
                run_task("hf_logits", folder=side.folder, generated=generated, **common)
                if generated is not None:
                    generation.append(Generation(**json.loads(generated.read_bytes())))
            sides.append(load_file(out))
    ours, theirs = (side["full"] for side in sides)
    difference = (ours - theirs).abs()
    stepwise = [(side["decoded"] - side["full"][-decoded:]).abs().max().item() for side in sides]
    logits = Logits(
        text=text,
        tokens=len(tokens),
        largest_logit=ours.abs().max().item(),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        same_likeliest_token=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        decoded=decoded,
        # max() would lose a NaN.
        decoding_difference=sum(stepwise) if any(step != step for step in stepwise) else max(stepwise),
    )
    return logits, tuple(generation)


def sample_text(characters: int = 20_000) -> str:
    """English prose that comes with every Python: the topics of its reference manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:characters]


def random_tokens(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """Tokens for a model without a tokenizer."""
    import torch

    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens_to_read(recipe: Recipe) -> int:
    """How many tokens a proof reads: to beyond the base of the scaling of C, which changes nothing before."""
    base = recipe.model.length_scaling_base
    return TOKENS if base is None or base > FARTHEST_BASE else max(TOKENS, base + 2 * DECODED)


def prove_export(saved: SavedModel, folder: Path, hashes: dict[str, str]) -> Proof:
    """Prove a new export: write verification.json; NotTheSame if the model differs.

    `hashes`: of Megatron's tensors as exported.
    """
    return _checked(prove_equal(saved, open_hf_folder(folder), hashes), folder)


def prove_import(source: HfFolder | FromTransformer, folder: Path) -> Proof:
    """Prove a new checkpoint: write verification.json; NotTheSame if the model differs.

    Of a TransXSSM begun from a Transformer, the tensors that it took over.
    """
    saved = open_checkpoint(folder)
    if isinstance(source, HfFolder):
        return _checked(prove_equal(source, saved), folder)
    with doing("verifying: the tensors, read back"):
        return _checked(Proof(compare_tensors(source, saved, list(source.shapes)), logits=None), folder)


def prove_equal(a: Source, b: Source, known: dict[str, str] | None = None) -> Proof:
    """Compare two models, up to the dtype of the coarser one; UserError if they have different tensors.

    `known`: see `compare_tensors`.
    """
    if fault := compare_shapes(b.shapes, a.shapes):
        raise UserError(f"these are models of other sizes: in the second, {fault}")
    names = list(a.shapes)
    inexact: set[str] = set()
    for side in (a, b):
        if isinstance(side, HfFolder):
            inexact |= {name for name, group in side.groups.items() if not group.transform.exact}
    with doing("verifying: the tensors, read back"):
        tensors = compare_tensors(a, b, names, known, inexact)
    rounded = "bfloat16" if "torch.bfloat16" in (str(a.dtype(names[0])), str(b.dtype(names[0]))) else None
    texts = TEXTS_WITH_EXPERTS if a.recipe.has_experts else 1
    for number in range(texts):
        with doing("verifying: logits and text, by Megatron and by transformers"):
            proof = Proof(tensors, *compare_logits(a, b, *_tokens_for(a, b, number=number), rounded))
        if proof.passed or tensors.different:
            break
    return proof


def _checked(proof: Proof, folder: Path) -> Proof:
    (folder / "verification.json").write_text(json.dumps(proof.to_json(), indent=2) + "\n", encoding="utf-8")
    if not proof.passed:
        raise NotTheSame("\n".join(proof.summary()))
    return proof


def _tokens_for(*sides: Source, number: int) -> tuple[list[int], str]:
    """A text, tokenised for the first side that has a tokenizer, otherwise random tokens; and its name."""
    from tokenizers import Tokenizer

    vocab_size, count = sides[0].recipe.data.vocab_size, tokens_to_read(sides[0].recipe)
    part = slice(number * count, (number + 1) * count)
    # Tokenizers have up to five characters to a token.
    prose = sample_text(max(20_000, 8 * part.stop))
    name = "the Python manual" + (f" from token {part.start} on" if number else "")
    for side in sides:
        folder = side.folder if isinstance(side, HfFolder) else side.checkpoints / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokens = tokenizer.encode(prose, add_special_tokens=False).ids[part]
            if max(tokens) < vocab_size:
                return tokens, name
        elif (folder / "tokenizer.model").is_file():
            return load_tokenizer(folder / "tokenizer.model").EncodeAsIds(prose)[part], name
    return random_tokens(vocab_size, count, number), "random tokens"
