"""Arguments of `forward`: the cache under either name, and a check that no keyword argument is silently ignored."""

from typing import Any

# Arguments that transformers, Trainer, TRL, PEFT, accelerate and lm-eval pass to every model.
KNOWN_ARGUMENTS = frozenset(
    {
        # For the loss.
        *("num_items_in_batch", "shift_labels", "ignore_index"),
        # Which outputs to return.
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        # Only affect how an attention kernel computes, not its result.
        *("deterministic", "kernel_options"),
        # transformers' server passes it to generate(), for stop strings.
        "tokenizer",
        # transformers' debugger, which wraps the model.
        *("debug_io", "debug_io_dir", "prune_layers"),
        # Passed by older callers and some tokenizers, without meaning here: a cache counts its tokens itself, and there
        # is one token type.
        *("cache_position", "token_type_ids"),
        # Checked below.
        "is_causal",
    }
)


def check_arguments(kwargs: dict[str, Any]) -> None:
    """TypeError for arguments that would be silently ignored; arguments that are None are accepted."""
    if strangers := sorted(name for name in kwargs.keys() - KNOWN_ARGUMENTS if kwargs[name] is not None):
        names = ", ".join(strangers)
        raise TypeError(f"TransXSSM does not know the argument {names}, which would have no effect; leave it out")
    if kwargs.get("is_causal") is False:
        raise TypeError("is_causal=False: a state-space layer only reads from left to right; leave the argument out")


def the_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, under either of transformers' two names for it; TypeError for another kind of cache.

    Recognised by an attribute, not by class: a model loaded with its own code has its own cache class.
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
