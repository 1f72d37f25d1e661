"""Targets that put tokens of their own before the prompt."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from support.heads import markov_head, oracle_head, random_head
from torch import Tensor
from transformers import PreTrainedModel

from jetspec_hf.upstream import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])
NUM_VIRTUAL = 5
METHODS = {
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, encoder_hidden_size=16),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:.*`past_key_values`:FutureWarning"),
]
# PEFT puts its prefix where transformers no longer looks, and its prompt before every token.
knows_the_cache = pytest.mark.skipif(CACHE != "past_key_values", reason="this PEFT is not made for this transformers")


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


def tuned(target: PreTrainedModel, method: str) -> PeftModel:
    """A target with virtual tokens that say something."""
    model = get_peft_model(target, METHODS[method])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_()
    return model.eval()


def generate(model: PeftModel, head: PreTrainedModel | None = None, prompt: Tensor = PROMPT, **options: Any) -> Any:
    torch.manual_seed(11)
    return model.generate(
        input_ids=prompt, **({"max_new_tokens": 19, "do_sample": False} | options), assistant_model=head
    )


def without_cache(model: PeftModel) -> list[list[int]]:
    """What the target says, whatever PEFT and transformers make of caches."""
    text = PROMPT
    for _ in range(19):
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
        text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return text.tolist()


@pytest.mark.parametrize("method", [pytest.param("prefix tuning", marks=knows_the_cache), "prompt tuning", "p-tuning"])
def test_a_target_with_virtual_tokens_verifies(target: PreTrainedModel, method: str) -> None:
    bare, model = generate(target).tolist(), tuned(target, method)
    text = without_cache(model)
    assert text != bare
    for head in (random_head(target), markov_head(target)):
        assert generate(model, head).tolist() == text


@knows_the_cache
@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_stand_before_padding_too(target: PreTrainedModel, method: str) -> None:
    model, head = tuned(target, method), markov_head(target)
    padded = torch.cat([torch.full((1, 3), 63), PROMPT], dim=1)
    options = {"attention_mask": (torch.arange(padded.shape[1]) >= 3).long()[None], "do_sample": True}
    plain = generate(model, None, padded, **options)
    assert generate(model, head, padded, **options).tolist() == plain.tolist()


@knows_the_cache
def test_an_oracle_is_accepted_behind_virtual_tokens(target: PreTrainedModel) -> None:
    model = tuned(target, "prompt tuning")
    text = generate(model)
    shifted = torch.cat([text[:, :1].expand(1, NUM_VIRTUAL), text], dim=1)
    output = generate(model, oracle_head(target, shifted), return_dict_in_generate=True)
    assert output.sequences.tolist() == text.tolist()
    assert output.statistics.num_rounds == 3


@knows_the_cache
def test_the_bare_target_verifies_after_its_tuned_self(target: PreTrainedModel) -> None:
    plain, head = generate(target), random_head(target)
    generate(tuned(target, "prefix tuning"), head)
    assert generate(target, head).tolist() == plain.tolist()


@pytest.mark.skipif(CACHE == "past_key_values", reason="here PEFT's prefix reaches the cache")
def test_a_prefix_that_does_not_reach_the_cache_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"virtual tokens before the prompt, but after 6 tokens the cache holds 6"):
        generate(tuned(target, "prefix tuning"), random_head(target))


@pytest.mark.parametrize("method", METHODS)
def test_several_rows_are_refused_behind_virtual_tokens(target: PreTrainedModel, method: str) -> None:
    with pytest.raises(ValueError, match=r"virtual tokens.*one prompt at a time; call `generate` for each"):
        generate(tuned(target, method), random_head(target), PROMPT.expand(2, -1))


@pytest.mark.parametrize("method", METHODS)
def test_static_caches_are_refused_behind_virtual_tokens(target: PreTrainedModel, method: str) -> None:
    with pytest.raises(ValueError, match=r"virtual tokens.*leave out `cache_implementation='static'`"):
        generate(tuned(target, method), random_head(target), cache_implementation="static")
