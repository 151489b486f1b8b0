"""The supervisor's settings: written by `txssm submit` into the batch script, read by the supervisor."""

from dataclasses import dataclass

from megatron_txssm.jobs.limits import DEFAULTS, Limits


@dataclass(frozen=True)
class Settings:
    """The supervisor's command line."""

    # A file; if started by hand, also a recipe's name.
    recipe: str
    # Values of --set.
    overrides: tuple[str, ...] = ()
    # Number of nodes to train on; the job's others are spare. 0: all.
    nodes: int = 0
    limits: Limits = DEFAULTS

    @property
    def words(self) -> list[str]:
        words = [self.recipe, *(word for text in self.overrides for word in ("--set", text)), *self.limits.words]
        return [*words, f"--nodes={self.nodes}"] if self.nodes else words
