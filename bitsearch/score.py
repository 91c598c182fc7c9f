"""`bitsearch eval`: the quality of a policy file, or of a model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.corpora import make_corpus, read_text
from bitsearch.errors import BadInput, UsageError
from bitsearch.evaluate import Quality, summary
from bitsearch.models.load import LoadedModel, load_model, open_layout, untie_head
from bitsearch.models.packed import POLICY
from bitsearch.models.source import Source
from bitsearch.policy import Policy, load_policy
from bitsearch.restore import (
    assignment,
    candidate_weights,
    check_model,
    load_prepared,
    preparation_of,
)
from bitsearch.session import embedding_rows, pick_device
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    pass


def score_policy(
    model: str,
    policy_path: Path | None,
    *,
    reference: str | None = None,
    texts: Sequence[str],
    statistics: Path | None,
    length: int,
    windows: int,
    dtype: str,
    device: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """KL, perplexity and top-1 agreement on texts, each with its share of windows.

    Args:
        model: model reference; must be the one that the policy was made for.
        policy_path: a policy file; None measures the model as it is.
        reference: the model that it is compared with, if not itself; by default the one
            that a packed checkpoint was made from.
        texts: built-in names or files, taken whole.
        statistics: calibration statistics; by default the file that the policy names.
        length: tokens a window.
        windows: windows over all texts.
        dtype: what to compute in.
        device: where.
        progress: called with stage, done, total.

    Raises:
        BadInput: model and policy do not fit, or a file cannot be used.
    """
    if policy_path is not None and reference is not None:
        raise UsageError("--policy is compared with MODEL itself: leave --reference away")
    policy = load_policy(policy_path) if policy_path is not None else None
    preparation = None
    if policy is not None and policy_path is not None:
        preparation = preparation_of(policy, policy_path, statistics)
    untie = preparation is not None and preparation.untied
    layout, _, source = open_layout(model, untie=untie)
    changed = None
    if policy is None and (reference is not None or source.packed):
        changed = source
        policy, layout, source = _compared(source, reference)
    if policy is not None:
        check_model(policy, policy_path or Path(model) / POLICY, source)
    contents = [(text, read_text(text)) for text in texts]
    progress("evaluation", 0, 3)
    loaded = load_prepared(source, preparation, dtype=dtype, device=pick_device(device))

    from bitsearch.models.decoder import Decoder
    from bitsearch.objectives.memory import available_bytes
    from bitsearch.objectives.teacher import Teacher

    rows = embedding_rows(loaded.model)
    corpus = make_corpus("evaluation", contents, loaded.tokenizer, length, windows, rows)
    decoder = Decoder(loaded.model, layout.blocks)
    progress("evaluation", 1, 3)
    teacher = Teacher(decoder, corpus.tokens, restart=False)
    itself = teacher.measure()
    progress("evaluation", 2, 3)
    measured = itself
    if changed is not None:
        _take_over(loaded.model, load_model(changed, dtype=dtype, device=decoder.device), changed)
        measured = teacher.measure()
    elif policy is not None and policy_path is not None:
        weights = candidate_weights(
            loaded.model,
            policy,
            policy_path,
            statistics,
            cache_bytes=available_bytes(decoder.device) // 3,
        )
        with weights.applied(assignment(policy, layout)):
            measured = teacher.measure()
    progress("evaluation", 3, 3)
    quality = Quality(
        *(part.double().numpy() for part in (measured.kl, measured.nll, measured.top1))
    )
    return {
        "model": model,
        "policy": None if policy_path is None else str(policy_path),
        "bytes": 2 * layout.parameters if policy is None else policy.achieved.bytes,
        "tokens": corpus.tokens.numel(),
        "corpus": corpus.describe(),
        **summary(quality, itself.nll.double().numpy(), corpus),
    }


def _compared(changed: Source, reference: str | None) -> tuple[Policy | None, ModelLayout, Source]:
    """What a changed model is compared with, and the policy that it was packed by."""
    if not changed.packed:
        layout, _, source = open_layout(reference or changed.reference)
        return None, layout, source
    policy = load_policy(changed.path / POLICY)
    try:
        layout, _, source = open_layout(
            reference or policy.model.reference,
            revision=None if reference else policy.model.revision,
        )
    except BadInput as error:
        if reference:
            raise
        raise BadInput(
            f"{changed.path} was made from a model that cannot be opened ({error}); "
            "name it with --reference"
        ) from error
    return policy, layout, source


def _take_over(model: Any, other: LoadedModel, source: Source) -> None:
    """Give a model the parameters of another one of its kind."""
    import torch

    if not other.layout.tied:
        untie_head(model)
    found = dict(other.model.named_parameters())
    mine = dict(model.named_parameters())
    if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in found.items()}:
        raise BadInput(f"{source.where} is not of the same kind as the model it is compared with")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(found[name])
