"""Code files beside exported weights run with transformers alone: no megatron_txssm, Megatron or mamba-ssm."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_imports

from megatron_txssm.hf.standalone import AUTO_MAP, code_files
from tests.hf.tiny import VARIANTS, generate, padded_left, tiny_model

SCRIPT = """
import sys
from pathlib import Path


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "megatron_txssm", "mamba_ssm"):
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
work = Path(sys.argv[1])
given = torch.load(work / "given.pt")
for name in sys.argv[2:]:
    folder, again = work / name, work / f"{name} again"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(model.config) is type(config)
    model.save_pretrained(again)
    loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    base = AutoModel.from_pretrained(again, trust_remote_code=True)
    results = {}
    with torch.no_grad():
        for who, of in (("first", model), ("again", loaded)):
            results[who, "logits"] = of(**given).logits
            results[who, "tokens"] = of.generate(**given, max_new_tokens=12, do_sample=False)
        results["base", "logits"] = model.lm_head(base(**given).last_hidden_state)
    torch.save(results, work / f"{name}.pt")
loaded_ours = [name for name in sys.modules if name.partition(".")[0] in ("megatron", "megatron_txssm", "mamba_ssm")]
assert not loaded_ours, loaded_ours
"""


def test_another_process_without_our_packages_computes_the_same_bits(tmp_path: Path) -> None:
    """From our folder, from the folder that it then saves, and for the model without a head; all variants."""
    ids, mask = padded_left()
    torch.save({"input_ids": ids, "attention_mask": mask}, tmp_path / "given.pt")
    for variant in VARIANTS:
        folder = tmp_path / variant
        tiny_model(variant).save_pretrained(folder)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *VARIANTS],
        env=os.environ | home,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for variant in VARIANTS:
        model, results = tiny_model(variant), torch.load(tmp_path / f"{variant}.pt")
        logits = model(ids, attention_mask=mask).logits
        tokens = generate(model, ids, mask, max_new_tokens=12)
        for who in ("first", "again", "base"):
            assert torch.equal(results[who, "logits"], logits), (variant, who)
        for who in ("first", "again"):
            assert torch.equal(results[who, "tokens"], tokens), (variant, who)


def test_the_hub_asks_for_no_package_that_is_optional(tmp_path: Path) -> None:
    """transformers rejects files from the Hub with missing imports, unless these are inside a try block."""
    for name, text in code_files().items():
        (tmp_path / name).write_text(text)
        assert not {"mamba_ssm", "triton"} & set(get_imports(tmp_path / name)), name


def test_the_files_import_nothing_of_ours() -> None:
    files = code_files()
    assert {f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()} <= set(files)
    for name, text in files.items():
        compile(text, name, "exec")
        assert "import megatron" not in text and "from megatron" not in text, name
