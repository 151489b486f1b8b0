"""Builds what pyproject.toml describes; a wheel gets recipes/ and slurm/ as the package's folder resources/."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "megatron_txssm"
# Not slurm/env.sh: it is the site's own and may hold secrets.
RESOURCES = ("recipes/**/*.yaml", "slurm/*.sbatch", "slurm/entrypoint.sh", "slurm/env.example.sh")


class BuildPy(build_py):
    def run(self) -> None:
        if self.editable_mode:
            return
        built = Path(self.build_lib, PACKAGE)
        if built.resolve() != Path(PACKAGE).resolve():
            # An earlier build may have left modules that have been moved since.
            shutil.rmtree(built, ignore_errors=True)
        super().run()
        for target, source in self._resources().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """For the sdist."""
        return [*super().get_source_files(), *self._resources().values()]

    def get_output_mapping(self) -> dict[str, str]:
        """For a strict editable installation."""
        return super().get_output_mapping() | self._resources()

    def _resources(self) -> dict[str, str]:
        """Path in the build -> path in the checkout, which is the current folder."""
        paths = sorted(path for pattern in RESOURCES for path in Path().glob(pattern))
        return {os.path.join(self.build_lib, PACKAGE, "resources", path): str(path) for path in paths}


setup(cmdclass={"build_py": BuildPy})
