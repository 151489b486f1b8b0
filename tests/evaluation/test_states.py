"""txssm eval states: the norms that a hook measures, the worker that does it, its recipe and its command."""

# B=batch L=sequence D=hidden C=measured positions H=heads

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.choices import POSITION_ENCODINGS
from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation import states
from megatron_txssm.evaluation.states import StateNorms, states_as_worker, states_recipe
from megatron_txssm.model.state_space_mixer import StateSpaceCache
from megatron_txssm.training.launch.preflight import make_run_directory
from tests.support.megatron_tasks import run_tasks, train
from tests.support.tiny_model import HIDDEN, build_mixer, perturb, state_space_config
from tests.support.tiny_run import TinyRun, make_tiny_run

EVERY, LENGTH = 4, 12


def final_state(mixer: Any, hidden_LBD: torch.Tensor, state_BHPN: torch.Tensor | None = None) -> torch.Tensor:
    """The state after tokens read in one pass, from a state before them."""
    context = StaticInferenceContext(2, 64)
    if state_BHPN is not None:
        context.key_value_memory_dict[1] = StateSpaceCache(state_BHPN)
        context.sequence_len_offset = 1
    mixer.forward(hidden_LBD, inference_context=context)
    cache: Any = context.key_value_memory_dict[1]
    return cache.state_BHPN


def only_layer(norms: StateNorms) -> dict[str, Any]:
    (layer,) = norms.as_json()
    return layer


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_the_norms_are_those_of_the_states(one_process: None, encoding: str) -> None:
    mixer = build_mixer(state_space_config(position_encoding=encoding, gated=encoding == "conv1d_d"))
    perturb(mixer)
    hidden_LBD = torch.randn(LENGTH, 2, HIDDEN, generator=torch.Generator().manual_seed(3))
    unwatched, _ = mixer(hidden_LBD)
    norms = StateNorms(EVERY)
    norms.after_setup(None, ([torch.nn.Sequential(mixer)], None, None))  # pyright: ignore[reportArgumentType]
    watched, _ = mixer(hidden_LBD)
    assert torch.equal(watched, unwatched)

    layer = only_layer(norms)
    assert layer["layer"] == 1
    prefixes = [final_state(mixer, hidden_LBD[:end]) for end in (4, 8, 12)]
    norms_CBH = torch.stack([state.flatten(2).norm(dim=2) for state in prefixes])
    assert layer["mean"] == pytest.approx(norms_CBH.mean((1, 2)).tolist(), rel=1e-5)
    assert layer["largest"] == pytest.approx(norms_CBH.amax((1, 2)).tolist(), rel=1e-5)


def test_the_share_of_a_state_that_a_piece_leaves(one_process: None) -> None:
    mixer = build_mixer(state_space_config(position_encoding="a_t"))
    hidden_LBD = torch.randn(EVERY, 2, HIDDEN, generator=torch.Generator().manual_seed(3))
    norms = StateNorms(EVERY)
    norms.watch([mixer])
    mixer(hidden_LBD)
    before_BHPN = torch.full((2, 4, 6, 8), 1000.0)
    left_BHPN = final_state(mixer, hidden_LBD, before_BHPN) - final_state(mixer, hidden_LBD, 0 * before_BHPN)
    layer = only_layer(norms)
    assert layer["surviving_share"] == pytest.approx((left_BHPN / before_BHPN).mean().item(), rel=1e-4)
    assert 0.01 < layer["surviving_share"] < 0.99


def test_infinity_is_no_number_of_json(one_process: None) -> None:
    mixer = build_mixer(state_space_config())
    norms = StateNorms(EVERY)
    norms.watch([mixer])
    mixer(torch.full((EVERY, 2, HIDDEN), torch.inf))
    layer = only_layer(norms)
    assert layer["mean"] == layer["largest"] == [None]
    json.dumps(layer, allow_nan=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run without norms, trained for two steps, and its states in samples longer than the training's."""
    made = make_tiny_run(tmp_path_factory.mktemp("states"))
    text = made.recipe.read_text().replace("ablation: null", "ablation: no_norm")
    text = text.replace("train_iters: 2000", "train_iters: 2").replace("save_interval: 2000", "save_interval: 2")
    made.recipe.write_text(text)
    tasks = [(train, {"recipe": made.recipe}), (measure, {"run": made.run, "output": made.folder / "states"})]
    run_tasks(1, tasks, made.folder / "ranks")
    return made


def measure(run: Path, output: Path) -> None:
    recipe = states_recipe(run, output, length=96, samples=3, every=16)
    make_run_directory(recipe)
    with open(os.devnull, "w", encoding="utf-8") as terminal:
        states_as_worker(recipe, terminal, every=16, step=None)


def test_a_checkpoints_states_are_measured(tiny: TinyRun) -> None:
    # Its checkpoint has no norms but the last.
    assert open_checkpoint(tiny.run).recipe.model.ablation == "no_norm"
    found = json.loads((tiny.folder / "states" / "states.json").read_text())
    assert (found["step"], found["samples"], found["positions"]) == (2, 3, [16, 32, 48, 64, 80, 96])
    # Of M-*-.
    (layer,) = found["layers"]
    assert layer["layer"] == 1 and len(layer["mean"]) == len(layer["largest"]) == 6
    assert all(0 < mean <= largest for mean, largest in zip(layer["mean"], layer["largest"], strict=True))


def test_wrong_numbers_and_models_are_refused(tiny: TinyRun) -> None:
    recipe = partial(states_recipe, tiny.run, tiny.folder / "other")
    with pytest.raises(UserError, match="--every 7 does not divide --length 96; use a divisor of it"):
        recipe(length=96, samples=1, every=7)
    with pytest.raises(UserError, match="--samples 0 must be from 1 to"):
        recipe(length=96, samples=0, every=8)
    with pytest.raises(UserError, match="has no state-space layer"):
        recipe(length=96, samples=1, every=8, overrides=["model.layer_pattern=*-*-"])
    isolated = ["data.isolate_documents=true", "parallel.tensor_model_parallel_size=2", "training.seed=5"]
    found = recipe(length=96, samples=1, every=8, overrides=isolated)
    assert not found.data.isolate_documents and found.parallel.tensor_model_parallel_size == 1
    assert (found.training.seq_length, found.global_batch_size, found.training.seed) == (96, 1, 1234)


def test_the_worker_gets_the_same_command(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    worked: list[tuple[Any, Callable[..., Any]]] = []
    monkeypatch.setattr(states, "launch", lambda recipe, nproc, command: commands.append(command) or 3)
    monkeypatch.setattr("megatron_txssm.training.pretrain.run_worker", lambda *work: worked.append(work) or 0)
    words = ["--length", "96", "--samples", "3", "--every", "16", "--step", "2", "--set", "training.seed=5"]
    assert main(["eval", "states", str(tiny.run), *words]) == 3
    monkeypatch.setattr("megatron_txssm.studies.states.is_worker", lambda: True)
    monkeypatch.setattr(states, "is_worker", lambda: True)
    assert main(commands[0]) == 0
    ((recipe, work),) = worked
    assert recipe.run_path == tiny.run / "evaluation" / "states_96" / "run" and recipe.logging.eval_iters == 3
    assert isinstance(work, partial) and work.keywords == {"every": 16, "step": 2}
