"""Where recipes/ and slurm/ are: beside the package in a checkout, in its folder resources/ where it was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# Only a wheel has this folder; setup.py puts it there.
_RESOURCES = PACKAGE / "resources"

# The folder with recipes/ and slurm/. A job has it on its PYTHONPATH: in a checkout, and in a run's frozen copy of the
# code, it also holds the package; in an installation it holds no code, and the job imports the installed package.
HOME = _RESOURCES if _RESOURCES.is_dir() else PACKAGE.parent
RECIPES = HOME / "recipes"
BATCH_SCRIPTS = HOME / "slurm"
