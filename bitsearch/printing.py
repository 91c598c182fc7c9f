"""Results as people read them."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from bitsearch.console import out


def print_result(found: dict[str, Any]) -> None:
    """The outcome of a search."""
    budget = " and ".join(found["budget"])
    out.print(
        f"\n[bold]{escape(found['model'])}[/] within {budget}: "
        f"{found['bytes']:,} bytes, {found['bpw']:.3f} bits a weight"
    )
    if found.get("recipe"):
        recipe = found["recipe"]
        changed = f"; changed: {', '.join(recipe['overridden'])}" if recipe["overridden"] else ""
        out.print(f"recipe {escape(recipe['name'])}: {escape(recipe['title'])}{changed}")
    # Narrow enough for 80 columns.
    regime = found["latency"][0]["regime"] if found.get("latency") else None
    table = Table(
        Column("held-out text", overflow="fold"),
        Column("bpw", justify="right", no_wrap=True),
        *([Column("ms", justify="right", no_wrap=True)] if regime else []),
        Column("KL", justify="right", no_wrap=True),
        Column("perplexity", justify="right", no_wrap=True),
        Column("shipped − it, paired 95 %", no_wrap=True),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_row(
        f"[bold]{found['shipped']} (shipped)[/]",
        f"{found['bpw']:.3f}",
        *_milliseconds(found, regime),
        f"[bold]{found['kl']:.4f}[/]",
        f"{found['perplexity']:.2f}",
        "",
    )
    for control in sorted(found["controls"], key=lambda row: row["kl"]):
        table.add_row(
            control["name"],
            f"{control['bpw']:.3f}",
            *([f"{control['ms'][regime]:.3f}"] if regime else []),
            f"{control['kl']:.4f}",
            f"{control['perplexity']:.2f}",
            _interval(control["difference_ci"]),
        )
    unquantized = ("16", *([""] if regime else []), "0")
    table.add_row("unquantized", *unquantized, f"{found['reference_perplexity']:.2f}", "")
    out.print(table)
    for entry in found.get("latency", []):
        out.print(_step(entry))
    out.print(f"KL of the shipped policy: 95 % interval {_interval(found['kl_ci'])}")
    out.print(f"top-1 agreement with the unquantized model: {100 * found['top1']:.1f} %")
    for name, text in found.get("texts", {}).items():
        out.print(f"  {escape(name)}: KL {text['kl']:.4f}, perplexity {text['perplexity']:.2f}")
    _print_diagnostics(found)
    solver = found["solver"]
    gap = "unknown" if solver["gap"] is None else f"{solver['gap']:.2g}"
    out.print(
        f"solver {solver['name']}: gap {gap}, {solver['seconds']:.2f} s; "
        f"measuring took {found['measure_seconds']:.0f} s, all {found['seconds']:.0f} s; "
        f"peak memory {found['peak_rss_bytes'] / 1e9:.1f} GB"
    )
    out.print(f"policy: {escape(found['policy'])}")


def _milliseconds(found: dict[str, Any], regime: str | None) -> list[str]:
    """The shipped policy's time, measured if it could be."""
    if regime is None:
        return []
    entry = found["latency"][0]
    return [f"{entry['measured_ms'] or entry['predicted_ms']:.3f}"]


def _step(entry: dict[str, Any]) -> str:
    """A regime's prediction beside what was measured."""
    where = f"a step of {entry['regime']} on {entry['device']}, {entry['machine']['name']}"
    if entry["threads"]:
        where += f", {entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
    if entry["measured_ms"] is None:
        return f"{escape(where)}: estimated {entry['predicted_ms']:.3f} ms, not measured"
    off = entry["predicted_ms"] / entry["measured_ms"] - 1
    return (
        f"{escape(where)}: predicted {entry['predicted_ms']:.3f} ms ({100 * off:+.1f} %), measured "
        f"[bold]{entry['measured_ms']:.3f} ms[/] from end to end ({entry['clock']} clock; "
        f"{entry['wall_ms']:.3f} ms on the wall's)"
    )


