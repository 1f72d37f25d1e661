import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.heads import CHECKPOINTING
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from jetspec_hf.cache import make_head_cache
from jetspec_hf.head.configuration_jetspec import JetSpecConfig
from jetspec_hf.head.modeling_jetspec import JetSpecDraftHead
from jetspec_hf.training.blocks import draft_blocks

HIDDEN, BLOCK = 32, 6  # of the heads below

SLIDING = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 4}
MIXED = SLIDING | {"layer_types": ["full_attention", "sliding_attention"]}


@pytest.fixture
def make(make_target: Callable, make_head: Callable) -> Callable[..., JetSpecDraftHead]:
    """A small random head whose output depends strongly on all that it sees."""

    def make(*, attn_implementation: str = "sdpa", **overrides: object) -> JetSpecDraftHead:
        head = make_head(make_target(), target_layer_ids=[2, 0], **overrides)
        head.set_attn_implementation(attn_implementation)
        return head

    return make


def random_block(batch: int = 1, size: int = BLOCK) -> Tensor:
    return torch.randn(batch, size, HIDDEN)


def random_context(head: JetSpecDraftHead, length: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, head.fc.in_features)


@torch.no_grad()
def in_rounds(head: JetSpecDraftHead, block: Tensor, context: Tensor, lengths: list[int]) -> Tensor:
    """The output after the last of several rounds with a cache, from which each round drops its block."""
    cache = make_head_cache(head.config)
    for new in context.split(lengths, dim=1):
        output = head(block, new, cache=cache).last_hidden_state
        cache.crop(-block.shape[1])
    assert cache.get_seq_length() == context.shape[1]
    return output


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["causal", "bidirectional"])
@torch.no_grad()
def test_published_heads_compute_what_the_reference_computes(golden: Path, name: str, attn_implementation: str) -> None:
    head = JetSpecDraftHead.from_pretrained(golden / f"head_{name}", attn_implementation=attn_implementation)
    target = AutoModelForCausalLM.from_pretrained(golden / "target")
    expected = load_file(golden / "head_forward.safetensors")
    (case,) = (c for c in json.loads((golden / "head_forward.json").read_text())["cases"] if c["head"] == name)
    assert head.config.target_layer_ids == case["target_layer_ids"]

    cache = make_head_cache(head.config)
    for index, facts in enumerate(case["rounds"]):
        tensors = {key.split(".")[-1]: value for key, value in expected.items() if f"{name}.round{index}." in key}
        block = target.get_input_embeddings()(tensors["block_ids"])
        context = tensors["context_hidden_states"]
        output = head(block, context, tensors["position_ids"], cache=cache).last_hidden_state
        cache.crop(-block.shape[1])
        assert cache.get_seq_length() == facts["context"]
        torch.testing.assert_close(output, tensors["last_hidden_state"], rtol=0, atol=1e-4)
        torch.testing.assert_close(target.lm_head(output[:, 1:]), tensors["draft_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"is_causal": False}, MIXED, MIXED | {"is_causal": False}],
    ids=["causal", "bidirectional", "mixed causal", "mixed bidirectional"],
)
@torch.no_grad()
def test_rounds_with_a_cache_equal_one_pass_without(make: Callable, fields: dict, attn_implementation: str) -> None:
    head = make(attn_implementation=attn_implementation, **fields)
    block, context = random_block(), random_context(head, 12)
    fresh = head(block, context).last_hidden_state
    torch.testing.assert_close(in_rounds(head, block, context, [7, 1, 4]), fresh, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_rounds(head, block, context, [2, 10]), fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_only_a_bidirectional_head_looks_at_later_slots(make: Callable, is_causal: bool) -> None:
    head = make(is_causal=is_causal)
    block, context = random_block(size=8), random_context(head, 5)
    whole = head(block, context).last_hidden_state
    for size in (1, 3, 7):
        short = head(block[:, :size], context).last_hidden_state
        assert torch.allclose(short, whole[:, :size], rtol=1e-4, atol=1e-4) == is_causal


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_sliding_layers_see_only_their_window(make: Callable, is_causal: bool, attn_implementation: str) -> None:
    head = make(attn_implementation=attn_implementation, is_causal=is_causal, **SLIDING)
    full = make(attn_implementation=attn_implementation, is_causal=is_causal)
    full.load_state_dict(head.state_dict())
    num_context, window = 9, SLIDING["sliding_window"]
    block, context = random_block(), random_context(head, num_context)

    bias = torch.full((1, 1, BLOCK, num_context + BLOCK), torch.finfo(torch.float32).min)
    for slot in range(BLOCK):
        for key in range(num_context + BLOCK):
            back = num_context + slot - key
            if abs(back) < window and (back >= 0 or not is_causal):
                bias[0, 0, slot, key] = 0.0
    expected = full(block, context, attention_mask=bias).last_hidden_state
    assert not torch.allclose(full(block, context).last_hidden_state, expected, rtol=1e-2, atol=1e-2)

    torch.testing.assert_close(head(block, context).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_rounds(head, block, context, [6, 1, 2]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_flex_attention_drafts_blocks_as_sdpa_does(make: Callable, is_causal: bool) -> None:
    head = make(is_causal=is_causal, **MIXED)
    assert head.config.num_key_value_heads < head.config.num_attention_heads
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 2)
    context, anchors = random_context(head, 12, batch=2), torch.tensor([[2, 4, 9], [-1, 7, 11]])
    embed = torch.nn.Embedding(64, HIDDEN)
    drafted = []
    with torch.compiler.set_stance("force_eager"):
        for attention in ("sdpa", "flex_attention"):
            head.set_attn_implementation(attention)
            drafted.append(draft_blocks(head, head.config, embed, position_ids, position_ids, context, anchors))
    torch.testing.assert_close(*drafted, rtol=1e-5, atol=1e-5)


def test_decoding_with_flex_attention_is_refused(make_target: Callable, make_head: Callable) -> None:
    target = make_target()
    head = make_head(target)
    head.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"takes a `BlockMask`.*set_attn_implementation\('sdpa'\)"):
        target.generate(torch.tensor([[1, 2, 3]]), assistant_model=head, max_new_tokens=8, do_sample=False)


@torch.no_grad()
def test_a_ready_boolean_mask_is_used_as_it_is(make: Callable) -> None:
    head, bidirectional = make(), make(is_causal=False)
    block, context = random_block(), random_context(head, 3)
    mask = torch.ones(1, 1, BLOCK, 3 + BLOCK, dtype=torch.bool).tril(diagonal=3)
    torch.testing.assert_close(
        bidirectional(block, context, attention_mask=mask).last_hidden_state, head(block, context).last_hidden_state
    )


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, {"is_causal": False}, MIXED], ids=["causal", "bidirectional", "mixed causal"])
@torch.no_grad()
def test_left_padding_changes_nothing(make: Callable, fields: dict, attn_implementation: str) -> None:
    head = make(attn_implementation=attn_implementation, **fields)
    num_padding, length = 3, 7
    block, context = random_block(batch=2), random_context(head, length, batch=2)
    alone = head(block[:1, :], context[:1, num_padding:]).last_hidden_state  # row 0 has three tokens fewer
    other = head(block[1:, :], context[1:]).last_hidden_state

    padding_mask = torch.ones(2, length + BLOCK, dtype=torch.long)
    padding_mask[0, :num_padding] = 0
    positions = (padding_mask.cumsum(dim=1) - 1).clamp(min=0)
    context[0, :num_padding] = 100.0
    cache = make_head_cache(head.config)
    first = {
        "context_hidden_states": context[:, :5],
        "position_ids": torch.cat([positions[:, :5], positions[:, 5:11]], 1),
    }
    head(block, attention_mask=padding_mask[:, : 5 + BLOCK], cache=cache, **first)
    cache.crop(-BLOCK)
    for output in (
        head(block, context, positions, padding_mask),
        head(block, context[:, 5:], positions[:, 5:], padding_mask, cache),
    ):
        torch.testing.assert_close(output.last_hidden_state[:1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.last_hidden_state[1:], other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_are_counted_on_from_the_cache(make: Callable) -> None:
    head = make()
    block, context = random_block(), random_context(head, 8)
    cache = make_head_cache(head.config)
    head(block, context[:, :5], torch.arange(5 + BLOCK)[None], cache=cache)
    cache.crop(-BLOCK)
    explicit = head(block, context[:, 5:], torch.arange(5, 8 + BLOCK)[None], cache=cache)
    assert torch.equal(in_rounds(head, block, context, [5, 3]), explicit.last_hidden_state)


@torch.no_grad()
def test_positions_matter(make: Callable) -> None:
    head = make()
    block, context = random_block(), random_context(head, 5)
    counted = head(block, context).last_hidden_state
    spread = head(block, context, 3 * torch.arange(5 + BLOCK)[None]).last_hidden_state
    shifted = head(block, context, 100 + torch.arange(5 + BLOCK)[None]).last_hidden_state
    assert not torch.allclose(spread, counted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(shifted, counted, rtol=1e-3, atol=1e-3)  # rotary embeddings are relative


def assert_same_head(loaded: JetSpecDraftHead, head: JetSpecDraftHead) -> None:
    assert type(loaded) is JetSpecDraftHead
    weights = head.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    block, context = random_block(), random_context(head, 4)
    with torch.no_grad():
        assert torch.equal(loaded(block, context).last_hidden_state, head(block, context).last_hidden_state)


@pytest.mark.parametrize("fields", [{}, MIXED | {"is_causal": False}], ids=["causal", "mixed bidirectional"])
def test_a_saved_head_loads_as_it_was(make: Callable, tmp_path: Path, fields: dict) -> None:
    head = make(**fields)
    head.save_pretrained(tmp_path)
    assert_same_head(JetSpecDraftHead.from_pretrained(tmp_path), head)
    assert_same_head(AutoModel.from_pretrained(tmp_path), head)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), JetSpecConfig)


def test_a_head_is_saved_under_the_published_names(golden: Path, tmp_path: Path) -> None:
    JetSpecDraftHead.from_pretrained(golden / "head_causal").save_pretrained(tmp_path)
    published = load_file(golden / "head_causal" / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in published)


def test_loading_tells_its_details_if_asked(golden: Path) -> None:
    head, info = JetSpecDraftHead.from_pretrained(golden / "head_causal", output_loading_info=True)
    assert isinstance(head, JetSpecDraftHead)
    assert not info["missing_keys"]


def copy_with_weights(golden: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(golden / "head_causal", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["fc.weight", "layers.2.self_attn.q_norm.weight"])
def test_a_missing_weight_is_refused_and_named(golden: Path, tmp_path: Path, name: str) -> None:
    folder = copy_with_weights(golden, tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=rf"missing keys: {name}"):
        JetSpecDraftHead.from_pretrained(folder)


@pytest.mark.parametrize("name", ["hidden_dim_adapter.proj.weight", "layers.3.input_layernorm.weight"])
def test_a_weight_without_a_place_is_refused_and_named(golden: Path, tmp_path: Path, name: str) -> None:
    folder = copy_with_weights(golden, tmp_path, lambda weights: weights.update({name: torch.ones(64)}))
    with pytest.raises(ValueError, match=rf"unexpected keys: {name}"):
        JetSpecDraftHead.from_pretrained(folder)


def test_a_subfolder_is_loaded(golden: Path) -> None:
    for name in ("head_causal", "head_bidirectional"):
        head = JetSpecDraftHead.from_pretrained(golden / name)
        assert_same_head_weights(JetSpecDraftHead.from_pretrained(f"{golden}::{name}"), head)


def assert_same_head_weights(loaded: JetSpecDraftHead, head: JetSpecDraftHead) -> None:
    assert loaded.config.is_causal == head.config.is_causal
    weights = head.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


@pytest.fixture
def hub_cache(golden: Path, tmp_path: Path) -> Path:
    """A Hub cache, as a download of two heads leaves it."""
    for repo, source, subfolder in (
        ("models--hao-ai-lab--jetspec-qwen3-8b", "head_causal", ""),
        ("models--someone--heads", "head_bidirectional", "wide"),
    ):
        commit = "0123456789abcdef0123456789abcdef01234567"
        (tmp_path / repo / "refs").mkdir(parents=True)
        (tmp_path / repo / "refs" / "main").write_text(commit)
        shutil.copytree(golden / source, tmp_path / repo / "snapshots" / commit / subfolder)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "source"),
    [("hao-ai-lab/jetspec-qwen3-8b", "head_causal"), ("someone/heads::wide", "head_bidirectional")],
)
def test_a_head_is_loaded_by_its_hub_id_without_a_network(
    golden: Path, hub_cache: Path, name: str, source: str
) -> None:
    head = JetSpecDraftHead.from_pretrained(name, cache_dir=hub_cache, local_files_only=True)
    assert_same_head_weights(head, JetSpecDraftHead.from_pretrained(golden / source))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_bfloat16_stays_close_to_float32(golden: Path, attn_implementation: str) -> None:
    folder = golden / "head_causal"
    exact = JetSpecDraftHead.from_pretrained(folder)
    head = JetSpecDraftHead.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attn_implementation)
    block, context = torch.randn(1, 8, 64), torch.randn(1, 6, 192)
    output = head(block.bfloat16(), context.bfloat16()).last_hidden_state
    assert output.dtype == torch.bfloat16
    expected = exact(block, context).last_hidden_state
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("fields", "num_parameters"),
    [
        (
            {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 5,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_target_layers": 36,
            },
            1_048_626_432,
        ),
        (
            {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 8,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "num_target_layers": 48,
                "target_layer_ids": [1, 12, 23, 34, 45],
            },
            473_995_264,
        ),
    ],
    ids=["qwen3-8b", "qwen3-30b-a3b"],
)
def test_published_sizes_have_the_published_number_of_parameters(fields: dict, num_parameters: int) -> None:
    config = JetSpecConfig(**fields, head_dim=128, vocab_size=151936, mask_token_id=151669)
    with torch.device("meta"):
        head = JetSpecDraftHead(config)
    assert sum(parameter.numel() for parameter in head.parameters()) == num_parameters


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "gradient checkpointing"])
def test_every_parameter_learns(make: Callable, checkpoints: bool) -> None:
    head = make()
    block, context, wanted = random_block(), random_context(head, 5), random_block()
    expected = torch.autograd.grad((head(block, context).last_hidden_state * wanted).sum(), list(head.parameters()))
    if checkpoints:
        getattr(head, f"{CHECKPOINTING}_enable")()
    passes = []
    head.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    (head.train()(block, context).last_hidden_state * wanted).sum().backward()
    assert len(passes) == (2 if checkpoints else 1)
    for (name, parameter), gradient in zip(head.named_parameters(), expected, strict=True):
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("missing", ["mask_token_id", "num_target_layers"])
def test_a_head_without_needed_fields_is_refused(missing: str) -> None:
    fields = {"vocab_size": 100, "mask_token_id": 99, "num_target_layers": 8}
    del fields[missing]
    with pytest.raises(ValueError, match="for_target"):
        JetSpecDraftHead(JetSpecConfig(**fields))


def test_a_plain_model_is_no_head(make_target: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_target().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a draft head"):
        JetSpecDraftHead.from_pretrained(tmp_path)


def test_a_head_has_no_embeddings_of_its_own(make_target: Callable, make_head: Callable) -> None:
    """FSDP2 asks for both, and shards what it gets."""
    head = make_head(make_target())
    assert head.get_input_embeddings() is None
    assert head.get_output_embeddings() is None


def test_a_new_head_is_not_sure_of_the_mask(make_target, make_head) -> None:
    target = make_target(hidden_size=64, head_dim=16, tie_word_embeddings=True, initializer_range=0.05)
    head = make_head(target, initializer_range=0.02)
    mask = target.get_input_embeddings().weight[head.config.mask_token_id].expand(1, head.config.block_size, -1)
    context = torch.randn(1, 9, len(head.config.target_layer_ids) * target.config.hidden_size)
    with torch.no_grad():
        hidden = head(mask, context).last_hidden_state
    assert torch.cosine_similarity(hidden, mask, dim=-1).max() < 0.7
