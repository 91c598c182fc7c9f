"""The policy file: one format for every quantizable tensor, by full name.

Runtime-neutral and explicit: no patterns and no implicit default. Modules and
exclusions together are a complete partition of the quantizable tensors. The
JSON Schema ships with the package as `schema/policy-1.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format, parse_format

SCHEMA: Literal["bitsearch.policy/1"] = "bitsearch.policy/1"


# Larger numbers are damage: no tensor has an axis of 2^40, and no file 2^53 bytes.
Size = Annotated[int, Field(ge=1, le=2**40)]
Bytes = Annotated[int, Field(ge=0, le=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class PolicyModel(_Strict):
    """The model that a policy was made for."""

    reference: str
    revision: str | None
    architecture: str
    model_type: str
    dtype: str
    parameters: Bytes
    fingerprint: dict[str, str]
    tied: list[list[str]]
    fused: dict[str, list[str]]
    experts: dict[str, int]


class PolicyFormat(_Strict):
    """A format, declared once and referenced by name."""

    kind: str
    bits: int = Field(ge=2, le=16)
    group_size: Size | None = None
    symmetric: bool


class PolicyModule(_Strict):
    """The decision for one tensor."""

    format: str
    unit: str
    role: str
    block: int | None
    shape: tuple[Size, Size]
    count: Size
    bytes: Bytes


class Achieved(_Strict):
    """What the policy weighs in bitsearch's own packed layout."""

    bytes: Bytes
    kept_bytes: Bytes
    bpw: float
    linear_bpw: float | None
    nominal_bpw: float


class PolicyTarget(_Strict):
    """The engine that a policy was searched for, and what its files store."""

    name: str
    title: str
    bytes: Bytes
    bpw: float


class PolicyLatency(_Strict):
    """Milliseconds of a step in one regime, on one machine.

    `predicted_ms` is from the latency table of that hash; `measured_ms` is the whole
    step on the device's clock, `wall_ms` on the wall's, none where it was not measured.
    """

    regime: str
    device: str
    machine: dict[str, str]
    kernels: str
    threads: int | None
    clock: str
    profile: str = Field(pattern=r"^[0-9a-f]{64}$")
    predicted_ms: float = Field(ge=0)
    measured_ms: float | None = Field(default=None, ge=0)
    wall_ms: float | None = Field(default=None, ge=0)


class PolicyFile(_Strict):
    """A file beside the policy."""

    file: str = Field(pattern=r"^[^/\\\\]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PolicyPreparation(PolicyFile):
    """An exact change of the model before it is quantized, by its method's name."""

    method: str


class PolicyExternal(_Strict):
    """A checkpoint of another tool that weights of a format were taken from."""

    path: str
    sha256: dict[str, str]


class PolicyQuantizer(_Strict):
    """How weights are rounded into their formats, and the input statistics that it is given.

    `external` names the formats whose weights another tool made.
    """

    method: str
    statistics: PolicyFile | None = None
    preparation: PolicyPreparation | None = None
    external: dict[str, PolicyExternal] = {}


class PolicyMeasurement(_Strict):
    """A measured quality with its 95 % bootstrap interval over windows."""

    corpus: dict[str, Any]
    kl: float
    kl_ci: tuple[float, float]
    perplexity: float
    reference_perplexity: float
    top1: float


class PolicyDamage(_Strict):
    """What was predicted, and what was measured on the real model; `none` of an import."""

    estimator: str
    predicted: float | None
    selection: PolicyMeasurement | None = None
    evaluation: PolicyMeasurement | None = None


class Policy(_Strict):
    """A complete mixed-precision policy."""

    schema_: Literal["bitsearch.policy/1"] = Field(default=SCHEMA, alias="schema")
    model: PolicyModel
    formats: dict[str, PolicyFormat]
    modules: dict[str, PolicyModule]
    excluded: dict[str, str]
    kv_cache: dict[str, dict[str, str]] | None = None
    quantizer: PolicyQuantizer
    calibration: dict[str, Any] | None
    budgets: list[str]
    achieved: Achieved
    target: PolicyTarget | None = None
    latency: list[PolicyLatency] | None = None
    damage: PolicyDamage
    provenance: dict[str, Any]

    def format_of(self, tensor: str) -> Format:
        """The format of a tensor by its full name."""
        return parse_format(self.modules[tensor].format)


def save_policy(policy: Policy) -> str:
    """The JSON text of a policy: stable order, one module a line for readable diffs."""
    data = policy.model_dump(mode="json", by_alias=True)
    modules = data.pop("modules")
    data["modules"] = {}
    text = json.dumps(data, indent=1, ensure_ascii=False)
    rows = ",\n".join(
        f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row, ensure_ascii=False)}"
        for name, row in modules.items()
    )
    return text.replace('"modules": {}', '"modules": {\n' + rows + "\n }", 1) + "\n"


def load_policy(path: Path) -> Policy:
    """Read and validate a policy file.

    Raises:
        BadInput: missing, not JSON, of a newer schema, or inconsistent.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise BadInput(f"policy file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"policy file {path} is not JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise BadInput(
            f"{path} has schema {schema!r}, this bitsearch reads {SCHEMA!r}; "
            "give a policy file, or use the version of bitsearch that wrote it"
        )
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise BadInput(f"policy file {path}: {where}: {first['msg']}") from error
    _check_consistent(policy, path)
    return policy


def _check_consistent(policy: Policy, path: Path) -> None:
    """Formats are declared as they are named; bytes are those of the shapes."""
    for name, declared in policy.formats.items():
        format = _format_of(name, path)
        expected = PolicyFormat(
            kind=format.kind,
            bits=format.bits,
            group_size=format.group_size,
            symmetric=format.symmetric,
        )
        if declared != expected:
            raise BadInput(f"policy file {path}: format '{name}' is declared as another format")
    total = policy.achieved.kept_bytes
    for tensor, module in policy.modules.items():
        if module.format not in policy.formats:
            raise BadInput(
                f"policy file {path}: {tensor} uses '{module.format}', which is not declared"
            )
        size = module.count * parse_format(module.format).bytes(*module.shape)
        if size != module.bytes:
            raise BadInput(
                f"policy file {path}: {tensor} is {size} bytes in {module.format}, "
                f"not {module.bytes}"
            )
        total += size
    if total != policy.achieved.bytes:
        raise BadInput(
            f"policy file {path}: modules and kept bytes sum to {total}, "
            f"not to achieved.bytes = {policy.achieved.bytes}"
        )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _format_of(name: str, path: Path) -> Format:
    """A format name found in a file; an unknown one is the file's fault."""
    try:
        return parse_format(name)
    except UsageError as error:
        raise BadInput(f"policy file {path}: {error}") from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file."""
    return Policy.model_json_schema(by_alias=True)
