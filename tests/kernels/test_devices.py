"""Devices: kernels that compute what formats stand for, and refusals that say why."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.kernels import ggml, onnxruntime_device
from bitsearch.kernels.devices import Device, Launch, NoKernel, device_names, open_device
from bitsearch.quantizers.codec import Encoded
from bitsearch.quantizers.rtn import quantize
from bitsearch.testing_devices import Clockwork, check_device

FORMATS = {
    "ggml": (
        *("gguf-q2_k", "gguf-q3_k", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k", "gguf-q4_0"),
        *("gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0", "gguf-mxfp4", "bf16", "fp16"),
        *("int4-g32-sym", "int4-g64-sym", "int5-g32-sym", "int5-g128-sym", "int8-g32-sym"),
    ),
    "onnxruntime": ("int2-g32", "int4-g64", "int4-g128-sym", "int8-g32", "int8-g64-sym", "bf16"),
    "torch-cpu": ("int4-g32", "int4-g64-sym", "int4-g128", "int8-row-sym", "bf16"),
}
CASES = [(device, name) for device, names in FORMATS.items() for name in names]


@pytest.fixture(scope="module")
def devices() -> dict[str, Device]:
    """Every device on one thread."""
    return {name: open_device(name, 1) for name in FORMATS}


def parts_of(name: str, *shapes: tuple[int, int]) -> tuple[list[Encoded | Tensor], Tensor]:
    """Matrices in a format, and the values they stand for, stacked."""
    format = parse_format(name)
    weights = [0.02 * torch.randn(shape) for shape in shapes]
    if format.exact:
        dtype = torch.bfloat16 if name == "bf16" else torch.float16
        return list(weights), torch.cat(weights).to(dtype).float()
    encoded = [quantize(weight, format) for weight in weights]
    return list(encoded), torch.cat([part.dequantize() for part in encoded])


@pytest.mark.parametrize(("device", "name"), CASES)
def test_a_fused_set_is_multiplied_as_its_values_say(
    devices: dict[str, Device], device: str, name: str
) -> None:
    torch.manual_seed(0)
    for m, k in product((1, 3), (256, 768)):
        parts, values = parts_of(name, (32, k), (16, k))
        x = torch.randn(m, k)
        on = devices[device]
        given = x.to(on.place, getattr(torch, on.dtype))
        found = on.linear(Launch(m, k, ((48, name),)), parts)(given)
        exact = x.double() @ values.double().T
        assert found.shape == (m, 48) and found.dtype == given.dtype
        assert float((found - exact).abs().max() / exact.abs().max()) < 0.02


@pytest.mark.parametrize("name", ["int4-g32-sym", "int5-g64-sym", "int8-g32-sym"])
def test_integers_become_blocks_of_the_same_values(name: str) -> None:
    from bitsearch.kernels.ggml_formats import blocks, decode, type_of

    (part,), values = parts_of(name, (7, 192))
    type = type_of(parse_format(name))
    assert type is not None
    assert torch.equal(torch.from_numpy(decode(blocks(part, type), type)), values)


@pytest.mark.parametrize("device", FORMATS)
def test_devices_keep_their_contract(devices: dict[str, Device], device: str) -> None:
    check_device(devices[device])


def test_the_contract_can_fail(clockwork: Clockwork) -> None:
    check_device(clockwork)

    class Wrong(Clockwork):
        def linear(self, launch: Launch, parts: Any) -> Any:
            right = super().linear(launch, parts)
            return lambda x: 1.1 * right(x)

    with pytest.raises(AssertionError, match=r"int4-g32 at 64 × 512: error 0\.1"):
        check_device(Wrong(clockwork.rate))


@pytest.mark.parametrize(
    ("device", "k", "name", "reason"),
    [
        ("ggml", 576, "gguf-q4_k", "whole blocks of 256 weights, not 576"),
        ("ggml", 512, "int4-g128", "no kernel for int4-g128"),
        ("ggml", 512, "int3-g64-sym", "no kernel for int3-g64-sym"),
        ("onnxruntime", 576, "int4-g128", "columns in whole groups"),
        ("onnxruntime", 512, "int3-g64", "no kernel for int3-g64"),
        ("torch-cpu", 576, "int4-g128", "columns in whole groups"),
        ("torch-cpu", 512, "int3-g64", "no kernel for int3-g64"),
        ("torch-cpu", 512, "int8-g64", "no kernel for int8-g64"),
    ],
)
def test_a_format_without_a_kernel_is_refused_by_name(
    devices: dict[str, Device], device: str, k: int, name: str, reason: str
) -> None:
    with pytest.raises(NoKernel, match=reason) as refused:
        devices[device].kernel(Launch(1, k, ((64, name),)))
    assert "\n" not in str(refused.value)


def test_without_the_wheel_ggml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    ggml.library.cache_clear()
    with pytest.raises(BadInput, match=r"pip install 'bitsearch\[ggml\]'"):
        open_device("ggml", 1)
    assert open_device("auto", 1).name == "torch-cpu"
    ggml.library.cache_clear()


def test_without_onnxruntime_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadInput, match=r"pip install 'bitsearch\[onnxruntime\]'"):
        open_device("onnxruntime", 1)


def test_auto_tells_why_a_device_was_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bitsearch")
    assert open_device("auto", 1).name == "ggml" and not caplog.messages
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    ggml.library.cache_clear()
    assert open_device("auto", 1).name == "torch-cpu"
    ggml.library.cache_clear()
    (told,) = caplog.messages
    assert told.startswith("not on ggml: ") and "pip install 'bitsearch[ggml]'" in told


def test_onnxruntime_tells_that_its_sessions_share_no_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime_device, "_POOL", [1])
    open_device("onnxruntime", 1)
    assert not caplog.messages
    open_device("onnxruntime", 2)
    assert "no pool of 2 threads" in caplog.text


def test_onnxruntime_sessions_share_their_threads() -> None:
    """With threads of their own, which spin after their work, a step took 90 times as long."""
    script = """
