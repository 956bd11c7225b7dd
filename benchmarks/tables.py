"""Markdown tables of the suites' records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .competitors import COMPETITORS, OURS

SuiteRecord = dict  # as written by __main__

NAMES = {"compiled": "torch.compile", "chunked": "checkpointed chunks"}
_HEADS = {**{name: f"`{name}`" for name in OURS}, **NAMES}
_SETS = {
    "amx": "AVX-512 with AMX",
    "avx512_bf16": "AVX-512 with BF16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "neon": "NEON",
    "portable": "portable C++",
}
_RIVALS = ("eager", "compiled", "lightly")  # losses whose times the tables show as multiples of ours
_ABSENT = "-"


def time_table(record: SuiteRecord) -> str:
    """Return milliseconds of forward plus backward, our ratio to the floor, and other losses' ratios to ours."""
    results = record["results"]
    names = _in_order(name for result in results for name in result["losses"])
    rivals = [name for name in _RIVALS if name in names]
    size = {"N": "n", "D": "d", **({"dtype": "dtype"} if record["suite"] == "gpu" else {})}
    heads = [*size, *map(_head, names), "ours / floor", *(f"{_head(name)} / ours" for name in rivals)]
    rows = []
    for result in results:
        losses = result["losses"]
        row = [str(result[key]) for key in size.values()]
        row += [digits(losses[name]["both"]["p50"]) if name in losses else _ABSENT for name in names]
        ours = losses.get(result["ours"])
        row.append(digits(ours["times_floor"], 2) if ours else _ABSENT)
        row += [digits(losses[name]["over_ours"], 2) if ours and name in losses else _ABSENT for name in rivals]
        rows.append(row)
    parts = [_markdown(heads, rows), _footnote(record, names)]
    if threaded := [result for result in results if "threads" in result]:
        parts.append(_threads(threaded))
    return "\n\n".join(parts)


def sets_table(records: list[SuiteRecord]) -> str:
    """Return a row for each instruction set and size: our milliseconds, our ratio to the floor, and other losses'
    ratios to ours."""
    rivals = _in_order(name for record in records for result in record["results"] for name in result["losses"])
    rivals = [name for name in _RIVALS if name in rivals]
    heads = ["instruction set", "processor", "N", "D", "ours, ms", "ours / floor"]
    heads += [f"{_head(name)} / ours" for name in rivals]
    rows = []
    for record in records:
        machine = record["machine"]
        for result in record["results"]:
            losses, ours = result["losses"], result["losses"][result["ours"]]
            row = [set_name(machine), machine["processor"], str(result["n"]), str(result["d"])]
            row += [digits(ours["both"]["p50"]), digits(ours["times_floor"], 2)]
            row += [digits(losses[name]["over_ours"], 2) if name in losses else _ABSENT for name in rivals]
            rows.append(row)
    return "\n\n".join([_markdown(heads, rows), *dict.fromkeys(map(_footnote, records))])


def all_sets(records: list[SuiteRecord]) -> str:
    """Return every loss on every instruction set: a heading and `time_table` for each set."""
    return "\n\n".join(f"### {set_name(record['machine'])}\n\n{time_table(record)}" for record in records)


def set_name(machine: dict) -> str:
    """Return our kernel's instruction set. In records that do not store it, our kernel used the same set as PyTorch."""
    used = machine.get("instruction_set") or machine["vector"].lower()
    return _SETS.get(used, used)


def _threads(results: list[dict]) -> str:
    heads = ["N", "D", "threads", f"{_head(results[0]['ours'])}, ms", "speed-up", "speed-up of the GEMM"]
    rows = [
        [
            str(result["n"]),
            str(result["d"]),
            count,
            *map(digits, (row["both"]["p50"], row["speed_up"], row["gemm_speed_up"])),
        ]
        for result in results
        for count, row in result["threads"].items()
    ]
    return _markdown(heads, rows)


def memory_table(record: SuiteRecord) -> str:
    """Return peak MiB beyond the inputs."""
    cells = {(row["n"], row["d"], row["loss"]): _mib(row["extra_bytes"]) for row in record["results"]}
    names = _in_order(name for *_, name in cells)
    sizes = dict.fromkeys((n, d) for n, d, _ in cells)
    rows = [[str(n), str(d), *(cells.get((n, d, name), _ABSENT) for name in names)] for n, d in sizes]
    return f"{_markdown(['N', 'D', *map(_head, names)], rows)}\n\n{_footnote(record, names)}"


def scaling_table(record: SuiteRecord) -> str:
    """Return seconds, and their growth divided by the growth of N^2, as measured and at a constant GEMM rate. For a
    record with numbers of threads, return `_threads_table`."""
    if any("threads" in result for result in record["results"]):
        return _threads_table(record)
    heads = ["N", "D", "seconds", "seconds / N^2, first = 1", "normalised by GEMM rate", "/ floor", "MiB"]
    rows = [
        [
            str(row["n"]),
            str(row["d"]),
            *map(digits, (row["s"], row["growth"], row["growth_normalised"], row["times_floor"])),
            _mib(row["extra_bytes"]),
        ]
        for row in record["results"]
    ]
    return f"{_markdown(heads, rows)}\n\n{_footnote(record)}"


