"""Does the search beat every control of the same bytes, on text it has not seen?

Runs `bitsearch search` as users do, once for each budget in one run directory:
the damage table is measured once. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from bitsearch.search import Request, search
from bitsearch.session import open_session

BUDGETS = ("3.0bpw", "3.5bpw", "4.0bpw", "4.5bpw", "5.0bpw", "6.0bpw", "7.0bpw")


def main() -> None:
    """Search at every budget and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--damage", default="kl")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", default="8,16,32")
    parser.add_argument("--candidates")
    parser.add_argument("--diagnostics", type=int, default=24)
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("length", "windows", "candidates")}
    results = []
    with open_session(options.model, options.out, options.device, given) as session:
        for budget in options.budgets.split(","):
            request = Request((budget,), options.damage, "pareto_dp", options.diagnostics)
            found = search(session, request, lambda stage, done, total: None)
            found.pop("policy")
            results.append(found)
            content = {"versions": versions(session.device), "results": results}
            options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print_table(results)


def versions(device: str) -> dict[str, str]:
    """What the numbers were made with."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Markdown: the shipped policy beside the best uniform control and the best of all."""
    print(
        "| budget | bpw | shipped | KL | best uniform control | its KL | difference, paired 95 % |"
    )
    print("|---" * 7 + "|")
    for row in results:
        uniform = [c for c in row["controls"] if "uniform" in c["name"] or "filled" in c["name"]]
        best = min(uniform, key=lambda control: float(control["kl"]))
        low, high = best["difference_ci"]
        difference = f"{best['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        print(
            f"| {row['budget'][0]} | {row['bpw']:.3f} | {row['shipped']} | {row['kl']:.4f} | "
            f"{best['name']} | {best['kl']:.4f} | {difference} |"
        )


if __name__ == "__main__":
    main()
