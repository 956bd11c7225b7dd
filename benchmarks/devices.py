"""The list of devices on which `make gpu` has checked the kernels, with the verdicts, from its records."""

from __future__ import annotations

import json
from pathlib import Path

from . import tables
from .gpu_stages import PartRecord

NO_DEVICES = "None yet. Run `make gpu` on a machine with a GPU, then `python -m benchmarks report`."


def section(results: Path) -> str:
    """Return a table of the devices, followed by the times on each, or NO_DEVICES if there are none."""
    folders = sorted(path for path in (results / "gpu").glob("*") if path.is_dir())
    found = [records for folder in folders if (records := read_device(folder))]
    if not found:
        return NO_DEVICES
    heads = ["device", "driver", "PyTorch", "Triton", "verified", "suite", "sanitizer", "date"]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *map(_row, found))]
    return "\n\n".join(["\n".join(lines), *filter(None, map(_times_table, found))])


def read_device(folder: Path) -> list[PartRecord]:
    """Return the records of one device, or an empty list if no kernels were verified there. Rehearsals do not count."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.record.json"))]
    records = [record for record in records if not record["key"]["rehearsal"]]
    return records if _verified(records) else []


def _verified(records: list[PartRecord]) -> PartRecord | None:
    """Return the record of the part that verifies the kernels, or None if it has no result."""
    parts = (record for record in records if (record["stage"], record["part"]) == ("verify", "kernels"))
    return next((record for record in parts if record.get("result")), None)


def _row(records: list[PartRecord]) -> list[str]:
    verify = _verified(records)
    assert verify is not None
    model = verify["key"]["device"]
    verdicts = {name: v["status"] for of_device in verify["result"].values() for name, v in of_device.items()}
    return [
        f"{model['name']}, {model['capability']}", model["driver"], model["torch"], model["triton"],
        ", ".join(f"`{name}` {status}" for name, status in verdicts.items()),
        _share(records, "suite"), _share(records, "sanitize"), verify["machine"]["time"][:10],
    ]  # fmt: skip


def _share(records: list[PartRecord], stage: str) -> str:
    """Return how many of a stage's parts passed, out of those that ran."""
    ran = [record["status"] for record in records if record["stage"] == stage and record["status"] != "missing"]
    return f"{ran.count('passed')} of {len(ran)}" if ran else "not run"


def _times_table(records: list[PartRecord]) -> str:
    """Return the times of those parts of stage `benchmark` that passed, as a table, or "" if there are none."""
    parts = [r["result"] for r in records if r["stage"] == "benchmark" and r["status"] == "passed" and "result" in r]
    if not parts:
        return ""
    parts.sort(key=lambda part: (part["results"][0]["d"], part["results"][0]["n"]))
    missing = {name: why for part in parts for name, why in part["missing"].items()}
    results = [result for part in parts for result in part["results"]]
    return tables.time_table({**parts[0], "results": results, "missing": missing})
