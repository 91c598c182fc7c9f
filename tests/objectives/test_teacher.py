"""KL, likelihood and agreement equal those of plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.errors import OutOfResources
from bitsearch.objectives import teacher as module
from bitsearch.objectives.teacher import Teacher


def brute_kl(reference: Tensor, changed: Tensor) -> Tensor:
    """(windows,) mean KL a token of (windows, length, vocabulary) log-probabilities."""
    return (reference.exp() * (reference - changed)).sum(-1).mean(-1)


@torch.no_grad()
def shake(case: Any, prefix: str, amount: float = 0.3, seed: int = 1) -> None:
    """Add noise to every matrix below a module."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in case.model.get_submodule(prefix).parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(amount * float(parameter.std()) * noise)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_unchanged_model_has_no_kl(family: str, case_of: Any) -> None:
    case = case_of(family)
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    for start in (None, 0, 1, 2, 3):
        measured = teacher.measure(start)
        assert measured.kl.shape == (3,)
        assert torch.all(measured.kl.abs() < 1e-7)
        assert torch.all(measured.top1 == 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text", "opt", "mixtral"])
@pytest.mark.parametrize("block", [0, 2])
def test_restarted_measures_equal_brute_force(family: str, block: int, case_of: Any) -> None:
    case = case_of(family, dtype=torch.float64)
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    reference = case.log_probabilities()
    shake(case, case.layout.blocks[block])
    changed = case.log_probabilities()
    measured = teacher.measure(block)
    kl = brute_kl(reference, changed)
    assert kl.min() > 1e-5
    assert torch.allclose(measured.kl.double(), kl, rtol=1e-3, atol=1e-7)
    nll = -changed[:, :-1].gather(-1, case.tokens[:, 1:, None])[..., 0].mean(-1)
    assert torch.allclose(measured.nll.double(), nll, rtol=1e-5)
    agree = (reference.argmax(-1) == changed.argmax(-1)).double().mean(-1)
    assert torch.allclose(measured.top1.double(), agree)
    assert torch.equal(teacher.kl(block), measured.kl)
    assert torch.allclose(teacher.kl(None), measured.kl, rtol=1e-5)


def test_changed_head_needs_no_block(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(dtype=torch.float64)
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    reference = case.log_probabilities()
    shake(case, "lm_head")
    kl = brute_kl(reference, case.log_probabilities())

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the blocks were run")

    monkeypatch.setattr(case.decoder, "hidden", refuse)
    assert torch.allclose(teacher.kl(start=3).double(), kl, rtol=1e-4)


def test_restart_must_be_asked_for(case_of: Any) -> None:
    case = case_of()
    teacher = Teacher(case.decoder, case.tokens, restart=False)
    assert torch.all(teacher.kl().abs() < 1e-7)
    with pytest.raises(ValueError, match="restart=True"):
        teacher.kl(start=1)


@pytest.mark.parametrize("start", [None, 1])
def test_size_of_mini_batches_does_not_matter(start: int | None, case_of: Any) -> None:
    case = case_of(windows=5)
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    shake(case, case.layout.blocks[1])
    found = []
    for size in (1, 2, 4, 5):
        teacher.batches.size = size
        found.append(teacher.measure(start))
    for other in found[1:]:
        assert torch.allclose(other.kl, found[0].kl, rtol=1e-5)
        assert torch.allclose(other.nll, found[0].nll, rtol=1e-5)
        assert torch.equal(other.top1, found[0].top1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_reference_is_the_same_kept_or_recomputed(
    family: str, case_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the head has changed, of which a tied embedding is one."""
    case = case_of(family)
    kept = Teacher(case.decoder, case.tokens, restart=True)
    monkeypatch.setattr(module, "available_bytes", lambda device: 0)
    recomputed = Teacher(case.decoder, case.tokens, restart=True)
    assert kept._log_p is not None and recomputed._log_p is None
    recomputed._head_rows = 5  # a window's 12 rows do not divide by it
    shake(case, case.layout.units[0].name)
    shake(case, case.layout.blocks[1])
    one, other = kept.measure(), recomputed.measure()
    assert one.kl.min() > 1e-4
    assert torch.allclose(one.kl, other.kl, rtol=1e-5, atol=1e-7)
    assert torch.allclose(one.nll, other.nll, rtol=1e-5)
    assert torch.equal(one.top1, other.top1)


@pytest.mark.parametrize("start", [None, 1])
def test_out_of_memory_shrinks_batches_and_changes_nothing(
    start: int | None, case_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(windows=5)
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    shake(case, case.layout.blocks[1])
    expected = teacher.kl(start)
    assert teacher.batches.size > 1
    sizes = fail_above(case, 1, monkeypatch)
    assert torch.allclose(teacher.kl(start), expected, rtol=1e-5)
    assert sizes == [5, 2, 1, 1, 1, 1, 1]
    assert teacher.batches.size == 1


def test_out_of_memory_while_recording(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(windows=5)
    plain = Teacher(case.decoder, case.tokens, restart=True)
    sizes = fail_above(case, 2, monkeypatch)
    careful = Teacher(case.decoder, case.tokens, restart=True)
    assert sizes == [5, 2, 2, 1]
    shake(case, case.layout.blocks[1])
    assert torch.allclose(careful.kl(1), plain.kl(1), rtol=1e-5)


def test_one_window_too_large_is_out_of_resources(
    case_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of()
    teacher = Teacher(case.decoder, case.tokens, restart=True)
    fail_above(case, 0, monkeypatch)
    with pytest.raises(OutOfResources, match="--length"):
        teacher.kl(1)
    with pytest.raises(OutOfResources):
        Teacher(case.decoder, case.tokens, restart=True)


def fail_above(case: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let forward passes of more than `limit` windows run out of memory; their sizes."""
    hidden = case.decoder.hidden
    sizes: list[int] = []

    def limited(tokens: Tensor, **kwargs: Any) -> Tensor:
        sizes.append(len(tokens))
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        state: Tensor = hidden(tokens, **kwargs)
        return state

    monkeypatch.setattr(case.decoder, "hidden", limited)
    return sizes
