"""The decoding loop for several prompts: one tree for each row, whose texts grow at different paces."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..drafting.node_count import FixedCount, TimedCount
from ..drafting.options import DraftOptions
from ..drafting.rows import RowsDrafter
from ..pair import DecodingPair
from ..tree.acceptance import Acceptance
from ..tree.tree import DraftTree, root_tree
from ..upstream import decoding
from ..verification.dynamic import DynamicVerifier
from ..verification.verifier import Scores
from .emission import Wishes
from .outputs import DraftStatistics, JetSpecGenerateOutput, make_output
from .rows_emission import RowsEmission
from .workers import inner_mode, make_node_count


class _Rounds:
    """The steps of a round, timed, for the rows that still decode."""

    def __init__(
        self,
        pair: DecodingPair,
        options: DraftOptions,
        verifier: DynamicVerifier,
        emission: RowsEmission,
        statistics: DraftStatistics,
        generation_config: GenerationConfig,
    ) -> None:
        self._verifier, self._emission, self._statistics = verifier, emission, statistics
        self._drafter = RowsDrafter(pair, options, len(emission.going))
        mode = inner_mode(generation_config)

        def step(phase: str, function: Callable) -> Callable:
            return statistics.timed(phase, mode()(function))

        self._find = statistics.timed("draft", self._drafter.graft_probs)
        self._run_head, self._graft = step("draft", self._drafter.run_head), step("build", self._drafter.graft)
        self._grow, self._score = step("build", self._drafter.grow), step("verify", verifier.score)
        self._keep, self._select = step("commit", self._keep_paths), step("commit", self._select_rows)
        self._accept, self._observe = (
            statistics.timed("accept", one) for one in (emission.accept, self._drafter.observe)
        )

    def read_prompt(self, input_ids: Tensor, generation_config: GenerationConfig) -> None:
        """Read the prompts, and emit the first token of each."""
        scores, positions = self._statistics.timed("prefill", self._verifier.prefill)(input_ids, generation_config)
        self._drafter.extend(scores.taps, positions, [scores.taps.shape[1]] * len(input_ids))
        self._drafter.observe(input_ids.tolist())
        roots = root_tree(self._emission.anchors)  # the last token of a prompt is a tree, already scored
        self._drafter.observe([one.tokens for one in self._emission.accept(roots, scores.logits)])
        self._drop_finished()

    def run(self, count_of: Callable[[int], FixedCount | TimedCount]) -> None:
        """Draft trees, score them, accept paths, keep them, until all texts are finished."""
        emission = self._emission
        while not emission.is_finished:
            going, max_depths, node_count = list(emission.going), emission.max_depths, count_of(len(emission.going))
            choice = node_count.choose(partial(self._find, max(max_depths)))
            sizes = {"num_nodes": choice.num_nodes, "max_depth": max(max_depths)}
            tree = _within(max_depths, self._draft(emission.anchors, choice.runs_head, **sizes))
            scores: Scores = self._score(tree)
            accepted: list[Acceptance] = self._accept(tree, scores.logits)
            self._observe([one.tokens for one in accepted])
            node_count.observe(choice, tree, [one.path for one in accepted])
            self._keep(len(tree), [one.path for one in accepted], scores.taps)
            for row, one in zip(going, accepted, strict=True):
                for statistics in (self._statistics, self._statistics.rows[row.number]):
                    statistics.count_round(tree, one)
            self._drop_finished()

    def _draft(self, anchors: Tensor, runs_head: bool, **sizes: int) -> DraftTree:
        if not runs_head:
            return self._graft(anchors, **sizes)
        block = self._run_head(anchors, **sizes, padding_mask=self._verifier.padding_mask())
        return self._grow(anchors, block, **sizes)

    def _keep_paths(self, num_nodes: int, paths: Sequence[list[int]], taps: Tensor) -> None:
        num_kept = [len(path) for path in paths]
        padded = torch.tensor([path + [0] * (max(num_kept) - len(path)) for path in paths], device=taps.device)
        kept = taps.gather(1, padded[:, :, None].expand(-1, -1, taps.shape[2]))
        positions = self._verifier.keep_rows(num_nodes, padded.to(self._emission.device), num_kept)
        self._drafter.extend(kept, positions, num_kept)

    def _drop_finished(self) -> None:
        num_before, staying = len(self._emission.going), self._emission.drop_finished()
        if 0 < len(staying) < num_before:
            self._select(staying)

    def _select_rows(self, staying: list[int]) -> None:
        self._verifier.select_rows(staying)
        self._drafter.select_rows(staying)


def _within(max_depths: Sequence[int], tree: DraftTree) -> DraftTree:
    """A tree that asks for no position behind the last of a row, though some rows may draft deeper than others."""
    if min(max_depths) >= len(tree) - 1:
        return tree
    deepest = tree.depths.new_tensor(max_depths)[:, None]
    return replace(tree, depths=tree.depths.minimum(deepest))  # what lies deeper is never accepted


def decode_rows(
    pair: DecodingPair, input_ids: Tensor, wishes: Wishes, options: DraftOptions, model_kwargs: dict[str, Any]
) -> JetSpecGenerateOutput | Tensor:
    """[`~jetspec_hf.decoding.loop.tree_assisted_decoding`] for several prompts, `(batch, tokens)`."""
    (num_rows, num_prompt), generation_config = input_ids.shape, wishes.generation_config
    statistics = DraftStatistics(
        num_prompt_tokens=num_rows * num_prompt,
        rows=[DraftStatistics(num_prompt_tokens=num_prompt) for _ in range(num_rows)],
    )
    emission = RowsEmission(input_ids, wishes, statistics)
    with DynamicVerifier(pair, input_ids, model_kwargs) as verifier:
        rounds = _Rounds(pair, options, verifier, emission, statistics, generation_config)
        rounds.read_prompt(input_ids, generation_config)
        make_count = partial(make_node_count, pair, options, generation_config, lambda: statistics.total_seconds)
        with decoding(pair.target):
            rounds.run(_CountOf(make_count))
        verifier.end_rows(emission.num_steps)
    sequences = emission.end()
    for row, num_tokens in zip(statistics.rows, emission.num_new_tokens, strict=True):
        row.num_new_tokens = num_tokens
    statistics.num_new_tokens = sum(emission.num_new_tokens)
    return make_output(generation_config, sequences, emission.kept, verifier.result_cache(), statistics)


class _CountOf:
    """What says how many nodes a round drafts, by how many rows decode."""

    def __init__(self, make: Callable[[int], FixedCount | TimedCount]) -> None:
        self._make = make
        self._num_rows = 0
        self._count: FixedCount | TimedCount

    def __call__(self, num_rows: int) -> FixedCount | TimedCount:
        if self._num_rows != num_rows:
            self._num_rows, self._count = num_rows, self._make(num_rows)  # which counts time from here on
        return self._count
