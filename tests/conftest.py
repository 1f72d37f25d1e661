"""Tiny random models, and where the golden vectors are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, set_seed

from jetspec_hf import JetSpecConfig, JetSpecDraftHead

torch.set_num_threads(1)  # for models this small, more only wait for each other


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the reference implementation computed; see its README."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def make_target() -> Callable[..., Qwen3ForCausalLM]:
    """A random target whose most likely token stands out, on the CPU in float32, never ending by itself."""

    def make(*, seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
        set_seed(seed)
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        return Qwen3ForCausalLM(Qwen3Config(**(fields | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def make_head() -> Callable[..., JetSpecDraftHead]:
    """A random head for a target."""

    def make(target: PreTrainedModel, *, seed: int = 1, **overrides: Any) -> JetSpecDraftHead:
        set_seed(seed)
        fields = {
            "mask_token_id": target.config.get_text_config().vocab_size - 1,
            "num_hidden_layers": 2,
            "block_size": 6,
            "initializer_range": 0.3,
        }
        config = JetSpecConfig.for_target(target.config, **(fields | overrides))
        return JetSpecDraftHead(config).eval()

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def setting(make_target, make_head):
    """A Markov head that has something to say, its target, and hidden states of a block of 4 with their logits."""

    def make(kind: str) -> tuple:
        target = make_target()
        markov = make_head(target, markov_rank=5, markov_head_type=kind, tie_markov_head=False).markov_head
        torch.nn.init.normal_(markov.markov_w2.weight)
        hidden_states = torch.randn(1, 4, 32)
        return markov, target, hidden_states, 2 * target.lm_head(hidden_states)

    return make
