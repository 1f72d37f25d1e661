"""The JetSpec draft head: a few Qwen3 layers whose context is the target's own hidden states."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from .configuration_jetspec import JetSpecConfig
from .loading import load_published, split_subfolder
from .markov import JetSpecMarkovHead
from .masking import as_bias, block_mask

_LOUDNESS = 10  # of what new layers add to the hidden states, in terms of other weights


class JetSpecAttention(Qwen3Attention):
    """Attention whose queries come from the block and whose keys and values come from context and block."""

    def __init__(self, config: JetSpecConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False  # the mask says all

    def forward(
        self,
        hidden_states: Tensor,
        context_hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        head_cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the block, `(batch, block, hidden)`, to cached context, new context and block."""
        batch, block_size = hidden_states.shape[:2]
        sources = torch.cat([context_hidden_states, hidden_states], dim=1)
        heads = (batch, -1, self.head_dim)
        # (batch, heads, block or new context + block, head_dim)
        queries = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads[1:])).transpose(1, 2)
        keys = self.k_norm(self.k_proj(sources).unflatten(-1, heads[1:])).transpose(1, 2)
        values = self.v_proj(sources).unflatten(-1, heads[1:]).transpose(1, 2)

        cos, sin = (part[:, None] for part in position_embeddings)
        keys = keys * cos + rotate_half(keys) * sin
        cos, sin = cos[..., -block_size:, :], sin[..., -block_size:, :]
        queries = queries * cos + rotate_half(queries) * sin
        if head_cache is not None:
            keys, values = head_cache.update(keys, values, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, block_size, -1)), weights


