"""`quantize` writes the model that `eval` measured, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsearch import appearing, checkpoint
from bitsearch.checkpoint import quantize_model

ASKED = ("--length", "16", "--windows", "6", "--json")
CHECKPOINT = {"config.json", "generation_config.json", "policy.json", "tokenizer.json",
              "tokenizer_config.json"}  # fmt: skip


def as_dtype(model: Path, dtype: torch.dtype) -> None:
    """Rewrite a model in another dtype."""
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    opened.save_pretrained(model)


def tensor_bytes(file: Path) -> int:
    """What the file holds after its header."""
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return file.stat().st_size - 8 - int(header)


def scores(cli: Any, place: Any, *arguments: object) -> tuple[float, float, int]:
    found = cli("eval", *arguments, "--text", place.text("evaluation"), *ASKED).json
    return found["kl"], found["perplexity"], found["bytes"]


def test_checkpoints_are_as_good_as_the_policy(cli: Any, place: Any, tmp_path: Path) -> None:
    """Statistics, many formats and a bfloat16 model: searched, then written in each way."""
    as_dtype(place.model, torch.bfloat16)
    formats = "int{2,3,4}-g16,nf4-g32,mxfp4,nvfp4,bf16"
    cli(*place.search("5bpw", "--candidates", formats))
    policy = place.run / "policy.json"
    used = {row["format"] for row in json.loads(policy.read_text())["modules"].values()}
    assert len(used) > 1
    measured = scores(cli, place, place.model, "--policy", policy)
    assert measured[0] > 0

    packed, exact, rounded = (tmp_path / name for name in ("packed", "exact", "rounded"))
    told = cli("quantize", place.model, "--policy", policy, "--out", packed, "--packed", "--json")
    assert told.json["policy_bytes"] == measured[2] == tensor_bytes(packed / "packed.safetensors")
    assert set(os.listdir(packed)) == {"packed.safetensors"} | CHECKPOINT
    assert scores(cli, place, packed) == measured
    # its original may have moved
    shutil.copytree(place.model, tmp_path / "moved")
    assert scores(cli, place, packed, "--reference", tmp_path / "moved") == measured

    cli("quantize", place.model, "--policy", policy, "--out", exact, "--dtype", "float32")
    assert scores(cli, place, exact, "--reference", place.model)[:2] == measured[:2]

    told = cli("quantize", place.model, "--policy", policy, "--out", rounded)
    assert told.code == 0 and "fake-quantized, bfloat16" in told.out and "steps" in told.err
    assert set(os.listdir(rounded)) == {"model.safetensors"} | CHECKPOINT
    near = scores(cli, place, rounded, "--reference", place.model)
    assert near[:2] == pytest.approx(measured[:2], rel=0.05) and near[0] != measured[0]
    # alone, a checkpoint is a model like any other
    assert scores(cli, place, rounded)[0] == pytest.approx(0, abs=1e-6)
    assert scores(cli, place, rounded)[1] == near[1]
    text = "w3 w4 w5"
    tokens = AutoTokenizer.from_pretrained(rounded)(text)["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(place.model)(text)["input_ids"]


def test_the_quantizer_is_that_of_the_policy(cli: Any, place: Any, tmp_path: Path) -> None:
    """One that needs more statistics, and gives other weights than rounding to nearest."""
    as_dtype(place.model, torch.bfloat16)
    cli(*place.search("4.5bpw", "--quantizer", "gptq", "--candidates", "int{3,4}-g16,bf16"))
    policy, packed = place.run / "policy.json", tmp_path / "packed"
    cli("quantize", place.model, "--policy", policy, "--out", packed, "--packed")
    measured = scores(cli, place, place.model, "--policy", policy)
    assert scores(cli, place, packed) == measured

    other = json.loads(policy.read_text())
    other["quantizer"]["method"] = "rtn"
    (place.run / "rtn.json").write_text(json.dumps(other))
    assert scores(cli, place, place.model, "--policy", place.run / "rtn.json")[0] != measured[0]


def test_the_dtype_is_that_of_the_model(cli: Any, searched: Any, tmp_path: Path) -> None:
    place, policy = searched.place, searched.run / "policy.json"

    def dtypes(*options: str) -> set[torch.dtype]:
        out = tmp_path / "out"
        assert cli("quantize", place.model, "--policy", policy, "--out", out, "--force",
                   *options).code == 0  # fmt: skip
        stored = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        assert {str(t.dtype) for t in stored.values()} == {f"torch.{config['dtype']}"}
        return {tensor.dtype for tensor in stored.values()}

    assert dtypes() == {torch.bfloat16}  # of a float32 model
    assert dtypes("--dtype", "float16") == {torch.float16}
    assert dtypes("--dtype", "float32") == {torch.float32}


def test_a_float16_model_stays_one(cli: Any, place: Any, tmp_path: Path) -> None:
    as_dtype(place.model, torch.float16)
    cli(*place.search())
    out, policy = tmp_path / "out", place.run / "policy.json"
    assert cli("quantize", place.model, "--policy", policy, "--out", out, "--json").json[
        "dtype"] == "float16"  # fmt: skip
    packed = tmp_path / "packed"
    cli("quantize", place.model, "--policy", policy, "--out", packed, "--packed")
    assert load_file(packed / "packed.safetensors")["model.norm.weight"].dtype == torch.float16
    assert scores(cli, place, packed) == scores(cli, place, place.model, "--policy", policy)


@pytest.mark.parametrize("packed", [True, False])
def test_weights_beyond_the_dtype(cli: Any, place: Any, searched: Any, packed: bool) -> None:
    file, name = place.model / "model.safetensors", "model.norm.weight"
    weights = load_file(file)
    weights[name][5] = 1e5
    save_file(weights, file, metadata={"format": "pt"})
    told = ("quantize", place.model, "--policy", searched.run / "policy.json", "--out",
            place.path / "out", *["--packed"] * packed)  # fmt: skip
    line = cli(*told, "--dtype", "float16").complaint(4)
    assert f"{name} holds weights up to 1e+05, beyond float16" in line
    assert not (place.path / "out").exists()
    assert cli(*told).code == 0


def test_a_policy_of_another_model(cli: Any, searched: Any, tmp_path: Path) -> None:
    policy = searched.run / "policy.json"
    line = cli("quantize", "tiny", "--policy", policy, "--out", tmp_path / "out").complaint(4)
    assert "was made with model.config_sha256" in line and not (tmp_path / "out").exists()
    packed = tmp_path / "packed"
    model = searched.place.model
    cli("quantize", model, "--policy", policy, "--out", packed, "--packed")
    line = cli("quantize", packed, "--policy", policy, "--out", tmp_path / "out").complaint(4)
    assert "was made with model." in line


def test_bad_requests(cli: Any, searched: Any, tmp_path: Path) -> None:
    place, policy = searched.place, searched.run / "policy.json"
    told = ("quantize", place.model, "--policy", policy, "--out", tmp_path / "out")
    assert "float32" in cli(*told, "--dtype", "int4").complaint(2)
    assert "16-bit" in cli(*told, "--packed", "--dtype", "float32").complaint(2)
    assert "cannot be read" in cli(*told[:3], tmp_path / "none.json", *told[4:]).complaint(4)
    away = shutil.copy(policy, tmp_path / "policy.json")
    assert "--statistics" in cli(*told[:3], away, *told[4:]).complaint(4)
    assert set(os.listdir(tmp_path)) == {"policy.json", "run"}
    statistics = searched.run / "statistics.safetensors"
    # what is asked for by name is not replaced by what lies beside
    gone = cli(*told, "--statistics", tmp_path / "gone.safetensors").complaint(4)
    assert f"no file '{tmp_path / 'gone.safetensors'}'" in gone
    assert cli(*told[:3], away, *told[4:], "--statistics", statistics).code == 0


def test_eval_needs_the_original_of_a_packed_checkpoint(
    cli: Any, place: Any, searched: Any, tmp_path: Path
) -> None:
    """The policy names a model that is gone, then one of another kind is given."""
    policy = json.loads((searched.run / "policy.json").read_text())
    policy["model"]["reference"] = str(tmp_path / "gone")
    path = searched.run / "moved.json"
    path.write_text(json.dumps(policy))
    out = tmp_path / "out"
    cli("quantize", searched.place.model, "--policy", path, "--out", out, "--packed")
    asked = ("--text", place.text("evaluation"), *ASKED[:-1])
    line = cli("eval", out, *asked).complaint(4)
    assert str(tmp_path / "gone") in line and "--reference" in line
    assert "was made with model." in cli("eval", out, *asked, "--reference", "tiny").complaint(4)
    assert cli("eval", out, *asked, "--reference", place.model).code == 0
    line = cli("eval", place.model, *asked, "--reference", "tiny").complaint(4)
    assert "is not of the same kind" in line
    line = cli("eval", place.model, *asked, "--reference", "tiny", "--policy", path).complaint(2)
    assert "--reference" in line


def test_nothing_is_overwritten(cli: Any, searched: Any, tmp_path: Path) -> None:
    place, policy = searched.place, searched.run / "policy.json"
    out = tmp_path / "out"
    told = ("quantize", place.model, "--policy", policy, "--out", out)
    out.mkdir()
    assert cli(*told).code == 0
    before = (out / "model.safetensors").read_bytes()
    assert "--force" in cli(*told, "--packed").complaint(4)
    assert (out / "model.safetensors").read_bytes() == before
    assert cli(*told, "--packed", "--force").code == 0
    assert set(os.listdir(out)) == {"packed.safetensors"} | CHECKPOINT

    # what no `quantize` wrote is safe from --force too
    original = sorted(os.listdir(place.model))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("dear")
    for folder in (mine, place.model, searched.run):
        line = cli(*told[:-1], folder, "--force").complaint(4)
        assert "something else than a checkpoint" in line
    assert "not a folder" in cli(*told[:-1], mine / "thesis.tex", "--force").complaint(4)
    assert sorted(os.listdir(place.model)) == original and os.listdir(mine) == ["thesis.tex"]
    assert set(os.listdir(tmp_path)) == {"run", "out", "mine"}


@pytest.mark.parametrize("force", [False, True])
def test_stopped_halfway(
    cli: Any, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """An interrupt at any step leaves what was there, and nothing else."""
    out = tmp_path / "out"
    told = ("quantize", searched.place.model, "--policy", searched.run / "policy.json", "--out",
            out, "--packed")  # fmt: skip
    if force:
        cli(*told)
    before = content(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in (checkpoint, "_write_packed"), (appearing, "sync"), (appearing.os, "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(*place, interrupt)
            cli(*told, "--force").complaint(130)
        assert content(tmp_path) == before
    assert cli(*told, "--force").code == 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written(cli: Any, searched: Any) -> None:
    line = cli("quantize", searched.place.model, "--policy", searched.run / "policy.json",
               "--out", "/proc/nothing/out").complaint(5)  # fmt: skip
    assert "cannot write /proc/nothing/out" in line


def test_too_little_room_is_told_before_the_work(
    cli: Any, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = searched.run / "policy.json"
    # the file, and the one in which its tensors gather
    needed = 2 * json.loads(policy.read_text())["achieved"]["bytes"]
    monkeypatch.setattr(
        appearing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, needed - 1)
    )
    out = tmp_path / "out"
    line = cli("quantize", searched.place.model, "--policy", policy, "--out", out,
               "--packed").complaint(5)  # fmt: skip
    assert f"{needed - 1:,} are free" in line and os.listdir(tmp_path) == ["run"]


KILLED = """
import os, resource, signal, sys
import torch
import transformers.models.llama.modeling_llama
import bitsearch.checkpoint
import bitsearch.objectives.weights
from bitsearch.cli import main

