"""Checks of muP: what it does not go with."""

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe


def check_mup(recipe: Recipe) -> None:
    """UserError if the model has muP with an optimizer whose updates need no learning rate per width."""
    base = recipe.model.mup_base_hidden_size
    if base is not None and recipe.optimizer.name == "muon":
        raise UserError(
            f"model.mup_base_hidden_size={base} scales AdamW's learning rates, and optimizer.name=muon has updates of "
            "another size; set model.mup_base_hidden_size=null, or optimizer.name=adam"
        )
