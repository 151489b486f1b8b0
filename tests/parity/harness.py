"""Runs cases of worker.py under torchrun and puts their gradients together."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

WORKER = Path(__file__).with_name("worker.py")

# Four layers, one for each stage of PP2 x VPP2; sizes that TP=2 divides; a length that the chunk does not divide.
MODEL = """
--num-layers 4 --layer-pattern SSAS --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 80
--mamba-state-dim 16 --mamba-head-dim 8 --mamba-num-groups 2 --ssd-chunk-size 16 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.08
--seq-length 40 --max-position-embeddings 40 --vocab-size 63 --make-vocab-size-divisible-by 16 --padded-vocab-size 64
--spec megatron_txssm.model.layer_specs transxssm_block_spec
"""
TRAINING = """
--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1
--weight-decay 0.01 --adam-beta2 0.999 --seed 1234 --split 90,10,0 --tokenizer-type NullTokenizer
--dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist
--log-interval 1 --eval-interval 1000 --eval-iters 0 --num-workers 0
"""


@dataclass(frozen=True)
class Case:
    """One run: where its files go, and its Megatron arguments behind the common ones."""

    out: Path
    arguments: str
    distributed_optimizer: bool = True

    def words(self) -> list[str]:
        return [*self.arguments.split(), *(["--use-distributed-optimizer"] if self.distributed_optimizer else [])]

    def losses(self) -> dict[int, float]:
        return {int(step): loss for step, loss in json.loads((self.out / "losses.json").read_text()).items()}

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        """Whole gradients by the parameter's name in the checkpoint; an element that no rank holds is NaN."""
        whole: dict[str, torch.Tensor] = {}
        for file in self.out.glob(f"gradients_{step}_*.pt"):
            for key, shape, offset, piece in torch.load(file, weights_only=True):
                where = tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
                whole.setdefault(key, torch.full(shape, torch.nan))[where] = piece
        return whole


def run_cases(world_size: int, cases: list[Case], data_prefix: Path) -> None:
    """Run `cases` one after another on `world_size` gloo processes."""
    common = [*MODEL.split(), *TRAINING.split(), "--data-path", str(data_prefix)]
    for case in cases:
        case.out.mkdir(parents=True, exist_ok=True)
    cases_file = cases[0].out / "cases.json"
    cases_file.write_text(json.dumps([{"out": str(case.out), "arguments": common + case.words()} for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    result = subprocess.run([*command, str(WORKER), str(cases_file)], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]


def write_tokens(prefix: Path) -> Path:
    """Documents of a learnable sequence, of 20 to 120 tokens each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(400):
        length = int(random.integers(20, 120))
        tokens = (random.integers(0, 8, length).cumsum() + random.integers(0, 60)) % 60
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def worst_gradient(case: Case, reference: Case, steps: range) -> tuple[float, str]:
    """The largest ‖g − g_ref‖ / ‖g_ref‖ of a parameter, and its name; the norms run over all steps.

    Not step by step: the gradient of a vector with one number a head is a sum that may all but cancel at one step, and
    then shows the rounding of its terms.
    """
    ours = [case.gradients(step) for step in steps]
    theirs = [reference.gradients(step) for step in steps]
    assert all(gradients.keys() == theirs[0].keys() for gradients in ours + theirs)
    errors = {}
    for key in theirs[0]:
        expected = torch.stack([gradients[key] for gradients in theirs])
        assert expected.norm() > 0, f"{key} has no gradient"
        errors[key] = float((torch.stack([gradients[key] for gradients in ours]) - expected).norm() / expected.norm())
        assert errors[key] == errors[key], f"a part of the gradient of {key} is missing"
    return max((error, key) for key, error in errors.items())
