"""Sampling settings."""

from dataclasses import dataclass

from megatron_txssm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    # 0: always the likeliest token.
    temperature: float = 0.8
    # Choose from the k likeliest tokens; 0: all.
    top_k: int = 50
    # Choose from the likeliest tokens that together have this probability; 1: all.
    top_p: float = 1.0
    # For tokens in the text: divides positive logits, multiplies negative ones (arXiv:1909.05858).
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0), ("top_k", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"--repetition-penalty {self.repetition_penalty} must be above 0; 1 changes nothing")
