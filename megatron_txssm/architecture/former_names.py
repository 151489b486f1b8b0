"""Parameter names of earlier checkpoints, in which a mixer and the FFN behind it were one layer of Megatron's GPTModel.

Initial weights are still drawn by these names, so that a seed gives the model that it always gave.
"""

import re

from megatron_txssm.architecture.layer_pattern import EXPERTS, FFN

_FINAL_NORM = ("decoder.final_norm.", "decoder.final_layernorm.")


def former_name(name: str, layers: str) -> str:
    """The earlier name of a parameter of a model with these layers (one symbol each).

    Mixers are numbered among mixers, FFNs and experts among these, so names stay distinct where layers are not pairs
    of both. `name` may have a prefix, such as an optimizer's.
    """
    if (found := re.search(r"\bdecoder\.layers\.(\d+)\.", name)) is None:
        return name.replace(*_FINAL_NORM)
    layer = int(found[1])
    is_ffn = layers[layer] in (FFN, EXPERTS)
    before = sum((other in (FFN, EXPERTS)) == is_ffn for other in layers[:layer])
    rest = name[found.end() :]
    if rest.startswith("mixer."):
        rest = "self_attention." + rest.removeprefix("mixer.")
    return f"{name[: found.start()]}decoder.layers.{before}.{rest}"
