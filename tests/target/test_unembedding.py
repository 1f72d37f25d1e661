"""Targets that are wrapped, offloaded, quantized, of another number type, or that squash their logits."""

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from support.training import losses_of, make_rows, make_trainer
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, set_seed

from jetspec_hf.target.unembedding import Unembedding
from jetspec_hf.training.evaluation import surprise, tokens_per_round


class Int8Linear(nn.Module):
    """Weights as integers with one scale for each row, none of them a floating-point parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight * self.scale)


def quantize(target: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = copy.deepcopy(target)
    for name, module in list(target.named_modules()):
        if isinstance(module, nn.Linear):
            quantized = Int8Linear(module)
            target.set_submodule(name, quantized)
            plain.get_submodule(name).weight.data = quantized.weight * quantized.scale
    return target, plain


def adapt(target: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    adapted = get_peft_model(target, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]))
    for name, value in adapted.named_parameters():
        if "lora" in name:
            nn.init.normal_(value, std=0.1)
    return adapted, copy.deepcopy(adapted).merge_and_unload()


def offload(target: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = copy.deepcopy(target)
    return cpu_offload(target, execution_device=torch.device("cpu")), plain


KINDS: dict[str, Callable] = {"quantized": quantize, "adapted": adapt, "offloaded": offload}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_head_trains_and_drafts_as_with_the_plain_target(tmp_path, make_target, make_head, kind: str) -> None:
    rows = make_rows(make_target(), 4)
    texts = [(row["input_ids"], 4) for row in rows]
    prompt = torch.tensor([rows[0]["input_ids"][:4]])
    seen = []
    for target in KINDS[kind](make_target()):
        head = make_head(make_target(), initializer_range=0.05)
        trainer = make_trainer(head, target, rows, tmp_path, max_steps=3, logging_steps=1)
        trainer.train()
        head.eval()
        options = {"max_new_tokens": 12, "do_sample": False}
        drafted = target.generate(input_ids=prompt, assistant_model=head, **options).tolist()
        assert drafted == target.generate(input_ids=prompt, **options).tolist()
        seen.append([*losses_of(trainer), *surprise(target, texts), tokens_per_round(head, target, texts, [8])[8]])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_a_head_in_float32_trains_for_a_target_in_bfloat16(tmp_path, make_target, make_head, bf16: bool) -> None:
    target = make_target()
    rows = make_rows(target, 4)
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(target, initializer_range=0.05)
        trainer = make_trainer(head, target.to(dtype), rows, tmp_path, bf16=bf16, max_steps=3, logging_steps=1)
        trainer.train()
        assert head.dtype == torch.float32
        seen.append(losses_of(trainer))
    assert seen[0] != seen[1]
    assert seen[0] == pytest.approx(seen[1], rel=0.1)


def test_logits_are_squashed_as_the_target_does(make_target) -> None:
    set_seed(0)
    fields = {name: make_target().config.to_dict()[name] for name in ("vocab_size", "hidden_size", "head_dim")}
    target = Gemma2ForCausalLM(
        Gemma2Config(
            **fields,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            final_logit_softcapping=2.0,
        )
    ).eval()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = target(ids).logits
        torch.testing.assert_close(Unembedding(target)(target.get_decoder()(ids).last_hidden_state), logits)
    expected = logits[0, 3:-1].log_softmax(dim=-1).gather(1, ids[0, 4:, None]).mean()
    assert surprise(target, [(ids[0].tolist(), 4)]).log_prob == pytest.approx(float(expected), rel=1e-5)
