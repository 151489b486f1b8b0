"""The folder of recipes/ and slurm/: beside the package in a checkout, in its folder resources/ if installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# Exists only in a wheel; setup.py creates it.
_RESOURCES = PACKAGE / "resources"

# The folder with recipes/ and slurm/, which is on a job's PYTHONPATH. In a checkout, and in a run's frozen copy of the
# code, it also contains the package. In an installation it contains no code, and the job imports the installed package.
HOME = _RESOURCES if _RESOURCES.is_dir() else PACKAGE.parent
RECIPES = HOME / "recipes"
BATCH_SCRIPTS = HOME / "slurm"
