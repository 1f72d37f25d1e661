"""Drafting for several texts at once, whose rounds commit different numbers of tokens."""

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..cache import keep_paths
from ..head.masking import ragged_block_mask
from ..pair import DecodingPair
from ..tree.tree import DraftTree, root_tree
from .drafter import Block, TreeGrower, mask_block
from .graft_tree import GraftNode, graft_nodes, graft_trees
from .grafts import Grafter, stack_rows_of_grafts
from .options import DraftOptions


class RowsDrafter:
    """A [`~jetspec_hf.drafting.drafter.Drafter`] for several rows, each with a text, grafts and a tree of its own.

    A token of a row has the same place in the head's cache as in the padded text; behind the text of a shorter row are
    places without meaning, which masks hide.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): all but the number of nodes, which is given for each tree.
        num_rows (`int`): texts.
    """

    def __init__(self, pair: DecodingPair, options: DraftOptions, num_rows: int) -> None:
        self._pair, self._options = pair, options
        self._grower = TreeGrower(pair, options)
        self._grafters = [Grafter(options.prompt_lookup_num_tokens) for _ in range(num_rows)]
        # Of each row: taps, (tokens, taps * hidden), and positions, (tokens,), that the head has not read.
        self._pending: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_rows)]
        self._cache = DynamicCache()  # full layers, windows or not: those are left to the mask
        self._lengths = [0] * num_rows  # tokens of each row in the cache

    def extend(self, taps: Tensor, positions: Tensor, num_new: Sequence[int]) -> None:
        """Take in what the target says of newly committed tokens, the first `num_new` of each row."""
        for pending, row, places, num in zip(
            self._pending, taps, positions.expand(len(taps), -1), num_new, strict=True
        ):
            pending.append((row[:num], places[:num]))

    def observe(self, rows: Sequence[Sequence[int]]) -> None:
        """Take in newly emitted tokens of each row, the prompt first, for grafts."""
        for grafter, tokens in zip(self._grafters, rows, strict=True):
            grafter.extend(tokens)

    def select_rows(self, staying: Sequence[int]) -> None:
        """Go on with some rows, by their numbers among those that are left."""
        self._grafters = [self._grafters[row] for row in staying]
        self._pending = [self._pending[row] for row in staying]
        self._lengths = [self._lengths[row] for row in staying]
        if self._cache.get_seq_length() > 0:
            self._cache.batch_select_indices(torch.tensor(list(staying)))
            self._cache.crop(max(self._lengths) - self._cache.get_seq_length())

    def graft_probs(self, max_depth: int) -> list[float]:
        """As in [`~jetspec_hf.drafting.drafter.Drafter`], the mean over rows."""
        probs = [[math.exp(node.log_prob) for node in nodes] for nodes in self._graft_nodes(max_depth)]
        return [sum(column) / len(probs) for column in zip_longest(*probs, fillvalue=0.0)]

    def graft(self, anchors: Tensor, *, num_nodes: int, max_depth: int) -> DraftTree:
        """As in [`~jetspec_hf.drafting.drafter.Drafter`]; impossible nodes fill the tree of a row that has fewer."""
        return graft_trees(anchors, [nodes[:num_nodes] for nodes in self._graft_nodes(max_depth)])

    def run_head(
        self, anchors: Tensor, *, num_nodes: int, max_depth: int, padding_mask: Tensor | None = None
    ) -> Block | None:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]."""
        if min(max_depth, num_nodes) < 1:
            return None
        found = [grafter.find() for grafter in self._grafters]
        grafts = stack_rows_of_grafts(found, anchors.device) if any(found) else None
        hidden_states = self._block_states(anchors, padding_mask)[:, :max_depth]
        return Block(hidden_states, self._pair.unembed(hidden_states.to(anchors.device)), grafts)

    def grow(self, anchors: Tensor, block: Block | None, *, num_nodes: int, max_depth: int) -> DraftTree:
        """See [`~jetspec_hf.drafting.drafter.Drafter`]."""
        if block is None:
            return root_tree(anchors)
        return self._grower.grow(anchors, block, num_nodes=num_nodes, max_depth=max_depth)

    def _graft_nodes(self, max_depth: int) -> list[list[GraftNode]]:
        least, is_chain = self._options.min_log_prob, self._options.is_chain
        return [
            graft_nodes(grafter.find(), max_depth=max_depth, min_log_prob=least, is_chain=is_chain)
            for grafter in self._grafters
        ]

    def _block_states(self, anchors: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Run the head over the blocks; hidden states of the masks, `(batch, block - 1, hidden)`."""
        head, blocks = self._pair.head, mask_block(self._pair, anchors)
        taps, positions, new = self._take_pending(head.device, head.dtype)
        before, num_new = torch.tensor([self._lengths, new], device=head.device)
        self._lengths = [length + more for length, more in zip(self._lengths, new, strict=True)]
        ahead = torch.arange(1, blocks.shape[1] + 1, device=head.device)
        hidden_states = head(
            noise_embeds=self._pair.embed(blocks).to(taps),
            context_hidden_states=taps,
            position_ids=torch.cat([positions, positions.gather(1, num_new[:, None] - 1) + ahead], dim=1),
            attention_mask=self._masks(before, num_new, taps.shape[1], padding_mask),
            cache=self._cache,
        ).last_hidden_state[:, 1:]
        self._cache.crop(-blocks.shape[1])
        paths = torch.arange(taps.shape[1], device=head.device).expand(len(new), -1)
        keep_paths(self._cache, taps.shape[1], paths, before, max(self._lengths))
        return hidden_states

    def _take_pending(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
        """All that was not read, `(batch, most, width)`, its positions, `(batch, most)`, and how many of each row."""
        if not all(self._pending):
            raise RuntimeError("Drafting needs the taps of the tokens before the anchor; call `extend` first.")
        rows = [[torch.cat(parts) for parts in zip(*pending, strict=True)] for pending in self._pending]
        self._pending = [[] for _ in rows]
        taps, positions = (pad_sequence(list(kind), batch_first=True) for kind in zip(*rows, strict=True))
        return taps.to(device, dtype), positions.to(device), [len(positions) for _, positions in rows]

    def _masks(self, before: Tensor, num_new: Tensor, most_new: int, padding_mask: Tensor | None) -> dict[str, Tensor]:
        """The head's masks of each layer type, where `_lengths` counts the new tokens already."""
        config = self._pair.head.config
        if padding_mask is not None:
            # The tokens that a continued cache already held were never tapped.
            padding_mask = padding_mask[:, padding_mask.shape[1] - max(self._lengths) :].to(before.device)
            padding_mask = nn.functional.pad(padding_mask, (0, most_new), value=1)
        return {
            layer_type: ragged_block_mask(
                before,
                num_new,
                num_past=self._cache.get_seq_length(),
                most_new=most_new,
                block_size=config.block_size,
                is_causal=config.is_causal,
                window=config.sliding_window if layer_type == "sliding_attention" else None,
                padding_mask=padding_mask,
            )
            for layer_type in set(config.layer_types)
        }
