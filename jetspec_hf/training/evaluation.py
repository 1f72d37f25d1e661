"""Evaluation: what a head would accept in decoding, measured on finished texts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting.drafter import Block, TreeGrower
from ..drafting.grafts import Grafter, stack_grafts
from ..drafting.options import DraftOptions
from ..pair import DecodingPair
from ..target.reading import TargetReader, read_target
from ..target.spec import input_device
from ..target.unembedding import Unembedding
from ..tree.acceptance import Acceptance, accept, children_of
from ..tree.tree import DraftTree
from .blocks import draft_blocks
from .data import Answer

CHAIN = "chain"  # in place of a number of nodes: the likeliest token of each depth, one below the other
_ANCHORS_AT_ONCE = 64


@torch.no_grad()
def tokens_per_round(
    head: PreTrainedModel,
    target: PreTrainedModel | TargetReader,
    answers: Iterable[Answer],
    num_assistant_tokens: Sequence[int | str],
) -> dict[int | str, float]:
    """How many tokens a round of `generate` emits on average, the bonus token counted, for several numbers of nodes.

    Target and head read each text once; trees then grow from the head's hidden states as in `generate`, by the same
    functions, and the text says what is accepted. On the target's own greedy answers this is what `generate` does.

    Args:
        head (`JetSpecDraftHead`): the head.
        target (`PreTrainedModel` or `TargetReader`): its target, or what reads in its place.
        answers (`Iterable[Answer]`): see [`~jetspec_hf.training.data.answers_of`].
        num_assistant_tokens (`Sequence[int | str]`): numbers of nodes, the root not counted; `"chain"` for a chain.

    Returns:
        `dict[int | str, float]`: tokens per round for each number of nodes.

    Raises:
        ValueError: if head and target do not fit, or no answer is longer than one token, which needs no round.
    """
    emitted: dict[int | str, list[int]] = {num_nodes: [] for num_nodes in num_assistant_tokens}
    for num_nodes, _, accepted in _rounds(head, target, answers, num_assistant_tokens):
        emitted[num_nodes].append(len(accepted.tokens))
    if not all(emitted.values()):
        raise ValueError("No answer is longer than one token; evaluate on longer texts.")
    return {num_nodes: sum(counts) / len(counts) for num_nodes, counts in emitted.items()}


class ScoreBucket(NamedTuple):
    """Drafted nodes with like scores."""

    num_nodes: int
    expected: float  # mean probability of their paths under the head
    observed: float  # share of them that was accepted


@torch.no_grad()
def score_buckets(
    head: PreTrainedModel,
    target: PreTrainedModel | TargetReader,
    answers: Iterable[Answer],
    num_assistant_tokens: int,
    num_buckets: int = 10,
) -> list[ScoreBucket]:
    """How far the scores by which a tree spends its nodes are true; see [`tokens_per_round`] for the arguments.

    Returns:
        `list[ScoreBucket]`: nodes by the probability of their path, in `num_buckets` equal parts of 0 to 1 of which
        the empty ones are left out.
    """
    scores, hits = [], []
    for _, tree, accepted in _rounds(head, target, answers, [num_assistant_tokens]):
        scores += tree.log_probs[0, 1:].exp().tolist()
        hits += [node in set(accepted.path) for node in range(1, len(tree))]
    members: dict[int, list[int]] = {}
    for node, score in enumerate(scores):
        members.setdefault(min(int(score * num_buckets), num_buckets - 1), []).append(node)
    return [
        ScoreBucket(
            len(nodes), sum(scores[node] for node in nodes) / len(nodes), sum(hits[node] for node in nodes) / len(nodes)
        )
        for _, nodes in sorted(members.items())
    ]


class Surprise(NamedTuple):
    """How the target finds a text, in nats per token of the answer."""

    log_prob: float  # mean log-probability of the text's tokens
    entropy: float  # mean entropy of the target's distributions at the same places

    @property
    def excess(self) -> float:
        """About 0 for texts that the target sampled, below for greedy ones, above for those of others."""
        return -self.log_prob - self.entropy


@torch.no_grad()
def surprise(target: PreTrainedModel | TargetReader, answers: Iterable[Answer]) -> Surprise:
    """Tell the target's own answers from those of others; see [`tokens_per_round`] for `answers`."""
    log_probs, entropies = [], []
    for ids, num_prompt in answers:
        text = torch.tensor([list(ids)], device=input_device(target))
        last_hidden = read_target(target, text, layer_ids=[]).last_hidden
        distribution = Unembedding(target)(last_hidden[0, num_prompt - 1 : -1]).log_softmax(dim=-1)
        log_probs.append(distribution.gather(1, text[0, num_prompt:, None])[:, 0])
        entropies.append(-(distribution.exp() * distribution).sum(dim=-1))
    return Surprise(float(torch.cat(log_probs).mean()), float(torch.cat(entropies).mean()))


