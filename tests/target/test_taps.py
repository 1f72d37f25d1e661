import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from jetspec_hf.target.taps import HiddenStateTaps
from jetspec_hf.upstream import CACHE

LAYER_IDS = [0, 2]


@pytest.fixture
def target(make_target: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_target(hidden_size=16, num_hidden_layers=4)


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))


def num_hooks(target: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in target.modules())


@torch.no_grad()
def expected_states(target: PreTrainedModel, input_ids: torch.Tensor, layer_ids: list[int]) -> torch.Tensor:
    states = target(input_ids, output_hidden_states=True).hidden_states
    return torch.cat([states[layer_id + 1] for layer_id in layer_ids], dim=-1)  # 0 holds the embeddings


@torch.no_grad()
def test_taps_are_the_states_after_their_layers_in_the_order_asked_for(target: PreTrainedModel) -> None:
    for layer_ids in ([0, 2], [2, 0], [1]):
        with HiddenStateTaps(target, layer_ids) as taps:
            with taps.recording():
                target(tokens(7))
            torch.testing.assert_close(taps.take(), expected_states(target, tokens(7), layer_ids), rtol=0, atol=0)


@torch.no_grad()
def test_taps_of_the_golden_target_are_what_its_heads_were_given(golden: Path) -> None:
    expected = load_file(golden / "head_forward.safetensors")
    target = AutoModelForCausalLM.from_pretrained(golden / "target")
    with HiddenStateTaps(target, [1, 3, 5]) as taps:
        with taps.recording():
            target(expected["causal.input_ids"][:, :24])
        states = taps.take()
    rounds = [expected[f"causal.round{index}.context_hidden_states"] for index in range(3)]
    torch.testing.assert_close(states, torch.cat(rounds, dim=1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_last_layer_is_tapped_before_the_final_norm(target: PreTrainedModel) -> None:
    with HiddenStateTaps(target, [3]) as taps:
        with taps.recording():
            normed = target(tokens(7), output_hidden_states=True).hidden_states[-1]
        states = taps.take()
    torch.testing.assert_close(target.model.norm(states), normed)
    assert not torch.allclose(states, normed)


@torch.no_grad()
def test_a_prompt_in_chunks_is_taken_whole(target: PreTrainedModel) -> None:
    prompt = tokens(9)
    with HiddenStateTaps(target, LAYER_IDS) as taps:
        with taps.recording():
            cache = None
            for chunk in prompt.split([4, 3, 2], dim=1):
                cache = target(chunk, **{CACHE: cache}, use_cache=True)[CACHE]
        states = taps.take()
    torch.testing.assert_close(states, expected_states(target, prompt, LAYER_IDS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_taking_empties_the_taps(target: PreTrainedModel) -> None:
    with HiddenStateTaps(target, LAYER_IDS) as taps:
        for seed, length in ((1, 5), (2, 3)):
            with taps.recording():
                target(tokens(length, seed))
            expected = expected_states(target, tokens(length, seed), LAYER_IDS)
            torch.testing.assert_close(taps.take(), expected, rtol=0, atol=0)


@torch.no_grad()
def test_forwards_outside_recording_are_not_recorded(target: PreTrainedModel) -> None:
    with HiddenStateTaps(target, LAYER_IDS) as taps:
        target(tokens(4, seed=1))
        with taps.recording():
            target(tokens(5, seed=2))
        target(tokens(6, seed=3))
        torch.testing.assert_close(taps.take(), expected_states(target, tokens(5, seed=2), LAYER_IDS))


@torch.no_grad()
def test_forwards_of_another_thread_are_not_recorded(target: PreTrainedModel) -> None:
    def other_thread() -> None:
        with torch.no_grad():
            target(tokens(6, seed=3))

    with HiddenStateTaps(target, LAYER_IDS) as taps:
        with taps.recording():
            target(tokens(5, seed=2))
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()
        torch.testing.assert_close(taps.take(), expected_states(target, tokens(5, seed=2), LAYER_IDS))


@torch.no_grad()
def test_two_threads_tap_one_target_at_once(target: PreTrainedModel) -> None:
    both_record, both_ran = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    taken = {}

    def tap(seed: int) -> None:
        with torch.no_grad(), HiddenStateTaps(target, LAYER_IDS) as taps:
            with taps.recording():
                both_record.wait()
                target(tokens(5, seed))
                both_ran.wait()
            taken[seed] = taps.take()

    threads = [threading.Thread(target=tap, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        torch.testing.assert_close(taken[seed], expected_states(target, tokens(5, seed), LAYER_IDS))


def test_no_hook_stays_after_an_error(target: PreTrainedModel) -> None:
    def tap_and_fail() -> None:
        with HiddenStateTaps(target, LAYER_IDS) as taps, taps.recording():
            assert num_hooks(target) == len(LAYER_IDS)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tap_and_fail()
    assert num_hooks(target) == 0


@torch.no_grad()
def test_an_error_ends_the_recording(target: PreTrainedModel) -> None:
    with HiddenStateTaps(target, LAYER_IDS) as taps:
        with contextlib.suppress(RuntimeError), taps.recording():
            raise RuntimeError("stop")
        target(tokens(4, seed=1))
        with taps.recording():
            target(tokens(5, seed=2))
        assert taps.take().shape[1] == 5


def test_a_target_that_passes_its_hooks_by_is_named(make_target: Callable) -> None:
    target = make_target()
    with HiddenStateTaps(target, [1, 2]) as taps, taps.recording():
        target.model.layers[1](torch.zeros(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))
        with pytest.raises(ValueError, match="hooks on the layers of Qwen3ForCausalLM did not run"):
            taps.take()