def _threads_table(record: SuiteRecord) -> str:
    """Return times, speed-ups and efficiencies of our kernel and of torch.mm, and the predicted speed-up."""
    heads = ["N", "D", "threads", "ours, ms", "speed-up", "predicted", "efficiency"]
    heads += ["torch.mm, ms", "speed-up", "efficiency"]
    rows = [
        [
            *(str(result["n"]), str(result["d"]), count),
            *map(digits, (row["both"]["p50"], row["speed_up"])),
            digits(row["predicted_speed_up"]) if row["predicted_speed_up"] else _ABSENT,
            *map(digits, (row["efficiency"], row["gemm"]["p50"], row["gemm_speed_up"], row["gemm_efficiency"])),
        ]
        for result in record["results"]
        for count, row in result["threads"].items()
    ]
    return f"{_markdown(heads, rows)}\n\n{_footnote(record)}"


def schedule_table(record: SuiteRecord) -> str:
    """Return predicted speed-ups relative to one thread, and how the time is spent at the largest number of threads."""
    counts = list(dict.fromkeys(row["threads"] for row in record["results"]))
    speed_ups: dict[tuple[str, int], dict[int, float]] = {}
    for row in record["results"]:
        speed_ups.setdefault((row["problem"], row["d"]), {})[row["threads"]] = row["speed_up"]
    heads = ["", "D", *(f"{count} thread{'s' if count > 1 else ''}" for count in counts)]
    rows = [[name, str(d), *(digits(of[count]) for count in counts)] for (name, d), of in speed_ups.items()]
    shares = ("computing", "waiting", "serial")
    parts_heads = ["", "D", "threads", "ms", "edge", "tasks", "computing", "waiting for turns", "serial", "balance"]
    parts = [
        [
            *(row["problem"], str(row["d"]), str(row["threads"]), digits(row["ms"]), str(row["edge"])),
            f"{row['tasks']:,}",
            *(f"{100 * row[share]:.0f} %" for share in shares),
            digits(row["balance"], 2),
        ]
        for row in record["results"]
        if row["threads"] == max(counts)
    ]
    return f"{_markdown(heads, rows)}\n\n{_markdown(parts_heads, parts)}"


def accuracy_table(record: SuiteRecord) -> str:
    """Return relative errors of the gradient: a row per loss, a column per stage of training."""
    cells = {
        (result["n"], result["d"], result["temperature"], name, result["stage"]): f"{error:.0e}".replace("e-0", "e-")
        for result in record["results"]
        for name, error in result["errors"].items()
    }
    stages = list(dict.fromkeys(stage for *_, stage in cells))
    heads = ["N", "D", "temperature", "", *("start of training" if s == "start" else f"loss {s}" for s in stages)]
    rows = [
        [*map(str, case), _head(name), *(cells.get((*case, name, stage), _ABSENT) for stage in stages)]
        for *case, name in dict.fromkeys(key[:-1] for key in cells)
    ]
    return f"{_markdown(heads, rows)}\n\n{_footnote(record)}"


def kernels_table(record: SuiteRecord) -> str:
    """Return registers, shared memory and matrix instructions of every compiled kernel."""
    heads = ["chip", "kernel", "dtype", "D", "variant", "tile", "regime", "shared, KiB", "registers", "at once"]
    heads += ["matrix instructions", "faults"]
    regimes = {None: "", False: "direct", True: "shifted"}
    rows = [
        [
            *(str(row[key]) for key in ("target", "kernel", "dtype", "d", "variant")),
            ", ".join(str(size) for size in row["tile"] or () if size is not None),
            regimes[row["shifted"]],
            digits(row["shared"] / 1024),
            *(str(row[key]) for key in ("registers", "resident", "matrix")),
            "; ".join(row["faults"]) or _ABSENT,
        ]
        for row in record["results"]
    ]
    return _markdown(heads, rows)


def model_table(record: SuiteRecord) -> str:
    """Return predicted milliseconds and the bottlenecks."""
    heads = ["chip", "N", "D", "dtype", "backend", "both", "both / u", "parts and their bottlenecks"]
    rows = [
        [
            *(str(row[key]) for key in ("target", "n", "d", "dtype", "backend")),
            *map(digits, (row["ms"]["both"], row["ms"]["both"] / row["ms"]["u"])),
            ", ".join(f"{name} {digits(row['ms'][name])} ({limit})" for name, limit in row["limits"].items()),
        ]
        for row in record["results"]
    ]
    return _markdown(heads, rows)