def _print_diagnostics(found: dict[str, Any]) -> None:
    """Each with what it means."""
    d = found["diagnostics"]
    if (proxy := d.get("proxy")) and proxy["rank_correlation"] is not None:
        out.print(
            f"damage was measured with {proxy['proxy']} in place of {proxy['quantizer']}: rank "
            f"correlation {proxy['rank_correlation']:.2f} over {proxy['cells']} cells"
        )
    if d["sigma"] is not None:
        out.print(
            f"sensitivities spread by σ = {d['sigma']:.2f}: at best "
            f"{d['ceiling']:.2f} times the damage of uniform widths, if damage were additive"
        )
    if d.get("additivity") is not None:
        verdict = "additive" if d["additivity"] < 1.5 else "units interact: trust measurements only"
        out.print(
            f"additivity R = {d['additivity']:.2f} ({verdict}; "
            f"from {d['additivity_units']} units measured alone)"
        )
    if d.get("rank_correlation") is not None:
        out.print(
            f"rank correlation of predicted with measured damage: {d['rank_correlation']:.2f} "
            f"over {d['random_policies']} random policies"
        )


def print_plan(found: dict[str, Any], units: bool) -> None:
    """The feasible range and the size of every candidate."""
    low, high = found["range"]["bytes"]
    low_bpw, high_bpw = found["range"]["bpw"]
    out.print(
        f"[bold]{escape(found['model'])}[/]: {found['architecture']}, "
        f"{found['parameters']:,} parameters, {len(found['units'])} units"
    )
    if found["target"] not in ("portable", "none"):
        out.print(f"for {escape(found['target'])}: bytes are those of its files")
    out.print(f"achievable: {low:,} to {high:,} bytes, {low_bpw:.3f} to {high_bpw:.3f} bpw")
    for budget in found["budgets"]:
        fits = budget["uniform"] or "no uniform format"
        out.print(f"budget {budget['text']}: {budget['bytes']:,} bytes; {fits} fits everywhere")
    count = len(found["units"])
    table = Table("candidate", "bytes everywhere", "bpw", "units")
    for row in found["candidates"]:
        bpw = 8 * row["bytes"] / found["parameters"]
        offered = "all" if row["units"] == count else f"{row['units']} of {count}"
        table.add_row(row["name"], f"{row['bytes']:,}", f"{bpw:.3f}", offered)
    out.print(table)
    if units:
        listed = Table(Column("unit", overflow="fold"), "kind", "parameters", "tensors")
        for unit in found["units"]:
            listed.add_row(
                unit["name"], unit["kind"], f"{unit['parameters']:,}", str(len(unit["tensors"]))
            )
        out.print(listed)
    for name, reason in found["excluded"].items():
        out.print(f"kept at 16 bits: {name} ({reason})")
    cost = found["cost"]
    out.print(
        f"on {cost['cores']} cores with default settings, roughly: fisher_output "
        f"{_minutes(cost['seconds_fisher_output'])}, kl {_minutes(cost['seconds_kl'])}, "
        f"checking {_minutes(cost['seconds_check'])}, {cost['memory_bytes'] / 1e9:.1f} GB of memory"
    )


def print_quality(found: dict[str, Any]) -> None:
    """The quality of one policy."""
    out.print(
        f"KL {found['kl']:.5f} {_interval(found['kl_ci'])}, perplexity {found['perplexity']:.3f} "
        f"(unquantized {found['reference_perplexity']:.3f}), top-1 {100 * found['top1']:.2f} %, "
        f"{found['tokens']:,} tokens"
    )
    for name, text in found.get("texts", {}).items():
        out.print(f"  {escape(name)}: KL {text['kl']:.5f}, perplexity {text['perplexity']:.3f}")


def print_checkpoint(found: dict[str, Any]) -> None:
    """What was written, and where."""
    size = sum(found["files"].values())
    kind = "packed" if found["packed"] else f"fake-quantized, {found['dtype']}"
    out.print(f"{escape(found['out'])}: {kind}, {size:,} bytes of weights on disk")
    if not found["packed"]:
        out.print(f"packed it would be {found['policy_bytes']:,} bytes (--packed)")


def print_export(found: dict[str, Any]) -> None:
    """What was written, and what is lost."""
    out.print(f"{escape(found['out'])}: {found['target']}, {', '.join(found['files'])}")
    if found["tensor_bytes"] is not None:
        out.print(f"{found['tensor_bytes']:,} bytes of weights")
    for loss in found["losses"]:
        out.print(
            f"{loss['code']} {escape(loss['module'])}: {loss['from']} → {loss['to']}", style="dim"
        )


def _interval(pair: tuple[float, float]) -> str:
    return f"\\[{pair[0]:.4f}, {pair[1]:.4f}]"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