model, policy, folder = sys.argv[1:]

def attempt(name, arm, *options):
    child = os.fork()
    if child == 0:
        arm()
        sys.argv = ["bitsearch", "quantize", model, "--policy", policy, "--out",
                    f"{folder}/{name}", *options]
        try:
            main()
        except SystemExit as done:
            os._exit(int(done.code or 0))
    _, status = os.waitpid(child, 0)
    print(name, os.waitstatus_to_exitcode(status))

def limited():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

def killed(name, count):
    def arm():
        real, left = getattr(os, name), [count]
        def call(*arguments):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        setattr(os, name, call)
    return arm

torch.set_num_threads(1)
attempt("full", limited)
attempt("full-packed", limited, "--packed")
attempt("sync", killed("fsync", 4))
attempt("rename", killed("replace", 1), "--packed")
"""


def test_a_full_disk_and_a_killed_run(searched: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    folder = tmp_path / "folder"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(searched.place.model),
         str(searched.run / "policy.json"), str(folder)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines == ["full 5", "full-packed 5", "sync -9", "rename -9"]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("bitsearch: cannot write") == 2 and "File too large" in done.stderr
    # of the killed ones hidden folders stay, of the others nothing
    left = os.listdir(folder)
    assert len(left) == 2 and all(name.startswith(".") for name in left)


def test_progress_reaches_its_end(searched: Any, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    quantize_model(
        str(searched.place.model), searched.run / "policy.json", tmp_path / "out",
        packed=True, dtype=None, statistics=None, device="cpu", force=False,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    modules = len(json.loads((searched.run / "policy.json").read_text())["modules"])
    assert steps == [("quantizing", done, modules) for done in range(modules + 1)]