def _options(pair: DecodingPair, num_nodes: int | str) -> DraftOptions:
    config = pair.head.config
    if isinstance(num_nodes, int):
        return DraftOptions(num_nodes, prompt_lookup_num_tokens=config.prompt_lookup_num_tokens)
    return DraftOptions(config.block_size - 1, is_chain=True)


def _rounds(
    head: PreTrainedModel,
    target: PreTrainedModel | TargetReader,
    answers: Iterable[Answer],
    num_assistant_tokens: Sequence[int | str],
) -> Iterator[tuple[int | str, DraftTree, Acceptance]]:
    """Every round that decoding the texts takes: the number of nodes, the tree, and what of it is accepted."""
    pair = DecodingPair(head, target)
    for ids, num_prompt in answers:
        text = torch.tensor([list(ids)], device=input_device(target))
        states = read_target(target, text, head.config.target_layer_ids).taps
        # The last token needs no round, and the one after the prompt comes with it.
        anchors = torch.arange(num_prompt, text.shape[1] - 1, device=text.device)
        if len(anchors) == 0:
            continue
        blocks = torch.cat([_draft(head, target, text, states, some) for some in anchors.split(_ANCHORS_AT_ONCE)])
        for num_nodes in num_assistant_tokens:
            for tree, accepted in _decode(pair, _options(pair, num_nodes), text[0], blocks, num_prompt):
                yield num_nodes, tree, accepted


def _draft(
    head: PreTrainedModel, target: PreTrainedModel | TargetReader, text: Tensor, states: Tensor, anchors: Tensor
) -> Tensor:
    """The head's hidden states of the blocks at `anchors`, `(anchors, block - 1, hidden)`."""
    positions = torch.arange(text.shape[1], device=head.device)[None]
    text, states, anchors = text.to(head.device), states.to(head.device, head.dtype), anchors.to(head.device)
    return draft_blocks(head, head.config, target.get_input_embeddings(), text, positions, states, anchors[None])[0]


def _decode(
    pair: DecodingPair, options: DraftOptions, text: Tensor, blocks: Tensor, num_prompt: int
) -> Iterator[tuple[DraftTree, Acceptance]]:
    """The rounds of one text, from the hidden states of a block at each token of the answer.

    Its first token comes with the prompt.
    """
    tokens = text.tolist()
    grower, grafter = TreeGrower(pair, options), Grafter(options.prompt_lookup_num_tokens)
    grafter.extend(tokens[: num_prompt + 1])
    anchor = num_prompt
    while anchor < len(tokens) - 1:
        hidden_states, found = blocks[anchor - num_prompt, None], grafter.find()
        grafts = stack_grafts(found, text.device) if found else None
        block = Block(hidden_states, pair.unembed(hidden_states.to(text.device)), grafts)
        tree = grower.grow(
            text[anchor, None], block, num_nodes=options.num_assistant_tokens or 0, max_depth=len(tokens)
        )
        accepted = _follow(tree, tokens[anchor + 1 :])
        yield tree, accepted
        grafter.extend(accepted.tokens)
        anchor += len(accepted.tokens)


def _follow(tree: DraftTree, rest: list[int]) -> Acceptance:
    """Accept what the text says, to its end."""
    rest = rest[::-1]
    return accept(children_of(tree, 0), lambda node: rest.pop(), lambda token: not rest)
