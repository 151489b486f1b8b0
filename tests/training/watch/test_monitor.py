"""What a run tells: exact losses on file, the learning rate of each step, throughput, each validation once."""

import gc
import json
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training import training

from megatron_txssm.architecture.flops import flops_per_token
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.hooks import listen, listening
from megatron_txssm.training.watch import monitor, throughput
from megatron_txssm.training.watch.monitor import TrainingMonitor


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def nobody_listens_after_a_test() -> Iterator[None]:
    with listening():
        yield


class FakeMegatron:
    """Megatron's loop as far as the monitor listens to it: each step takes the given seconds."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, clock: Clock, run: Path, fields: Sequence[str] = (), **changes: Any
    ):
        self.args = SimpleNamespace(
            rank=0,
            world_size=4,
            iteration=0,
            train_iters=100,
            log_interval=1,
            global_batch_size=8,
            seq_length=256,
            consumed_train_samples=0,
            pipeline_model_parallel_size=1,
            validation_set_names=None,
            multiple_validation_sets=True,
            virtual_pipeline_model_parallel_size=None,
            data_parallel_size=4,
            tensor_model_parallel_size=1,
            context_parallel_size=1,
            expert_model_parallel_size=1,
        )
        vars(self.args).update(changes)
        self.clock = clock
        # The trackers' events.
        self.written: list[tuple[int, dict[str, Any]]] = []
        monkeypatch.setattr(monitor, "get_args", lambda: self.args)
        loop: Any = training
        monkeypatch.setattr(loop, "training_log", self._training_log)
        monkeypatch.setattr(loop, "train_step", self._train_step)
        monkeypatch.setattr(loop, "evaluate", lambda losses: (losses, None, False))
        monkeypatch.setattr(loop, "evaluate_and_print_results", self._evaluate_all)
        monkeypatch.setattr(loop, "num_floating_point_operations", self._flops)
        monkeypatch.setattr(loop, "build_train_valid_test_data_iterators", lambda test: (None, None, test))
        self.loop = loop
        self.optimizer = SimpleNamespace(param_groups=[{"default_config": True, "lr": 0.0}])
        self.logged: list[float | None] = []
        # What the experts' tracker adds to the losses since the last line, by step.
        self.load_balance: dict[int, float] = {}
        self.total_losses: dict[str, torch.Tensor] = {}
        self.validations = 0
        self.iterators: list[Any] = []
        # The watch for slowness has its own tests.
        self.recipe = load_recipe(
            "demo_cpu", [f"run_directory={run}", "logging.slow_throughput_fraction=null", *fields]
        )
        self.terminal = StringIO()
        self.monitor = TrainingMonitor(self.recipe, self.terminal)
        report: Any = lambda values, step: self.written.append((step, dict(values)))  # noqa: E731
        trackers: Any = SimpleNamespace(log=report, log_step=report)
        self.monitor.trackers = trackers
        listen(self.monitor)

    def _train_step(
        self, data_iterator: Any, optimizer: Any, opt_param_scheduler: Any, forward_backward_func: Any, iteration: int,
        seconds: float, grad_norm: float | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.clock.now += seconds
        # As Megatron's scheduler does at the end of a step.
        optimizer.param_groups[0]["lr"] += 1e-4
        return {}, int(grad_norm is None), False, False, 0, grad_norm, None, 0

    def _training_log(
        self, loss_dict: Any, total_loss_dict: Any, learning_rate: float | None, iteration: int, loss_scale: float,
        report_memory_flag: bool, skipped_iter: int, grad_norm: Any, params_norm: Any, num_zeros_in_grad: Any,
        max_attention_logit: Any, pg_collection: Any = None,
    ) -> str:  # fmt: skip
        self.logged.append(learning_rate)
        if iteration in self.load_balance:
            # As MoEMetricsTracker.report and training_log.
            total_loss_dict["load_balancing_loss"] += torch.tensor(self.load_balance[iteration])
            if iteration % self.args.log_interval == 0:
                total_loss_dict["load_balancing_loss"] = torch.tensor([0.0])
        return "logged"

    def _flops(self, args: Any, batch_size: int, seqlen_squared_sum_in_batch: Any = None, **others: Any) -> float:
        raise AssertionError("Megatron's own count")

    def _evaluate_all(self, prefix: str, data_iterator: list[Any]) -> None:
        self.validations += 1
        for losses in data_iterator:
            self.loop.evaluate(losses)

    def step(
        self, iteration: int, loss: Any = 4.0, seconds: float = 2.0, skipped: bool = False, squares: float | None = None
    ) -> None:
        # Without a loss, the step only read its batches.
        norm = None if loss is None else 0.5
        self.loop.train_step(None, self.optimizer, None, None, iteration - 1, seconds=seconds, grad_norm=norm)
        self.args.consumed_train_samples += self.args.global_batch_size
        self.loop.num_floating_point_operations(
            self.args, self.args.global_batch_size, seqlen_squared_sum_in_batch=squares, total_real_tokens_in_batch=None
        )
        losses = {} if loss is None else {"lm loss": torch.as_tensor(loss)}
        rate = self.optimizer.param_groups[0]["lr"]
        # Megatron's own call: most by position.
        logged = self.loop.training_log(
            losses,
            self.total_losses,
            rate,
            iteration,
            1.0,
            False,
            int(skipped),
            None if norm is None else torch.tensor(norm),
            None,
            None,
            0,
            pg_collection=None,
        )  # fmt: skip
        assert logged == "logged"

    def validate(self, *sets: dict[str, torch.Tensor] | None, prefix: str = "iteration 5") -> None:
        iterators = list(sets)
        # As long as Megatron's loop, none has the id of another.
        self.iterators.append(iterators)
        if prefix.endswith("test set"):
            assert self.loop.build_train_valid_test_data_iterators(iterators)[2] is iterators
        self.loop.evaluate_and_print_results(prefix, iterators)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Without the line of the start."""
        lines = [json.loads(line) for line in (self.recipe.run_path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "start" not in line]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> FakeMegatron:
    return FakeMegatron(monkeypatch, clock, tmp_path)


def test_a_step_that_only_reads_counts_no_tokens(megatron: FakeMegatron) -> None:
    megatron.args.log_interval = 3
    megatron.step(1)
    megatron.step(2, loss=None, skipped=True, seconds=0.0)
    megatron.step(3)
    _, jumped, last = megatron.metrics
    assert "lm loss" not in jumped and jumped["skipped"] and jumped["grad_norm"] is None
    assert jumped["consumed_tokens"] == 2 * 8 * 256
    # Two batches in two steps of 2 s.
    assert last["tokens_per_second"] == pytest.approx(8 * 256 / 2.0)
    assert last["model_tflops_per_second_per_rank"] > 0
    assert "skipped 1 steps" in megatron.terminal.getvalue()


def test_losses_are_kept_exactly(megatron: FakeMegatron) -> None:
    # The neighbour of 4 differs in the last bit only.
    losses = [torch.tensor(4.0).nextafter(torch.tensor(5.0)), torch.tensor(1 / 3), torch.tensor(1e-42)]
    for iteration, loss in enumerate(losses, start=1):
        megatron.step(iteration, loss)
    read = [torch.tensor(line["lm loss"], dtype=torch.float32) for line in megatron.metrics]
    assert all(a.equal(b) for a, b in zip(read, losses, strict=True))
    assert [line["iteration"] for line in megatron.metrics] == [1, 2, 3]
    assert [line["consumed_tokens"] for line in megatron.metrics] == [2048, 4096, 6144]
    assert megatron.metrics[0]["grad_norm"] == 0.5


EXPERTS = ("model.layer_pattern=ME*E", "model.num_experts=4", "model.moe_aux_loss_coeff=0.02")


def test_the_load_balance_is_each_steps_own(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> None:
    """Megatron sums it up from one line to the next."""
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, EXPERTS, log_interval=2)
    megatron.load_balance = {1: 1.5, 2: 1.25, 3: 1.125, 4: 2.0, 5: 1.0}
    for iteration in megatron.load_balance:
        megatron.step(iteration)
    assert [line["load_balancing_loss"] for line in megatron.metrics] == list(megatron.load_balance.values())
    assert [line["lm loss"] for line in megatron.metrics] == [4.0] * 5


@pytest.mark.parametrize("fields", [(), (*EXPERTS, "model.moe_aux_loss_coeff=0")])
def test_without_a_weight_there_is_no_load_balance(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path, fields: Sequence[str]
) -> None:
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, fields)
    megatron.step(1)
    assert "load_balancing_loss" not in megatron.metrics[0] and megatron.total_losses == {}


