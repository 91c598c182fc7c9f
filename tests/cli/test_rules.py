"""`search --at-least --tie --distinct`: kept by the shipped policy, or refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitsearch.policy import load_policy


def test_rules_are_kept_by_what_is_shipped(cli: Any, searched: Any) -> None:
    asked = ["search", searched.run, "-b", "5bpw", "--diagnostics", "0", "--solver", "milp"]
    rules = ["--at-least", "*o_proj=8", "--tie", "*layers.{block}.mlp*", "--distinct", "2"]
    found = cli(*asked, *rules, "--json").json
    assert found["bytes"] <= found["limit_bytes"][0]
    policy = load_policy(searched.run / "policy.json")
    formats = {name: module.format for name, module in policy.modules.items()}
    assert len(set(formats.values())) <= 2
    for name, form in formats.items():
        if "o_proj" in name:
            assert policy.formats[form].bits >= 8
    for block in (0, 1):
        assert len({form for name, form in formats.items() if f"layers.{block}.mlp" in name}) == 1
    content = json.loads((searched.run / "policy.json").read_text())
    assert content["provenance"]["rules"] == {
        "at_least": {"*o_proj": 8}, "tie": ["*layers.{block}.mlp*"], "distinct": 2
    }  # fmt: skip
    # a tie is for every solver
    tied = cli(*asked[:-1], "pareto_dp", *rules[:4], "--json").json
    assert tied["bytes"] <= tied["limit_bytes"][0]


@pytest.mark.parametrize(
    "rules, code, complaint",
    [
        (["--distinct", "2"], 2, "solver 'pareto_dp' cannot limit the number of distinct"),
        (["--at-least", "o_proj"], 2, "--at-least takes PATTERN=BITS"),
        (["--at-least", "nobody=4"], 2, "--at-least pattern 'nobody' matches no unit"),
        (["--tie", "nobody"], 2, "--tie pattern 'nobody' matches no unit"),
        (["--at-least", "*=8"], 3, "below the achievable range"),
    ],
)
def test_rules_that_cannot_be_kept(
    cli: Any, searched: Any, rules: list[str], code: int, complaint: str
) -> None:
    before = (searched.run / "policy.json").read_bytes()
    line = cli("search", searched.run, "-b", "4bpw", *rules).complaint(code)
    assert complaint in line
    assert (searched.run / "policy.json").read_bytes() == before