class JetSpecDecoderLayer(Qwen3DecoderLayer):
    """A Qwen3 layer with [`JetSpecAttention`]."""

    def __init__(self, config: JetSpecConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = JetSpecAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, context_hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As in Qwen3; the context goes by position, since reentrant checkpointing sees no other gradients."""
        return super().forward(hidden_states, context_hidden_states=context_hidden_states, **kwargs)


class JetSpecDraftHead(PreTrainedModel):
    """Drafts a block of tokens in one pass from the target's hidden states (paper, section 3).

    The module is that of the published heads (JetSpec, and with `is_causal=False` DFlash), under the same names, unless
    `markov_rank` adds a [`~jetspec_hf.head.markov.JetSpecMarkovHead`]. It has no embedding and no LM head: both are the
    target's. Pass it to the target's `generate` as `assistant_model`.
    """

    config: JetSpecConfig
    config_class = JetSpecConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JetSpecDecoderLayer"]  # noqa: RUF012, transformers reads a plain class attribute
    _skip_keys_device_placement = ["cache", "past_key_values", "head_cache"]  # noqa: RUF012, as above
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # What `generate` recognises this head by; wrappers such as `PeftModel` pass it on.
    drafts_trees = True

    def __init__(self, config: JetSpecConfig) -> None:
        if config.mask_token_id is None or config.target_layer_ids is None:
            raise ValueError(
                "The configuration names no `mask_token_id` or no `num_target_layers`; "
                "make one with `JetSpecConfig.for_target(target.config, mask_token_id=...)`."
            )
        super().__init__(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(JetSpecDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.markov_head = JetSpecMarkovHead(config) if config.markov_rank > 0 else None
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if any(one is module and name.endswith(("o_proj", "down_proj")) for name, one in self.named_modules()):
            # What is to be predicted enters as the mask's embedding, which a tied LM head takes for the mask itself;
            # so layers start loud enough to drown it.
            init.normal_(module.weight, std=_LOUDNESS * self.config.initializer_range)
        if self.markov_head is not None:
            self.markov_head.initialize(module)

    def add_markov_head(self, rank: int = 64, kind: str = "gated", *, is_tied: bool = True) -> None:
        """Give a head that has none a new [`~jetspec_hf.head.markov.JetSpecMarkovHead`].

        It changes nothing until it is trained, which is cheap if only its weights are: freeze the others with
        `head.requires_grad_(False)` and `head.markov_head.requires_grad_(True)`.

        Args:
            rank (`int`, *optional*, defaults to 64): `markov_rank` of the configuration.
            kind (`str`, *optional*, defaults to `"gated"`): `markov_head_type` of the configuration.
            is_tied (`bool`, *optional*, defaults to `True`): `tie_markov_head` of the configuration.

        Raises:
            ValueError: if the head has one, or rank or kind do not exist.
        """
        if self.markov_head is not None:
            raise ValueError("This head has a Markov head already; train that one.")
        options = {"markov_rank": rank, "markov_head_type": kind, "tie_markov_head": is_tied}
        self.config = JetSpecConfig.from_dict(self.config.to_dict() | options)
        self.markov_head = JetSpecMarkovHead(self.config).to(self.device, self.dtype)
        self.markov_head.apply(self.markov_head.initialize)

    def get_input_embeddings(self) -> None:
        """None: the target's are borrowed. Sharding asks for them."""
        return None

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | BlockMask] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """One draft pass. The signature is that of transformers' own DFlash drafters.

        Args:
            noise_embeds (`torch.FloatTensor` of shape `(batch, block, hidden)`):
                The target's embeddings of the anchor, then of mask tokens.
            context_hidden_states (`torch.FloatTensor` of shape `(batch, new context, taps * hidden)`):
                The target's hidden states after `target_layer_ids`, concatenated, of committed tokens that
                the cache does not hold yet.
            position_ids (`torch.LongTensor` of shape `(batch, new context + block)`, *optional*):
                Positions in the target's text; by default counted on from the cache.
            attention_mask (`torch.Tensor` or `dict[str, torch.Tensor]`, *optional*):
                Of shape `(batch, all context + block)`, nonzero where not padding; or a ready mask of shape
                `(batch, 1, block, all context + block)`, true or 0 where a query may attend, for all layers or one for
                each of the `layer_types` in use. With `flex_attention`: a `BlockMask` for each of them, nothing else.
            cache (`Cache`, *optional*):
                The head's own cache. On return it also holds the new context and the block; crop the block.
            past_key_values (`Cache`, *optional*): the same, as transformers before 5.24 call it.
            **kwargs: go on to the attention function.

        Raises:
            ValueError: if the head has `flex_attention`, and a mask is no `BlockMask`.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(batch, block, hidden)`. Position `k` of the block
            goes through the target's LM head to predict the token **at** position `k`; the anchor's is unused.
        """
        cache = past_key_values if cache is None else cache
        context = self.hidden_norm(self.fc(context_hidden_states))
        num_new, block_size = context.shape[1], noise_embeds.shape[1]
        num_past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            positions = torch.arange(num_past, num_past + num_new + block_size, device=noise_embeds.device)
            position_ids = positions[None]
        position_embeddings = self.rotary_emb(noise_embeds, position_ids)
        masks = self._masks(num_past + num_new, noise_embeds, attention_mask, cache)

        hidden_states = noise_embeds
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                context,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                head_cache=cache,  # whose own name for it differs from version to version
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _masks(
        self,
        num_context: int,
        noise_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor | BlockMask] | None,
        cache: Cache | None,
    ) -> dict[str, Tensor | BlockMask | None]:
        """One mask for each layer type in use."""
        ready = attention_mask.values() if isinstance(attention_mask, dict) else [attention_mask]
        if self.config._attn_implementation == "flex_attention" and not all(isinstance(m, BlockMask) for m in ready):
            raise ValueError(
                "A head with 'flex_attention' takes a `BlockMask` for each layer type, as in training, and got other "
                "masks; to decode, call `head.set_attn_implementation('sdpa')`."
            )
        masks: dict[str, Tensor | BlockMask | None]
        if isinstance(attention_mask, dict):
            masks = dict(attention_mask)
        elif attention_mask is not None and attention_mask.ndim == 4:
            masks = dict.fromkeys(self.config.layer_types, attention_mask)
        else:
            block_size, device = noise_embeds.shape[1], noise_embeds.device
            masks = {
                layer_type: self._block_mask(layer_type, num_context, block_size, attention_mask, cache, device)
                for layer_type in set(self.config.layer_types)
            }
        if self.config._attn_implementation != "eager":
            return masks
        return {
            layer_type: as_bias(mask, noise_embeds.dtype)
            if isinstance(mask, Tensor) and mask.dtype == torch.bool
            else mask
            for layer_type, mask in masks.items()
        }

    def _block_mask(
        self,
        layer_type: str,
        num_context: int,
        block_size: int,
        padding_mask: Tensor | None,
        cache: Cache | None,
        device: torch.device,
    ) -> Tensor | None:
        """The mask of the layers of a type, behind what their cache still holds."""
        is_sliding, first_key = layer_type == "sliding_attention", 0
        if is_sliding and cache is not None and cache.layers:
            # A sliding cache holds `window - 1` positions before the newest.
            cached = cache.layers[self.config.layer_types.index(layer_type)]
            _, first_key = cached.get_mask_sizes(block_size)
        return block_mask(
            num_context,
            block_size,
            is_causal=self.config.is_causal,
            first_key=first_key,
            window=self.config.sliding_window if is_sliding else None,
            padding_mask=padding_mask,
            device=device,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a head in our own or a published JetSpec or DFlash format, without a conversion step.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A local folder or a Hub id, such as `hao-ai-lab/jetspec-qwen3-8b`; `repo::subfolder` works too. Where
                the Hub does not know an id of `hao-ai-lab` or `JetSpec`, that of the other is tried.
            model_args: as in [`~transformers.PreTrainedModel.from_pretrained`].
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if a weight is missing, or one has no place in the head.
            OSError: if there is no such folder and no such id, or a file is not what its name says.
        """
        repo, kwargs = split_subfolder(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        head, info = load_published(
            lambda name: load(name, *model_args, output_loading_info=True, **kwargs), repo, kwargs.get("subfolder", "")
        )
        wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if wrong:
            listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in wrong.items())
            raise ValueError(
                f"{pretrained_model_name_or_path!r} does not hold the weights of this head ({listed}). "
                "Check that config.json and the weights belong together."
            )
        return (head, info) if wants_info else head


def register() -> None:
    """Let `AutoModel` find these classes: for the package alone, since a head that carries them is none of ours."""
    AutoConfig.register(JetSpecConfig.model_type, JetSpecConfig, exist_ok=True)
    AutoModel.register(JetSpecConfig, JetSpecDraftHead, exist_ok=True)
