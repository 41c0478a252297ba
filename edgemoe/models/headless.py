"""Language models of which transformers has the decoder alone.

Of some models that also see, transformers has the whole and the decoder of its language part
(`HYV4VLTextModel`), and no class for that part with its head. Here it gets one, built as the
language models are that transformers has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

if TYPE_CHECKING:
    from types import ModuleType

# By the decoder's model_type: the class of the decoder, and the type in which the whole model
# keeps its head (None: the model's own). Each was compared with the whole on text.
_DECODERS: dict[str, tuple[str, torch.dtype | None]] = {
    "hy_v4_vl_text": ("HYV4VLTextModel", torch.float32),
}


def with_head(model_type: str, module: ModuleType) -> type[Any] | None:
    """Make a language model of a decoder.

    Args:
        model_type: The decoder's, as in config.json.
        module: The module of transformers that has it.

    Returns:
        The class, the same each time; None where that decoder was not tried.
    """
    if model_type not in _MADE and model_type in _DECODERS:
        name, dtype = _DECODERS[model_type]
        decoder = getattr(module, name, None)
        if decoder is not None:
            _MADE[model_type] = _make(decoder, dtype)
    return _MADE.get(model_type)


_MADE: dict[str, type[Any]] = {}


def _make(decoder: type[Any], dtype: torch.dtype | None) -> type[Any]:
    base: Any = decoder.__mro__[1]

    class TextForCausalLM(base, GenerationMixin):  # type: ignore[misc]
        """A decoder and what turns its hidden states into logits."""

        config_class = decoder.config_class
        base_model_prefix = "model"
        input_modalities = ("text",)
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
        _keep_in_fp32_modules_strict = ["lm_head"] if dtype == torch.float32 else None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.vocab_size = config.vocab_size
            width = config.hidden_size
            self.lm_head = nn.Linear(width, config.vocab_size, bias=False, dtype=dtype)
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            logits_to_keep: int = 0,
            **options: Any,
        ) -> MoeCausalLMOutputWithPast:
            """Compute logits.

            Args:
                input_ids: int64 `[rows, tokens]`.
                attention_mask: As the decoder takes it.
                position_ids: int64 `[rows, tokens]`.
                logits_to_keep: Last positions that logits are wanted of; 0 for all.
                **options: What else the decoder takes, such as a cache.

            Returns:
                Logits `[rows, positions, vocabulary]` and what the decoder keeps.
            """
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **options,
            )
            hidden = outputs.last_hidden_state[:, -logits_to_keep:]
            kept = {
                name: value for name, value in outputs.items() if name != "last_hidden_state"
            }
            logits = self.lm_head(hidden.to(self.lm_head.weight.dtype))
            return MoeCausalLMOutputWithPast(logits=logits, **kept)

    TextForCausalLM.__name__ = decoder.__name__.removesuffix("Model") + "ForCausalLM"
    TextForCausalLM.__qualname__ = TextForCausalLM.__name__
    TextForCausalLM.__module__ = decoder.__module__
    return TextForCausalLM
