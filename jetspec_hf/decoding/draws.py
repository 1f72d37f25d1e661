"""The random draws of plain sampling, for rows that are not at the same step."""

import torch
from torch import Tensor


class Draws:
    """Draws for each row and step what plain decoding would draw, which draws for all rows step by step.

    What a row gets depends on the state of the generator before that step and on its own distribution. States are
    kept, a few thousand bytes each or less, and the draws of a step are made again for every row that comes to it.

    Args:
        num_rows (`int`): rows of the batch, finished ones too.
        device (`torch.device`): where plain decoding draws.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._generator = torch if device.type == "cpu" else torch.get_device_module(device)
        self._options = {} if device.type == "cpu" else {"device": device}
        self._states = [self._generator.get_rng_state(**self._options)]  # before each step

    def draw(self, row: int, step: int, probs: Tensor) -> Tensor:
        """The token of a row, `(1,)`, from its distribution, `(1, vocab)`; steps of a row come in their order."""
        self._generator.set_rng_state(self._states[step], **self._options)
        batch = probs.new_ones(self._num_rows, probs.shape[1])
        batch[row] = probs[0]
        drawn = torch.multinomial(batch, num_samples=1)[row]
        if step + 1 == len(self._states):
            self._states.append(self._generator.get_rng_state(**self._options))
        return drawn

    def end(self, num_steps: int) -> None:
        """Leave the generator as plain decoding does after so many steps."""
        self._generator.set_rng_state(self._states[num_steps], **self._options)
