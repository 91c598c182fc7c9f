"""Budgets: every spelling, exact rounding, and never a byte too much."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsearch.budget import check_feasible, parse_budget, resources
from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.formats import parse_formats
from bitsearch.formats.integer import IntFormat
from bitsearch.solvers import MEASURED, SOLVERS, load_solver
from bitsearch.solvers.problem import Problem
from bitsearch.space import Space, make_space
from bitsearch.units import Matrix, ModelLayout, Unit

FORMATS = [
    IntFormat("int", bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (None, 16, 100)
    for symmetric in (False, True)
] + list(parse_formats("bf16,fp16"))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Random models with random candidates, some units frozen."""
    kinds = st.sampled_from(["linear", "fused", "experts", "embedding", "head"])
    units = []
    for index in range(draw(st.integers(1, 6))):
        matrices = tuple(
            Matrix(f"u{index}.{part}.weight", *shape, count=count)
            for part, (shape, count) in enumerate(
                draw(
                    st.lists(
                        st.tuples(
                            st.tuples(st.integers(1, 40), st.integers(1, 130)), st.integers(1, 3)
                        ),
                        min_size=1,
                        max_size=3,
                    )
                )
            )
        )
        units.append(Unit(f"u{index}", draw(kinds), matrices, index))
    layout = ModelLayout(
        "m", None, "M", "m", "bfloat16", tuple(units), (), {"norm": draw(st.integers(0, 99))}
    )
    candidates = draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=5, unique=True))
    frozen = draw(
        st.dictionaries(
            st.sampled_from([unit.name for unit in units]),
            st.sampled_from([format.name for format in FORMATS]),
            max_size=2,
        )
    )
    return make_space(layout, candidates, frozen)


@pytest.mark.parametrize(
    "text, factor",
    [
        ("4bpw", Fraction(4, 8)),
        ("4.25bpw", Fraction(17, 32)),
        (" 3.3 bpw ", Fraction(33, 80)),
        ("0.3x", Fraction(6, 10)),
        ("1x", Fraction(2)),
    ],
)
def test_relative_budgets_round_down(space: Space, text: str, factor: Fraction) -> None:
    """Exact also where binary fractions are not."""
    budget = parse_budget(text, space)
    exact = factor * space.layout.parameters
    assert budget.limit == exact.numerator // exact.denominator and not budget.linear_only


@pytest.mark.parametrize(
    "text, limit",
    [
        ("1000B", 1000), ("12KB", 12_000), ("600MB", 600_000_000), ("1.2GB", 1_200_000_000),
        ("2TB", 2 * 10**12), ("1KiB", 1024), ("1.5MiB", 3 << 19), ("1.2GiB", 1_288_490_188),
        ("0.1TiB", 109_951_162_777),
    ],
)  # fmt: skip
def test_sizes(space: Space, text: str, limit: int) -> None:
    assert parse_budget(text, space).limit == limit


def test_linear_budgets_count_block_weights_alone(space: Space) -> None:
    parameters = 2 * ((48 + 20 + 20) * 48 + 48 * 48 + 3 * 2 * 30 * 48)
    budget = parse_budget("4.1bpw@linear", space)
    assert budget.linear_only and budget.limit == parameters * 41 // 80


@pytest.mark.parametrize(
    "text",
    [
        "", "4", "bpw", "4 bits", "4.bpw", ".5x", "-4bpw", "4bpw@all", "600MB@linear", "1e3MB",
        "4,5bpw", "600mb", "nanbpw", "infx", "12parsecs", "4bpw 5bpw", "٤bpw", f"{'9' * 5000}B",
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused_with_examples(space: Space, text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a budget; write 3\.5bpw"):
        parse_budget(text, space)


@pytest.mark.parametrize("text, side", [("1.9bpw", "below"), ("0B", "below"), ("17bpw", "above"),
                                        ("1bpw@linear", "below"), ("1.1x", "above")])  # fmt: skip
def test_out_of_range_budgets_are_refused_with_the_range(
    space: Space, text: str, side: str
) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        check_feasible([parse_budget(text, space)], space)
    low, high = space.byte_range(space.linear if "linear" in text else None)
    assert side in str(caught.value) and f"{low:,} to {high:,} bytes" in str(caught.value)
    assert str(caught.value).count("@linear") == (2 if "linear" in text else 0)


def test_the_exact_ends_of_the_range_are_feasible(space: Space) -> None:
    for limit in space.byte_range():
        check_feasible([parse_budget(f"{limit}B", space)], space)
    with pytest.raises(InfeasibleBudget):
        check_feasible([parse_budget(f"{space.byte_range()[0] - 1}B", space)], space)


@given(spaces(), st.booleans())
def test_the_printed_range_is_feasible(space: Space, linear: bool) -> None:
    scope = "@linear" if linear and space.linear.any() else ""
    with pytest.raises(InfeasibleBudget) as caught:
        check_feasible([parse_budget(f"0.0001bpw{scope}", space)], space)
    found = re.search(r"([\d.]+) to ([\d.]+) bpw", str(caught.value))
    assert found
    for end in found.groups():
        check_feasible([parse_budget(f"{end}bpw{scope}", space)], space)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in MEASURED])
def test_no_solver_exceeds_a_budget(solver: str) -> None:
    solve = load_solver(solver)

    @settings(max_examples=40)
    @given(spaces(), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
    def check(space: Space, position: float, seed: int, linear: bool) -> None:
        scope = space.linear if linear else None
        low, high = space.byte_range(scope)
        limit = low + int(position * (high - low))
        if linear:
            parameters = sum(u.parameters for u in np.array(space.units)[space.linear])
            if not parameters:
                return
            bits = -(-8 * limit * 10**9 // parameters)
            text = f"{bits // 10**9}.{bits % 10**9:09d}bpw@linear"
        else:
            text = f"{limit}B"
        budget = parse_budget(text, space)
        check_feasible([budget], space)
        costs, limits = resources([budget], space)
        damage = np.random.default_rng(seed).exponential(size=space.bytes.shape)
        solution = solve(Problem(np.where(space.allowed, damage, np.inf), costs, limits), seed=0)
        rows = np.arange(len(space.units))
        assert space.allowed[rows, solution.choice].all()
        if linear:
            spent = int(space.bytes[rows, solution.choice][space.linear].sum())
        else:
            spent = space.total_bytes(solution.choice)
        assert spent <= budget.limit

    check()


def test_budgets_hold_together(layouts: Callable[..., ModelLayout]) -> None:
    """A tight linear budget beside a loose total one: both kept, the embedding gets the rest."""
    space = make_space(layouts(tied=False), parse_formats("int{2,3,4,8}-g32,bf16"))
    budgets = [parse_budget(text, space) for text in ("3.6bpw@linear", "8bpw")]
    check_feasible(budgets, space)
    costs, limits = resources(budgets, space)
    damage = 4.0 ** -np.array([[c.bits for c in space.candidates]] * len(space.units))
    solution = load_solver("milp")(Problem(damage, costs, limits), seed=0)
    chosen = space.bytes[np.arange(len(space.units)), solution.choice]
    assert chosen[space.linear].sum() <= budgets[0].limit
    assert space.total_bytes(solution.choice) <= budgets[1].limit
    widths = np.array([space.candidates[c].bits for c in solution.choice])
    assert widths[~space.linear].min() > widths[space.linear].max()
