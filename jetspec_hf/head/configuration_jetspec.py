"""Configuration of a JetSpec draft head."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config

from .loading import split_subfolder
from .published import MODEL_TYPE, default_target_layer_ids, from_published

_MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")


@strict
class JetSpecConfig(Qwen3Config):
    r"""Configuration of a [`JetSpecDraftHead`].

    The fields of [`~transformers.Qwen3Config`] describe the head's own layers; `vocab_size` and `hidden_size` are the
    target's, whose embedding and LM head it borrows.

    Args:
        block_size (`int`, *optional*, defaults to 16):
            Positions in one draft pass: the anchor, then `block_size - 1` mask tokens that each predict one token.
        mask_token_id (`int`):
            Token whose embedding fills the positions to predict; one that never occurs in text.
        num_target_layers (`int`):
            Decoder layers of the target.
        target_layer_ids (`list[int]`, *optional*):
            Decoder layers, counted from 0, after which the target's hidden states are tapped. By default evenly spaced,
            one for each layer of the head: see [`~jetspec_hf.head.published.default_target_layer_ids`].
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether a block position sees only itself and earlier ones (JetSpec) or the whole block (DFlash).
        markov_rank (`int`, *optional*, defaults to 0):
            Rank of the [`~jetspec_hf.head.markov.JetSpecMarkovHead`] that conditions a token on its own path; 0 for
            none, as in the paper.
        markov_head_type (`str`, *optional*, defaults to `"gated"`):
            What of the path it sees: `"vanilla"`, `"gated"` or `"rnn"`.
        tie_markov_head (`bool`, *optional*, defaults to `True`):
            Whether its tables are linear in the target's embedding and LM head, or its own.
        markov_candidates (`int`, *optional*, defaults to 64):
            Tokens of each depth, the likeliest without it, that it scores below every node.
        draft_temperatures (`list[float]`, *optional*):
            For each depth, what the head's logits are divided by to tell how likely the target is to agree, when it
            decodes greedily or at a lower temperature; see [`~jetspec_hf.training.trainer.JetSpecTrainer.calibrate`].
        num_assistant_tokens (`int`, *optional*):
            Most nodes to draft per round, the root not counted, where `generate` is not told. By default each round
            drafts as many as are fastest, down to none: see [`~jetspec_hf.drafting.node_count.NodeCount`].
        assistant_confidence_threshold (`float`, *optional*, defaults to 0.0):
            Least cumulative probability of a drafted node, where `generate` is not told.
        prompt_lookup_num_tokens (`int`, *optional*, defaults to 16):
            Longest graft, in tokens, from what followed the same words earlier in the text, where `generate` is not
            told; 0 for none.

    Raises:
        ValueError: if a field is missing or outside its range; both the value and the range are named.
    """

    model_type = MODEL_TYPE

    block_size: int = 16
    mask_token_id: int | None = None
    num_target_layers: int | None = None
    target_layer_ids: list[int] | None = None
    is_causal: bool = True
    markov_rank: int = 0
    markov_head_type: str = "gated"
    tie_markov_head: bool = True
    markov_candidates: int = 64
    draft_temperatures: list[float] | None = None
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float = 0.0
    prompt_lookup_num_tokens: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mask_token_id is None or self.num_target_layers is None:
            return  # transformers builds empty configurations to compare with; the head refuses one
        if self.target_layer_ids is None:
            self.target_layer_ids = default_target_layer_ids(self.num_target_layers, self.num_hidden_layers)
        if self.block_size < 2:
            raise ValueError(f"`block_size` counts the anchor, so it must be at least 2; got {self.block_size}.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` is {self.mask_token_id}, outside the vocabulary of {self.vocab_size}; "
                "use an id that has a row in the target's embedding."
            )
        if not self.target_layer_ids or not all(0 <= i < self.num_target_layers for i in self.target_layer_ids):
            raise ValueError(
                f"`target_layer_ids` is {self.target_layer_ids} for a target of {self.num_target_layers} layers; "
                "name at least one layer, counted from 0."
            )
        num_nodes = self.num_assistant_tokens
        if (num_nodes is not None and num_nodes < 1) or not 0 <= self.assistant_confidence_threshold <= 1:
            raise ValueError(
                "`num_assistant_tokens` must be at least 1 and `assistant_confidence_threshold` from 0 to 1; "
                f"got {num_nodes} and {self.assistant_confidence_threshold}."
            )

        if self.markov_rank < 0 or self.markov_candidates < 1 or self.markov_head_type not in _MARKOV_HEAD_TYPES:
            raise ValueError(
                f"`markov_rank` must not be negative, `markov_candidates` at least 1 and `markov_head_type` one of "
                f"{', '.join(_MARKOV_HEAD_TYPES)}; got {self.markov_rank}, {self.markov_candidates} and "
                f"{self.markov_head_type!r}."
            )

        if self.prompt_lookup_num_tokens < 0:
            raise ValueError(f"`prompt_lookup_num_tokens` must not be negative; got {self.prompt_lookup_num_tokens}.")
        temperatures = self.draft_temperatures
        if temperatures is not None and (len(temperatures) != self.block_size - 1 or min(temperatures) <= 0):
            raise ValueError(
                f"`draft_temperatures` needs {self.block_size - 1} positive numbers, one for each depth of a block of "
                f"{self.block_size}; got {temperatures}."
            )

    @classmethod
    def for_target(
        cls,
        target_config: PreTrainedConfig,
        *,
        mask_token_id: int,
        num_hidden_layers: int = 5,
        block_size: int = 16,
        **options: Any,
    ) -> "JetSpecConfig":
        """A configuration that fits a target.

        Args:
            target_config (`PreTrainedConfig`): the target's configuration.
            mask_token_id (`int`): a token that never occurs in text, with a row in the target's embedding.
            num_hidden_layers (`int`): layers of the head.
            block_size (`int`): positions in one draft pass, the anchor counted.
            options: any other field, such as `intermediate_size` or `is_causal`.

        Raises:
            ValueError: if the target has no attention heads, or a field is outside its range.
        """
        text = target_config.get_text_config()
        # Where layers differ, the first stands for all; it has its sizes in a configuration of its own.
        layer = text.per_layer_config[0]

        def size(name: str) -> Any:
            value = _optional(layer, name)
            return value[0] if isinstance(value, list) else value

        heads = size("num_attention_heads")
        if heads is None:
            raise ValueError(
                f"{type(text).__name__} names no `num_attention_heads`; a draft head needs a target with attention."
            )
        fields = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": size("intermediate_size") or 4 * text.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": size("num_key_value_heads") or heads,
            "head_dim": size("head_dim") or text.hidden_size // heads,
            "rms_norm_eps": size("rms_norm_eps"),
            "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(text)},
            "max_position_embeddings": size("max_position_embeddings"),
            "bos_token_id": _optional(text, "bos_token_id"),
            "eos_token_id": _optional(text, "eos_token_id"),
            "pad_token_id": _optional(text, "pad_token_id"),
            "num_target_layers": text.num_hidden_layers,
        }
        known = {name: value for name, value in fields.items() if value is not None}
        return cls(
            **(known | options),
            num_hidden_layers=num_hidden_layers,
            block_size=block_size,
            mask_token_id=mask_token_id,
        )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers, and also reads `repo::subfolder` and the published formats.

        Raises:
            FileNotFoundError: if there is no such folder, or no config.json in it.
        """
        repo, kwargs = split_subfolder(pretrained_model_name_or_path, kwargs)
        where = f"{repo}::{kwargs['subfolder']}" if kwargs.get("subfolder") else str(repo)
        config_dict, kwargs = super().get_config_dict(repo, **kwargs)
        if not config_dict:
            raise FileNotFoundError(f"{where!r} has no config.json, so it holds no head.")
        return from_published(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "JetSpecConfig":
        """As in transformers, and also reads the published formats."""
        return super().from_dict(from_published(config_dict), **kwargs)


def _optional(config: PreTrainedConfig, name: str) -> Any:
    """A field of a target's configuration that some families lack."""
    return getattr(config, name, None)


def _rope_theta(text: PreTrainedConfig) -> float:
    """The base of a target's rotary embedding; some have one for each layer type, some none."""
    rope = _optional(text, "rope_parameters") or {}
    entries = [rope, rope.get("full_attention"), rope.get("sliding_attention")]
    return next((entry["rope_theta"] for entry in entries if entry and "rope_theta" in entry), 10000.0)
