"""What is measured before a policy ships: within budget, named, controls among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsearch.budget import parse_budget, resources
from bitsearch.contenders import Contender, byte_matched, random_policies, searched
from bitsearch.formats import parse_formats
from bitsearch.solvers import load_solver
from bitsearch.solvers.pareto_dp import front
from bitsearch.solvers.problem import Problem
from bitsearch.space import Space, make_space
from bitsearch.units import ModelLayout

CANDIDATES = "int{2,3,4,5,8}-g64,int{2,3,4,8}-g32,bf16"


def problem_of(space: Space, limit: int, seed: int = 0) -> Problem:
    """Log-normal sensitivities, damage 4^−b."""
    widths = np.array([candidate.bits for candidate in space.candidates])
    sensitivity = np.random.default_rng(seed).lognormal(0, 1, len(space.units))
    damage = np.where(space.allowed, sensitivity[:, None] * 4.0**-widths, np.inf)
    costs, limits = resources([parse_budget(f"{limit}B", space)], space)
    return Problem(damage, costs, limits)


def all_contenders(problem: Problem, space: Space) -> list[Contender]:
    """Those of a search."""
    solver = load_solver("pareto_dp")
    best = solver(problem, seed=0).choice
    curve = front(problem.damage, problem.costs[0])
    return [
        *searched(problem, best, curve, space, solver, 0),
        *byte_matched(problem, space, 0),
        *random_policies(problem, 3, 0),
    ]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.floats(0, 1),
    blocks=st.integers(1, 4),
    tied=st.booleans(),
    candidates=st.sampled_from([CANDIDATES, "int4-g32", "int{3,8}-row-sym,fp16", "bf16,fp16"]),
    frozen=st.sampled_from([{}, {"embed": "int8-row"}, {"blocks.0.*": "bf16"}, {"*": "int4-g32"}]),
    seed=st.integers(0, 1000),
)
def test_every_contender_keeps_the_budget(
    layouts: Callable[..., ModelLayout],
    position: float,
    blocks: int,
    tied: bool,
    candidates: str,
    frozen: dict[str, str],
    seed: int,
) -> None:
    space = make_space(layouts(blocks, tied=tied), parse_formats(candidates), frozen)
    low, high = space.byte_range()
    limit = low + int(position * (high - low))
    problem = problem_of(space, limit, seed)
    for contender in all_contenders(problem, space):
        assert problem.feasible(contender.choice), contender.name
        assert space.total_bytes(contender.choice) <= limit, contender.name


def contenders_at(space: Space, bits: float) -> list[Contender]:
    """Searched ones and controls at a budget in bits."""
    return all_contenders(problem_of(space, int(bits * space.layout.parameters / 8)), space)


@pytest.fixture
def wide(layouts: Callable[..., ModelLayout]) -> Space:
    """A model with many candidates."""
    return make_space(layouts(4, tied=False), parse_formats(CANDIDATES))


@pytest.mark.parametrize("bits", [2.9, 4.6, 6.0])
def test_names_and_choices_are_distinct(wide: Space, bits: float) -> None:
    found = contenders_at(wide, bits)
    assert len({contender.name for contender in found}) == len(found)
    mixes = [c.choice.tobytes() for c in found if not c.is_control]
    assert len(set(mixes)) == len(mixes)


def test_all_controls_are_there(wide: Space) -> None:
    found = {c.name: c for c in contenders_at(wide, 4.8) if c.is_control}
    for name in ("uniform-int4-g64", "filled-g64", "first-last-g64", "embed8-filled-g64",
                 "filled-g32", "random", "reversed"):  # fmt: skip
        assert name in found, found.keys()
    four = [c.name for c in wide.candidates].index("int4-g64")
    assert (found["uniform-int4-g64"].choice == four).all()
    eight = [c.name for c in wide.candidates].index("int8-g64")
    outside = [i for i, unit in enumerate(wide.units) if unit.kind in ("embedding", "head")]
    assert (found["embed8-filled-g64"].choice[outside] == eight).all()


def test_controls_spend_on_the_layers_alone_too(wide: Space) -> None:
    """The embedding stays, and the layers go two widths up where the budget allows."""
    names = [c.name for c in wide.candidates]
    outside = [i for i, unit in enumerate(wide.units) if unit.kind in ("embedding", "head")]
    inside = [i for i in range(len(wide.units)) if i not in outside]
    four, five, eight = (names.index(f"int{bits}-g64") for bits in (4, 5, 8))
    size = wide.bytes[outside, four].sum() + wide.bytes[inside, five].sum()
    extra = int(wide.bytes[inside, eight].min() - wide.bytes[inside, five].min())
    limit = int(size) + wide.layout.kept_bytes + extra
    found = {c.name: c.choice for c in contenders_at(wide, 8 * limit / wide.layout.parameters)}
    assert (found["embed4-filled-g64"][outside] == four).all()
    assert set(found["embed4-filled-g64"][inside].tolist()) <= {five, eight}


def test_filled_controls_spend_what_uniform_leaves(wide: Space) -> None:
    limit = int(4.8 * wide.layout.parameters / 8)
    found = {c.name: c.choice for c in contenders_at(wide, 4.8)}
    four, five = ([c.name for c in wide.candidates].index(f"int{bits}-g64") for bits in (4, 5))
    assert set(found["filled-g64"].tolist()) == {four, five}
    spent = wide.total_bytes(found["filled-g64"])
    assert wide.total_bytes(found["uniform-int4-g64"]) < spent <= limit
    assert limit - spent < (wide.bytes[:, five] - wide.bytes[:, four]).max()


def test_the_optimum_is_no_worse_than_any_contender(wide: Space) -> None:
    problem = problem_of(wide, int(4.1 * wide.layout.parameters / 8))
    found = all_contenders(problem, wide)
    assert found[0].name == "searched"
    assert all(
        problem.total_damage(found[0].choice) <= problem.total_damage(c.choice) + 1e-12
        for c in found
    )


def test_higher_floors_hold(wide: Space) -> None:
    floors = [c for c in contenders_at(wide, 4.6) if c.name.startswith("at-least-")]
    assert floors
    for contender in floors:
        least = int(contender.name.split("-")[2])
        assert min(wide.candidates[c].bits for c in contender.choice) >= least


def test_neighbours_on_the_front_are_smaller(wide: Space) -> None:
    found = contenders_at(wide, 4.6)
    best = wide.total_bytes(found[0].choice)
    near = [wide.total_bytes(c.choice) for c in found if c.name.startswith("front-")]
    assert near and all(0.97 * best < size < best for size in near)


def test_contenders_are_reproducible(wide: Space) -> None:
    first, second = contenders_at(wide, 3.7), contenders_at(wide, 3.7)
    assert [c.name for c in first] == [c.name for c in second]
    assert all((a.choice == b.choice).all() for a, b in zip(first, second, strict=True))
