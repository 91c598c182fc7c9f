"""Each recipe's formula and rule of choice on a case worked out by hand.

The parts are the ones that the recipe file names; every expected number comes
from the arithmetic in the docstring. What an estimator reads off a model (a
gradient, a trace, a KL) is put in its place here, and is checked against
models in tests/objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitsearch.objectives.damage import (
    backup_noise,
    first_order,
    gradient_alignment,
    hessian_eigenvalue,
    hessian_trace,
    noise_slope,
)
from bitsearch.objectives.damage.jsd_from_widest import divergence
from bitsearch.recipes import load_recipe
from bitsearch.solvers import amq, load_solver
from bitsearch.solvers.pareto_dp import front
from bitsearch.solvers.problem import Problem

Known = Callable[..., Any]
Patch = pytest.MonkeyPatch


def test_hawq_v1(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """S = λ/n ranks the units, whatever their errors.

    λ = 8, 6, 6 over n = 4, 2, 1 weights: S = 2, 3, 6, so the ranking is c, b, a. At 4 and
    8 bits (n/2 and n bytes, here 2 and 4, 1 and 2, 1 and 2) the low policy takes 4 bytes;
    5 bytes raise c alone and 6 raise c and b, though a's λ is the largest.
    """
    scoring = known("int4-row-sym,int8-row-sym", {"a": [[9.0] * 4] * 2, "b": [[1.0] * 2] * 2,
                                                  "c": [[0.1]] * 2})  # fmt: skip
    monkeypatch.setattr(hessian_eigenvalue, "top_eigenvalue", lambda _, u: (8.0, 6.0, 6.0)[u])
    damage = table("hawq-v1", scoring)
    assert damage[:, 0] * 4**4 == pytest.approx([2.0, 3.0, 6.0])
    costs = [[2, 4], [1, 2], [1, 2]]
    assert chosen("hawq-v1", damage, costs, 5) == [0, 0, 1]
    assert chosen("hawq-v1", damage, costs, 6) == [0, 1, 1]
    assert chosen("hawq-v1", damage, costs, 7) == [0, 1, 1]  # a needs two more bytes


def traces(monkeypatch: Patch, *values: float) -> None:
    monkeypatch.setattr(hessian_trace, "hutchinson", lambda scoring, draws: list(values))


def test_hawq_v2(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """½Ω = ½ (Tr/n)·‖Δ‖², and the Pareto set of (ΣΩ, size).

    a: Tr/n = 6/3 = 2, ‖Δ‖² = 3, 1, 0 → 3, 1, 0. b: Tr/n = 5/1 = 5, ‖Δ‖² = 4, 1.6, 0 → 10,
    4, 0. At 1, 2 and 4 bytes each: sums by (a, b) are (1,1) 13 at 2; (2,1) 11 and (1,2) 7 at
    3; (2,2) 5 at 4; (4,1) 10 and (1,4) 3 at 5; (4,2) 4 and (2,4) 1 at 6; (4,4) 0 at 8. The
    Pareto set is 2:13, 3:7, 4:5, 5:3, 6:1, 8:0.
    """
    root = 1.6**0.5
    errors = {"a": [[1.0] * 3, [1.0, 0.0, 0.0], [0.0] * 3], "b": [[2.0], [root], [0.0]]}
    traces(monkeypatch, 6.0, 5.0)
    damage = table("hawq-v2", known("int2-row-sym,int4-row-sym,int8-row-sym", errors))
    assert damage == pytest.approx(np.array([[3.0, 1.0, 0.0], [10.0, 4.0, 0.0]]))
    found = front(damage, np.array([[1, 2, 4]] * 2))
    assert found.bytes.tolist() == [2, 3, 4, 5, 6, 8]
    assert found.damage == pytest.approx([13.0, 7.0, 5.0, 3.0, 1.0, 0.0])
    assert chosen("hawq-v2", damage, [[1, 2, 4]] * 2, 7) == [1, 2]


def test_hawq_v3(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """The same score at 4 and 8 bits; the ILP takes the best set, not the best unit first.

    Ω drops by 6 (a, 3 bytes), 4 (b, 2 bytes), 4 (c, 2 bytes) from 4 to 8 bits. With 4 bytes
    to spare b and c (8) beat a alone (6), although a drops most.
    """
    errors = {name: [[1.0], [0.0]] for name in "abc"}
    traces(monkeypatch, 12.0, 8.0, 8.0)
    damage = table("hawq-v3", known("int4-row-sym,int8-row-sym", errors))
    assert damage == pytest.approx(np.array([[6.0, 0.0], [4.0, 0.0], [4.0, 0.0]]))
    assert chosen("hawq-v3", damage, [[3, 6], [2, 4], [2, 4]], 7 + 4) == [0, 1, 1]


def test_amq() -> None:
    """Scores 1, 1.2, 0.9, 2.5, 1 in the cheapest candidate: median 1, so above 2 only unit 3.

    At 2, 3 and 4 bytes a unit the frozen one takes 4: 12 bytes at least, and the front
    that NSGA-II starts from has unit 3 at its widest everywhere. With 11 bytes it is
    released again, for nothing else fits.
    """
    recipe = load_recipe("amq")
    assert (recipe.damage, recipe.solver) == ("jsd_from_widest", "amq")
    low = np.array([1.0, 1.2, 0.9, 2.5, 1.0])
    costs = np.broadcast_to(np.array([2, 3, 4]), (1, 5, 3))
    damage = np.column_stack([low, low / 2, low / 4])
    found = amq.frozen(Problem(damage, costs, np.array([14]))).damage
    assert np.isinf(found).tolist() == [[False] * 3] * 3 + [[True, True, False]] + [[False] * 3]
    assert not np.isinf(amq.frozen(Problem(damage, costs, np.array([11]))).damage).any()


def test_amq_divergence() -> None:
    """p = (1, 0), q = (½, ½), m = (¾, ¼): ½ ln(4/3) + ½ (½ ln(2/3) + ½ ln 2) = 0.2157616."""
    log_p, log_q = torch.tensor([[1.0, 1e-30]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(divergence(log_p, log_q)) == pytest.approx(0.2157616, rel=1e-5)


def test_evopress(monkeypatch: Patch) -> None:
    """NMSE = ‖Δx‖²/‖Wx‖² seeds it, and the real loss decides.

    Two units, one of which may be raised. The table says unit 0, the measured KL unit 1.
    """
    recipe = load_recipe("evopress")
    assert recipe.damage == "relative_output_error"
    problem = Problem(
        np.array([[9.0, 0.0], [5.0, 0.0]]), np.array([[[1, 2], [1, 2]]]), np.array([3])
    )

    class Loss:
        pieces, piece_tokens, spent = 4, 10, 0

        def __call__(self, choices: Any, pieces: Any, base: Any = None) -> Any:
            self.spent += self.piece_tokens * len(choices) * len(pieces)
            kl = [1.0 if choice[1] == 0 else 0.5 if choice[0] == 0 else 0.1 for choice in choices]
            return np.array(kl)[:, None].repeat(len(pieces), axis=1)

    solver = load_solver(str(recipe.solver))
    assert solver(problem, Loss(), tokens=2000, seed=0).choice.tolist() == [0, 1]


def test_hawq_scores_negative_curvature_lowest(
    known: Known, monkeypatch: Patch, table: Any
) -> None:
    """Not 0: a unit whose row is 0 counts as one that no text has reached."""
    traces(monkeypatch, -3.0, 0.0)
    errors = {"a": [[1.0], [0.0]], "b": [[1.0], [0.0]]}
    damage = table("hawq-v3", known("int4-row-sym,int8-row-sym", errors))
    assert 0 < damage[0, 0] < 1e-30 and damage[1, 0] == 0


@pytest.mark.parametrize("name", ["zeroq", "modelopt-autoquantize-kl"])
def test_measured_kl(name: str, chosen: Any) -> None:
    """One sum and one maximum of the same one-at-a-time KL table, 2, 4 and 8 bytes a unit.

    a: 9, 5, 0; b: 6, 1, 0; c: 6, 1, 0. 10 bytes allow two units at 4 and one at 2: with a at
    2 the sum is 9 + 1 + 1 = 11 and the worst unit 9; with b or c at 2 it is 5 + 6 + 1 = 12
    and the worst unit 6.
    """
    assert load_recipe(name).damage == "kl"
    damage = np.array([[9.0, 5.0, 0.0], [6.0, 1.0, 0.0], [6.0, 1.0, 0.0]])
    found = chosen(name, damage, [[2, 4, 8]] * 3, 10)
    if name == "zeroq":
        assert found == [0, 1, 1]
    else:
        assert found in ([1, 0, 1], [1, 1, 0])


def test_llm_mq(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """|Σ g Δ|: signs cancel inside a unit.

    a: g = (1, 2), Δ = (4, −2) → 4 − 4 = 0 at 2 bits, (1, 1) → 3 at 3, (0, 0) at 4: the
    ranking by absolute values would be 8. b: g = −1, Δ = 5, 2, 1 → 5, 2, 1. Made monotone a
    is 0, 0, 0. With bytes 2, 3, 4 and 6 in all a takes 2 and b takes 4: damage 1.
    """
    errors = {"a": [[4.0, -2.0], [1.0, 1.0], [0.0, 0.0]], "b": [[5.0], [2.0], [1.0]]}
    slopes = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0]])]
    monkeypatch.setattr(first_order, "mean_gradient", lambda *_: slopes)
    damage = table("llm-mq", known("int{2,3,4}-g128", errors))
    assert damage.tolist() == [[0.0, 3.0, 0.0], [5.0, 2.0, 1.0]]
    assert chosen("llm-mq", damage, [[2, 3, 4]] * 2, 6) == [0, 2]


def test_autoround_autoscheme(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """Σ|g ⊙ Δ|: absolute values inside the sum.

    a: |1·4| + |2·(−2)| = 8, |1·1| + |2·1| = 3, 0. b: 5, 2, 1. With bytes 2, 4, 8 and 10 in
    all: (8,2) 0 + 5 = 5, (2,8) 8 + 1 = 9, (4,4) 3 + 2 = 5 of 8 bytes; 5 either way, and 12
    bytes give (8,4): 0 + 2 = 2.
    """
    errors = {"a": [[4.0, -2.0], [1.0, 1.0], [0.0, 0.0]], "b": [[5.0], [2.0], [1.0]]}
    slopes = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0]])]
    monkeypatch.setattr(first_order, "mean_gradient", lambda *_: slopes)
    damage = table("autoround-autoscheme", known("int{2,4,8}-g128-sym", errors))
    assert damage.tolist() == [[8.0, 3.0, 0.0], [5.0, 2.0, 1.0]]
    assert chosen("autoround-autoscheme", damage, [[2, 4, 8]] * 2, 12) == [2, 1]


def test_higgs(known: Known, monkeypatch: Patch, table: Any) -> None:
    """α = Σ KL_j t_j² / Σ t_j⁴ with t² = 1, 4 here, then s = α ‖Δ‖²/‖W‖².

    KL = 3, 10: α = (3·1 + 10·4) / (1 + 16) = 43/17. ‖W‖² = 9 + 16 = 25, ‖Δ‖² = 1 and 0.25,
    so t² = 0.04 and 0.01: s = 1.72/17 = 0.1011765 and 0.43/17 = 0.0252941.
    """
    monkeypatch.setattr(noise_slope, "LEVELS", (1.0, 2.0))
    measured = iter([3.0, 10.0])

    class Teacher:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def kl(self, start: int | None) -> Any:
            return torch.tensor([next(measured)])

    class Preserved:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(noise_slope, "Teacher", Teacher)
    monkeypatch.setattr(noise_slope, "write_weight", lambda *_: None)
    scoring = known("int3-g128,int4-g128", {"a": [[0.6, 0.8], [0.5, 0.0]]}, {"a": [3.0, 4.0]})
    scoring.weights.preserved = lambda unit: Preserved()
    scoring.decoder.model = None
    damage = table("higgs", scoring)
    assert damage[0] == pytest.approx([0.1011765, 0.0252941], rel=1e-5)


def test_modelopt_gradient(chosen: Any) -> None:
    """½ (∂L/∂Y ⊙ ΔY)² summed, then monotone in bytes, then the binary programme.

    A unit's table 4, 5, 0 at 2, 3 and 8 bytes becomes 4, 4, 0: the third byte buys nothing.
    """
    recipe = load_recipe("modelopt-autoquantize-gradient")
    assert (recipe.damage, recipe.solver) == ("fisher_output_data", "milp")
    from bitsearch.objectives.damage.fisher_output import _weighted

    # g = (1, 2), ΔY = (3, 1): (3² + 2²)/2 = 6.5; signs do not cancel
    assert _weighted(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])) == 6.5
    damage = np.array([[4.0, 5.0, 0.0], [4.0, 3.0, 0.0]])
    name = "modelopt-autoquantize-gradient"
    assert chosen(name, damage, [[2, 3, 8]] * 2, 5) == [0, 1]


@pytest.mark.parametrize(("name", "order"), [("nncf", [0, 1, 1]), ("nncf-hessian", [1, 1, 0])])
def test_nncf(
    name: str, order: list[int], known: Known, monkeypatch: Patch, table: Any, chosen: Any
) -> None:
    """Units go to 4 bits in ascending order of score, until the bytes suffice.

    8-bit errors 0.2, 0.1, 0.05 on one weight each. Data-free: 1/0.04 = 25, 1/0.01 = 100,
    1/0.0025 = 400, so a goes first. Hessian with mean x² = 1, 1, 1: 0.4, 0.2, 0.1, so c does.
    One unit of 2 bytes in place of 4 keeps 10 bytes.
    """
    errors = {"a": [[9.0], [0.2]], "b": [[9.0], [0.1]], "c": [[9.0], [0.05]]}
    means = {f"{unit}.weight": torch.ones(1) for unit in errors}
    monkeypatch.setattr(backup_noise, "input_mean_squares", lambda *_: (means, {}))
    damage = table(name, known("int4-g128,int8-row", errors))
    score = [25.0, 100.0, 400.0] if name == "nncf" else [0.4, 0.2, 0.1]
    assert damage[:, 0] == pytest.approx(score, rel=1e-3)
    assert chosen(name, damage, [[2, 4]] * 3, 10) == order


def test_mlx_dynamic(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """10⁶/n · Σ g ⊙ (low − high), and a threshold: a unit of small gain waits for its turn.

    a: n = 2, g = (1, 1), low − high = (0.02, 0.01) → 0.03/2 · 10⁶ = 15,000. b: n = 1,
    1 · (0.04 − 0.01) → 30,000. c: n = 1, 0.005 → 5,000. Ranking b, a, c at 1, 2 and 1 bytes
    more: two bytes to spare raise b alone, for a's two come before c's one.
    """
    errors = {"a": [[0.03, 0.01], [0.01, 0.0]], "b": [[0.04], [0.01]], "c": [[0.005], [0.0]]}
    slopes = {f"{unit}.weight": torch.ones(1, len(rows[0])) for unit, rows in errors.items()}
    monkeypatch.setattr(gradient_alignment, "low_gradient", lambda *_: slopes)
    damage = table("mlx-dynamic", known("int{4,5}-g64", errors))
    assert damage[:, 0] == pytest.approx([15_000.0, 30_000.0, 5_000.0], rel=1e-4)
    assert damage[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert chosen("mlx-dynamic", damage, [[8, 10], [4, 5], [4, 5]], 18) == [0, 1, 0]
    assert chosen("mlx-dynamic", damage, [[8, 10], [4, 5], [4, 5]], 19) == [1, 1, 0]
