"""Drafting: a head turns the target's taps into a tree of candidates."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cache import make_head_cache
from ..pair import DecodingPair
from ..tree.tree import DraftTree, Proposals, build_tree, root_tree
from .graft_tree import GraftNode, graft_nodes, graft_tree
from .grafts import GraftedProposals, Grafter, stack_grafts
from .options import DraftOptions
from .proposals import DepthProposals, PathProposals


class Block(NamedTuple):
    """What is known of the depths below an anchor before there is a tree."""

    hidden_states: Tensor  # (batch, depths, hidden), the head's
    logits: Tensor  # (batch, depths, vocab), from the target's LM head, without the Markov head
    grafts: tuple[Tensor, Tensor] | None  # tokens and log-probabilities, each (batch, grafts, length)


class Drafter(Protocol):
    """Drafts trees within one `generate` call: one pass of the head, then the best tree under its distributions."""

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """Take in what the target says of newly committed tokens.

        Args:
            taps (`torch.FloatTensor` of shape `(batch, tokens, taps * hidden)`): the target's hidden states.
            positions (`torch.LongTensor` of shape `(batch, tokens)`): where they stand in the text.
        """

    def observe(self, tokens: Sequence[int]) -> None:
        """Take in newly emitted tokens, the prompt first, for grafts."""

    def graft_probs(self, max_depth: int) -> list[float]:
        """Cumulative probabilities of the nodes that a tree of grafts alone may have, falling; none at times."""
        ...

    def graft(self, anchor: Tensor, *, num_nodes: int, max_depth: int) -> DraftTree:
        """The best tree of grafts alone, which is the root alone where there are none or no nodes are asked for.

        Takes what [`run_head`] takes. The head does not run, and reads the taps of this round when it next does.
        """
        ...

    def run_head(
        self, anchor: Tensor, *, num_nodes: int, max_depth: int, padding_mask: Tensor | None = None
    ) -> Block | None:
        """Grafts, and one pass of the head; `None` where no node could be of use.

        Args:
            anchor (`torch.LongTensor` of shape `(batch,)`): the last committed token, right after the taps taken in.
            num_nodes (`int`): most nodes in the tree, the root not counted.
            max_depth (`int`): deepest node that can still be of use.
            padding_mask (`torch.Tensor` of shape `(batch, committed)`, *optional*): nonzero on real committed tokens.
        """
        ...

    def grow(self, anchor: Tensor, block: Block | None, *, num_nodes: int, max_depth: int) -> DraftTree:
        """The best tree under what [`run_head`] gave for the same arguments."""
        ...


class TreeGrower:
    """Finds the best tree under what a head and grafts propose. Nothing but arithmetic, so that it can be compiled.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): all but the number of nodes, which is given for each tree.
    """

    def __init__(self, pair: DecodingPair, options: DraftOptions) -> None:
        self._pair, self._is_chain = pair, options.is_chain
        self._min_log_prob = options.min_log_prob
        self._temperatures: Tensor | None = None
        if pair.head.config.draft_temperatures is not None:
            # Found on greedy texts. Sampling is less certain.
            temperatures = torch.tensor(pair.head.config.draft_temperatures).clamp(min=options.temperature)
            self._temperatures = temperatures.to(pair.input_device)

    def grow(self, anchor: Tensor, block: Block, *, num_nodes: int, max_depth: int) -> DraftTree:
        """The best tree of at most `num_nodes` nodes and `max_depth` depths below an anchor, `(batch,)`."""
        return build_tree(
            anchor,
            self._proposals(anchor, block, num_nodes),
            num_nodes=num_nodes,
            max_depth=max_depth,
            min_log_prob=self._min_log_prob,
            is_chain=self._is_chain,
        )

    def _proposals(self, anchor: Tensor, block: Block, num_nodes: int) -> Proposals:
        """What head and grafts propose below every node."""
        hidden_states, logits, grafts = block
        markov_head, temperatures = self._pair.head.markov_head, self._temperatures
        if temperatures is not None:
            temperatures = temperatures[: logits.shape[1]]
        proposals: DepthProposals | PathProposals
        if markov_head is None:
            proposals = DepthProposals(logits, num_nodes, temperatures)
        else:
            proposals = PathProposals(
                logits,
                hidden_states,
                anchor,
                markov_head,
                self._pair.embed,
                self._pair.lm_head,
                self._pair.head.config.markov_candidates,
                temperatures,
                None if grafts is None else grafts[0],
            )
        return proposals if grafts is None else GraftedProposals(proposals, *grafts)


class PendingTaps:
    """Taps of committed tokens that are not in the head's cache yet."""

    def __init__(self) -> None:
        self._taps: list[Tensor] = []
        self._positions: list[Tensor] = []

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """See [`Drafter`]."""
        self._taps.append(taps)
        self._positions.append(positions)

    def take(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All of them and their positions, which are dropped here."""
        if not self._taps:
            raise RuntimeError("Drafting needs the taps of the tokens before the anchor; call `extend` first.")
        taps, positions = torch.cat(self._taps, dim=1), torch.cat(self._positions, dim=1)
        self._taps, self._positions = [], []
        return taps.to(device, dtype), positions.to(device)


def mask_block(pair: DecodingPair, anchor: Tensor) -> Tensor:
    """The tokens `[anchor, MASK, ...]` of a block, `(batch, block)`."""
    config = pair.head.config
    block = anchor.new_full((anchor.shape[0], config.block_size), config.mask_token_id)
    block[:, 0] = anchor
    return block


class DynamicDrafter:
    """A [`Drafter`] whose cache grows with the text.

    Args:
        pair (`DecodingPair`): the head and its target.
        options (`DraftOptions`): all but the number of nodes, which is given for each tree.
    """

    def __init__(self, pair: DecodingPair, options: DraftOptions) -> None:
        self._pair = pair
        self._grower = TreeGrower(pair, options)
        self._grafter = Grafter(options.prompt_lookup_num_tokens)
        self._min_log_prob, self._is_chain = options.min_log_prob, options.is_chain
        self._pending = PendingTaps()
        self._cache = make_head_cache(pair.head.config)

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """See [`Drafter`]."""
        self._pending.extend(taps, positions)

    def observe(self, tokens: Sequence[int]) -> None:
        """See [`Drafter`]."""
        self._grafter.extend(tokens)

    def graft_probs(self, max_depth: int) -> list[float]:
        """See [`Drafter`]."""
        return [math.exp(node.log_prob) for node in self._graft_nodes(max_depth)]

    def graft(self, anchor: Tensor, *, num_nodes: int, max_depth: int) -> DraftTree:
        """See [`Drafter`]."""
        return graft_tree(anchor, self._graft_nodes(max_depth)[:num_nodes])

    def _graft_nodes(self, max_depth: int) -> list[GraftNode]:
        least, is_chain = self._min_log_prob, self._is_chain
        return graft_nodes(self._grafter.find(), max_depth=max_depth, min_log_prob=least, is_chain=is_chain)

    def run_head(
        self, anchor: Tensor, *, num_nodes: int, max_depth: int, padding_mask: Tensor | None = None
    ) -> Block | None:
        """See [`Drafter`]."""
        if min(max_depth, num_nodes) < 1:
            return None
        # Before the head runs: to bring anything to a device, one waits for what runs there.
        found = self._grafter.find()
        grafts = stack_grafts(found, anchor.device) if found else None
        # No tree of so few nodes is deeper.
        hidden_states = self._block_states(anchor, padding_mask)[:, : min(max_depth, num_nodes)]
        return Block(hidden_states, self._pair.unembed(hidden_states.to(anchor.device)), grafts)

    def grow(self, anchor: Tensor, block: Block | None, *, num_nodes: int, max_depth: int) -> DraftTree:
        """See [`Drafter`]."""
        if block is None:
            return root_tree(anchor)
        return self._grower.grow(anchor, block, num_nodes=num_nodes, max_depth=max_depth)

    def _block_states(self, anchor: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Run the head over the block; hidden states of the masks, `(batch, block - 1, hidden)`."""
        head, block = self._pair.head, mask_block(self._pair, anchor)
        taps, new = self._pending.take(head.device, head.dtype)
        ahead = torch.arange(1, block.shape[1] + 1, device=new.device)
        positions = torch.cat([new, new[:, -1:] + ahead], dim=1)
        if padding_mask is not None:
            padding_mask = torch.nn.functional.pad(padding_mask, (0, block.shape[1]), value=1)
            # The tokens that a continued cache already held were never tapped.
            padding_mask = padding_mask[:, -(self._cache.get_seq_length() + positions.shape[1]) :]
            padding_mask = padding_mask.to(taps.device)
        hidden_states = head(
            noise_embeds=self._pair.embed(block).to(taps),
            context_hidden_states=taps,
            position_ids=positions,
            attention_mask=padding_mask,
            cache=self._cache,
        ).last_hidden_state[:, 1:]
        self._cache.crop(-block.shape[1])
        return hidden_states
