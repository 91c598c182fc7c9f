"""A table measured with a cheaper quantizer: asked for only, and its agreement told."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from bitsearch.tables import read_table

ASKED = ("--quantizer", "gptq")


def test_a_proxy_measures_and_the_right_one_ships(cli: Any, place: Any) -> None:
    def damage(*more: str) -> Any:
        shutil.rmtree(place.run, ignore_errors=True)
        found = cli(*place.search("4.5bpw", *more), "--json")
        table, header = read_table(place.run / "tables" / "fisher_output.safetensors")
        return found, table, header

    _, with_rtn, header = damage()
    _, with_gptq, _ = damage(*ASKED)
    found, with_proxy, _ = damage(*ASKED, "--proxy-quantizer", "rtn")
    assert np.array_equal(with_proxy, with_rtn) and not np.array_equal(with_rtn, with_gptq)

    told = found.json["diagnostics"]["proxy"]
    assert (told["proxy"], told["quantizer"]) == ("rtn", "gptq")
    assert told["cells"] == len(told["sample"]) >= 10
    assert {row[1] for row in told["sample"]} == {"int2-g16", "int4-g16", "int8-g16"}
    for unit, format, proxy, right in told["sample"]:
        cell = header["units"].index(unit), header["candidates"].index(format)
        assert proxy == with_rtn[cell] and right == pytest.approx(with_gptq[cell], rel=1e-6)
    _, _, proxy, right = zip(*told["sample"], strict=True)
    assert told["rank_correlation"] == pytest.approx(spearmanr(proxy, right).statistic)
    within = [
        spearmanr(*zip(*[row[2:] for row in told["sample"] if row[1] == format], strict=True))
        for format in ("int2-g16", "int4-g16", "int8-g16")
    ]
    assert told["within_formats"] == pytest.approx(np.mean([rho.statistic for rho in within]))
    line = f"rank correlation {told['rank_correlation']:.2f} over {told['cells']} cells"
    assert f"damage measured with rtn in place of gptq: {line}" in " ".join(found.err.split())

    # the policy is that of gptq, measured with it
    policy = place.run / "policy.json"
    assert json.loads(policy.read_text())["quantizer"]["method"] == "gptq"
    text = ("--text", place.text("evaluation"), "--length", "16", "--windows", "6", "--json")
    measured = cli("eval", place.model, "--policy", policy, *text).json
    assert measured["kl"] == pytest.approx(found.json["kl"], rel=1e-6)
    printed = " ".join(cli("search", place.run, "--budget", "5bpw").out.split())
    assert "damage was measured with rtn in place of gptq" in printed
    assert "proxy_quantizer='rtn'" in cli(*place.search("4.5bpw", *ASKED)).complaint(4)


def test_an_unknown_proxy(cli: Any, place: Any) -> None:
    line = cli(*place.search("4.5bpw", "--proxy-quantizer", "magic")).complaint(2)
    assert "unknown quantizer 'magic'" in line
