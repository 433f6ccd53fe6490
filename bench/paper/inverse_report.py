"""What is shown of the comparison of inverse Hessians: a table, claims and figures."""

from __future__ import annotations

import numpy as np

from bench.paper import figures
from bench.paper.experiment import Claim, Record, Report
from bench.paper.store import Results

CLAMPED = "the paper's CG"


def at(record: Record, name: str, k: int) -> list[float]:
    """Steps, cosine, distance, residual, products and milliseconds of a solver with ``k`` terms."""
    return next(entry for entry in record["curves"][name] if entry[0] == k)


def report(results: Results) -> Report:
    rows = []
    for arm in results.arms:
        record = results.of(arm)[0]
        for name, curve in record["curves"].items():
            for k in (1, 5, 20, 100):
                if any(entry[0] == k for entry in curve):
                    entry = at(record, name, k)
                    status = dict(zip((e[0] for e in curve), record["statuses"].get(name, []), strict=False)).get(k)
                    rows.append(
                        {
                            "problem": arm,
                            "method": name,
                            "K": k,
                            "cosine": entry[1],
                            "relative L2": entry[2],
                            "residual": entry[3] if entry[3] is not None and entry[3] == entry[3] else "-",
                            "ms": entry[5] if entry[5] is not None and entry[5] == entry[5] else "-",
                            "status": status or "-",
                        }
                    )
    shown = {
        "distance": distance_figure(results),
        "inverse": inverse_figure(results),
        "training": training_figure(results),
    }
    convex = convex_claims(results) if "logistic regression" in results.arms else []
    return Report(rows, [*convex, *indefinite_claims(results)], shown)


def convex_claims(results: Results) -> list[Claim]:
    """What the paper says of Neumann and CG, at a minimum."""
    record = results.of("logistic regression")[0]
    cosines = [entry[1] for entry in record["curves"]["Neumann"]]
    one = [at(record, name, 1) for name in ("Neumann", "CG")]
    later = [at(record, name, 20) for name in ("Neumann", "CG")]
    sketch, chebyshev = at(record, "Nystrom", 20), at(record, "Chebyshev", 20)
    return [
        Claim(
            "more Neumann terms: the hypergradient approaches the exact one (logistic regression)",
            f"cosine identity {record['identity'][0]:.3f}, 20 terms {later[0][1]:.3f}, most {cosines[-1]:.3f}",
            all(a <= b + 1e-12 for a, b in zip(cosines, cosines[1:], strict=False)) and cosines[-1] >= 0.97,
        ),
        Claim(
            "Neumann has the greater cosine similarity than CG for equal steps (one step)",
            f"{one[0][1]:.3f} against {one[1][1]:.3f}",
            one[0][1] > one[1][1],
        ),
        Claim(
            "the same at 20 steps, against a correct CG",
            f"{later[0][1]:.3f} against {later[1][1]:.3f}; the CG of the paper's code "
            f"{at(record, CLAMPED, 20)[1]:.3f}, Chebyshev {chebyshev[1]:.3f}, Nystrom of rank 20 {sketch[1]:.3f}",
            later[0][1] > later[1][1],
        ),
    ]


def indefinite_claims(results: Results) -> list[Claim]:
    """What the theory says of solvers on a Hessian with negative eigenvalues."""
    record = results.of("indefinite MLP")[0]
    minres, cg = at(record, "MINRES", 20), at(record, "CG", 20)
    return [
        Claim(
            f"on an indefinite Hessian ({record['weights']:,} weights, {record['negative']} negative eigenvalues) "
            "MINRES shrinks the residual, plain CG does not",
            f"residual after 20 steps: MINRES {minres[3]:.2f}, CG {cg[3]:.2f}",
            minres[3] <= 0.3 < cg[3],
        )
    ]


