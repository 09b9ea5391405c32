"""Random problems for hypothesis."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helpers.problems import INTERVAL_OPTIONS, SCORE_OPTIONS, Shape

few = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

EVERY_OPTION = (*INTERVAL_OPTIONS, *SCORE_OPTIONS, "scales", "mask", "-inf", "-inf distances")


SMALL_DIMS = st.integers(1, 40)


@st.composite
def shapes(draw, dims=SMALL_DIMS):
    """Small, but enough results that their rms error is not luck."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return Shape(
        batch=draw(st.integers(3, 5)),
        heads=kv_heads * group,
        n_queries=draw(st.integers(1, 40)),
        n_keys=draw(st.integers(1, 60)),
        head_dim=draw(dims),
        kv_heads=kv_heads,
        value_dim=draw(dims),
    )


def subsets(names):
    return st.lists(st.sampled_from(names), unique=True)
