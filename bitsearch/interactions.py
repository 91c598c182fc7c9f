"""The run's sketch of units' interactions: measured once, kept with what it means."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitsearch.errors import BadInput
from bitsearch.run import atomic_write, check_same
from bitsearch.session import Session

SAMPLES = 1024
FILE = "interactions.safetensors"


def measured_sketch(
    session: Session, samples: int, done: Callable[[int, int], None]
) -> NDArray[np.float32]:
    """`score_sketch` of the run's calibration text, from the file if it is there.

    Args:
        session: the run.
        samples: label draws over all calibration windows, rounded up to whole windows.
        done: called with finished and all backward passes.

    Raises:
        SettingsMismatch: the file was measured with other settings.
        BadInput: the file is damaged.
    """
    from bitsearch.objectives.damage.scoring import Scoring
    from bitsearch.objectives.interactions import score_sketch

    space, tokens = session.space, session.corpora["calibration"].tokens
    draws = -(-samples // len(tokens))
    signature = json.loads(
        json.dumps(
            session.table_signature("interactions")
            | {
                "draws": draws,
                "units": [unit.name for unit in space.units],
                "candidates": [candidate.name for candidate in space.candidates],
            }
        )
    )
    path = session.run.path / FILE
    if path.exists():
        try:
            with safe_open(path, framework="numpy") as file:
                stored = json.loads((file.metadata() or {}).get("bitsearch", "{}"))
                sketch = np.asarray(file.get_tensor("sketch"), np.float32)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise BadInput(f"{path} cannot be read: {error}; delete it to measure anew") from error
        check_same(stored, signature, path)
        return sketch
    scoring = Scoring(
        session.decoder,
        space.units,
        space.candidates,
        session.weights,
        tokens,
        session.settings.seed,
    )
    sketch = score_sketch(scoring, draws, done)
    atomic_write(path, save({"sketch": sketch}, metadata={"bitsearch": json.dumps(signature)}))
    return sketch


def interaction_terms(
    session: Session, damage: NDArray[np.float64], done: Callable[[int, int], None]
) -> NDArray[np.float32]:
    """Pair terms for a damage table of (units, candidates), shrunk on held-out windows."""
    from bitsearch.objectives.interactions import correlations, pair_terms

    shrunk, strength = correlations(measured_sketch(session, SAMPLES, done))
    session.run.log("interactions", strength=strength)
    return pair_terms(damage, shrunk)
