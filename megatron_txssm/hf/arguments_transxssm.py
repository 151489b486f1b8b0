"""What callers give to `forward`: a cache by either name, and keyword arguments, of which none is lost unseen."""

from typing import Any

# What transformers, Trainer, TRL, PEFT, accelerate and lm-eval give to every model.
KNOWN_ARGUMENTS = frozenset(
    {
        # The loss's.
        *("num_items_in_batch", "shift_labels", "ignore_index"),
        # What to return; there is no router.
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        # How a kernel of attention computes, not what.
        *("deterministic", "kernel_options"),
        # Its server gives it to generate(), for strings that end a text.
        "tokenizer",
        # transformers' debugger, which sits around the model.
        *("debug_io", "debug_io_dir", "prune_layers"),
        # Without meaning here: a cache counts its tokens itself, and there is one type of token. Older callers and some
        # tokenizers give them.
        *("cache_position", "token_type_ids"),
        # Checked below.
        "is_causal",
    }
)


def check_arguments(kwargs: dict[str, Any]) -> None:
    """TypeError for what would change the function and is not obeyed; None says nothing and passes."""
    if strangers := sorted(name for name in kwargs.keys() - KNOWN_ARGUMENTS if kwargs[name] is not None):
        names = ", ".join(strangers)
        raise TypeError(f"TransXSSM does not know the argument {names}, which would have no effect; leave it out")
    if kwargs.get("is_causal") is False:
        raise TypeError("is_causal=False: a state-space layer reads from left to right alone; leave the argument out")


def the_cache(cache: Any, past_key_values: Any) -> Any:
    """The one cache among the two names that versions of transformers have for it; TypeError for another class's.

    By what ours has and no other, not by its class: a model that was loaded with its own code has its own class.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names for one cache; give one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not hasattr(given, "seen_tokens"):
        raise TypeError(
            f"the cache is a {type(given).__name__}, which cannot hold the states of state-space layers; "
            "use TransXSSMCache(model.config), or leave it to generate()"
        )
    return given
