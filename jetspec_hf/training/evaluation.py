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
_ANCHORS_AT_ONCE = 32  # whose logits are held, for every depth


class ScoreBucket(NamedTuple):
    """Drafted nodes with like scores."""

    num_nodes: int
    expected: float  # mean probability of their paths under the head
    observed: float  # share of them that was accepted


class Drafting(NamedTuple):
    """How well a head drafts."""

    tokens_per_round: dict[int | str, float]  # for each number of nodes
    scores: list[ScoreBucket]  # of the largest trees


@torch.no_grad()
def measure_drafting(
    head: PreTrainedModel,
    target: PreTrainedModel | TargetReader,
    answers: Iterable[Answer],
    num_assistant_tokens: Sequence[int | str],
    num_buckets: int = 10,
) -> Drafting:
    """How many tokens a round of `generate` emits on average, and how far the scores of trees are true.

    Target, head and LM head read each text once; trees then grow as in `generate`, by the same functions, and the text
    says what is accepted. On the target's own greedy answers this is what `generate` does.

    Args:
        head (`JetSpecDraftHead`): the head.
        target (`PreTrainedModel` or `TargetReader`): its target, or what reads in its place.
        answers (`Iterable[Answer]`): see [`~jetspec_hf.training.data.answers_of`].
        num_assistant_tokens (`Sequence[int | str]`): numbers of nodes, the root not counted; `"chain"` for a chain.
        num_buckets (`int`, *optional*, defaults to 10): equal parts of 0 to 1 by which nodes are put together.

    Returns:
        `Drafting`: tokens per round, the bonus token counted, for each number of nodes; and for the largest of them
        the nodes by the probability of their path, without the parts that have none.

    Raises:
        ValueError: if head and target do not fit, or no answer is longer than one token, which needs no round.
    """
    emitted: dict[int | str, list[int]] = {num_nodes: [] for num_nodes in num_assistant_tokens}
    largest = max((one for one in num_assistant_tokens if isinstance(one, int)), default=None)
    scores: list[float] = []
    hits: list[bool] = []
    for num_nodes, tree, accepted in _rounds(head, target, answers, num_assistant_tokens):
        emitted[num_nodes].append(len(accepted.tokens))
        if num_nodes == largest:
            path = set(accepted.path)
            scores += tree.log_probs[0, 1:].exp().tolist()
            hits += [node in path for node in range(1, len(tree))]
    if not all(emitted.values()):
        raise ValueError("No answer is longer than one token; evaluate on longer texts.")
    means = {num_nodes: sum(counts) / len(counts) for num_nodes, counts in emitted.items()}
    return Drafting(means, _buckets(scores, hits, num_buckets))


def tokens_per_round(
    head: PreTrainedModel,
    target: PreTrainedModel | TargetReader,
    answers: Iterable[Answer],
    num_assistant_tokens: Sequence[int | str],
) -> dict[int | str, float]:
    """The tokens per round of [`measure_drafting`]."""
    return measure_drafting(head, target, answers, num_assistant_tokens).tokens_per_round


def _buckets(scores: list[float], hits: list[bool], num_buckets: int) -> list[ScoreBucket]:
    """Nodes of all trees, by score."""
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
        drafts = [_Draft(pair, _options(pair, num_nodes), text[0], num_prompt) for num_nodes in num_assistant_tokens]
        for some in anchors.split(_ANCHORS_AT_ONCE):
            hidden_states = _draft(head, target, text, states, some)
            logits = pair.unembed(hidden_states.to(text.device))
            for num_nodes, draft in zip(num_assistant_tokens, drafts, strict=True):
                for tree, accepted in draft.rounds(int(some[0]), hidden_states, logits):
                    yield num_nodes, tree, accepted


def _draft(
    head: PreTrainedModel, target: PreTrainedModel | TargetReader, text: Tensor, states: Tensor, anchors: Tensor
) -> Tensor:
    """The head's hidden states of the blocks at `anchors`, `(anchors, block - 1, hidden)`."""
    positions = torch.arange(text.shape[1], device=head.device)[None]
    text, states, anchors = text.to(head.device), states.to(head.device, head.dtype), anchors.to(head.device)
    return draft_blocks(head, head.config, target.get_input_embeddings(), text, positions, states, anchors[None])[0]


class _Draft:
    """The rounds of one text with one number of nodes. Its first token comes with the prompt."""

    def __init__(self, pair: DecodingPair, options: DraftOptions, text: Tensor, num_prompt: int) -> None:
        self._grower, self._grafter = TreeGrower(pair, options), Grafter(options.prompt_lookup_num_tokens)
        self._num_nodes = options.num_assistant_tokens or 0
        self._text, self._tokens = text, text.tolist()
        self._anchor = num_prompt
        self._grafter.extend(self._tokens[: num_prompt + 1])

    def rounds(self, first: int, hidden_states: Tensor, logits: Tensor) -> Iterator[tuple[DraftTree, Acceptance]]:
        """Go on as far as blocks are known: those whose anchors stand at `first` and after, one for each row."""
        while self._anchor - first < len(logits):
            row, tokens = self._anchor - first, self._tokens
            found = self._grafter.find()
            grafts = stack_grafts(found, self._text.device) if found else None
            tree = self._grower.grow(
                self._text[self._anchor, None],
                Block(hidden_states[row, None], logits[row, None], grafts),
                num_nodes=self._num_nodes,
                max_depth=len(tokens),
            )
            accepted = _follow(tree, tokens[self._anchor + 1 :])
            yield tree, accepted
            self._grafter.extend(accepted.tokens)
            self._anchor += len(accepted.tokens)


def _follow(tree: DraftTree, rest: list[int]) -> Acceptance:
    """Accept what the text says, to its end."""
    rest = rest[::-1]
    return accept(children_of(tree, 0), lambda node: rest.pop(), lambda token: not rest)
