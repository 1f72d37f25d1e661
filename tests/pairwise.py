"""Fewer tests of options that are crossed: most faults show where two values meet, hardly any needs three."""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable


def pairwise(cases: Iterable[tuple[Hashable, ...]]) -> list[tuple]:
    """A few of the cases, such that any two values that meet in one of all meet in one of these, too."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    uses: Counter = Counter()  # how often each value was chosen: of equally good cases, the one of rarer values
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: (len(pairs[case] & missing), -sum(uses[it] for it in enumerate(case))))
        chosen.append(best)
        missing -= pairs[best]
        uses.update(enumerate(best))
    return chosen
