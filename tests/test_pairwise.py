import itertools

from pairwise import pairwise


def test_any_two_values_that_may_meet_do() -> None:
    cases = [case for case in itertools.product("abcde", "xyz", (0, 1), (0, 1)) if case[:2] != ("a", "y")]
    chosen = pairwise(cases)
    assert set(chosen) < set(cases)
    assert len(chosen) <= 16  # 14 for letters alone
    for first, second in itertools.combinations(range(4), 2):
        assert {(case[first], case[second]) for case in chosen} == {(case[first], case[second]) for case in cases}
