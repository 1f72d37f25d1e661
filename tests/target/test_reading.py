"""Reading a target, against its own output."""

import pytest
import torch

from jetspec_hf.target.reading import TargetStates, read_target
from jetspec_hf.training.evaluation import surprise, tokens_per_round

TEXTS = torch.tensor([[3, 14, 15, 9, 26, 5], [5, 3, 58, 9, 7, 9]])


def test_states_are_those_that_the_target_returns(make_target) -> None:
    target = make_target()
    states = read_target(target, TEXTS, [2, 0])
    with torch.no_grad():
        output = target.model(TEXTS, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[layer + 1] for layer in (2, 0)], dim=-1)
    torch.testing.assert_close(states.taps, expected)
    torch.testing.assert_close(states.last_hidden, output.last_hidden_state)
    assert not states.last_hidden.requires_grad


def test_documents_of_a_row_do_not_see_each_other(make_target) -> None:
    target = make_target()
    whole = read_target(target, TEXTS, [1], torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]))
    for row, start, end in [(0, 0, 3), (0, 3, 6), (1, 0, 2), (1, 2, 6)]:
        alone = read_target(target, TEXTS[row, None, start:end], [1])
        for ours, theirs in zip(whole, alone, strict=True):
            torch.testing.assert_close(ours[row, None, start:end], theirs, rtol=1e-4, atol=1e-5)


def test_without_layers_there_are_no_taps(make_target) -> None:
    target = make_target()
    states = read_target(target, TEXTS, [])
    assert states.taps.shape == (2, 6, 0)
    assert torch.equal(states.last_hidden, read_target(target, TEXTS, [1]).last_hidden)


class Relay:
    """Reads with a target that is elsewhere."""

    def __init__(self, target) -> None:
        self.config, self.device, self._target = target.config, target.device, target
        self.get_input_embeddings, self.get_output_embeddings = (
            target.get_input_embeddings,
            target.get_output_embeddings,
        )

    def read(self, input_ids, layer_ids, position_ids=None) -> TargetStates:
        return read_target(self._target, input_ids, layer_ids, position_ids)


def test_what_reads_in_place_of_a_target_is_taken_for_it(make_target, make_head) -> None:
    target = make_target()
    head, texts = make_head(target), [(text.tolist(), 2) for text in TEXTS]
    assert surprise(Relay(target), texts) == surprise(target, texts)
    counted = tokens_per_round(head, Relay(target), texts, [3])
    assert counted == pytest.approx(tokens_per_round(head, target, texts, [3]))
