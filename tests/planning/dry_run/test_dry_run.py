"""A dry run against the same ranks training on real tensors over gloo: memory by kind, and traffic."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_txssm.planning.dry_run.run import WITHOUT_DATA, RankOf, run_ranks, usage_of
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

SMALL: Changes = {
    **WITHOUT_DATA,
    "model.layer_pattern": "M-*-",
    "model.hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 512,
    "model.state_size": 32,
    "model.state_head_dim": 32,
    "model.state_num_groups": 4,
    "model.chunk_size": 64,
    "data.vocab_size": 1000,
    "training.transformer_impl": "local",
    "megatron.overlap_grad_reduce": None,
    "megatron.overlap_param_gather": None,
    "training.seq_length": 256,
    "training.micro_batch_size": 2,
    "training.global_batch_tokens": 4096,
    "training.train_tokens": None,
    "training.train_iters": 10,
}
EXPERTS: Changes = {
    "model.layer_pattern": "ME*E",
    # As many as a token uses: each has as many tokens, as the dry run assumes.
    "model.num_experts": 2,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 128,
}
TP: Changes = {"parallel.tensor_model_parallel_size": 2}
SP: Changes = TP | {"parallel.sequence_parallel": True}
PP: Changes = {"parallel.pipeline_model_parallel_size": 2}
VPP: Changes = PP | {"parallel.virtual_pipeline_stages": 2, "model.layer_pattern": "M-|*-|M-|*-"}
CP: Changes = {"parallel.context_parallel_size": 2}
WITHOUT_ZERO1: Changes = {"parallel.use_distributed_optimizer": False}


@dataclass(frozen=True)
class Case:
    name: str
    processes: int
    changes: Changes = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return changed(load_recipe("transxssm_320m"), SMALL | self.changes)

    @property
    def ranks(self) -> list[int]:
        """One of each pipeline stage, the first and the last: the others hold as much."""
        return [0] if self.recipe.pipeline_stages == 1 else [0, self.processes - 1]


CASES = [
    Case("alone", 1),
    Case("fp32", 1, {"training.precision": "fp32"}),
    Case("tp", 2, TP),
    Case("sp_selective", 2, SP | {"parallel.recompute": "selective"}),
    Case("pp", 2, PP),
    Case("cp", 2, CP),
    Case("cp_all_to_all", 2, CP | {"parallel.state_context_parallel": "all_to_all"}),
    Case("zero1_overlap", 2, {"megatron.overlap_grad_reduce": True, "megatron.overlap_param_gather": True}),
    Case("dp_full_isolated", 2, WITHOUT_ZERO1 | {"parallel.recompute": "full", "data.isolate_documents": True}),
    Case("ep", 2, EXPERTS | {"parallel.expert_model_parallel_size": 2}),
    Case("tp_vpp", 4, TP | VPP),
    Case("sp_cp_isolated", 4, SP | CP | {"data.isolate_documents": True}),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Usage]:
    """By case and rank: what real ranks used."""
    found: dict[tuple[str, int], Usage] = {}
    for processes in (1, 2, 4):
        cases = [case for case in CASES if case.processes == processes]
        folders = [tmp_path_factory.mktemp(case.name) for case in cases]
        tasks = [
            RankOf(case.recipe, processes).task(folder, "local", only_build=False)
            for case, folder in zip(cases, folders, strict=True)
        ]
        file = folders[0] / "tasks.json"
        file.write_text(json.dumps(tasks))
        script = Path(__file__).with_name("real_ranks.py")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, str(script), str(file)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for case, folder in zip(cases, folders, strict=True):
            for rank in case.ranks:
                result = json.loads((folder / f"real_{rank}.json").read_text())
                found[case.name, rank] = usage_of(result["usage"])
    return found


@pytest.fixture(scope="module")
def faked() -> dict[tuple[str, int], Usage]:
    """By case and rank: the same from dry runs."""
    keys = [(case, rank) for case in CASES for rank in case.ranks]
    ranks = [RankOf(case.recipe, case.processes, rank) for case, rank in keys]
    results = run_ranks(ranks, kernels="local")
    return {(case.name, rank): usage_of(result["usage"]) for (case, rank), result in zip(keys, results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_dry_run_needs_what_real_ranks_need(
    case: Case, real: dict[tuple[str, int], Usage], faked: dict[tuple[str, int], Usage]
) -> None:
    for rank in case.ranks:
        ours, theirs = faked[case.name, rank], real[case.name, rank]
        state = (ours.weights, ours.gradients, ours.optimizer)
        assert state == (theirs.weights, theirs.gradients, theirs.optimizer) and min(state) > 0
        # On a busy machine, gloo's threads hold what they send longer; nothing makes a real peak less.
        least = 0.99 if case.processes == 1 else 0.5
        assert least * theirs.activations <= ours.activations <= 1.01 * theirs.activations
        assert ours.traffic == theirs.traffic and bool(ours.traffic) == (case.processes > 1)
