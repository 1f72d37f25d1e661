"""A head as transformers' candidate generators are: for loops of others, and to see what is drafted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..pair import DecodingPair
from ..tree.tree import DraftTree
from .drafter import DynamicDrafter
from .options import DraftOptions


class JetSpecCandidateGenerator(CandidateGenerator):
    """Drafts trees, or chains for those who cannot verify trees, within one `generate` call.

    Args:
        head (`JetSpecDraftHead`): the head, or one wrapped by PEFT.
        target (`PreTrainedModel`): lends its embedding and LM head.
        num_assistant_tokens (`int`): most nodes in a tree, the root not counted.
        options: the others of [`~jetspec_hf.DraftOptions`].
    """

    def __init__(
        self, head: PreTrainedModel, target: PreTrainedModel, *, num_assistant_tokens: int, **options: Any
    ) -> None:
        self._num_nodes = num_assistant_tokens
        self._drafter = DynamicDrafter(DecodingPair(head, target), DraftOptions(num_assistant_tokens, **options))

    def extend(self, taps: Tensor, positions: Tensor) -> None:
        """Take in what the target says of newly committed tokens; see [`~jetspec_hf.drafting.drafter.Drafter`]."""
        self._drafter.extend(taps, positions)

    def observe(self, tokens: Sequence[int]) -> None:
        """Take in newly emitted tokens, the prompt first, for grafts."""
        self._drafter.observe(tokens)

    def draft(self, anchor: Tensor, *, max_depth: int, padding_mask: Tensor | None = None) -> DraftTree:
        """One pass of the head, and the best tree under its distributions.

        Args:
            anchor (`torch.LongTensor` of shape `(batch,)`): the last committed token, right after the taps taken in.
            max_depth (`int`): deepest node that can still be of use.
            padding_mask (`torch.Tensor` of shape `(batch, committed)`, *optional*): nonzero on real committed tokens.
        """
        sizes = {"num_nodes": self._num_nodes, "max_depth": max_depth}
        return self._drafter.grow(anchor, self._drafter.run_head(anchor, **sizes, padding_mask=padding_mask), **sizes)

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The likeliest chain after `input_ids`, `(1, tokens)`, for a caller who cannot verify trees."""
        tree = self.draft(input_ids[:, -1], max_depth=self._num_nodes)
        path = [0]
        for node, parent in enumerate(tree.parents[0].tolist()):
            if parent == path[-1]:  # nodes come by depth, then by falling probability
                path.append(node)
        return torch.cat([input_ids, tree.tokens[:, path[1:]]], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt: the number of nodes is given."""
