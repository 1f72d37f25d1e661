"""The draft tree: which continuations of the last committed token the target is asked to check."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Proposals(Protocol):
    """Which tokens may stand at each depth below the root, and how likely they are below a node.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, depths, choices)`): different ones at each depth.
    """

    tokens: Tensor

    def __call__(self, depth: int, choices: Tensor, above: Tensor) -> Tensor:
        """How likely each token of a depth is below each node of the depth above; asked depth by depth.

        Args:
            depth (`int`): 1 is right below the root.
            choices (`torch.LongTensor` of shape `(batch, nodes)`): which of its depth's tokens each node holds; 0 for
                the root.
            above (`torch.LongTensor` of shape `(batch, nodes)`): the number, in the call before, of the node above it.

        Returns:
            `torch.FloatTensor` of shape `(batch, nodes or 1, choices)`: log-probabilities, none above 0 and none NaN;
            1 where all nodes have the same. Choices left out at the end are impossible.
        """
        ...


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens as a tree, flat, every parent before its children.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, nodes)`):
            Node 0 is the root: the last committed token. Siblings hold different tokens.
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            The node above each node; -1 at the root.
        depths (`torch.LongTensor` of shape `(batch, nodes)`):
            Steps below the root.
        log_probs (`torch.FloatTensor` of shape `(batch, nodes)`):
            Cumulative log-probability of the path to each node under the head; 0 at the root.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[1]


def root_tree(tokens: Tensor) -> DraftTree:
    """A tree of the root alone, for each row of `tokens`, shape `(batch,)`."""
    tokens = tokens[:, None]
    zeros = torch.zeros_like(tokens)
    return DraftTree(tokens, zeros - 1, zeros, zeros.float())


def build_tree(
    root_tokens: Tensor,
    proposals: Proposals,
    *,
    num_nodes: int,
    max_depth: int,
    min_log_prob: float = -math.inf,
    is_chain: bool = False,
) -> DraftTree:
    """Grow the tree whose nodes have the highest cumulative log-probability.

    Exactly the `num_nodes` best prefixes, as best-first search with lazily opened siblings finds them (the paper's
    accumulated log-probability, section 3, without its habit of adding all children of a node at once). A prefix is
    never likelier than its own prefixes, so the best of each depth contain every parent that the next depth needs:
    one sort per depth, on the device, without waiting for it.

    Args:
        root_tokens (`torch.LongTensor` of shape `(batch,)`): the last committed tokens.
        proposals (`Proposals`): tokens and scores of what may stand below a node.
        num_nodes (`int`): most nodes below the root.
        max_depth (`int`): deepest node, where proposals go as deep.
        min_log_prob (`float`): nodes less likely than this are left out.
        is_chain (`bool`, *optional*, defaults to `False`): one node at each depth, the likeliest below the one above.

    Returns:
        `DraftTree`: at most `1 + num_nodes` nodes, by depth, then by falling probability.
    """
    root = root_tree(root_tokens)
    max_depth = min(max_depth, proposals.tokens.shape[1])
    if num_nodes < 1 or max_depth < 1:
        return root
    num_choices = proposals.tokens.shape[2]
    scores, choices, above = root.log_probs, root.depths, root.depths
    levels = []
    first_above = -1  # nodes below the root are numbered from 0
    for depth in range(max_depth):
        children = scores[:, :, None] + proposals(depth + 1, choices, above)  # (batch, nodes, choices)
        num_above, num_children = children.shape[1:]
        width = 1 if is_chain else min(num_nodes, num_above * num_children)
        scores, places = children.flatten(1).topk(width, dim=1)
        above, choices = places // children.shape[2], places % children.shape[2]
        levels.append((scores, above + first_above, choices + depth * num_choices))
        first_above += num_above
    scores, parents, places = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))

    kept = _best(scores, num_nodes, min_log_prob)
    places = places.gather(1, kept)
    below = (
        proposals.tokens.flatten(1).gather(1, places),
        torch.searchsorted(kept, parents.gather(1, kept), right=True),  # the kept ones up to the parent; none: the root
        places // num_choices + 1,
        scores.gather(1, kept),
    )
    parts = (root.tokens, root.parents, root.depths, root.log_probs)
    return DraftTree(*(torch.cat(pair, dim=1) for pair in zip(parts, below, strict=True)))


def _best(scores: Tensor, num_nodes: int, min_log_prob: float) -> Tensor:
    """The numbers of the `num_nodes` best of some nodes, in their order."""
    # Stable: of two equally likely nodes the one nearer to the root goes first, so a child never outlives its parent.
    falling, order = scores.sort(dim=1, descending=True, stable=True)
    if min_log_prob > -math.inf:
        num_nodes = min(num_nodes, int((falling >= min_log_prob).sum(1).max()))
    return order[:, :num_nodes].sort(dim=1).values
