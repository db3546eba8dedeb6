"""A short run of the hostile calls; fuzz.py makes the long one."""

from fuzz import TARGETS, run


def test_hostile_calls_end_well():
    outcomes = run(calls=150, seed=0)
    assert [str(o) for o in outcomes if o.failure is not None] == []
    assert len({o.target for o in outcomes}) > len(TARGETS) / 2
    assert {"right answer", "TypeError", "ValueError"} <= {o.kind for o in outcomes}