def test_the_learning_rate_is_the_one_that_the_step_used(megatron: FakeMegatron) -> None:
    for iteration in (1, 2, 3):
        megatron.step(iteration)
    assert [line["learning_rate"] for line in megatron.metrics] == [0.0, 1e-4, 2e-4]
    assert megatron.logged == [0.0, 1e-4, 2e-4], "what Megatron's line, TensorBoard and W&B show"


def test_skipped_steps_are_shown(megatron: FakeMegatron) -> None:
    for iteration, skipped in enumerate([False, True, True, False], start=1):
        megatron.step(iteration, skipped=skipped)
    assert [line["skipped"] for line in megatron.metrics] == [False, True, True, False]
    assert re.findall(r"skipped (\d) step", megatron.terminal.getvalue()) == ["1", "2", "2"]


def test_throughput(megatron: FakeMegatron) -> None:
    megatron.step(1, seconds=2.0)
    megatron.step(2, seconds=0.5)
    tokens = 8 * 256
    assert [line["tokens_per_second"] for line in megatron.metrics] == pytest.approx([tokens / 2, tokens / 0.5])
    flops = flops_per_token(megatron.recipe.sizes, megatron.recipe.training.seq_length)
    expected = tokens / 2 * flops / 1e12 / 4
    assert megatron.metrics[0]["model_tflops_per_second_per_rank"] == pytest.approx(expected)
    # What Megatron's own line divides by its time.
    assert megatron.loop.num_floating_point_operations(megatron.args, 8) == pytest.approx(tokens * flops)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["training.precision=bf16"], "MFU {}%"),
        (["training.precision=fp32"], "MFU {}% of the bf16 peak"),
        (["training.precision=bf16", "training.fp8=hybrid"], "MFU {}% of the bf16 peak"),
    ],
)
def test_mfu_is_of_the_bf16_peak_of_all_gpus(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path, fields: list[str], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, fields, log_interval=2)
    # As fast as a third of an H100's 989 TFLOP/s; 4 ranks.
    flops = 8 * 256 * flops_per_token(megatron.recipe.sizes, 256)
    for iteration in (1, 2):
        megatron.step(iteration, seconds=flops / 4 / (989e12 / 3))
    assert [line["mfu"] for line in megatron.metrics] == pytest.approx([1 / 3] * 2)
    assert f"| {words.format('33.3')} |" in megatron.terminal.getvalue()
    assert [(step, values["mfu"]) for step, values in megatron.written] == [(n, pytest.approx(1 / 3)) for n in (1, 2)]