def distance_figure(results: Results) -> figures.Figure:
    columns = len(results.arms)
    figure = figures.figure(
        columns,
        f"{results.data}{' and diabetes' if 'diabetes ridge' in results.arms else ''}, {results.settings.seeds} seeds "
        "(line: median, band: range). Hypergradients and inverse HVPs against the exact dense inverse. At a minimum CG "
        "and MINRES get there first, Neumann and unrolling (the same numbers) slowly, Nystrom with its damping not at "
        "all, the CG of the paper's code hardly. With negative eigenvalues MINRES alone approaches the exact one.",
        rows=4,
        height=3.0,
    )
    panels = [
        (4, 1, "Hessian products, one for the residual", "cosine similarity"),
        (4, 2, "Hessian products, one for the residual", "relative L2 distance"),
        (4, 3, "Hessian products, one for the residual", "residual |b - Hx| / |b|"),
        (5, 2, "milliseconds", "relative L2 distance"),
    ]
    axes = figure.subplots(4, columns, squeeze=False)
    for column, arm in zip(axes.T, results.arms, strict=True):
        for axis, (across, up, x_title, y_title) in zip(column, panels, strict=True):
            for i, name in enumerate(results.of(arm)[0]["curves"]):
                stacks = np.array([record["curves"][name] for record in results.of(arm)], dtype=float)
                x, y = np.median(stacks[:, :, across], 0), stacks[:, :, up]
                if not np.isnan(x).all() and not np.isnan(y).all():
                    figures.band(axis, x, y, name, color=f"C{i}", marker=".")
            axis.set(xlabel=x_title, ylabel=y_title, xscale="log")
            axis.xaxis.set_minor_formatter("")
            if up > 1:
                axis.set(yscale="log")
                axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-10))
        column[0].set_title(arm)
    axes[0][0].legend(fontsize=8)
    return figure


def training_figure(results: Results) -> figures.Figure:
    """Residuals of 20 steps along a training run."""
    figure = figures.figure(
        1,
        f"{results.data}, an MLP in training, {results.settings.seeds} seeds (line: median, band: range). Residual of "
        "20 steps of every solver against the Hessian of that moment, whose number of negative eigenvalues is written "
        "above. Below the dotted line something is gained: most by MINRES. Plain CG meets negative curvature and hands "
        "back the start, on the line.",
        width=7.0,
    )
    axis = figure.subplots()
    records = [record["training"] for record in results.of("indefinite MLP")]
    for i, name in enumerate(dict.fromkeys(str(entry[2]) for entry in records[0])):
        lines = [{entry[0]: entry[5] for entry in record if entry[2] == name} for record in records]
        steps = sorted(set.intersection(*map(set, lines)))
        if len(steps) > 1:
            figures.band(axis, steps, [[line[s] for s in steps] for line in lines], name, color=f"C{i}", marker="o")
    for steps, negative in {entry[0]: entry[1] for entry in records[0]}.items():
        axis.annotate(str(negative), (steps, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    axis.axhline(1, color="black", linestyle=":")
    axis.set(xlabel="steps of Adam", ylabel="residual |b - Hx| / |b|", yscale="log")
    axis.legend(fontsize=8)
    return figure


def inverse_figure(results: Results) -> figures.Figure:
    names = [*(f"heat {k}" for k in results.protocol.heat_steps), "heat exact"]
    figure = figures.figure(
        len(names),
        f"{results.data}: tanh of the inverse Hessian, of its Neumann approximations with 2, 6 and 21 terms and exact "
        "(right), first 65 weights at the most. At a minimum more terms come closer; "
        "on the indefinite network 21 terms show nothing of the exact inverse yet.",
        rows=len(results.arms),
        width=2.6,
        height=2.5,
    )
    axes = figure.subplots(len(results.arms), len(names), squeeze=False)
    for line, arm in zip(axes, results.arms, strict=True):
        for axis, name in zip(line, names, strict=True):
            image = axis.imshow(results.of(arm)[0][name].numpy(), cmap="coolwarm", vmin=-1, vmax=1)
            axis.set(title=name.replace("heat ", "K = ").replace("K = exact", "exact"), xticks=[], yticks=[])
        line[0].set_ylabel(arm, fontsize=8)
        figure.colorbar(image, ax=line[-1])
    return figure
