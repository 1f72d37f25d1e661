"""Verification: the target scores all nodes of a tree in one forward pass."""

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from ..cache import check_cache
from ..pair import DecodingPair
from ..target.taps import HiddenStateTaps
from ..tree.tree import DraftTree
from ..upstream import CACHE, prefill

# Tensors that tell text from images, sound and the like. Of text alone they are 0.
MODALITY_INPUTS = {"token_type_ids", "mm_token_type_ids"}
# What is made anew for each tree. The rest of a call's inputs goes to every verification as it stands.
_MADE = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "cache_position"}


class Scores(NamedTuple):
    """What a target says of some tokens."""

    logits: Tensor  # (batch, tokens, vocab)
    taps: Tensor  # (batch, tokens, taps * hidden)


class Verifier(Protocol):
    """The target within one `generate` call: its cache, and where the text stands in it."""

    def prefill(self, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Scores, Tensor]:
        """Read the prompt, or what of it the cache does not hold yet.

        Returns:
            `tuple`: logits after the last token, `(batch, 1, vocab)`, and taps of the tokens read; and the positions of
            these, `(batch, tokens)`.
        """
        ...

    def padding_mask(self) -> Tensor | None:
        """Nonzero on real tokens among the committed ones; `None` where there is no padding."""
        ...

    def score(self, tree: DraftTree) -> Scores:
        """One forward over all nodes, under masks that show each only its own path."""
        ...

    def keep(self, num_nodes: int, path: Tensor) -> Tensor:
        """Keep the accepted nodes of the tree just scored, drop the rest, and return their positions.

        Args:
            num_nodes (`int`): nodes in that tree.
            path (`torch.LongTensor` of shape `(batch, kept)`): the nodes to keep, root first.
        """
        ...

    def result_cache(self) -> Cache:
        """The cache for whoever goes on with it."""
        ...


class TextLayout:
    """Where the committed tokens of a text stand, and which of them are padding.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt.
        model_kwargs (`dict`): what `generate` has prepared.
    """

    def __init__(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        padding_mask = model_kwargs.get("attention_mask")
        is_padded = padding_mask is not None and not bool(padding_mask.all())
        self.padding_mask: Tensor | None = padding_mask if is_padded else None  # of the prompt, (batch, tokens)
        # The newest ones. Targets whose rotary embedding knows time, height and width have (rows, batch, tokens), and
        # of text all rows alike.
        self._positions: Tensor
        if model_kwargs.get("position_ids") is not None:
            given = model_kwargs["position_ids"]  # one row may stand for all
            self._positions = given.expand(*given.shape[:-2], len(input_ids), -1)
        elif self.padding_mask is not None:
            self._positions = (self.padding_mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            self._positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        self._last = self._positions[..., -1:]

    @property
    def last_position(self) -> Tensor:
        """The position of the newest committed token, as the target takes it, `(batch, 1)`."""
        return self._last

    def newest(self, num_tokens: int) -> Tensor:
        """Positions of the newest tokens of the prompt as the head counts them, `(batch, tokens)`."""
        return _of_text(self._positions)[:, -num_tokens:]

    def advance(self, num_tokens: int, num_kept: Tensor | None = None) -> Tensor:
        """Commit tokens; their positions as the head counts them, `(batch, tokens)`.

        Args:
            num_tokens (`int`): of each row.
            num_kept (`torch.LongTensor` of shape `(batch,)`, *optional*): of each row, where some commit fewer.
        """
        start = self._last + 1
        positions = start + torch.arange(num_tokens, device=start.device)
        self._last = positions[..., -1:] if num_kept is None else self._last + num_kept[:, None]
        return _of_text(positions)

    def select(self, rows: Tensor) -> None:
        """Go on with some rows alone."""
        self._last = self._last[..., rows, :]
        if self.padding_mask is not None:
            self.padding_mask = self.padding_mask[rows]

    def put_before(self, num_virtual: int, *, are_read: bool) -> None:
        """Let virtual tokens stand before the prompt; where they were read, they have positions, and padding too."""
        num_tokens = num_virtual + self._positions.shape[1]
        self._positions = self._positions + num_virtual
        if are_read:
            self._positions = torch.arange(num_tokens, device=self._positions.device)[None]
        self._last = self._positions[..., -1:]
        if self.padding_mask is not None:
            self.padding_mask = torch.nn.functional.pad(self.padding_mask, (num_virtual, 0), value=1)


def _of_text(positions: Tensor) -> Tensor:
    """The row of text, where positions know time, height and width."""
    return positions[0] if positions.ndim == 3 else positions


def fixed_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What goes from a call to every verification as it stands."""
    return {name: value for name, value in model_kwargs.items() if name not in _MADE | MODALITY_INPUTS}


def has_virtual_tokens(target: PreTrainedModel) -> bool:
    """Whether PEFT puts tokens of its own before the prompt (prefix tuning, prompt tuning and their kin)."""
    prepare = vars(target).get("prepare_inputs_for_generation")
    return inspect.ismethod(prepare) and prepare.__self__ is not target


def read_prompt(
    pair: DecodingPair,
    taps: HiddenStateTaps,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    layout: TextLayout,
) -> tuple[Scores, Tensor, Cache]:
    """What [`Verifier.prefill`] returns, and the cache that holds the prompt.

    Args:
        pair (`DecodingPair`): the head and its target.
        taps (`HiddenStateTaps`): on the target.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt.
        generation_config (`GenerationConfig`): of the call.
        model_kwargs (`dict`): what `generate` has prepared, with the cache to fill.
        layout (`TextLayout`): of the prompt; learns of virtual tokens.

    Raises:
        ValueError: if the cache then does not hold what was read; says what may be the reason, and what to do.
    """
    held: Cache = model_kwargs[CACHE]
    num_before = int(held.get_seq_length())  # a static cache counts in place
    with taps.recording():
        outputs = prefill(pair.target, input_ids, generation_config, model_kwargs)
    states, cache = taps.take(), outputs.get(CACHE)
    num_read = states.shape[1]
    _check_prefill(pair.target, cache, held, num_before, num_read, input_ids.shape[1])
    if has_virtual_tokens(pair.target):  # in a cache of PEFT's own, or by reading them
        num_cached = cache.get_seq_length()
        layout.put_before(num_cached - input_ids.shape[1], are_read=num_read == num_cached)
    return Scores(outputs.logits[:, -1:], states), layout.newest(num_read), cache


def _check_prefill(
    target: PreTrainedModel, cache: Cache | None, held: Cache, num_before: int, num_read: int, num_prompt: int
) -> None:
    """Refuse to go on from `cache`, returned for `held`, unless it grew by what was read or by virtual tokens too."""
    num_cached = 0 if cache is None else int(cache.get_seq_length())
    if cache is None or num_cached == num_before:
        raise ValueError(
            f"{type(target).__name__} caches nothing of the prompt, as in training with checkpointing; "
            "call `target.eval()` before `generate`."
        )
    if has_virtual_tokens(target):
        check_cache(cache)
        if num_before > 0 or num_cached <= num_prompt:
            raise ValueError(
                f"PEFT puts virtual tokens before the prompt, but after {num_prompt} tokens the cache holds "
                f"{num_cached}; start from an empty cache, with a PEFT that is made for this version of transformers."
            )
    elif cache is not held or num_cached - num_before != num_read:
        raise ValueError(
            f"{type(target).__name__} read {num_read} tokens, and its cache grew by {num_cached - num_before}, or is "
            "another than `generate` gave it; call `generate` without `assistant_model`."
        )
