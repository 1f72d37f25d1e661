"""The drafting half: a head turns the target's taps into a tree of candidates."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .cache import make_head_cache
from .grafts import GraftedProposals, Grafter, stack_grafts
from .proposals import DepthProposals, PathProposals
from .tree import DraftTree, Proposals, build_tree, root_tree
from .unembedding import Unembedding


class Block(NamedTuple):
    """What is known of the depths below an anchor before there is a tree."""

    hidden_states: Tensor  # (batch, depths, hidden), the head's
    logits: Tensor  # (batch, depths, vocab), from the target's LM head, without the Markov head
    grafts: tuple[Tensor, Tensor] | None  # tokens and log-probabilities, each (grafts, length)


class JetSpecCandidateGenerator(CandidateGenerator):
    """Drafts trees within one `generate` call. Owns the head's cache and the taps that are not in it yet.

    Args:
        head (`JetSpecDraftHead`): the head, or one wrapped by PEFT.
        target (`PreTrainedModel`): lends its embedding and LM head.
        num_assistant_tokens (`int`): most nodes in a tree, the root not counted; may be set anew for each tree.
        assistant_confidence_threshold (`float`): least cumulative probability of a node.
        branching (`int`, *optional*): most children of a node; 1 drafts a chain.
        temperature (`float`): at which the target samples; 0 where it decodes greedily.
        prompt_lookup_num_tokens (`int`): longest graft in tokens, from what the text said before; 0 for none.
    """

    def __init__(
        self,
        head: PreTrainedModel,
        target: PreTrainedModel,
        *,
        num_assistant_tokens: int,
        assistant_confidence_threshold: float = 0.0,
        branching: int | None = None,
        temperature: float = 0.0,
        prompt_lookup_num_tokens: int = 0,
    ) -> None:
        self._head = head
        self._embed = target.get_input_embeddings()
        self._lm_head = target.get_output_embeddings()
        self._unembed = Unembedding(target)
        self.num_assistant_tokens = num_assistant_tokens
        self._branching = branching
        threshold = assistant_confidence_threshold
        self._min_log_prob = math.log(threshold) if threshold > 0 else -math.inf
        self._temperatures: Tensor | None = None
        if head.config.draft_temperatures is not None:
            # Found on greedy texts. Sampling is less certain.
            self._temperatures = torch.tensor(head.config.draft_temperatures).clamp(min=temperature)
        self._grafter = Grafter(prompt_lookup_num_tokens) if prompt_lookup_num_tokens > 0 else None
        self._cache = make_head_cache(head.config)
        self._taps: list[Tensor] = []  # committed, but not in the head's cache yet
        self._positions: list[Tensor] = []

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """Take in newly committed tokens.

        Args:
            taps (`torch.FloatTensor` of shape `(batch, tokens, taps * hidden)`): the target's hidden states.
            positions (`torch.LongTensor` of shape `(batch, tokens)`): where they stand in the text.
        """
        self._taps.append(taps)
        self._positions.append(positions)

    def observe(self, tokens: Sequence[int]) -> None:
        """Take in newly emitted tokens, the prompt first, for grafts."""
        if self._grafter is not None:
            self._grafter.extend(tokens)

    def draft(self, anchor: Tensor, *, max_depth: int, padding_mask: Tensor | None = None) -> DraftTree:
        """One pass of the head, and the best tree under its distributions.

        Args:
            anchor (`torch.LongTensor` of shape `(batch,)`): the last committed token, right after the taps taken in.
            max_depth (`int`): deepest node that can still be of use.
            padding_mask (`torch.Tensor` of shape `(batch, committed)`, *optional*): nonzero on real committed tokens.
        """
        block = self.draft_block(anchor, max_depth=max_depth, padding_mask=padding_mask)
        return self.build(anchor, block, max_depth=max_depth)

    def grow(self, anchor: Tensor, hidden_states: Tensor, *, max_depth: int) -> DraftTree:
        """The best tree, from the head's hidden states of a block, `(batch, block - 1, hidden)`; see [`draft`]."""
        hidden_states = hidden_states[:, :max_depth]
        logits = self._unembed(hidden_states.to(anchor.device))
        block = Block(hidden_states, logits, self._find_grafts(anchor.device))
        return self.build(anchor, block, max_depth=max_depth)

    def draft_block(self, anchor: Tensor, *, max_depth: int, padding_mask: Tensor | None = None) -> Block | None:
        """The first half of [`draft`]: grafts, and one pass of the head; `None` where no node could be of use."""
        if min(max_depth, self.num_assistant_tokens) < 1:
            return None
        # Before the head runs: to bring anything to a device, one waits for what runs there.
        grafts = self._find_grafts(anchor.device)
        hidden_states = self._block_states(anchor, padding_mask)[:, :max_depth]
        return Block(hidden_states, self._unembed(hidden_states.to(anchor.device)), grafts)

    def build(self, anchor: Tensor, block: Block | None, *, max_depth: int) -> DraftTree:
        """The second half of [`draft`]: the best tree under what [`draft_block`] gave."""
        return root_tree(anchor) if block is None else self.best_tree(anchor, block, max_depth)

    def best_tree(self, anchor: Tensor, block: Block, max_depth: int) -> DraftTree:
        """As [`build`] does. Nothing but arithmetic, so that it can be compiled."""
        return build_tree(
            anchor,
            self._proposals(anchor, block),
            num_nodes=self.num_assistant_tokens,
            max_depth=max_depth,
            min_log_prob=self._min_log_prob,
            branching=self._branching,
        )

    def _find_grafts(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        found = self._grafter.find() if self._grafter is not None else []
        return stack_grafts(found, device) if found else None

    def _proposals(self, anchor: Tensor, block: Block) -> Proposals:
        """What head and grafts propose below every node."""
        hidden_states, logits, grafts = block
        temperatures = self._temperatures
        if temperatures is not None:
            temperatures = temperatures[: logits.shape[1]].to(logits.device)
        markov_head = self._head.markov_head
        proposals: DepthProposals | PathProposals
        if markov_head is None:
            proposals = DepthProposals(logits, self.num_assistant_tokens, temperatures)
        else:
            proposals = PathProposals(
                logits,
                hidden_states,
                anchor,
                markov_head,
                self._embed,
                self._lm_head,
                self._head.config.markov_candidates,
                temperatures,
                None if grafts is None else grafts[0],
            )
        return proposals if grafts is None else GraftedProposals(proposals, *grafts)

    def _block_states(self, anchor: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Run the head over the block; hidden states of the masks, `(batch, block - 1, hidden)`."""
        block, taps, new = self._take_new(anchor)
        ahead = torch.arange(1, block.shape[1] + 1, device=new.device)
        positions = torch.cat([new, new[:, -1:] + ahead], dim=1)
        if padding_mask is not None:
            padding_mask = torch.nn.functional.pad(padding_mask, (0, block.shape[1]), value=1)
            # The tokens that a continued cache already held were never tapped.
            padding_mask = padding_mask[:, -(self._cache.get_seq_length() + positions.shape[1]) :]
            padding_mask = padding_mask.to(taps.device)
        hidden_states = self._head(
            noise_embeds=self._embed(block).to(taps),
            context_hidden_states=taps,
            position_ids=positions,
            attention_mask=padding_mask,
            cache=self._cache,
        ).last_hidden_state[:, 1:]
        self._cache.crop(-block.shape[1])
        return hidden_states

    def _take_new(self, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block `[anchor, MASK, ...]`, and taps and positions that the head has not read, on its device."""
        if not self._taps:
            raise RuntimeError("`draft` needs the taps of the tokens before the anchor; call `extend` first.")
        config, device = self._head.config, self._head.device
        block = anchor.new_full((anchor.shape[0], config.block_size), config.mask_token_id)
        block[:, 0] = anchor
        taps, positions = torch.cat(self._taps, dim=1), torch.cat(self._positions, dim=1)
        self._taps, self._positions = [], []
        return block, taps.to(device, self._head.dtype), positions.to(device)

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The likeliest chain after `input_ids`, `(1, tokens)`, for a caller who cannot verify trees."""
        tree = self.draft(input_ids[:, -1], max_depth=self.num_assistant_tokens)
        path = [0]
        for node, parent in enumerate(tree.parents[0].tolist()):
            if parent == path[-1]:  # nodes come by depth, then by falling probability
                path.append(node)
        return torch.cat([input_ids, tree.tokens[:, path[1:]]], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt: the number of nodes is given."""
