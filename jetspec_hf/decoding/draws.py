"""The random draws of plain sampling, for rows that are not at the same step."""

import torch
from torch import Tensor

_MOST_BYTES = 1 << 26  # of noise that is kept


class Draws:
    """Draws for each row and step what plain decoding would draw, which draws for all rows step by step.

    `torch.multinomial` takes one number from each distribution as a race: the token whose probability by exponential
    noise is largest. The noise of a step depends on the state of the generator before it, which is kept, a few thousand
    bytes or less; that of the newest steps is kept too, and made again for a row that comes to an older one.

    Args:
        num_rows (`int`): rows of the batch, finished ones too.
        device (`torch.device`): where plain decoding draws.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._generator = torch if device.type == "cpu" else torch.get_device_module(device)
        self._options = {} if device.type == "cpu" else {"device": device}
        self._states = [self._generator.get_rng_state(**self._options)]  # before each step
        self._noise: dict[int, Tensor] = {}  # of steps, (rows, vocab), the newest last

    def draw(self, row: int, step: int, probs: Tensor) -> Tensor:
        """The token of a row, `(1,)`, from its distribution, `(1, vocab)`; steps of a row come in their order."""
        if not probs.sum().isfinite():
            torch.multinomial(probs, num_samples=1)  # says what is wrong
        return (probs / self._noise_of(step, probs)[row]).argmax(dim=-1)

    def end(self, num_steps: int) -> None:
        """Leave the generator as plain decoding does after so many steps."""
        self._generator.set_rng_state(self._states[num_steps], **self._options)

    def _noise_of(self, step: int, probs: Tensor) -> Tensor:
        if step in self._noise:
            return self._noise[step]
        self._generator.set_rng_state(self._states[step], **self._options)
        noise = probs.new_empty(self._num_rows, probs.shape[1]).exponential_(1)
        if step + 1 == len(self._states):
            self._states.append(self._generator.get_rng_state(**self._options))
        self._noise[step] = noise
        while len(self._noise) > max(1, _MOST_BYTES // noise.nbytes):
            del self._noise[next(iter(self._noise))]
        return noise
