"""What names of tensors tell of the parts beside a checkpoint's language model. No torch."""

from __future__ import annotations

import re

SEEING = "parts that see"
HEARING = "parts that hear or speak"
PREDICTING = "layers that predict further tokens"
COMPUTED = "tables that are computed anew"
UNKNOWN = "tensors that the language model does not use"

_WORDS = (
    (re.compile(r"(^|\.)(mtp|nextn)"), PREDICTING),
    (
        re.compile(
            r"(^|[._])(visual|vision|vit|images?|video|patch|pixel|mm_projector|multi_?modal|"
            r"merger|perceiver?|siglip|clip|mlp1)"
        ),
        SEEING,
    ),
    (
        re.compile(r"(^|[._])(audio|sound|speech|perception|talker|code2wav|token2wav|ctc)"),
        HEARING,
    ),
    (re.compile(r"inv_freq$"), COMPUTED),
)
# Of the layers after the last, in families that keep them in the decoder's list.
PREDICTING_LAYER = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp\w*)\.")
# How producers name what goes with quantised weights: scales, zero points, orders, packed
# blocks. Sources: compressed-tensors, ModelOpt, AutoGPTQ, AutoAWQ, bitsandbytes, gpt-oss, MLX.
QUANTISED = re.compile(
    r"scale|zero|g_idx|qweight|packed|absmax|quant_(state|map)|_blocks$|weight_shape|amax$"
    r"|\.biases$|SCB$"
)


def kind_by_name(name: str) -> str | None:
    """Tell which part of a checkpoint a tensor belongs to.

    Args:
        name: Its name in the checkpoint.

    Returns:
        The part in a user's words; None where its name does not tell, as those of a language
        model.
    """
    return next((kind for words, kind in _WORDS if words.search(name)), None)