def test_without_a_known_gpu_there_is_no_mfu(megatron: FakeMegatron) -> None:
    megatron.step(1)
    assert "mfu" not in megatron.metrics[0] and "MFU" not in megatron.terminal.getvalue()


def test_attention_within_documents_is_billed_for_their_lengths(megatron: FakeMegatron) -> None:
    """8 samples of 256 tokens, whole in the first step; in the second each is documents of 192 and 64."""
    megatron.step(1, seconds=1.0, squares=8 * 256**2)
    megatron.step(2, seconds=1.0, squares=8 * (192**2 + 64**2))
    rates = [line["model_tflops_per_second_per_rank"] * 1e12 * 4 for line in megatron.metrics]
    assert rates[0] == pytest.approx(8 * 256 * flops_per_token(megatron.recipe.sizes, 256))
    # Of two layers of scores, forward and backward: a query meets half its document, 4 heads of 32 channels wide.
    saved = 3 * 2 * 2 * (8 / 2) * (256**2 - 192**2 - 64**2) * 4 * 32
    assert rates[0] - rates[1] == pytest.approx(saved)


def test_time_between_steps_is_not_training(megatron: FakeMegatron, clock: Clock) -> None:
    megatron.step(1)
    clock.now += 1000  # an evaluation, a save
    megatron.step(2)
    assert megatron.metrics[1]["tokens_per_second"] == pytest.approx(8 * 256 / 2)


