"""The ways to decode that a benchmark compares: their names, and what `generate` is asked for."""

from typing import Any

import pytest
from support.heads import random_head
from transformers import Qwen3ForCausalLM

from jetspec_hf.benchmark import method as module
from jetspec_hf.benchmark.method import KINDS, Method
from jetspec_hf.drafting.options import DraftOptions

OURS = ("chain", "auto", "tree", "tree-20")


@pytest.mark.parametrize("name", [*KINDS, "tree-1", "tree-63"])
def test_a_method_is_read_from_its_name(name: str) -> None:
    assert Method.parse(name).name == name


def test_the_name_of_a_tree_holds_its_nodes() -> None:
    assert Method.parse("tree-15") == Method("tree", 15)
    assert {Method.parse(kind).num_nodes for kind in KINDS} == {None}


@pytest.mark.parametrize(
    "name", ["", "beam", "tree-", "tree-0", "tree-x", "tree--3", "tree-1.5", "tree-015", "tree-²", "plain-3", "Tree"]
)
def test_what_is_none_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"no method {name};.* plain, lookup, dflash, chain, auto, tree, and tree-N"):
        Method.parse(name)


@pytest.mark.parametrize("name", [*KINDS, "tree-3"])
def test_others_draw_in_their_own_way_and_take_no_static_cache(name: str) -> None:
    method, is_other = Method.parse(name), name in ("lookup", "dflash")
    assert method.is_comparable(temperature=0.0)
    assert method.is_comparable(temperature=1.0) != is_other
    assert method.can_be_static != is_other


def asked(name: str, target: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, **head_options: Any) -> DraftOptions:
    """What a method asks of drafting with a head of these options."""
    given: list[DraftOptions] = []
    monkeypatch.setattr(module, "decode_with", lambda head, *, streamer, options: given.append(options))
    Method.parse(name).keywords(random_head(target, **head_options), streamer=None)
    return given[0]


@pytest.mark.parametrize("num_assistant_tokens", [None, 20, 31])
def test_a_call_says_all_that_a_head_may_say_otherwise(num_assistant_tokens: int | None, make_target, monkeypatch):
    target = make_target()
    of_head = {
        "num_assistant_tokens": num_assistant_tokens,
        "prompt_lookup_num_tokens": 5,
        "assistant_confidence_threshold": 0.1,
    }
    options = {name: asked(name, target, monkeypatch, **of_head) for name in OURS}
    assert options["tree"] == DraftOptions(num_assistant_tokens, 0.1, 5)
    assert options["tree-20"] == DraftOptions(20, 0.1, 5)
    assert options["auto"] == DraftOptions(None, 0.1, 5)
    block_size = random_head(target).config.block_size
    assert options["chain"] == DraftOptions(block_size - 1, 0.1, 0, is_chain=True)


@pytest.mark.parametrize("name", OURS)
def test_a_head_keeps_its_own_options(name: str, make_target) -> None:
    head = random_head(make_target(), num_assistant_tokens=9)
    before = head.config.to_dict()
    Method.parse(name).keywords(head, streamer=None)
    assert head.config.to_dict() == before
