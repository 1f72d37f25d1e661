"""Verification with a cache that grows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from ..cache import ParkedRows, close_windows, keep_path, keep_paths, open_windows, release
from ..head.masking import as_bias
from ..pair import DecodingPair
from ..target.spec import SLIDING
from ..target.taps import HiddenStateTaps
from ..tree.masking import ancestor_mask, tree_mask
from ..tree.tree import DraftTree
from ..upstream import CACHE, first_cached, record_past
from .verifier import Scores, TextLayout, fixed_kwargs, read_prompt


class DynamicVerifier:
    """A [`~jetspec_hf.verification.verifier.Verifier`] whose cache grows with the text.

    Hooks are on the target from `__enter__` to `__exit__`, which leaves the cache as plain decoding would.

    Args:
        pair (`DecodingPair`): the head, whose `target_layer_ids` are tapped, and its target.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the prompt.
        model_kwargs (`dict`): what `generate` has prepared, the cache among it.
    """

    def __init__(self, pair: DecodingPair, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        self._pair, self._model_kwargs = pair, model_kwargs
        self._taps = HiddenStateTaps(pair.target, pair.head.config.target_layer_ids)
        self._layout = TextLayout(input_ids, model_kwargs)
        self._fixed_kwargs = fixed_kwargs(model_kwargs)
        self._cache: Cache = model_kwargs[CACHE]
        # Of several rows: those that are finished, and cached tokens of each of the others.
        self._parked: ParkedRows | None = None
        self._lengths: list[int] = []
        self._num_prompt = 0  # cached tokens when it was read
        self._num_wanted: int | None = None  # cached tokens that are of use when all have ended

    def __enter__(self) -> "DynamicVerifier":
        self._taps.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._taps.__exit__(*exception)
        if self._parked is not None:
            self._parked.put_back(self._cache, self._lengths)
            if self._num_wanted is not None:
                self._cache.crop(self._num_wanted - self._cache.get_seq_length())
            close_windows(self._cache)
        release(self._cache)

    def prefill(self, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Scores, Tensor]:
        """See [`~jetspec_hf.verification.verifier.Verifier`]."""
        scores, positions, self._cache = read_prompt(
            self._pair, self._taps, input_ids, generation_config, self._model_kwargs, self._layout
        )
        # Only from here on: a long prompt need not stay whole in sliding layers.
        if len(input_ids) == 1:
            record_past(self._cache, True)
        else:
            open_windows(self._cache)
            self._num_prompt = self._cache.get_seq_length()
            self._parked, self._lengths = ParkedRows(len(input_ids)), [self._num_prompt] * len(input_ids)
        return scores, positions

    def padding_mask(self) -> Tensor | None:
        """See [`~jetspec_hf.verification.verifier.Verifier`]; of shape `(batch, cached)`."""
        padding_mask = self._layout.padding_mask
        if padding_mask is None:
            return None
        missing = self._cache.get_seq_length() - padding_mask.shape[1]
        return torch.nn.functional.pad(padding_mask, (0, missing), value=1)

    def score(self, tree: DraftTree) -> Scores:
        """See [`~jetspec_hf.verification.verifier.Verifier`]."""
        with self._taps.recording():
            outputs = self._pair.target(
                input_ids=tree.tokens,
                attention_mask=self._masks(tree),
                position_ids=self._layout.last_position + 1 + tree.depths,
                use_cache=True,
                **{CACHE: self._cache},
                **self._fixed_kwargs,
            )
        return Scores(outputs.logits, self._taps.take())

    def keep(self, num_nodes: int, path: Tensor) -> Tensor:
        """See [`~jetspec_hf.verification.verifier.Verifier`]."""
        keep_path(self._cache, num_nodes, path)
        return self._layout.advance(path.shape[1])

    def keep_rows(self, num_nodes: int, paths: Tensor, num_kept: Sequence[int]) -> Tensor:
        """The same for several rows, which keep different numbers of nodes.

        Args:
            num_nodes (`int`): nodes in each tree.
            paths (`torch.LongTensor` of shape `(batch, kept)`): as in [`keep`]; any node behind those that a row keeps.
            num_kept (`Sequence[int]`): nodes that each row keeps.

        Returns:
            `torch.LongTensor` of shape `(batch, kept)`: positions, without meaning behind those that a row keeps.
        """
        before = self._row_lengths()
        self._lengths = [length + kept for length, kept in zip(self._lengths, num_kept, strict=True)]
        keep_paths(self._cache, num_nodes, paths, before, max(self._lengths))
        return self._layout.advance(paths.shape[1], paths.new_tensor(num_kept))

    def select_rows(self, staying: Sequence[int]) -> None:
        """Go on with some of several rows, by their numbers among those that are left; the others are finished."""
        assert self._parked is not None  # there are several
        self._parked.park(self._cache, staying, self._lengths)
        self._lengths = [self._lengths[row] for row in staying]
        self._layout.select(torch.tensor(list(staying), device=self._layout.last_position.device))

    def end_rows(self, num_new: int) -> None:
        """Let all rows end with so many new tokens, though some may have cached more."""
        self._num_wanted = self._num_prompt + num_new - 1  # the newest token is never in the cache

    def result_cache(self) -> Cache:
        """See [`~jetspec_hf.verification.verifier.Verifier`]."""
        return self._cache

    def _masks(self, tree: DraftTree) -> Tensor | dict[str, Tensor] | None:
        """One mask where all layers attend alike, else one for each layer type; none where a single node sees all."""
        spec, padding_mask, num_past = self._pair.spec, self.padding_mask(), self._cache.get_seq_length()
        lengths = self._row_lengths() if len(set(self._lengths)) > 1 else None
        # Where sliding layers keep their past, transformers 5.15 makes a mask of too few keys for one token.
        if len(tree) == 1 and padding_mask is None and lengths is None and SLIDING not in spec.layer_types:
            return None
        ancestors = ancestor_mask(tree.parents)
        masks = {}
        for layer_type in set(spec.layer_types):
            mask = tree_mask(
                ancestors,
                tree.depths,
                num_past=num_past,
                first_key=first_cached(self._cache, spec.layer_types.index(layer_type), len(tree)),
                window=spec.window_of(layer_type),
                padding_mask=padding_mask,
                lengths=lengths,
            )
            # The one form that both sdpa and eager attention read alike.
            masks[layer_type] = as_bias(mask, self._pair.target.dtype)
        # Families of one layer type take no dictionary.
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _row_lengths(self) -> Tensor:
        return torch.tensor(self._lengths, device=self._layout.last_position.device)