def test_lines_come_at_the_interval_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, log_interval=4, train_iters=6)
    for iteration, seconds in enumerate([1, 1, 1, 5, 1, 3], start=1):
        megatron.step(iteration, seconds=seconds)
    assert re.findall(r"^iteration (\d)/6", megatron.terminal.getvalue(), re.MULTILINE) == ["4", "6"]
    # Averaged over the interval.
    assert megatron.metrics[3]["tokens_per_second"] == pytest.approx(8 * 256 * 4 / 8)
    assert megatron.metrics[5]["tokens_per_second"] == pytest.approx(8 * 256 * 2 / 4)
    assert len(megatron.metrics) == 6
    assert [step for step, _ in megatron.written] == [1, 2, 3, 4, 5, 6]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> None:
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, rank=1)
    megatron.step(1)
    megatron.validate({"lm loss": torch.tensor(3.0)})
    megatron.monitor.close()
    assert megatron.terminal.getvalue() == ""
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_says_when_and_how_long(megatron: FakeMegatron, clock: Clock) -> None:
    megatron.step(1, seconds=2.5)
    clock.now += 1000  # a save
    megatron.step(2, seconds=0.5)
    lines = megatron.metrics
    assert [line["step_seconds"] for line in lines] == [2.5, 0.5]
    assert [line["time"] for line in lines] == [1.7e9 + 102.5, 1.7e9 + 1103]
    assert {line["world_size"] for line in lines} == {4}


def test_a_slow_run_is_told_once_and_marked_while_it_is_so(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    monkeypatch.setattr(throughput, "SAMPLE_SECONDS", 0.0)
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(monitor, "notify", lambda *words, **facts: told.append((*words, facts)))
    fields = ["logging.slow_throughput_fraction=0.7"]
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, fields, world_size=1)
    for iteration in range(1, 181):
        # Compiled first; slow from 61 to 120. Validations and saves between steps do not count.
        megatron.step(iteration, seconds=30 if iteration < 8 else 10 if 60 < iteration <= 120 else 2)
        clock.now += 100 * (iteration % 3)
    # Judged every tenth step, three times in a row.
    slow = [line["iteration"] for line in megatron.metrics if "slow" in line]
    assert slow == list(range(90, 150))
    notes = [
        line
        for line in megatron.terminal.getvalue().splitlines()
        if not line.startswith("iteration ") or "throughput" in line
    ]
    host = os.uname().nodename
    words = f"20% of its median throughput: check {host}'s clocks and other processes, and the data files"
    assert notes == [f"warning: iteration 90 | {words}", "iteration 150 | throughput is back near its median"]
    facts = {"step": 90, "ranks": [], "nodes": [], "fraction": pytest.approx(0.2)}
    assert told == [(megatron.recipe.run_path, "slow", f"step 90: {words}", facts)]


