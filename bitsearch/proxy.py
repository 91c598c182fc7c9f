"""How far a damage table that was measured with a proxy can be trusted.

A table is measured with the quantizer that ships, unless a cheaper one is asked for
(`--proxy-quantizer rtn`). Then a sample of cells is measured with the right one too, and
their ranks are compared: over all of them, where widths tell most, and between units in
one format, which is what an allocation lives on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.diagnostics import rank_correlation
from bitsearch.objectives.estimators import load_estimator
from bitsearch.run import read_json
from bitsearch.session import Session

_UNITS, _FORMATS = 12, 3
log = logging.getLogger(__name__)


def agreement(
    session: Session,
    estimator: str,
    damage: NDArray[np.float64],
    done: Callable[[int, int], None],
) -> dict[str, Any]:
    """Spearman's ρ of a table with what the right quantizer gives, kept with the run.

    Args:
        session: with a proxy.
        estimator: of the table.
        damage: (units, candidates), as measured with the proxy.
        done: called with finished and all cells.

    Returns:
        `proxy` and `quantizer`, `cells`, `rank_correlation` over all cells and
        `within_formats`, the mean over formats, both None where too few cells differ;
        `sample`, rows of unit, format, damage with the proxy and without.
    """
    name = f"tables/{estimator}.proxy.json"
    if not (session.run.path / name).exists():
        cells = _sample(session)
        found: dict[tuple[int, int], float] = {}
        estimate = load_estimator(estimator)
        for unit, candidate, value in estimate(session.scoring(session.weights), cells):
            done(len(found), len(cells))
            found[unit, candidate] = value
        done(len(cells), len(cells))
        session.run.write_json(name, _compared(session, damage, found))
    kept: dict[str, Any] = read_json(session.run.path / name)
    within = kept["within_formats"]
    log.info(
        "damage measured with %s in place of %s: rank correlation %s over %d cells, %s between "
        "units in one format",
        kept["proxy"],
        kept["quantizer"],
        "unknown" if kept["rank_correlation"] is None else f"{kept['rank_correlation']:.2f}",
        kept["cells"],
        "unknown" if within is None else f"{within:.2f}",
    )
    return kept


def _sample(session: Session) -> list[tuple[int, int]]:
    """Cells of some units, in the narrowest, a middle and the widest format that rounds."""
    space = session.space
    rng = np.random.default_rng(session.settings.seed)
    lossy = [index for index, format in enumerate(space.candidates) if not format.exact]
    lossy.sort(key=lambda index: int(space.bytes[:, index].sum()))
    places = np.linspace(0, len(lossy) - 1, min(_FORMATS, len(lossy))).round().astype(int)
    units = rng.permutation(len(space.units))
    chosen = [lossy[place] for place in places]
    usable = [int(unit) for unit in units if space.allowed[unit][chosen].all()][:_UNITS]
    return sorted((unit, candidate) for unit in usable for candidate in chosen)


def _compared(
    session: Session, damage: NDArray[np.float64], found: dict[tuple[int, int], float]
) -> dict[str, Any]:
    def ranked(cells: list[tuple[int, int]]) -> float | None:
        rho = rank_correlation([float(damage[c]) for c in cells], [found[c] for c in cells])
        return None if np.isnan(rho) else rho

    space = session.space
    formats = sorted({candidate for _, candidate in found})
    each = [ranked([cell for cell in found if cell[1] == format]) for format in formats]
    known = [rho for rho in each if rho is not None]
    return {
        "proxy": session.settings.proxy_quantizer,
        "quantizer": session.settings.quantizer,
        "cells": len(found),
        "rank_correlation": ranked(list(found)),
        "within_formats": float(np.mean(known)) if known else None,
        "sample": [
            [space.units[unit].name, space.candidates[candidate].name, float(damage[cell]), right]
            for cell, right in found.items()
            for unit, candidate in [cell]
        ],
    }
