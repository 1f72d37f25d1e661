"""Tiny targets of all families, and how their texts are compared."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    set_seed,
)

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46]])


NUM_PADS = 3


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}


VISION = {
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1000),
}


UNTIED = {"tie_word_embeddings": False}  # tied and random, a Gemma repeats its last token for ever


BY_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4}


GEMMA4 = {"sliding_window": 8, "layer_types": MIXED, "global_head_dim": 16, "num_global_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """How to build a tiny target."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("sdpa", "eager")
    wrapper: dict[str, Any] | None = None  # what else the configuration has around that of the text

    def build(self, attention: str) -> PreTrainedModel:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        set_seed(0)
        text = fields | self.options
        text = text if self.wrapper is None else {"text_config": text} | self.wrapper
        config = self.config_class(**text, attn_implementation=attention)
        model = self.model_class(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layernorm" not in name and "norm" not in name and weight.std() == 0:
                    weight.normal_(std=0.4)  # some families start biases, sinks or experts at a constant
        return model


FAMILIES = {
    "qwen2": Family(Qwen2ForCausalLM, Qwen2Config),
    "qwen2_sliding": Family(
        Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    ),
    "qwen3_mixed": Family(
        Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}
    ),
    "qwen3_sliding": Family(
        Qwen3ForCausalLM,
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 4},
    ),
    "qwen3_moe": Family(Qwen3MoeForCausalLM, Qwen3MoeConfig, MOE),
    "qwen3_moe_sliding": Family(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, MOE | {"use_sliding_window": True, "sliding_window": 8}
    ),
    "llama": Family(LlamaForCausalLM, LlamaConfig),
    "mistral": Family(MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "mistral_full": Family(MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma2": Family(
        Gemma2ForCausalLM,
        Gemma2Config,
        UNTIED | {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 12.0},
        ("eager",),
    ),
    "gemma3": Family(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        UNTIED | {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": MIXED},
    ),
    "gemma4": Family(Gemma4ForCausalLM, Gemma4TextConfig, UNTIED | GEMMA4 | BY_LAYER),
    "gemma4_sharing": Family(
        Gemma4ForCausalLM, Gemma4TextConfig, UNTIED | GEMMA4 | BY_LAYER | {"num_kv_shared_layers": 2}, ("sdpa",)
    ),
    "gpt_oss": Family(
        GptOssForCausalLM,
        GptOssConfig,
        {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": MIXED},
        ("eager",),
    ),
    "qwen2_5_vl": Family(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, MROPE, wrapper=VISION),
    "qwen3_vl": Family(Qwen3VLForConditionalGeneration, Qwen3VLConfig, MROPE, ("sdpa",), VISION),
}


# With 5.15, transformers itself fails to read their prompts in chunks, those of Gemma 4 into static caches.
NO_CHUNKS = {"gemma4", "gemma4_sharing", "qwen2_5_vl", "qwen3_vl"} if transformers.__version__ < "5.16" else set()


def generate(target: PreTrainedModel, prompt: Tensor = PROMPT, **options: Any) -> Any:
    torch.manual_seed(11)
    everything = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return target.generate(prompt, **({"max_new_tokens": 13, "do_sample": False} | everything | options))


def assert_same_output(ours: Any, plain: Any) -> None:
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name]) == ours.statistics.num_new_tokens
        for one, other in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def assert_oracle_was_accepted(output: Any) -> None:
    """5 drafted tokens and the bonus in each round, after the one of the prefill."""
    assert output.statistics.num_rounds == -(-(output.statistics.num_new_tokens - 1) // 6)
