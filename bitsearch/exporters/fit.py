"""The nearest formats that a target holds, and the losses which that means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Loss
from bitsearch.formats import BF16, Format
from bitsearch.formats.integer import INT_BITS, IntFormat
from bitsearch.models.layout import FUSED_SETS
from bitsearch.policy import Policy, PolicyModule

# Why a target does not hold a tensor in a format; empty if it does.
Refusal = Callable[[str, PolicyModule, Format], str]

_DROPPED = {"embedding": "EMBED_DROPPED", "head": "HEAD_DROPPED"}


def fit(
    policy: Policy, target: str, refusal: Refusal, *, fused: bool
) -> tuple[dict[str, Format], list[Loss]]:
    """A format that the target holds for every tensor.

    What it does not hold is replaced by the cheapest integer format that loses no
    precision: the other symmetry, then a smaller group, then more bits, at last 16 bits.
    Formats that are no integers are not replaced.

    Args:
        policy: what is asked for.
        target: the target's name, for messages.
        refusal: what the target says to (tensor, module, format).
        fused: whether the target fuses q/k/v and gate/up, which then take the largest
            format among them.

    Raises:
        BadInput: a format that is no integer, or 16 bits, is refused.
    """
    formats: dict[str, Format] = {}
    losses: list[Loss] = []
    for tensor, module in policy.modules.items():
        asked = policy.format_of(tensor)
        found = next(
            (f for f in _alternatives(asked, module) if not refusal(tensor, module, f)), None
        )
        if found is None:
            raise BadInput(
                f"{module.unit} is {asked.name}, which {target} cannot hold: "
                f"{refusal(tensor, module, asked)}; freeze it in another format, or search "
                "with --target"
            )
        formats[tensor] = found
        losses += _losses(module, tensor, asked, found)
    if fused:
        losses += _harmonise(policy.modules, formats, target, refusal)
    return formats, losses


def linear_refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why no checkpoint of linear layers in whole groups holds a tensor in a format."""
    if not tensor.endswith(".weight"):
        return "stacked experts are not written"
    if module.role == "embedding":
        return "embeddings stay at 16 bits"
    if format.group_size and module.shape[1] % format.group_size:
        return f"groups of {format.group_size} do not divide rows of {module.shape[1]}"
    return ""


def checkpoint_bytes(
    policy: Policy, formats: Mapping[str, Format], matrix: Callable[[int, int, Format], int]
) -> int:
    """Bytes of all tensors: what is kept, and each matrix by its layout's count."""
    modules = policy.modules.items()
    sizes = (m.count * matrix(*m.shape, formats[tensor]) for tensor, m in modules)
    return policy.achieved.kept_bytes + sum(sizes)


def fused_sets(tensors: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Sets of tensors that engines concatenate, each with the fused module's name."""
    known = set(tensors)
    for parent in dict.fromkeys(tensor.rpartition(".")[0].rpartition(".")[0] for tensor in known):
        for leaf, members in FUSED_SETS:
            found = [name for m in members if (name := f"{parent}.{m}.weight") in known]
            if len(found) > 1:
                yield f"{parent}.{leaf}", found


def _alternatives(asked: Format, module: PolicyModule) -> Iterator[Format]:
    """What may stand for a format, nearest first."""
    yield asked
    if not isinstance(asked, IntFormat):
        return
    columns = module.shape[1]
    size = asked.group_size or columns
    groups = [asked.group_size]
    groups += [smaller for smaller in range(size - 1, 15, -1) if columns % smaller == 0]
    for bits in INT_BITS:
        if bits < asked.bits:
            continue
        for group in groups:
            for symmetric in (asked.symmetric, not asked.symmetric):
                yield IntFormat("int", bits, group, symmetric)
    yield BF16


def _losses(module: PolicyModule, tensor: str, asked: Format, found: Format) -> Iterator[Loss]:
    """What the change of a format loses; one for each thing that changed."""
    if asked == found:
        return
    if found.exact:
        code = _DROPPED.get(module.role, "WIDTH_PROMOTED")
        yield Loss(code, tensor, asked.name, found.name)
        return
    if found.bits != asked.bits:
        yield Loss("WIDTH_PROMOTED", tensor, asked.name, found.name)
    if found.group_size != asked.group_size:
        yield Loss("GROUP_COERCED", tensor, asked.name, found.name)
    if found.symmetric != asked.symmetric:
        yield Loss("SYM_COERCED", tensor, asked.name, found.name)


def _harmonise(
    modules: Mapping[str, PolicyModule], formats: dict[str, Format], target: str, refusal: Refusal
) -> Iterator[Loss]:
    """Give the members of each fused set the largest format among them."""
    for _, members in fused_sets(modules):
        shape = modules[members[0]].shape
        largest = max((formats[m] for m in members), key=lambda f: f.bytes(*shape))
        for member in members:
            if formats[member] == largest:
                continue
            if reason := refusal(member, modules[member], largest):
                raise BadInput(f"{member} cannot take {largest.name} in {target}: {reason}")
            yield Loss("FUSED_HARMONISED", member, formats[member].name, largest.name)
            formats[member] = largest
