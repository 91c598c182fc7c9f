"""The damage table of a run: measured as far as it is missing, and made fit for solvers."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bitsearch.objectives.estimators import load_estimator
from bitsearch.proxy import agreement
from bitsearch.session import Progress, Session
from bitsearch.solvers.monotone import monotone
from bitsearch.tables import complete_table, load_table, measure_table

log = logging.getLogger(__name__)


def measure(session: Session, estimator: str, progress: Progress) -> NDArray[np.float64]:
    """The damage table of an estimator, measured as far as it is missing.

    Returns:
        (units, candidates), +inf where not allowed, made monotone in bytes.
    """
    space = session.space
    session.progress = progress
    load = load_estimator(estimator)
    if complete_table(session.run, estimator) and (session.run.path / "model.json").exists():
        damage = load_table(session.run, estimator, space)
    else:
        scoring = session.scoring(session.damage_weights)
        damage = measure_table(
            session.run,
            estimator,
            space,
            session.table_signature(estimator),
            lambda cells: load(scoring, cells),
            lambda done, total: progress(f"damage ({estimator})", done, total),
        )
    if session.settings.proxy_quantizer is not None:
        agreement(session, estimator, damage, partial(progress, "proxy"))
    return monotone(_never_reached(damage, session), space.bytes)


def _never_reached(damage: NDArray[np.float64], session: Session) -> NDArray[np.float64]:
    """Score as worst what calibration text never reached: no damage was seen, none is known."""
    lossy = np.array([not candidate.exact for candidate in session.space.candidates])
    known = session.space.allowed & lossy
    silent = ((damage == 0) | ~known).all(axis=1) & known.any(axis=1)
    if not silent.any() or silent.all():
        return damage
    worst = np.where(known & ~silent[:, None], damage, 0).max(axis=0)
    for unit in np.flatnonzero(silent):
        log.warning(
            "%s: calibration text never reached it; scored as the most sensitive unit, "
            "give more text or --freeze it",
            session.space.units[unit].name,
        )
    return np.where(silent[:, None] & known, worst[None], damage)
