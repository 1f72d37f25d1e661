"""Drafting trees of few shapes, so that it can be compiled once for all rounds."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Cache

from ..cache import StaticCaches
from ..compiling import CompileStep
from ..head.masking import static_block_mask
from ..pair import DecodingPair
from ..tree.tree import DraftTree, root_tree
from ..upstream import num_cached
from .drafter import Block, PendingTaps, TreeGrower, mask_block
from .grafts import MOST_GRAFTS, Grafter, stack_grafts
from .options import DraftOptions


class StaticDrafter:
    """A [`~jetspec_hf.drafting.drafter.Drafter`] with a cache of fixed size and trees of full size.

    Where candidates run out, impossible ones fill a tree up, and `assistant_confidence_threshold` leaves none out.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): all but the number of nodes, which is given for each tree.
        caches (`StaticCaches`): the head's is filled.
        compile_step (`Callable`): what compiles a step.
        max_depth (`int`): deepest node that a tree may have, whatever a round asks for.
    """

    def __init__(
        self,
        pair: DecodingPair,
        options: DraftOptions,
        *,
        caches: StaticCaches,
        compile_step: CompileStep,
        max_depth: int,
    ) -> None:
        self._pair, self._cache, self._max_depth = pair, caches.head, max_depth
        self._grower = TreeGrower(pair, replace(options, assistant_confidence_threshold=0.0))
        self._grafter = Grafter(options.prompt_lookup_num_tokens)
        self._graft_length = options.prompt_lookup_num_tokens
        self._pending = PendingTaps()
        self._run_head, self._grow = compile_step(_run_head), compile_step(_grow)

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]."""
        self._pending.extend(taps, positions)

    def observe(self, tokens: Sequence[int]) -> None:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]."""
        self._grafter.extend(tokens)

    def graft_probs(self, max_depth: int) -> list[float]:
        """Grafts come with the head alone: a tree without it would be a further shape to compile."""
        return []

    def graft(self, anchor: Tensor, *, num_nodes: int, max_depth: int) -> DraftTree:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]; always the root alone."""
        # A copy, whose strides do not tell what it is a part of, since a graph is for one set of strides.
        return root_tree(anchor.clone(memory_format=torch.contiguous_format))

    def run_head(
        self, anchor: Tensor, *, num_nodes: int, max_depth: int, padding_mask: Tensor | None = None
    ) -> Block | None:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]; of all depths of the block whatever `max_depth` is."""
        if num_nodes < 1:
            return None
        grafts = None
        if self._graft_length > 0:  # always as many, of the same length
            grafts = stack_grafts(self._grafter.find(), anchor.device, (MOST_GRAFTS, self._graft_length))
        head, block = self._pair.head, mask_block(self._pair, anchor)
        taps, positions = self._pending.take(head.device, head.dtype)
        num_new = taps.shape[1]
        # A prompt, and what was decoded plainly, has its own length, and no graph makes the tensors of a cache.
        is_usual = num_new <= self._max_depth + 1 and self._cache.layers[0].is_initialized
        missing = max(0, self._max_depth + 1 - num_new)
        ahead = torch.arange(1, block.shape[1] + 1, device=positions.device)
        positions = torch.cat([nn.functional.pad(positions, (0, missing)), positions[:, -1:] + ahead], dim=1)
        taps, new = nn.functional.pad(taps, (0, 0, 0, missing)), torch.full((), num_new, device=taps.device)
        if padding_mask is not None:
            padding_mask = padding_mask.to(taps.device)
        run_head = self._run_head if is_usual else _run_head
        hidden_states, logits = run_head(self._pair, self._cache, block, taps, positions, new, padding_mask)
        return Block(hidden_states, logits, grafts)

    def grow(self, anchor: Tensor, block: Block | None, *, num_nodes: int, max_depth: int) -> DraftTree:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]; of full size and depth."""
        # A copy, whose strides do not tell what it is a part of, since a graph is for one set of strides.
        anchor = anchor.clone(memory_format=torch.contiguous_format)
        if block is None:
            return root_tree(anchor)
        return DraftTree(*self._grow(self._grower, anchor, block, num_nodes, self._max_depth))


def _run_head(
    pair: DecodingPair,
    cache: Cache,
    block: Tensor,
    taps: Tensor,
    positions: Tensor,
    num_new: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Let the head read `num_new` of `taps`, `(1, new, taps * hidden)`, and draft `block`, `(1, block)`.

    The block stands in the cache behind all of `taps`, and the next pass writes over what was not meant to be read.

    Returns:
        `tuple`: hidden states and logits of the masks.
    """
    head, width, block_size = pair.head, taps.shape[1], block.shape[1]
    num_read = num_cached(cache.layers[0]).to(num_new.device, copy=True)
    num_context = num_read + num_new
    masks = {
        layer_type: static_block_mask(
            num_context,
            num_read + width,
            cache.get_max_length(),
            block_size,
            is_causal=head.config.is_causal,
            window=head.config.sliding_window if layer_type == "sliding_attention" else None,
            padding_mask=padding_mask,
        )
        for layer_type in set(head.config.layer_types)
    }
    hidden_states = head(
        noise_embeds=pair.embed(block).to(head.device, head.dtype),
        context_hidden_states=taps,
        position_ids=positions,
        attention_mask=masks,
        cache=cache,
    ).last_hidden_state[:, 1:]
    for layer in cache.layers:
        num_cached(layer).copy_(num_context)
    return hidden_states, pair.unembed(hidden_states.to(block.device))


def _grow(grower: TreeGrower, anchor: Tensor, block: Block, num_nodes: int, max_depth: int) -> tuple[Tensor, ...]:
    """The fields of the best tree."""
    tree = grower.grow(anchor, block, num_nodes=num_nodes, max_depth=max_depth)
    return tree.tokens, tree.parents, tree.depths, tree.log_probs