def test_validation_losses(megatron: FakeMegatron) -> None:
    megatron.step(5)
    megatron.validate({"lm loss": torch.tensor(3.25)})
    assert megatron.metrics[-1] == {"iteration": 5, "validation lm loss": 3.25, "time": 1.7e9 + 102}
    assert megatron.terminal.getvalue().endswith("iteration 5 | validation lm loss 3.2500\n")
    megatron.step(6)
    megatron.validate(*({"lm loss": torch.tensor(x)} for x in (3.0, 2.0)))
    assert without_time(megatron.metrics)[-1] == {
        "iteration": 6,
        "validation-0 lm loss": 3.0,
        "validation-1 lm loss": 2.0,
    }
    # The time limit came first: nothing to tell.
    count = len(megatron.metrics)
    megatron.step(7)
    megatron.validate(None)
    assert len(megatron.metrics) == count + 1


def test_a_step_is_validated_once(megatron: FakeMegatron) -> None:
    """Megatron validates at the interval and at the end, which may be the same step."""
    megatron.step(5)
    megatron.validate(None)
    assert megatron.validations == 1
    for prefix in ("iteration 5", "iteration 5 on validation set", "iteration 5 on test set"):
        megatron.validate({"lm loss": torch.tensor(3.0)}, prefix=prefix)
    assert megatron.validations == 3
    assert without_time(megatron.metrics)[1:] == [
        {"iteration": 5, f"{data} lm loss": 3.0} for data in ("validation", "test")
    ]
    megatron.step(6)
    megatron.validate({"lm loss": torch.tensor(3.0)}, prefix="iteration 6 on validation set")
    assert megatron.validations == 4


def test_the_test_set_is_known_by_its_iterators(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> None:
    """One for each virtual pipeline stage, in a list that Megatron makes of them."""
    changes = {"multiple_validation_sets": False, "virtual_pipeline_model_parallel_size": 2}
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, **changes)
    validation, test = ([{"lm loss": torch.tensor(loss)}, None] for loss in (3.0, 2.0))
    for iterator in test:
        megatron.loop.build_train_valid_test_data_iterators(iterator)
    megatron.step(5)
    for iterators in (validation, test):
        megatron.loop.evaluate_and_print_results("any words", iterators)
    assert without_time(megatron.metrics)[1:] == [
        {"iteration": 5, "validation lm loss": 3.0},
        {"iteration": 5, "test lm loss": 2.0},
    ]


def test_no_iterator_outlives_megatrons_loop(megatron: FakeMegatron) -> None:
    """The processes of its loader would be waited for at the end, and they do not heed SIGTERM."""
    iterator = (batch for batch in ())
    alive = weakref.ref(iterator)
    megatron.loop.build_train_valid_test_data_iterators(iterator)
    del iterator
    gc.collect()
    assert alive() is None


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    for before in ("", '{"iteration": 1}\n', '{"iteration": 1}\n{"iteration": 2, "lm l'):
        file.write_text(before)
        with listening():
            FakeMegatron(monkeypatch, clock, tmp_path).step(2)
        *_, last = file.read_text().splitlines()
        assert json.loads(last)["lm loss"] == 4.0
        assert file.read_text().count("\n") == before.count("\n") + 2 + (not before.endswith("\n") and before != "")


def test_a_training_outlives_its_terminal(megatron: FakeMegatron, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(megatron.terminal, "write", gone)
    for iteration in (1, 2):
        megatron.step(iteration)
    megatron.validate({"lm loss": torch.tensor(3.0)})
    megatron.monitor.close()
    assert [line["iteration"] for line in megatron.metrics] == [1, 2, 2]


@pytest.mark.parametrize(
    "why_not, fields, said",
    [
        (None, [], True),
        (None, ["model.ssd_backend=triton"], True),
        (None, ["model.ssd_backend=torch"], False),
        (None, ["model.layer_pattern=*-"], False),
        ("it needs a CUDA device, and there is none", [], False),
    ],
)
def test_the_first_step_says_what_takes_it_so_long(
    why_not: str | None,
    fields: list[str],
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(monitor, "why_unavailable", lambda: why_not)
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, fields)
    for iteration in (1, 2):
        megatron.step(iteration)
    lines = megatron.terminal.getvalue().splitlines()
    assert ["compiles and tunes kernels" in line for line in lines] == [True] * said + [False] * 2
