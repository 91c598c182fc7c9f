"""Replayed losses are those of full forward passes, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bitsearch.formats import parse_formats
from bitsearch.objectives.replay import Replay, replaying

FORMATS = parse_formats("int2-g16,int3-g16,int4-g16,int8-g16,bf16")


def replay_of(case: Any, cache_bytes: int = 1 << 30) -> Any:
    """A replay over all units of a case."""
    return replaying(case.decoder, case.weights(cache_bytes), case.units, FORMATS, case.tokens)


def by_full_pass(case: Any, choice: np.ndarray) -> np.ndarray:
    """(windows,) KL by the model's own forward pass with every weight put in place."""
    reference = case.log_probabilities()
    assignment = [(u, FORMATS[c]) for u, c in zip(case.units, choice, strict=True)]
    with case.weights().applied(assignment):
        found = case.log_probabilities()
    kl = (reference.exp() * (reference - found)).sum(-1).mean(1)
    return np.asarray(kl)


def neighbours(base: np.ndarray, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Policies that differ from the base in a unit or two."""
    found = []
    for _ in range(count):
        choice = base.copy()
        for unit in rng.integers(len(base), size=2):
            choice[unit] = rng.integers(len(FORMATS))
        found.append(choice)
    return found


def windows_of(replay: Replay, kl: np.ndarray, windows: int) -> np.ndarray:
    """Means over pieces of (windows,) values."""
    return kl.reshape(replay.pieces, windows // replay.pieces).mean(1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_kl_is_that_of_a_full_forward_pass(case_of, family):
    case = case_of(family, windows=4)
    rng = np.random.default_rng(0)
    base = rng.integers(len(FORMATS), size=len(case.units))
    policies = [base, *neighbours(base, rng, 5)]
    with replay_of(case) as replay:
        found = replay.kl(policies, range(replay.pieces), base)
        assert replay.blocks_skipped > 0
    expected = [windows_of(replay, by_full_pass(case, choice), 4) for choice in policies]
    assert found == pytest.approx(np.array(expected), rel=1e-4, abs=1e-6)


def test_history_does_not_change_a_bit(case_of):
    case = case_of(windows=20, length=16)
    rng = np.random.default_rng(1)
    parents = [rng.integers(len(FORMATS), size=len(case.units))]
    for _ in range(3):
        parents += neighbours(parents[-1], rng, 1)
    with replay_of(case) as replay:
        assert replay.pieces > 1
        alone = {}
        for parent in parents:
            for choice in [parent, *neighbours(parent, np.random.default_rng(2), 4)]:
                alone[choice.tobytes()] = replay.kl([choice], range(replay.pieces))[0]
    with replay_of(case) as replay:
        for step, parent in enumerate(parents):
            children = [parent, *neighbours(parent, np.random.default_rng(2), 4)]
            pieces = rng.permutation(replay.pieces)[: 1 + step % replay.pieces].tolist()
            found = replay.kl(children, pieces, parent)
            for choice, values in zip(children, found, strict=True):
                assert values.tolist() == alone[choice.tobytes()][pieces].tolist()


def test_weights_come_back(case_of):
    case = case_of(windows=2)
    before = case.state()
    with replay_of(case) as replay:
        replay.kl([np.zeros(len(case.units), np.int64)], [0])
        assert any(not torch.equal(case.state()[name], value) for name, value in before.items())
    assert all(torch.equal(case.state()[name], value) for name, value in before.items())


def test_candidates_are_rounded_from_the_reference(case_of):
    """Without room for codes every candidate is quantized again, from the same weights."""
    case = case_of(windows=2)
    two, four = (np.full(len(case.units), index) for index in (0, 2))
    with replay_of(case) as kept:
        expected = kept.kl([two, four, two], [0])
    with replay_of(case, cache_bytes=0) as forgotten:
        assert forgotten.kl([two, four, two], [0]).tolist() == expected.tolist()


def test_restarts_begin_at_the_first_changed_block(case_of):
    case = case_of(windows=1)
    blocks = len(case.decoder.blocks)
    base = np.full(len(case.units), 2)
    with replay_of(case) as replay:
        replay.kl([base], [0], base)
        for index, unit in enumerate(case.units):
            changed = base.copy()
            changed[index] = 0
            run = replay.blocks_run
            replay.kl([changed], [0], base)
            first = {"embedding": 0, "head": blocks}.get(unit.kind, unit.block)
            assert replay.blocks_run - run == blocks - first


def test_states_that_hold_for_the_next_base_are_kept(case_of):
    case = case_of(windows=1)
    blocks = len(case.decoder.blocks)
    base = np.full(len(case.units), 2)
    last = max(i for i, unit in enumerate(case.units) if unit.block == blocks - 1)
    other = base.copy()
    other[last] = 0
    with replay_of(case) as replay:
        replay.kl([base], [0], base)
        run = replay.blocks_run
        replay.kl([other], [0], other)  # one block to record the base, none to measure it
        assert replay.blocks_run - run == 1


def test_overflow_is_infinite(case_of):
    case = case_of(windows=1)
    with replay_of(case) as replay:
        with torch.no_grad():
            case.model.get_parameter("model.norm.weight").fill_(float("inf"))
        assert replay.kl([np.zeros(len(case.units), np.int64)], [0])[0, 0] == np.inf
