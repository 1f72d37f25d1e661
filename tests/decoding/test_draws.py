"""Draws for rows that are ahead of each other, against those that plain sampling makes for all rows at once."""

import random

import pytest
import torch

from jetspec_hf.decoding.draws import Draws

NUM_ROWS, NUM_STEPS = 4, 9
CPU = torch.device("cpu")


@pytest.fixture
def probs() -> torch.Tensor:
    """Distributions of every step and row, `(steps, rows, vocab)`."""
    return torch.randn(NUM_STEPS, NUM_ROWS, 33, generator=torch.Generator().manual_seed(3)).softmax(dim=-1)


def plain_draws(probs: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.stack([torch.multinomial(step, num_samples=1)[:, 0] for step in probs])


@pytest.mark.parametrize("seed", range(5))
def test_rows_draw_what_they_draw_together_whoever_goes_first(seed: int, probs: torch.Tensor) -> None:
    expected = plain_draws(probs, seed)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    draws = Draws(NUM_ROWS, CPU)
    turns = [row for row in range(NUM_ROWS) for _ in range(NUM_STEPS)]
    random.Random(seed).shuffle(turns)
    next_steps = [0] * NUM_ROWS
    for row in turns:
        step = next_steps[row]
        torch.rand(seed)  # whatever others draw in between
        assert draws.draw(row, step, probs[step, row, None]).tolist() == [expected[step, row]]
        next_steps[row] += 1
    draws.end(NUM_STEPS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_steps", [0, 3, NUM_STEPS])
def test_steps_that_were_too_many_leave_no_trace(num_steps: int, probs: torch.Tensor) -> None:
    torch.manual_seed(7)
    for step in probs[:num_steps]:
        torch.multinomial(step, num_samples=1)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    draws = Draws(NUM_ROWS, CPU)
    for step in range(NUM_STEPS):  # one row ran ahead, the others did not draw at all
        draws.draw(2, step, probs[step, 2, None])
    draws.end(num_steps)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_without_any_chance_fails_as_in_plain_sampling() -> None:
    with pytest.raises(RuntimeError, match="prob"):
        Draws(2, CPU).draw(1, 0, torch.full((1, 5), torch.nan))
