"""Whatever is wrong: one line that names it, the right exit code, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitsearch.errors import BadInput
from bitsearch.run import Journal
from bitsearch.session import open_session
from bitsearch.settings import stored_settings


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the checkpoint of a model."""
    file = model / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_missing_model(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("plan",), ("search",), ("search", "--out", "mine")):
        line = cli(command[0], "no-such-model", "--budget", "4bpw", *command[1:]).complaint(4)
        assert "no model 'no-such-model'" in line and "tiny" in line
    assert "no model" in cli("measure", "tinny").complaint(4)
    assert "did you mean 'tiny'" in cli("measure", "tinny").complaint(4)
    # a mistyped name makes no folder
    assert not list(tmp_path.rglob("*.*")) and "mine" not in os.listdir(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_corrupt_checkpoint(cli: Any, place: Any, keep: int) -> None:
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    line = cli(*place.search()).complaint(4)
    assert "model.safetensors is damaged" in line


def test_pickled_weights(cli: Any, place: Any) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    line = cli(*place.search()).complaint(4)
    assert "pytorch_model.bin" in line and "save_pretrained" in line
    assert not place.run.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(cli: Any, place: Any, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name][3, 5] = value

    change_weights(place.model, spoil)
    line = cli(*place.search()).complaint(4)
    assert f"'{name}' holds NaN or infinite weights" in line


def test_missing_weights(cli: Any, place: Any) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights["lm_head.weight"]

    change_weights(place.model, drop)
    assert "lm_head.weight" in cli(*place.search()).complaint(4)


def test_weights_beyond_float16(cli: Any, place: Any) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.down_proj.weight"] *= 1e8

    change_weights(place.model, enlarge)
    line = cli(*place.search()).complaint(4)
    assert "beyond float16" in line and "--freeze" in line
    # As the message says; the space is another then, and so is the run.
    arguments = [str(a) for a in place.search("9bpw", "--freeze", "*.0.mlp.down_proj=bf16")]
    assert "made with frozen" in cli(*arguments).complaint(4)
    arguments[arguments.index("--out") + 1] = str(place.path / "another")
    assert cli(*arguments).code == 0


def test_a_broken_tokenizer(cli: Any, place: Any) -> None:
    (place.model / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer" in cli(*place.search()).complaint(4)
    (place.model / "tokenizer.json").unlink()
    assert "holds no tokenizer" in cli(*place.search()).complaint(4)


def test_a_tokenizer_of_another_model(cli: Any, place: Any) -> None:
    other = Path(__import__("bitsearch").__file__).parent / "builtin" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, place.model)
    line = cli(*place.search()).complaint(4)
    assert "does not belong to this model" in line and "96" in line


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"w3 w4 w5\n", "has 3 tokens, but 6 windows of 16 are asked for"),
        (b"\xff\xfe w3", "is not UTF-8 (byte 0)"),
    ],
)
def test_texts_that_are_none(cli: Any, place: Any, content: bytes, message: str) -> None:
    place.text("evaluation").write_bytes(content)
    line = cli(*place.search()).complaint(4)
    assert message in line and str(place.text("evaluation")) in line
    scored = cli("eval", place.model, "--text", place.text("evaluation"), "--windows", "6",
                 "--length", "16").complaint(4)  # fmt: skip
    assert message in scored


def test_a_text_that_is_not_there(cli: Any, place: Any) -> None:
    place.text("selection").unlink()
    line = cli(*place.search()).complaint(4)
    assert "no text" in line and "selection.txt" in line and "give a UTF-8 file" in line
    # the mistyped name does not stick to the run
    shutil.copy(place.text("common"), place.text("other"))
    assert cli(*place.search(), "--selection-text", place.text("other")).code == 0


