"""Tables of the results, for the terminal and for the README."""

from __future__ import annotations

from typing import Any

from setting import Setting, decode_bytes, flops

from experiments.tables import spread, table

NAMES = {
    "ours": "ours: draw, score target",
    "ours, both scored": "ours: draw, score target and proposal",
    "lock-step": "PyTorch, both in lock-step",
    "generate": "transformers `generate`, score both",
    "generate, target scored": "the same, log q taken as free",
}


def systems(result: dict[str, Any]) -> str:
    """Seconds, ratios and shares of the machine's rates."""
    setting = Setting(**result["setting"])
    rates = {f"{k}, {s}": r for s, of in result["matmul"].items() for k, r in of.items()}
    best = max(rates.values())
    ours = [run["total"] for run in result["rounds"]["ours"]]
    rows = []
    for name, runs in result["rounds"].items():
        totals = [run["total"] for run in runs]
        ratios = [mine / base for mine, base in zip(totals, ours, strict=True)]
        row = [NAMES[name], spread(totals), spread(ratios)]
        if name == "generate, target scored":
            row += ["", ""]
        else:
            work = flops(setting, name)
            share = work / sorted(totals)[len(totals) // 2] / best
            row += [f"{work / 1e9:.0f}", f"{100 * share:.0f}%"]
        rows.append(row)
    header = ["", "seconds", "over ours", "GFLOP of its algorithm", "of the best matmul rate"]
    text = [table(header, rows)]
    parts = {
        f"{NAMES[name]}: {part}": [run[part] for run in runs]
        for name, runs in result["rounds"].items()
        for part in runs[0]
        if part != "total" and name != "generate, target scored"
    }
    text.append(table(["part", "seconds"], [[k, spread(v)] for k, v in parts.items()]))
    draws = sorted(run["draw"] for run in result["rounds"]["ours"])
    moved = decode_bytes(setting) * (setting.new_tokens - 1) / draws[len(draws) // 2]
    rows = [[name, f"{rate / 1e9:.0f} GFLOP/s"] for name, rate in rates.items()]
    rows.append(["memory, jax", f"{result['bandwidth'] / 1e9:.1f} GB/s"])
    share = f"{moved / 1e9:.1f} GB/s ({100 * moved / result['bandwidth']:.0f}%)"
    rows.append(["moved by our decoding loop", share])
    text.append(table(["rate", "measured"], rows))
    text.append(
        f"First call, compilation included: {result['first_seconds']['ours']:.1f} s, of which "
        f"compiling {result['compile_seconds']:.1f} s. Largest difference between a system's "
        f"log-weight of a response and another's: {result['largest_difference']:.1e} "
        f"(log-weights have a standard deviation of {result['log_weight_std']:.2f})."
    )
    return "\n\n".join(text)


def parts(result: dict[str, Any]) -> str:
    """Our call in parts."""
    rows = [[name, f"{seconds:.3f}"] for name, seconds in result["seconds"].items()]
    return table(["part", "seconds"], rows)


def prefix(result: dict[str, Any]) -> str:
    """The prompt's cache beside the samples'."""
    rows = [
        [str(row["samples"]), *(f"{row[key] / 2**20:.1f}" for key in row if key != "samples")]
        for row in result["rows"]
    ]
    header = ["N", "prefix", "suffixes", "arguments", "temporaries", "N copies of the prefix"]
    return table([header[0], *(f"{name}, MiB" for name in header[1:])], rows)


def compile_time(result: dict[str, Any]) -> str:
    """Seconds to trace and compile, shallow against deep."""
    shallow, deep = result["layers"]
    columns = {int(k): v for k, v in result["seconds"].items()}
    stages = list(columns[shallow][0])
    rows = []
    for loop in ("decode", "score"):
        sums = {
            depth: [sum(run[s] for s in stages if s.startswith(loop)) for run in runs]
            for depth, runs in columns.items()
        }
        ratios = [b / a for a, b in zip(sums[shallow], sums[deep], strict=True)]
        for stage in [s for s in stages if s.startswith(loop)]:
            cells = [[run[stage] for run in columns[depth]] for depth in (shallow, deep)]
            each = [b / a for a, b in zip(*cells, strict=True)]
            rows.append([stage, *(spread(cell) for cell in cells), spread(each)])
        rows.append([f"{loop}: both", spread(sums[shallow]), spread(sums[deep]), spread(ratios)])
    return table(["seconds", f"{shallow} layers", f"{deep} layers", "ratio"], rows)


def score_memory(result: dict[str, Any]) -> str:
    """Temporaries of scoring beside the logits it doesn't make."""
    rows = []
    for row in result["rows"]:
        for name, samples in (("block", row["block_samples"]), ("all", result["samples"])):
            temp, logits = row[f"{name}_temp_bytes"], row[f"{name}_logit_bytes"]
            rows.append(
                [
                    f"{row['length']}, {samples} samples" + (" (a block)" * (name == "block")),
                    f"{temp / 2**20:.0f}",
                    f"{logits / 2**20:.0f}",
                    f"{temp / logits:.3f}",
                ]
            )
    return table(["T", "temporaries, MiB", "N x T x V logits, MiB", "ratio"], rows)


TABLES = {
    "systems": systems,
    "device": systems,
    "parts": parts,
    "prefix": prefix,
    "compile": compile_time,
    "score-memory": score_memory,
}


def render(name: str, result: dict[str, Any]) -> str:
    """One measurement as markdown."""
    if result["status"] not in ("complete", "disturbed"):
        return f"{result['status']}: {result.get('reason', '').strip().splitlines()[-1]}"
    hardware, versions = result["hardware"], result["versions"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['device']}"
    with_ = ", ".join(f"{key} {value}" for key, value in versions.items())
    setting = Setting(**result["setting"])
    what = (
        f"{setting.parameters / 1e6:.1f}M parameters, {setting.samples} samples, prompt "
        f"{setting.prompt}, {setting.new_tokens} new tokens, {setting.dtype}, {setting.threads} "
        "threads"
    )
    text = f"{TABLES[name](result)}\n\n{what}; {where}; {with_}; {result['date']}."
    if result["status"] == "disturbed":
        text += f" DISTURBED: other processes used {result['others_cores']} cores meanwhile."
    return text
