"""What chooses the number of nodes, without regard to clocks."""

from collections.abc import Sequence

from jetspec_hf.drafting.node_count import SIZES, NodeCount
from jetspec_hf.drafting.round_costs import PLAIN, Choice


class InTurn(NodeCount):
    """Chooses every size in turn, with the head and of grafts alone, whatever it learns."""

    ALL = (*(Choice(size, runs_head) for size in SIZES[1:] for runs_head in (True, False)), PLAIN)

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Choice] = []

    def choose(self, graft_probs: Sequence[float] = ()) -> Choice:
        super().choose(graft_probs)
        self.chosen.append(self.ALL[(5 * len(self.chosen) + 3) % len(self.ALL)])
        return self.chosen[-1]