import psutil
from bitsearch.kernels.devices import Launch, open_device
device, launch = open_device("onnxruntime", 2), Launch(1, 64, ((64, "int4-g32"),))
kept = [device.linear(launch, None)]
before = psutil.Process().num_threads()
kept += [device.linear(launch, None) for _ in range(16)]
print(psutil.Process().num_threads() - before)
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == 0


def test_onnxruntime_keeps_every_copy_in_memory() -> None:
    from bitsearch.kernels.onnxruntime_device import OnnxRuntime, stored_as
    from bitsearch.kernels.random_weights import inputs, random_parts

    launch = Launch(1, 256, ((64, "int4-g64"),))
    format = parse_format("int4-g64")
    stored = stored_as(format, random_parts(launch, 0)[0], 64)
    session = OnnxRuntime(1).session(launch, format, stored, 3)
    one, other, third = session.run(None, {"x": inputs(1, 256, 0)})
    # it would hold equal weights once, and time what its cache holds
    assert not (one == other).any() and not (other == third).any()


def test_a_broken_library_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    spec = ModuleSpec("libggml", None, origin=f"{tmp_path}/libggml/__init__.py")
    monkeypatch.setattr(ggml, "find_spec", lambda _: spec)
    ggml.library.cache_clear()
    with pytest.raises(BadInput, match="cannot be used here"):
        ggml.library()
    ggml.library.cache_clear()


def test_unknown_devices_are_refused_with_those_known() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'tpu'; known: .*ggml"):
        open_device("tpu", 1)
    assert set(device_names()) >= set(FORMATS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
def test_the_processor_is_told_from_another() -> None:
    from bitsearch.kernels.processor import last_level_cache, processor

    found = processor()
    assert found["name"] and found["cores"].endswith("cores")
    assert last_level_cache() >= 2**18
