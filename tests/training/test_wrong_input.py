"""Wrong input, as a user meets it: one clear message, an exit code, no traceback, nothing half-written."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.tiny_run import VOCAB_SIZE, Done, TinyRun, make_tiny_run, txssm


def check_message(done: Done, code: int, *wanted: str) -> None:
    """Exactly one message, with these texts, and this exit code."""
    everything = done.stdout + done.stderr
    assert done.code == code, everything
    assert everything.count("error:") == 1, everything
    assert done.stderr.startswith("error: "), everything
    assert "Traceback" not in everything
    for text in wanted:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (["training.train_iter=9"], ["unknown key 'training.train_iter'", "did you mean 'train_iters'?"]),
        (
            ["parallel.tensor_model_parallel_size=4"],
            ["num_attention_heads=2 is not divisible by tensor_model_parallel_size=4", "use one of 1, 2"],
        ),
        (["data.train=/nowhere/tokens"], ["data prefix /nowhere/tokens", "/nowhere/tokens.idx does not exist"]),
        (["model.state_size=15"], ["state_size=15 is odd"]),
        (["data.tokenizer_type=SentencePieceTokenizer", "data.tokenizer_model=/nowhere.model"], ["/nowhere.model"]),
        (["run_directory=/proc/txssm"], ["run_directory=/proc/txssm cannot be written", "state another"]),
        (["megatron.overlap_grad_reduc=true"], ["megatron.overlap_grad_reduc", "did you mean 'overlap_grad_reduce'?"]),
        (["megatron.num_experts=4"], ["megatron.num_experts=4: set model.num_experts instead"]),
        (["megatron.moe_z_loss_coeff=0.1"], ["moe_z_loss_coeff=0.1 is refused: it would change what experts compute"]),
        (["model.layer_pattern=ME"], ["layer_pattern has layers of experts (E); state num_experts, such as 8"]),
        (["checkpoint.load_from=/nowhere"], ["checkpoint.load_from=/nowhere holds no checkpoint"]),
    ],
)
def test_a_wrong_field(tiny: TinyRun, fields: list[str], wanted: list[str]) -> None:
    check_message(tiny.pretrain(fields=fields), 2, *wanted)
    assert not tiny.run.exists()


def test_kernels_that_cannot_run(tiny: TinyRun) -> None:
    done = tiny.pretrain(fields=["model.ssd_backend=triton"])
    check_message(done, 2, "ssd_backend=triton cannot run here", "CUDA", "set model.ssd_backend to auto or torch")


def test_a_typo_in_the_file(tiny: TinyRun) -> None:
    tiny.recipe.write_text(tiny.recipe.read_text().replace("hidden_size: 32", "hiden_size: 32", 1))
    check_message(tiny.pretrain(), 2, str(tiny.recipe), "'model.hiden_size'", "did you mean 'hidden_size'?")
    assert not tiny.run.exists()


def test_processes_that_the_layout_does_not_divide(tiny: TinyRun) -> None:
    done = tiny.pretrain("--nproc", "3", fields=["parallel.tensor_model_parallel_size=2"])
    check_message(done, 2, "3 processes", "tensor_model_parallel_size=2", "start a multiple of 2 processes")
    assert not tiny.run.exists()


def test_a_corrupt_index(tiny: TinyRun) -> None:
    index = tiny.folder / "data.idx"
    index.write_bytes(index.read_bytes()[:-20])
    check_message(tiny.pretrain(), 2, str(index), "cut off or corrupt", "prepare the data again")
    assert not tiny.run.exists()


def test_a_port_in_use(tiny: TinyRun) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        check_message(tiny.pretrain("--port", str(port)), 2, f"--port {port} cannot be used", "use another")
    assert not tiny.run.exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture(interrupted: tuple[TinyRun, Done]) -> None:
    run, _ = interrupted
    before = sorted(run.folder.rglob("*"))
    done = run.pretrain(fields=["model.layer_pattern=M-M-"])
    check_message(
        done, 2, str(run.checkpoints), "model.layer_pattern: M-*- there, M-M- here", "use another run_directory"
    )
    assert sorted(run.folder.rglob("*")) == before


def test_generate_without_a_checkpoint(tiny: TinyRun) -> None:
    done = txssm("generate", str(tiny.folder), "--prompt", "1 2")
    check_message(done, 2, f"{tiny.folder} holds no checkpoint", "name a run's folder or its checkpoints")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "1", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prompt", "1", "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
    ],
)
def test_generate_with_a_wrong_option(tiny: TinyRun, words: list[str], wanted: str) -> None:
    check_message(txssm("generate", str(tiny.folder), *words), 2, wanted)


def larger_tokenizer(folder: Path) -> Path:
    from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece

    texts = [f"def function_{number}(value): return value + {number}\n" for number in range(50)]
    return train_sentencepiece(texts, folder / "tokenizer", vocab_size=300)


def damage(checkpoints: Path) -> None:
    """Cut every file of tensors short, as a full disk or a copy that was interrupted would."""
    files = list(checkpoints.glob("iter_*/*.distcp"))
    assert files
    for file in files:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 10)


@pytest.fixture(scope="module")
def found_by_workers(interrupted: tuple[TinyRun, Done], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Mistakes that only Megatron or the tokenizer can find, in a worker: each costs a start, so two run at a time."""
    folder = tmp_path_factory.mktemp("workers")
    runs = {name: make_tiny_run(folder / name) for name in ("refused", "tokenizer")}
    model = larger_tokenizer(folder)
    fields = {
        "refused": ["megatron.overlap_param_gather=true"],
        "tokenizer": ["data.tokenizer_type=SentencePieceTokenizer", f"data.tokenizer_model={model}"],
    }
    damaged = TinyRun(folder / "damaged")
    shutil.copytree(interrupted[0].folder, damaged.folder)
    damage(damaged.checkpoints)
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = {name: pool.submit(run.pretrain, fields=fields[name]) for name, run in runs.items()}
        done["damaged"] = pool.submit(damaged.pretrain, fields=[f"run_directory={damaged.run}"])
        done["generate"] = pool.submit(txssm, "generate", str(damaged.checkpoints), "--prompt", "1 2")
        return {name: future.result() for name, future in done.items()}


@pytest.mark.slow
def test_a_value_that_megatron_refuses(found_by_workers: dict[str, Done]) -> None:
    check_message(
        found_by_workers["refused"], 2, "Megatron refuses the arguments", "--overlap-param-gather only supported"
    )


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_vocabulary(found_by_workers: dict[str, Done]) -> None:
    check_message(
        found_by_workers["tokenizer"],
        2,
        f"data.vocab_size={VOCAB_SIZE} is less than the 300 tokens",
        "tokenizer.model",
        "set data.vocab_size=300",
    )


@pytest.mark.slow
def test_a_damaged_checkpoint(found_by_workers: dict[str, Done]) -> None:
    done = found_by_workers["damaged"]
    check_message(
        done,
        2,
        "is damaged (",
        "is cut short",
        "no whole checkpoint is left in",
        "damaged/run/checkpoints: put the files back, or move the folder away to begin again",
    )
    assert "iteration" not in done.stdout


@pytest.mark.slow
def test_generate_from_a_damaged_checkpoint(found_by_workers: dict[str, Done]) -> None:
    done = found_by_workers["generate"]
    check_message(done, 2, "damaged/run/checkpoints/iter_", ".distcp is cut short", "copy it again")
    assert done.stdout == ""
