"""Numbers out of range."""

from types import SimpleNamespace

import pytest

from jetspec_hf.ranges import check_above, check_at_least


def test_numbers_below_their_least_are_refused_by_name() -> None:
    options = SimpleNamespace(batch_size=1, nodes=[15, 0], rank=None)
    check_at_least(options, batch_size=1, nodes=0, rank=1)
    with pytest.raises(ValueError, match="`nodes` must be at least 1; got 0"):
        check_at_least(options, batch_size=1, nodes=1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got nan"):
        check_at_least(SimpleNamespace(batch_size=float("nan")), batch_size=1)


def test_a_bound_may_be_too_small_itself() -> None:
    options = SimpleNamespace(temperature=0.5)
    check_above(options, temperature=0)
    with pytest.raises(ValueError, match=r"`temperature` must be above 0.5; got 0.5"):
        check_above(options, temperature=0.5)
