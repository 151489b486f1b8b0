"""A recipe for H100s, made small, trains here with emulated FP8: its loss falls, and is nearly that of bf16."""

import json
import random
from pathlib import Path

import pytest

from tests.support.tiny_run import VOCAB_SIZE, Done, sets, txssm

NOTICE = "FP8 (delayed) is emulated, since Transformer Engine is not installed: the same rounding, but no speedup"
# Sizes that a GPU could do as well: the in-projection has 208 rows, attention one head of 128 channels.
SMALL = (
    "model.layer_pattern=M-M-M-M-M-M-M-*-",
    "model.hidden_size=128",
    "model.num_attention_heads=1",
    "model.ffn_hidden_size=256",
    "model.state_size=16",
    "model.state_head_dim=8",
    "model.state_num_groups=2",
    "model.chunk_size=32",
    "training.seq_length=64",
    "training.micro_batch_size=4",
    "training.global_batch_tokens=512",
    "training.train_iters=60",
    "optimizer.learning_rate=3e-3",
    "data.tokenizer_type=NullTokenizer",
    f"data.vocab_size={VOCAB_SIZE}",
    "data.make_vocab_size_divisible_by=16",
    "checkpoint.save_interval=null",
    "logging.log_interval=1",
    "logging.eval_interval=null",
    "logging.tensorboard=false",
)


def train(folder: Path, recipe: str, name: str, *fields: str) -> tuple[list[float], Done]:
    """The loss of each step, and what was said."""
    data = (f"data.train={folder}/data", f"data.validation={folder}/data", f"run_directory={folder}/{name}")
    done = txssm("pretrain", recipe, "--nproc", "1", *sets((*SMALL, *data, *fields)))
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["lm loss"] for line in lines if "lm loss" in line], done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With documents that go on in steps of their own, which a model learns."""
    from megatron_txssm.data.corpus.shard import write_shard

    path, draw = tmp_path_factory.mktemp("fp8"), random.Random(0)
    documents = []
    for _ in range(200):
        start, step = draw.randrange(VOCAB_SIZE), draw.randrange(1, 4)
        documents.append([(start + step * i) % (VOCAB_SIZE - 1) for i in range(50)])
    write_shard(documents, path / "data", VOCAB_SIZE, VOCAB_SIZE - 1)
    return path


@pytest.mark.slow
def test_the_loss_falls_and_differs_a_little_from_that_in_bf16(folder: Path) -> None:
    losses, done = train(folder, "transxssm_1.3b_fp8_h100", "fp8")
    assert NOTICE in done.stdout
    plain, done = train(folder, "transxssm_1.3b", "bf16")
    assert "emulated" not in done.stdout
    assert len(losses) == len(plain) == 60
    assert losses[0] == pytest.approx(plain[0], rel=1e-2) and losses[0] != plain[0]
    end, plain_end = sum(losses[-10:]) / 10, sum(plain[-10:]) / 10
    assert end < 0.7 * losses[0] and plain_end < 0.7 * plain[0]
    # Measured: 4.3392 and 4.3391 at the beginning, 0.681 and 0.686 at the end.
    assert abs(end - plain_end) < 0.1
