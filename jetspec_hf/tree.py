"""The draft tree: which continuations of the last committed token the target is asked to check."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Children of the nodes at one depth: log-probabilities and tokens, each `(batch, parents, branching)`, best child
# first. The middle dimension is 1 where every parent has the same children.
Children = tuple[Tensor, Tensor]
# The children at a depth of nodes that hold given tokens, each below a given node; see `build_tree`.
Propose = Callable[[int, Tensor, Tensor], Children]


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
    propose: Propose,
    *,
    num_nodes: int,
    max_depth: int,
    min_log_prob: float = -math.inf,
) -> DraftTree:
    """Grow the tree whose nodes have the highest cumulative log-probability.

    Exactly the `num_nodes` best prefixes, as best-first search with lazily opened siblings finds them (the paper's
    accumulated log-probability, section 3, without its habit of adding all children of a node at once). A prefix is
    never likelier than its own prefixes, so the best of each depth contain every parent that the next depth needs:
    one sort per depth, on the device, without waiting for it.

    Args:
        root_tokens (`torch.LongTensor` of shape `(batch,)`): the last committed tokens.
        propose (`Callable`):
            `propose(depth, tokens, above)` gives the children at `depth` (1 is right below the root) of nodes that hold
            `tokens`, `(batch, parents)`, each below the node numbered `above`, `(batch, parents)`, of the call before;
            see `Children`. Scores must not exceed 0; a NaN counts as impossible.
        num_nodes (`int`): most nodes below the root.
        max_depth (`int`): deepest node.
        min_log_prob (`float`): nodes less likely than this are left out.

    Returns:
        `DraftTree`: at most `1 + num_nodes` nodes, by depth, then by falling probability.
    """
    root = root_tree(root_tokens)
    if num_nodes < 1 or max_depth < 1:
        return root
    levels, level = [root], root
    first_of_level = 0
    for depth in range(1, max_depth + 1):
        children = propose(depth, level.tokens, level.parents)
        num_above, level = len(level), _best_children(level, *children, depth, num_nodes)
        levels.append(DraftTree(level.tokens, level.parents + first_of_level, level.depths, level.log_probs))
        first_of_level += num_above
    everything = DraftTree(
        *(torch.cat([getattr(level, name) for level in levels], dim=1) for name in DraftTree.__annotations__)
    )
    return _best_nodes(everything, num_nodes, min_log_prob)


def _best_children(above: DraftTree, log_probs: Tensor, tokens: Tensor, depth: int, num_nodes: int) -> DraftTree:
    """The `num_nodes` likeliest children of one depth; their parents are numbered within `above`."""
    scores = above.log_probs[:, :, None] + torch.nan_to_num(log_probs, nan=-math.inf)  # (batch, parents, branching)
    branching = scores.shape[2]
    scores, best = scores.flatten(1).topk(min(num_nodes, len(above) * branching), dim=1)
    parents = best // branching
    # The same children under every parent stand there once.
    children = best if tokens.shape[1] > 1 else best % branching
    tokens = tokens.flatten(1).gather(1, children)
    return DraftTree(tokens, parents, torch.full_like(tokens, depth), scores)


def _best_nodes(tree: DraftTree, num_nodes: int, min_log_prob: float) -> DraftTree:
    """The root and the `num_nodes` likeliest other nodes, in their order."""
    # Stable: of two equally likely nodes the one nearer to the root goes first, so a child never outlives its parent.
    scores, order = tree.log_probs.sort(dim=1, descending=True, stable=True)
    num_kept = min(1 + num_nodes, len(tree))
    if min_log_prob > -math.inf:
        num_kept = min(num_kept, max(1, int((scores >= min_log_prob).sum(1).max())))
    kept = order[:, :num_kept].sort(dim=1).values
    new_index = torch.full_like(tree.tokens, -1).scatter(
        1, kept, torch.arange(num_kept, device=kept.device).expand_as(kept)
    )
    parents = tree.parents.gather(1, kept)
    parents = torch.where(parents < 0, -1, new_index.gather(1, parents.clamp(min=0)))
    return DraftTree(tree.tokens.gather(1, kept), parents, tree.depths.gather(1, kept), tree.log_probs.gather(1, kept))