def tune_table(record: SuiteRecord) -> str:
    """Return the tile of every entry of the tile table, and the milliseconds of the entry's fastest candidate."""
    heads = ["chip", "kernel", "dtype", "D", "M", "tile", "ms"]
    rows = [
        [
            *(str(row[key]) for key in ("target", "kernel", "dtype", "d", "M")),
            ", ".join(map(str, row["tile"] or "")),
            digits(min(row["ms"].values())) if row["ms"] else _ABSENT,
        ]
        for row in record["results"]
    ]
    return _markdown(heads, rows)


def family_table(record: SuiteRecord) -> str:
    """Return milliseconds, their ratio to the first loss of a comparison, and peak MiB beyond the inputs."""
    rows = [
        [
            row["loss"],
            str(row["n"]),
            str(row["d"]),
            digits(row["both"]["p50"]),
            digits(row["over_first"], 2),
            _mib(row["extra_bytes"]),
        ]
        for row in record["results"]
    ]
    return f"{_markdown(['loss', 'N', 'D', 'ms', 'ms / first', 'MiB'], rows)}\n\n{_footnote(record)}"


def drop_ins_table(record: SuiteRecord) -> str:
    """Return milliseconds of the plain formula and of our drop-in, and their ratio."""
    heads = ["loss", "N", "D", "threads", "plain formula, ms", "fastntxent, ms", "plain / ours"]
    rows = [
        [
            row["loss"],
            *(str(row[key]) for key in ("n", "d", "threads")),
            *map(digits, (row["plain"]["p50"], row["ours"]["p50"], row["plain_over_ours"])),
        ]
        for row in record["results"]
    ]
    return f"{_markdown(heads, rows)}\n\n{_footnote(record, libraries=False)}"


def distributed_table(record: SuiteRecord) -> str:
    """Return the bytes sent and the milliseconds of a step on several ranks, how these milliseconds are spent, the
    model's predictions, and other losses' ratios to ours."""
    heads = ["ranks", "m", "D", "strategy", "bytes sent", "/ formula", "ms", "/ model", "products", "model", "waiting"]
    heads += ["transfers, model", "gathered / ours", "dense / ours"]
    rows = [
        [
            *map(str, (row["ranks"], 2 * row["n"], row["d"], row["strategy"])),
            f"{row['sent_bytes']:,}",
            digits(row["sent_bytes"] / row["formula_bytes"]) if row["formula_bytes"] else _ABSENT,
            digits(row["both"]["p50"]),
            digits(row["both"]["p50"] / row["model_ms"], 2),
            *(digits(row[f"{part}_ms"]) for part in ("products", "model_products", "waiting", "model_transfers")),
            *(digits(ratio, 2) for ratio in row["over_ours"].values()),
        ]
        for row in record["results"]
    ]
    note = f"One thread per rank, {record['results'][0]['cores']} cores, gloo."
    return f"{_markdown(heads, rows)}\n\n{_footnote(record)} {note}"


def _in_order(found: Iterable[str]) -> list[str]:
    found = set(found)
    return [name for name in COMPETITORS if name in found]


def _head(name: str) -> str:
    return _HEADS.get(name, name) + ("\\*" if COMPETITORS[name].note else "")


def _footnote(record: SuiteRecord, names: Sequence[str] = (), *, libraries: bool = True) -> str:
    machine = record["machine"]
    facts = [f"{machine['processor']}, threads: {machine['threads']}, {machine['vector']}"]
    if machine.get("held"):
        facts.append(f"our kernel restricted to {machine['held']}")
    elif machine.get("instruction_set"):
        facts.append(f"our kernel: {machine['instruction_set']}")
    facts += dict.fromkeys(result["device"] for result in record["results"] if "device" in result)
    facts.append(f"PyTorch {machine['torch']}")
    facts += [f"{name} {number}" for name, number in machine["packages"].items() if libraries]
    sentences = [f"{', '.join(facts)}; {machine['time'][:10]}."]
    sentences += [f"\\* {COMPETITORS[name].note}." for name in names if COMPETITORS[name].note]
    if record["missing"]:
        sentences.append(f"Not run: {', '.join(record['missing'])}.")
    return " ".join(sentences)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---:" * len(heads) + "|", *lines[1:]])


def _mib(size: int) -> str:
    return "< 1" if size < 2**20 else digits(size / 2**20)


def digits(x: float, count: int = 3) -> str:
    """Return x with this many significant digits, without an exponent."""
    text = f"{float(f'{x:.{count}g}'):.9f}"
    return text.rstrip("0").rstrip(".")


TABLES = {
    "cpu": time_table,
    "gpu": time_table,
    "memory": memory_table,
    "scaling": scaling_table,
    "schedule": schedule_table,
    "converged": accuracy_table,
    "distributed": distributed_table,
    "family": family_table,
    "drop-ins": drop_ins_table,
    "kernels": kernels_table,
    "model": model_table,
    "tune": tune_table,
}
