"""Targets whose parts were exchanged: what works, and what is refused before the first token."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.heads import CHECKPOINTING, markov_head, random_head
from torch import Tensor, nn
from transformers import PreTrainedModel

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


def generate(target: PreTrainedModel, head: PreTrainedModel | None = None, **options: str) -> list[list[int]]:
    return target.generate(PROMPT, max_new_tokens=19, do_sample=False, assistant_model=head, **options).tolist()


def compile_forward(target: PreTrainedModel) -> None:
    target.forward = torch.compile(target.forward, backend="eager")


def compile_target(target: PreTrainedModel) -> None:
    target.compile(backend="eager")


def compile_decoder(target: PreTrainedModel) -> None:
    target.model.compile(backend="eager")


def compile_layers(target: PreTrainedModel) -> None:
    for layer in target.model.layers:
        layer.compile(backend="eager")


@pytest.mark.parametrize("compile_it", [compile_forward, compile_target, compile_decoder])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_target_that_was_compiled_as_a_whole_is_refused(
    target: PreTrainedModel, compile_it: Callable, cache: str | None
) -> None:
    head = random_head(target)
    compile_it(target)
    with pytest.raises(ValueError, match=r"was compiled.*`cache_implementation='static'`"):
        generate(target, head, cache_implementation=cache)


def test_a_target_whose_layers_were_compiled_one_by_one_verifies(target: PreTrainedModel) -> None:
    compile_layers(target)
    assert generate(target, random_head(target)) == generate(target)


def test_a_target_that_is_kept_from_being_compiled_verifies(target: PreTrainedModel) -> None:
    plain = generate(target)
    target.forward = torch.compiler.disable(target.forward)
    assert generate(target, random_head(target)) == plain


def test_a_compiled_copy_of_a_target_verifies(target: PreTrainedModel) -> None:
    assert generate(torch.compile(target, backend="eager"), random_head(target)) == generate(target)


def test_a_target_in_training_with_checkpointing_verifies_or_is_refused(target: PreTrainedModel) -> None:
    plain, head = generate(target), random_head(target)
    getattr(target, f"{CHECKPOINTING}_enable")()
    assert generate(target.train(), None) is not None
    try:
        assert generate(target, head) == plain  # versions that keep a cache where there is no gradient
    except ValueError as error:
        assert "caches nothing of the prompt" in str(error)  # noqa: PT017, either is right
        assert "`target.eval()`" in str(error)  # noqa: PT017
    assert generate(target.eval(), head) == plain


# --- quantized ---


def dynamic(target: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(target), {nn.Linear}, dtype=dtype)


class RowScaledLinear(nn.Module):
    """Quantizes activations too, but each row by itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return nn.functional.linear((inputs / scale).round() * scale, self.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_target_that_quantizes_activations_by_all_tokens_is_refused(target: PreTrainedModel) -> None:
    quantized = dynamic(target, torch.qint8)
    for head in (random_head(target), markov_head(target)):
        with pytest.raises(ValueError, match=r"quantizes activations by all tokens.*quantize weights only"):
            generate(quantized, head)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_target_whose_weights_alone_are_quantized_verifies(target: PreTrainedModel) -> None:
    quantized = dynamic(target, torch.float16)
    assert generate(quantized, random_head(target)) == generate(quantized)


def test_a_target_that_quantizes_each_token_by_itself_verifies(target: PreTrainedModel) -> None:
    for path, module in list(target.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path:
            target.set_submodule(path, RowScaledLinear(module))
    assert generate(target, random_head(target)) == generate(target)


def test_adapters_that_drop_out_are_not_taken_for_it(target: PreTrainedModel) -> None:
    adapter = LoraConfig(target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = get_peft_model(target, adapter).train()
    text = model.generate(input_ids=PROMPT, max_new_tokens=9, do_sample=False, assistant_model=random_head(target))
    assert text.shape == (1, 15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_markov_head_is_refused_where_the_lm_head_shows_no_weight(target: PreTrainedModel) -> None:
    quantized, head = dynamic(target, torch.float16), markov_head(target)
    assert not list(quantized.lm_head.parameters())
    with pytest.raises(ValueError, match=r"offloaded or quantized.*`head.markov_head = None`"):
        generate(quantized, head)
    head.markov_head = None
    assert generate(quantized, head) == generate(quantized)