def test_one_text_for_two_purposes(cli: Any, place: Any) -> None:
    shutil.copy(place.text("calibration"), place.text("evaluation"))
    line = cli(*place.search()).complaint(4)
    assert "calibration and evaluation texts share 40 long lines" in line


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--budget", "1bpw"), 3, "below the achievable range"),
        (("--budget", "20bpw"), 3, "above the achievable range"),
        (("--budget", "4"), 2, "is not a budget"),
        (("--damage", "guess"), 2, "unknown estimator 'guess'; known: kl"),
        (("--solver", "guess"), 2, "unknown solver 'guess'; known: pareto_dp"),
        (("--candidates", "int4"), 2, "unknown format 'int4'"),
        (("--candidates", ""), 2, "no candidate format"),
        (("--candidates", "bf16,bf16"), 2, "given twice"),
        (("--freeze", "lm_head"), 2, "--freeze takes PATTERN=FORMAT"),
        (("--freeze", "lm_head="), 2, "unknown format ''"),
        (("--freeze", "nowhere.*=bf16"), 2, "'nowhere.*' matches no unit"),
        (("--windows", "4,4"), 2, "--windows 4,4: write three numbers"),
        (("--windows", "4,0,4"), 2, "write three numbers"),
        (("--dtype", "float31"), 2, "unknown dtype 'float31'"),
        (("--dtype", "int8"), 2, "unknown dtype 'int8'"),
        (("--device", "cuda:99"), 4, "device 'cuda:99' is not available"),
        (("--device", "abacus"), 2, "unknown device 'abacus': give auto, cpu"),
        (("--revision", "main"), 4, "is not a hub model and has no revision 'main'"),
        (("--budget", "4bpw", "--budget", "5bpw@linear", "--solver", "pareto_dp"), 2, "milp"),
    ],
)
def test_arguments_that_cannot_be(
    cli: Any, place: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    if message in ("below the achievable range", "above the achievable range", "is not a budget"):
        line = cli("search", place.model, "--out", place.run, *arguments).complaint(code)
    else:
        line = cli(*place.search(), *arguments).complaint(code)
    assert message in line
    # found out before anything was measured, or written
    assert not place.run.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "tiny"),
        ("search", "tiny", "--budget", "4bpw", "--length", "3"),
        ("search", "tiny", "--budget", "4bpw", "--length", "long"),
        ("search", "tiny", "--budget", "4bpw", "--diagnostics", "-1"),
        ("search", "tiny", "--budget", "4bpw", "--seed", "-1"),
        ("serach", "tiny"),
        ("eval", "tiny"),
        ("plan",),
        ("--no-such-option",),
    ],
)
def test_usage_errors(cli: Any, arguments: tuple[str, ...]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2 and not outcome.out and "Traceback" not in outcome.err


def test_a_run_with_another_out(cli: Any, searched: Any, tmp_path: Path) -> None:
    line = cli("search", searched.run, "--budget", "5bpw", "--out", tmp_path / "x").complaint(2)
    assert "is a run itself; leave --out away" in line


def test_the_model_of_a_run_is_gone(cli: Any, place: Any) -> None:
    assert cli(*place.search()).code == 0
    shutil.move(place.model, place.path / "elsewhere")
    line = cli("search", place.run, "--budget", "5bpw").complaint(4)
    assert "no model" in line and str(place.model) in line


def test_a_unit_that_no_text_reaches(cli: Any, place: Any) -> None:
    """Behind a gate of zeros nothing is felt: scored as worst, with a warning that names it."""
    name = "model.layers.0.mlp.down_proj"

    def close(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.gate_proj.weight"].zero_()

    change_weights(place.model, close)
    outcome = cli(*place.search("5bpw"), "--json")
    warnings = [line for line in outcome.err.splitlines() if "never reached it" in line]
    assert any(line.startswith(f"{name}: calibration text") for line in warnings)
    assert all("--freeze" in line and "most sensitive" in line for line in warnings)
    policy = json.loads((place.run / "policy.json").read_text())
    widths = {tensor: policy["formats"][module["format"]]["bits"]
              for tensor, module in policy["modules"].items()}  # fmt: skip
    blocks = [bits for tensor, bits in widths.items() if ".layers." in tensor]
    assert outcome.json["shipped"] and widths[f"{name}.weight"] >= sorted(blocks)[len(blocks) // 2]


def test_a_destroyed_model_gives_numbers_all_the_same(cli: Any, place: Any) -> None:
    """Weights that overflow in the model are bad, not a crash, and never NaN in a file."""

    def blow_up(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith(("lm_head.weight", "norm.weight")):
                weights[name] *= 3e3

    change_weights(place.model, blow_up)
    found = cli(*place.search("3.6bpw"), "--json").json
    assert found["perplexity"] > 1e3
    for path in place.run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    assert cli("check", place.run).code == 0


def test_a_damaged_table_is_named_and_not_replaced(cli: Any, searched: Any) -> None:
    table = searched.run / "tables" / "fisher_output.safetensors"
    damaged = table.read_bytes()[:-9]
    table.write_bytes(damaged)
    line = cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert "fisher_output.safetensors" in line
    assert table.read_bytes() == damaged


@pytest.mark.parametrize("name", ["space.json", "corpora.json", "model.json"])
def test_damaged_run_files_are_named(cli: Any, searched: Any, name: str) -> None:
    path = searched.run / name
    path.write_bytes(path.read_bytes()[:-30])
    line = cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert name in line and "delete it to make it anew" in line


def test_damaged_statistics_are_named(cli: Any, searched: Any) -> None:
    (searched.run / "statistics.safetensors").write_bytes(b"\0" * 40)
    line = cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert "statistics.safetensors is damaged" in line


def test_damaged_evaluations_are_named(cli: Any, searched: Any) -> None:
    path = searched.run / "evaluations.journal"
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    path.write_bytes(raw)
    line = cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert "evaluations.journal is damaged at byte 0; delete it" in line
    path.unlink()
    assert cli("search", searched.run, "--budget", "5bpw").code == 0


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_space_files_give_a_clear_error(searched: Any, data: st.DataObject) -> None:
    path = searched.run / "space.json"
    good = path.read_bytes()
    raw = bytearray(good)
    settings_end = good.index(b'"parameters"')
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, settings_end))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.sampled_from(b'0-9.{}[]",: xnte\x00\xff'))
        else:
            del raw[at : at + data.draw(st.integers(1, 30))]
    path.write_bytes(raw)
    try:
        found = stored_settings(searched.run)
    except BadInput as error:
        assert "space.json" in str(error)
    else:
        assert found.length > 1 and min(found.windows.values()) > 0
    finally:
        path.write_bytes(good)


def test_a_newer_run_is_refused(cli: Any, searched: Any) -> None:
    path = searched.run / "space.json"
    path.write_text(path.read_text().replace("bitsearch.space/1", "bitsearch.space/2"))
    assert "bitsearch.space/2" in cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert "bitsearch.space/2" in cli("check", searched.run).complaint(4)


def test_a_folder_that_cannot_be_written(cli: Any, place: Any) -> None:
    arguments = [str(a) for a in place.search()]
    arguments[arguments.index("--out") + 1] = "/proc/nothing/run"
    line = cli(*arguments).complaint(5)
    assert "cannot write /proc/nothing/run" in line and "choose another --out" in line


def test_a_disk_that_fills_up_while_measuring(
    cli: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, [20]

    def filling(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", filling)
    line = cli(*place.search()).complaint(5)
    assert "No space left on device" in line and "the same command again, it resumes" in line
    monkeypatch.setattr(os, "fsync", sync)
    kept = len(Journal(place.run / "tables" / "fisher_output.journal").records)
    assert kept > 5
    assert cli("check", place.run).code == 0
    assert cli(*place.search()).code == 0


@pytest.mark.parametrize("after", [0, 5, 40])
def test_an_interrupt_saves_and_tells_how_to_go_on(
    cli: Any, place: Any, searched: Any, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    append, left = Journal.append, [after]

    def interrupted(self: Journal, record: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(Journal, "append", interrupted)
    arguments = [str(a) for a in place.search()]
    line = cli(*arguments).complaint(130)
    assert f"To go on: bitsearch {' '.join(arguments[:5])}" in line
    monkeypatch.setattr(Journal, "append", append)
    stored = [*place.run.glob("*.journal"), *place.run.glob("tables/*.journal")]
    assert bool(stored) == (after > 0)
    assert cli(*arguments).code == 0
    one, other = (json.loads((run / "policy.json").read_text())
                  for run in (place.run, searched.run))  # fmt: skip
    assert one["modules"] == other["modules"]
    assert one["damage"]["evaluation"]["kl"] == other["damage"]["evaluation"]["kl"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)  # fmt: skip
def test_out_of_memory(
    cli: Any, place: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("bitsearch.damage.monotone", fail)
    line = cli(*place.search()).complaint(5)
    assert "out of memory" in line and "shorter windows" in line
    monkeypatch.undo()


def test_a_second_process_is_told_who_works(cli: Any, searched: Any) -> None:
    with open_session(str(searched.run), None, "cpu", {}):
        line = cli("search", searched.run, "--budget", "5bpw").complaint(4)
    assert f"process {os.getpid()}) works in {searched.run}" in line


def test_names_with_brackets_are_printed_as_they_are(cli: Any, searched: Any) -> None:
    odd = searched.run.with_name("run [bold]x ü[bold]")
    searched.run.rename(odd)
    outcome = cli("search", odd, "--budget", "4.5bpw", "--diagnostics", "0")
    assert outcome.code == 0 and f"policy: {odd / 'policy.json'}\n" in outcome.out
    assert cli("check", odd).out == f"{odd}: run, valid\n"
