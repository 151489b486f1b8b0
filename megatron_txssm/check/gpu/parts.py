"""The parts of `txssm check gpu`, the most informative first: each yields findings, whatever breaks in it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_txssm.check.gpu import trainings as basic
from megatron_txssm.check.gpu import variants as others
from megatron_txssm.check.gpu.bench import Bench
from megatron_txssm.check.gpu.children import Child
from megatron_txssm.check.gpu.findings import Finding, compared, failed
from megatron_txssm.check.gpu.speed import LONG_PAIRS, PAIRS, SMALL_PAIRS, speed_of_pairs
from megatron_txssm.check.gpu.trainings import SMALL_VOCABULARY, STEPS, Agreement, Training

# Bounds of relative errors; measured on an H100: docs/gpu-results.
KERNEL_BOUNDS = {"fp32, IEEE": 1e-5, "fp32": 5e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Part:
    """`seconds`: the time that must be left to start it."""

    name: str
    about: str
    seconds: float
    find: Callable[[Bench], Iterator[Finding]]


def environment(bench: Bench) -> Iterator[Finding]:
    found = bench.finish(bench.start("environment", "environment"), limit=120)
    if failure := failed("the installation", found):
        yield failure
        return
    yield Finding("the machine", "measured", found["machine"], found)
    bench.transformer_engine = found["packages"].get("Transformer Engine") == "right"
    for package, said in found["packages"].items():
        if said == "right":
            yield Finding(package, "right", found["versions"].get(package, "imported"))
        elif said.startswith("not installed"):
            yield Finding(package, "left out", said)
        else:
            yield Finding(package, "FAILED", said)


def kernels(bench: Bench) -> Iterator[Finding]:
    # Triton reads its fp32 mode on import. One block size per kernel: nothing is timed here.
    once = {"MAMBA_DETERMINISTIC": "1"}
    ieee = once | {"TRITON_F32_DEFAULT": "ieee"}
    children = [bench.start("kernels", "kernels", once), bench.start("kernels", "kernels_ieee", ieee)]
    for child in children:
        found = bench.finish(child, limit=240)
        if failure := failed(child.name, found):
            yield failure
            continue
        for name, error in found.items():
            bound = KERNEL_BOUNDS["fp32, IEEE" if bench.device == "cpu" and "fp32" in name else name.partition(", ")[2]]
            yield compared(f"{name}, against fp64", error, bound)


def trainings(bench: Bench) -> Iterator[Finding]:
    yield from _trained(bench, basic.WAVES, basic.AGREEMENTS)
    for name in ("te", "fp8_attention", "isolated_te"):
        backends = _backends(bench, name)
        if backends:
            yield Finding(f"attention's backend, {name}", "measured", backends)


def variants(bench: Bench) -> Iterator[Finding]:
    yield from _trained(bench, others.WAVES, others.AGREEMENTS)


def _trained(
    bench: Bench, all_waves: Sequence[Sequence[Training]], agreements: Sequence[Agreement]
) -> Iterator[Finding]:
    """Train wave by wave what can be compared here, and compare."""
    found: dict[str, dict[str, Any]] = {}
    able = {training.name: training for wave in all_waves for training in wave if _can_train(training, bench)}
    pairs = [{agreement.training, agreement.reference} for agreement in agreements]
    compared = set[str]().union(*(pair for pair in pairs if pair <= able.keys()))
    wanted = compared | {able[name].continues for name in compared}
    waves = [[training for training in wave if training.name in wanted] for wave in all_waves]
    prepared: dict[str, Child] = {}
    for wave, following in zip(waves, [*waves[1:], []], strict=True):
        # A training that continues another must not read its run before that has ended.
        independent = [training for training in following if training.continues is None]
        prepared_next = bench.prepare(independent, SMALL_VOCABULARY, beside=len(wave))
        found |= bench.train_all(wave, SMALL_VOCABULARY, prepared, limit=240)
        prepared = prepared_next
    for agreement in agreements:
        yield _agreement(agreement, found)


def _can_train(training: Training, bench: Bench) -> bool:
    return (bench.transformer_engine and bench.device == "cuda") or not training.needs_transformer_engine


def _agreement(agreement: Agreement, found: dict[str, dict[str, Any]]) -> Finding:
    pair = (agreement.training, agreement.reference)
    for name in pair:
        if name not in found:
            return Finding(agreement.claim, "left out", "Transformer Engine is not installed, or cannot be used")
        if failure := failed(agreement.claim, found[name]):
            return failure
    for name in pair:
        steps = [row["iteration"] for row in found[name]["rows"] if "lm loss" in row]
        # Each once: a resumed run must not start over.
        if steps != list(range(1, STEPS + 1)):
            return Finding(agreement.claim, "FAILED", f"{name}: steps {steps}")
    ours, theirs = (_losses(found[name]["rows"]) for name in pair)
    # max() may ignore a NaN.
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    error = max(differences) if all(d == d for d in differences) else float("nan")
    return compared(agreement.claim, error, agreement.bound, " nats")


def _losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["lm loss"] for row in rows if "lm loss" in row]


def _backends(bench: Bench, name: str) -> str:
    """The attention backends that Transformer Engine selected, from its log."""
    log = bench.folder / name / "logs/rank_0.log"
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    chosen = {line.partition("Selected backend = ")[2].rstrip(".") for line in lines if "Selected backend = " in line}
    return ", ".join(sorted(chosen))


def speed(bench: Bench) -> Iterator[Finding]:
    return speed_of_pairs(bench, SMALL_PAIRS if bench.small else PAIRS)


def long_sequences(bench: Bench) -> Iterator[Finding]:
    return speed_of_pairs(bench, () if bench.small else LONG_PAIRS)


def scan(bench: Bench) -> Iterator[Finding]:
    found = bench.finish(bench.start("scan_speed", "scan"), limit=120)
    if failure := failed("the scan's speed", found):
        yield failure
        return
    yield Finding("memory bandwidth, by a large copy", "measured", f"{found.pop('bytes_per_second') / 1e12:.2f} TB/s")
    for length, row in found.items():
        name = "kernels" if "kernels" in row else "torch"
        others = [f"{other} {ms:.3g} ms ({ms / row[name]:.2f}x)" for other, ms in row.items() if other != name]
        yield Finding(
            f"scan, forward and backward, {length} tokens",
            "measured",
            f"{name} {row[name]:.3g} ms; {'; '.join(others)}",
            row,
        )


def decoding(bench: Bench) -> Iterator[Finding]:
    found = bench.finish(bench.start("decoding", "decoding"), limit=120)
    if failure := failed("decoding", found):
        yield failure
        return
    for context, speeds in found.items():
        ours, llama = speeds["TransXSSM"], speeds["Llama"]
        said = f"{ours:.1f} tokens/s; Llama {llama:.1f} ({ours / llama:.2f}x)"
        yield Finding(f"decoding after {context} tokens, 320M", "measured", said, speeds)


def bandwidth(bench: Bench) -> Iterator[Finding]:
    claim = "all-reduce over the GPUs of this node"
    found = bench.finish(bench.start("bandwidth", "bandwidth"), limit=150)
    if failure := failed(claim, found):
        yield failure
    elif not found:
        yield Finding(claim, "left out", "needs two GPUs")
    else:
        said = f"{found['allreduce']:.0f} GB/s of bus bandwidth, {found['gpus']} GPUs"
        yield Finding(claim, "measured", said, found)


PARTS: Sequence[Part] = (
    Part("environment", "versions, and what can be imported", 10, environment),
    Part("kernels", "scan and rotation against fp64", 30, kernels),
    Part("trainings", "small trainings, whose losses must agree", 60, trainings),
    Part("variants", "baselines, experts, prediction, Muon, muP, the guard, a CUDA graph", 60, variants),
    Part("bandwidth", "all-reduce between the GPUs of this node", 20, bandwidth),
    Part("speed", "a training step at 4096 tokens beside Llama 3", 40, speed),
    Part("scan", "the scan beside attention", 25, scan),
    Part("decoding", "tokens per second beside Llama", 40, decoding),
    Part("long", "a training step at 8192 and 16384 tokens beside Llama 3", 40, long_sequences),
)
