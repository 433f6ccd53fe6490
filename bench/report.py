"""One page of everything measured against peers: ``python -m bench report``.

Reads ``bench/results/peers_threads*.json`` and ``scaling_*.json``; writes ``bench/results/report.md``, its plots, and
the comparison table of the README between its markers. `readme_table` is what a test holds the README against.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.measure import RESULTS
from bench.peers import CLOSED_FORM, COMPILED, OURS, PEERS
from bench.peers.problems import PROBLEMS, TITLES
from bench.peers.run import OK
from bench.peers.tasks import TASKS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- peers: written by python -m bench report -->", "<!-- /peers -->"
OTHERS = [peer for peer in PEERS if peer not in (OURS, COMPILED, CLOSED_FORM)]

Row = dict[str, object]


def load(pattern: str) -> list[tuple[dict[str, object], list[Row]]]:
    """Environment and rows of every file of results that matches."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    return [(data["environment"], data["rows"]) for data in found]


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows of packages that were right and timed."""
    return [row for row in rows if row["status"] == OK and row["times"] is not None]


def losses(rows: Iterable[Row]) -> list[Row]:
    """Where another package is faster than ours: more than half of the rounds."""
    return [row for row in timed(rows) if row["peer"] in OTHERS and row["times"] < 1]


def against(variant: str, rows: Iterable[Row]) -> list[Row]:
    """Rows of other packages with the times that another form of ours is faster, where it was timed."""
    own = {(row["problem"], row["task"]): row["times"] for row in timed(rows) if row["peer"] == variant}
    return [
        row | {"times": row["times"] / own[row["problem"], row["task"]]}
        for row in timed(rows)
        if row["peer"] in OTHERS and (row["problem"], row["task"]) in own
    ]


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def pivot(rows: Iterable[Row], down: str, across: str, names: tuple[list[str], list[str]]) -> list[list[str]]:
    """Geometric means of the times faster, one column more for all, as text."""
    rows, (lines, columns) = timed(rows), names

    def cell(keep: Callable[[Row], bool]) -> str:
        mean = geometric_mean(row["times"] for row in rows if keep(row))
        return "-" if mean is None else f"{mean:.2f}" if mean < 10 else f"{mean:.0f}"

    return [
        [
            line,
            *(cell(lambda r, c=column: r[down] == line and r[across] == c) for column in columns),  # noqa: B023
            cell(lambda r: r[down] == line and r[across] in columns),  # noqa: B023
        ]
        for line in lines
    ]


def _means(rows: Iterable[Row], across: str, names: Iterable[str]) -> list[list[str]]:
    """A line per package that was timed at all."""
    return [line for line in pivot(rows, "peer", across, (OTHERS, list(names))) if line[-1] != "-"]


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A table."""
    head = list(head)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def facts(environment: dict[str, object]) -> str:
    """Machine, versions and commit in one line."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def _threads(environment: dict[str, object]) -> str:
    return f"{environment['threads']} thread{'s' if environment['threads'] != 1 else ''}"


def readme_table(rows: list[Row], environment: dict[str, object]) -> list[str]:
    """What stands between the markers of the README."""
    slower, all_rows = losses(rows), [row for row in timed(rows) if row["peer"] in OTHERS]
    closed = geometric_mean(1 / row["times"] for row in timed(rows) if row["peer"] == CLOSED_FORM)
    tasks = [f"`{task}`" for task in TASKS if any(row["task"] == task for row in all_rows)]
    return [
        f"How many times faster than each package: geometric mean over what was run of {', '.join(tasks)}",
        "(the report has every number), with the same number of steps, after a check against float64",
        f"({environment['cpu']}, {environment['isa'].upper()}, {_threads(environment)}, torch {environment['torch']}).",
        "`-`: it cannot, or not correctly.",
        "",
        *markdown(["against", *PROBLEMS, "all"], _means(rows, "problem", PROBLEMS)),
        "",
        f"Slower in {len(slower)} of {len(all_rows)} comparisons: [report](bench/results/report.md)."
        + (f" Closed forms, where a model has one, are another {closed:.1f} times faster." if closed else ""),
    ]


def page(results: list[tuple[dict[str, object], list[Row]]], scaling: list[tuple[dict[str, object], list[Row]]]) -> str:
    """The report."""
    out = ["# hypergrad_ext against every peer", ""]
    for environment, rows in results:
        out += _summary(environment, rows)
    out += ["![geometric means](report.png)", ""]
    for environment, rows in scaling:
        out += [f"## Scaling, {environment['isa'].upper()}", "", facts(environment), "", *_slopes(rows), ""]
    if scaling:
        out += ["The last of them:", "", "![scaling](scaling.png)", ""]
    for environment, rows in results:
        out += _details(environment, rows)
    return "\n".join(out).rstrip() + "\n"


def _summary(environment: dict[str, object], rows: list[Row]) -> list[str]:
    compared = [row for row in timed(rows) if row["peer"] in OTHERS]
    slower = sorted(losses(rows), key=lambda row: row["times"])
    out = [f"## Summary, {environment['isa'].upper()}, {_threads(environment)}", "", facts(environment), ""]
    out += [
        "How many times faster `hypergrad_ext` is, as one drops it in: `hg.inverse_hvp`, `hg.hypergradient` of a loss;",
        "geometric means. Every result was held against float64 first; what is wrong or cannot be done is not timed.",
        "",
        *markdown(["against", *PROBLEMS, "all"], _means(rows, "problem", PROBLEMS)),
        "",
        *markdown(["against", *TASKS, "all"], _means(rows, "task", TASKS)),
        "",
        f"### Where we lose: {len(slower)} of {len(compared)}",
        "",
    ]
    if slower:
        out += markdown(
            ["problem", "task", "against", "times faster", "spread"],
            [
                [row["problem"], row["task"], row["peer"], f"{row['times']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}"]
                for row in slower
            ],
        )
    else:
        out.append("Nowhere in this run.")
    compiled = against(COMPILED, rows)
    if compiled:
        out += ["", '### The same with `engine="compiled"`, which takes some seconds once, as jitted packages do', ""]
        out += markdown(["against", *PROBLEMS, "all"], _means(compiled, "problem", PROBLEMS))
    split = products_and_rest(rows)
    if split:
        out += ["", "### Milliseconds per product, and of all that is done once", ""]
        out += [
            "From solves with 20 and 100 products; once: the loss, its gradient, recording and plans, calls;",
            "`-` where that is lost in the noise of the long solve.",
            "",
        ]
        out += markdown(["problem", "package", "a product", "once"], split)
    closed = [row for row in timed(rows) if row["peer"] == CLOSED_FORM]
    if closed:
        lines = [[row["problem"], row["task"], f"{1 / row['times']:.2f}"] for row in closed]
        out += ["", "### How much faster our closed forms are than our Hessian of the loss", ""]
        out += markdown(["problem", "task", "times"], lines)
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != OK:
            kind = "wrong" if row["status"].startswith("wrong") else row["status"]
            reasons.setdefault((row["peer"], kind), []).append(row)
    if reasons:
        out += ["", "### Not timed", ""]
        lines = [[peer, _reason(kind, found), _places(found)] for (peer, kind), found in sorted(reasons.items())]
        out += markdown(["package", "reason", "where"], lines)
    return [*out, ""]


def products_and_rest(rows: Iterable[Row]) -> list[list[str]]:
    """Time of a product and of the rest of a solve, from two solves of different lengths, as text."""
    ms = {(row["problem"], row["peer"], row["task"]): row["ms"] for row in timed(rows)}
    found = []
    for problem in PROBLEMS:
        for peer in PEERS:
            short, long = (ms.get((problem, peer, f"neumann{k}")) for k in (20, 100))
            if short and long:
                product = (long - short) / 80
                once = short - 20 * product
                found.append([problem, peer, f"{product:.3g}", f"{once:.2g}" if once > 0 else "-"])
    return found


def _reason(kind: str, rows: list[Row]) -> str:
    if kind != "wrong" or len(rows) == 1:
        return rows[0]["status"]
    errors = [row["error"] for row in rows]
    return f"wrong: errors {min(errors):.1e} to {max(errors):.1e}"


def _places(rows: list[Row]) -> str:
    """Tasks, if it is the same on all problems, or problems and tasks, a few of them."""
    tasks, problems = dict.fromkeys(r["task"] for r in rows), dict.fromkeys(r["problem"] for r in rows)
    if len(rows) == len(tasks) * len(problems):
        return f"{', '.join(problems)}: {', '.join(tasks)}"
    where = [f"{r['problem']} {r['task']}" for r in rows]
    return ", ".join(where) if len(where) <= 3 else f"{where[0]} and {len(where) - 1} more"


def _details(environment: dict[str, object], rows: list[Row]) -> list[str]:
    out = [f"## Details, {environment['isa'].upper()}, {_threads(environment)}", ""]
    for problem in PROBLEMS:
        mine = [row for row in timed(rows) if row["problem"] == problem]
        if not mine:
            continue
        out += [f"### {problem}: {TITLES[problem]}", "", "One gradient is one of the training loss.", ""]
        lines = [
            [
                *(row["task"], row["peer"], str(row["steps"]), f"{row['error']:.0e}", f"{row['ms']:.3g}"),
                *(f"{row['gradients']:.3g}", f"{row['times']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}"),
            ]
            for task in TASKS
            for row in mine
            if row["task"] == task
        ]
        head = ["task", "package", "products", "error", "ms", "gradients", "ours is times faster", "spread"]
        out += [*markdown(head, lines), ""]
    return out


def _slopes(rows: list[Row]) -> list[str]:
    from bench.scaling import slopes

    head = ["over", "from", "to", "slope of time", "slope of memory"]
    return markdown(head, [[str(cell) for cell in line] for line in slopes(rows)])


def plot(rows: list[Row], path: Path) -> None:
    """Geometric means of problems and packages as a map of colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _means(rows, "problem", PROBLEMS)
    values = [[float(cell) if cell != "-" else math.nan for cell in line[1:]] for line in lines]
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    logs = [[math.log2(value) if value == value else math.nan for value in line] for line in values]
    image = axis.imshow(logs, cmap="RdYlGn", vmin=-3, vmax=3, aspect="auto")
    axis.set_xticks(range(len(PROBLEMS) + 1), [*PROBLEMS, "all"])
    axis.set_yticks(range(len(lines)), [line[0] for line in lines])
    for i, line in enumerate(lines):
        for j, cell in enumerate(line[1:]):
            axis.text(j, i, cell, ha="center", va="center")
    axis.set_title("times faster than each package (geometric mean over tasks)")
    figure.colorbar(image, label="log2")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def with_table(readme: str, lines: Iterable[str]) -> str:
    """The README with these lines between its markers.

    Raises:
        ValueError: If it has no markers.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    return "\n".join([f"{head}{BEGIN}", *lines, f"{END}{tail}"])


def headline(results: list[tuple[dict[str, object], list[Row]]]) -> tuple[dict[str, object], list[Row]]:
    """The results that the README shows: those on the most threads."""
    return max(results, key=lambda result: result[0]["threads"])


def main() -> None:
    """Write everything."""
    from bench import scaling

    results = load("peers_threads*.json")
    if not results:
        raise SystemExit("bench/results has no peers_threads*.json: run python -m bench.peers first")
    curves = load("scaling_*.json")
    (RESULTS / "report.md").write_text(page(results, curves))
    environment, rows = headline(results)
    plot(rows, RESULTS / "report.png")
    for _, points in curves:
        scaling.plot(points, RESULTS / "scaling.png")
    README.write_text(with_table(README.read_text(), readme_table(rows, environment)))
    print(f"wrote {RESULTS / 'report.md'}")


if __name__ == "__main__":
    main()
