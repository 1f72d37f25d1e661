"""The Markov head, against its equation written out."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.markov import KINDS, addition

from jetspec_hf import JetSpecDraftHead
from jetspec_hf.head.markov import JetSpecMarkovHead
from jetspec_hf.pair import DecodingPair


@pytest.fixture
def make_markov_head(make_target, make_head):
    """A Markov head that has something to say, and the target that it belongs to."""

    def make(kind: str, is_tied: bool = False) -> tuple[JetSpecMarkovHead, torch.nn.Module]:
        target = make_target()
        head = make_head(target, markov_rank=5, markov_head_type=kind, tie_markov_head=is_tied)
        torch.nn.init.normal_(head.markov_head.markov_w2.weight)
        return head.markov_head, target

    return make


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_its_equation(kind: str, is_tied: bool, make_markov_head) -> None:
    markov, target = make_markov_head(kind, is_tied)
    embed, paths = target.get_input_embeddings(), torch.tensor([[[3, 9, 9, 4], [1, 2, 3, 60]]])
    hidden_states = torch.randn(1, 2, 4, 32)
    codes = markov.context_codes(markov.follow(paths, embed), hidden_states)
    everything = codes @ markov.token_codes(target.lm_head).T
    some = torch.tensor([5, 9, 63])
    torch.testing.assert_close(markov.token_codes(target.lm_head, some), markov.token_codes(target.lm_head)[some])
    for row in range(2):
        for end in range(4):
            path = paths[0, row, : end + 1].tolist()
            expected = addition(markov, target, path, hidden_states[0, row, end])
            torch.testing.assert_close(everything[0, row, end], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_one_adds_nothing_and_can_learn(kind: str, is_tied: bool, make_target, make_head) -> None:
    target = make_target()
    markov = make_head(target, markov_rank=5, markov_head_type=kind, tie_markov_head=is_tied).markov_head
    states = markov.follow(torch.tensor([[3, 9]]), target.get_input_embeddings())
    added = markov.context_codes(states, torch.randn(1, 2, 32)) @ markov.token_codes(target.lm_head).T
    assert not added.any()
    added[0, 1, 7].backward()
    assert markov.markov_w2.weight.grad.any()


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, is_tied: bool, tmp_path, make_target, make_head) -> None:
    head = make_head(make_target(), markov_rank=5, markov_head_type=kind, tie_markov_head=is_tied)
    torch.nn.init.normal_(head.markov_head.markov_w2.weight)
    head.save_pretrained(tmp_path)
    loaded = JetSpecDraftHead.from_pretrained(tmp_path)
    assert loaded.config.markov_head_type == kind
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_plain_form_has_the_names_that_others_serve(make_target, make_head) -> None:
    head = make_head(make_target(), markov_rank=5, markov_head_type="vanilla", tie_markov_head=False)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items() if "markov" in name}
    assert shapes == {"markov_head.markov_w1.weight": (64, 5), "markov_head.markov_w2.weight": (64, 5)}


@pytest.mark.parametrize(
    "wrong", [{"markov_rank": -1}, {"markov_candidates": 0}, {"markov_rank": 4, "markov_head_type": "bigram"}]
)
def test_what_does_not_exist_is_refused(wrong: dict, make_target, make_head) -> None:
    with pytest.raises(ValueError, match="markov_head_type"):
        make_head(make_target(), **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_one_can_be_added_to_a_trained_head(kind: str, tmp_path, make_target, make_head) -> None:
    target = make_target()
    head = make_head(target, draft_temperatures=[0.7] * 5)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.add_markov_head(5, kind)
    assert not head.markov_head.markov_w2.weight.any()
    assert head.markov_head.markov_w1.weight.std() > 0.1
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
    head.save_pretrained(tmp_path)
    loaded = JetSpecDraftHead.from_pretrained(tmp_path)
    assert (loaded.config.markov_rank, loaded.config.markov_head_type) == (5, kind)
    assert loaded.config.draft_temperatures == [0.7] * 5
    with pytest.raises(ValueError, match="has a Markov head already"):
        head.add_markov_head(5)


def test_peft_trains_it_beside_an_adapter(tmp_path, make_target, make_head) -> None:
    target = make_target()
    head = make_head(target)
    head.save_pretrained(tmp_path / "head")
    head.add_markov_head(5)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["markov_head"])
    wrapped = get_peft_model(head, config)
    torch.nn.init.normal_(wrapped.markov_head.markov_w2.weight)
    trainable = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    assert any("markov_w2" in name for name in trainable)
    assert not any("o_proj" in name for name in trainable)

    prompt = torch.tensor([[3, 14, 15, 9, 26, 5]])
    text = target.generate(prompt, max_new_tokens=20, do_sample=False)
    options = {"max_new_tokens": 20, "do_sample": False, "num_assistant_tokens": 7, "return_dict_in_generate": True}
    ours = target.generate(prompt, assistant_model=wrapped, **options)
    assert torch.equal(ours.sequences, text)

    wrapped.save_pretrained(tmp_path / "adapter")
    again = JetSpecDraftHead.from_pretrained(tmp_path / "head")
    again.add_markov_head(5)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(loaded.markov_head.markov_w2.weight, wrapped.markov_head.markov_w2.weight)
    merged = loaded.merge_and_unload()
    assert isinstance(merged.markov_head, JetSpecMarkovHead)
    theirs = target.generate(prompt, assistant_model=merged, **options)
    assert theirs.statistics.accepted_lengths == ours.statistics.accepted_lengths


def test_a_target_whose_lm_head_cannot_be_read_is_refused(make_target, make_head) -> None:
    target = make_target()
    head = make_head(target, markov_rank=5)
    target.set_output_embeddings(target.lm_head.to("meta"))
    with pytest.raises(ValueError, match="offloaded or quantized"):
        DecodingPair(head, target)
    head.markov_head = None
    DecodingPair(head, target)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_one_drafts_in_bfloat16(kind: str, is_tied: bool, make_target, make_head) -> None:
    target = make_target().bfloat16()
    options = {"markov_rank": 5, "markov_head_type": kind, "tie_markov_head": is_tied}
    head = make_head(target, **options, draft_temperatures=[0.7] * 5).bfloat16()
    torch.nn.init.normal_(head.markov_head.markov_w2.weight)
    prompt = torch.tensor([[3, 14, 15, 9, 26, 5]])
    sampling = {"max_new_tokens": 12, "return_dict_in_generate": True, "num_assistant_tokens": 9}
    output = target.generate(prompt, assistant_model=head, do_sample=False, **sampling)
    assert output.sequences.shape[1] == 18
    assert max(output.statistics.drafted_nodes) == 9
