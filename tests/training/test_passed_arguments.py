"""Arguments that a recipe passes on to Megatron train a model as they say, together, in one short run."""

import json

import pytest

from megatron_txssm.recipe.megatron_arguments.section import passing
from tests.support.tiny_run import TinyRun

# One process; what is left out here needs a GPU, another layout, or ends the run.
PASSED = {
    "mock_data": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 5000,
    "align_grad_reduce": False,
    "check_for_large_grads": True,
    "check_for_nan_in_loss_and_grad": False,
    "recompute_modules": ["core_attn", "mlp"],
    "mlp_chunks_for_training": 2,
    "bias_swiglu_fusion": False,
    "cross_entropy_loss_fusion": True,
    "disable_jit_fuser": True,
    "lr_warmup_init": 1e-5,
    "start_weight_decay": 0.01,
    "end_weight_decay": 0.02,
    "weight_decay_incr_style": "cosine",
    "eval_micro_batch_size": 1,
    "num_workers": 1,
    "num_dataset_builder_threads": 2,
    "manual_gc": True,
    "manual_gc_interval": 2,
    "train_sync_interval": 1,
    "log_params_norm": True,
    "log_num_zeros_in_grad": True,
    "log_throughput": True,
    "log_progress": True,
    "timing_log_level": 2,
    "dist_ckpt_strictness": "raise_all",
    "ckpt_assume_constant_structure": True,
}
SCHEDULE = {
    "optimizer.decay_style": "WSD",
    "optimizer.wsd_decay_fraction": 0.4,
    "optimizer.wsd_decay_shape": "linear",
    "optimizer.warmup_fraction": 0.2,
    "optimizer.min_learning_rate_ratio": 0.0,
}


@pytest.mark.slow
def test_a_run_with_many_of_them_and_mock_data(tiny: TinyRun) -> None:
    assert set(PASSED) <= set(passing())
    fields = {
        **SCHEDULE,
        **{f"megatron.{name}": value for name, value in PASSED.items()},
        "parallel.use_distributed_optimizer": True,
        "parallel.recompute": "selective",
        "training.train_iters": 10,
        "checkpoint.save_interval": 10,
        "data.tokenizer_type": None,
        "data.skip_steps": [2],
    }
    done = tiny.pretrain(fields=[f"{name}={json.dumps(value)}" for name, value in fields.items()])
    assert done.code == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    rates = {step["iteration"]: step["learning_rate"] for step in steps if "learning_rate" in step}
    # Two steps of warm-up, four at the peak, four down to nothing; the one that is skipped delays none.
    expected = {1: 1e-5, 2: (1e-5 + 1e-3) / 2} | dict.fromkeys(range(3, 8), 1e-3) | {8: 0.75e-3, 9: 0.5e-3, 10: 0.25e-3}
    assert rates == pytest.approx(expected)
    assert (tiny.checkpoints / "iter_0000010" / ".metadata").is_file()
