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
    if "logistic regression" in results.arms:
        shown["penalties"] = penalty_figure(results)
    convex = convex_claims(results) if "logistic regression" in results.arms else []
    legend = (
        "K: terms, steps or rank. Cosine and relative L2 distance of the hypergradient to the exact one, residual "
        "relative to the right-hand side, status of the solve. The first seed."
    )
    return Report(rows, [*convex, *indefinite_claims(results)], shown, legend)


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


def _data(results: Results) -> str:
    return f"{results.data}{' and diabetes' if 'diabetes ridge' in results.arms else ''}"


def distance_figure(results: Results) -> figures.Figure:
    columns = len(results.arms)
    figure = figures.figure(
        columns,
        f"{_data(results)}, {figures.seeds(results.settings.seeds)}. Hypergradients and inverse HVPs against the exact "
        "dense inverse. At a minimum CG and MINRES get there first, Neumann and unrolling (the same numbers) slowly, "
        "Nystrom with its damping not at all, the CG of the paper's code hardly. With negative eigenvalues MINRES "
        "alone approaches the exact one.",
        rows=5,
        height=2.8,
    )
    panels = [
        (0, 1, "terms, steps or rank K", "cosine similarity"),
        (0, 2, "terms, steps or rank K", "relative L2 distance"),
        (4, 2, "Hessian products, one for the residual", "relative L2 distance"),
        (4, 3, "Hessian products, one for the residual", "residual |b - Hx| / |b|"),
        (5, 2, "milliseconds per hypergradient", "relative L2 distance"),
    ]
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for column, arm in zip(axes.T, results.arms, strict=True):
        for axis, (across, up, x_title, y_title) in zip(column, panels, strict=True):
            for i, name in enumerate(results.of(arm)[0]["curves"]):
                stacks = np.array([record["curves"][name] for record in results.of(arm)], dtype=float)
                x, y = np.median(stacks[:, :, across], 0), stacks[:, :, up]
                if not np.isnan(x).all() and not np.isnan(y).all():
                    figures.band(axis, x, y, name, color=f"C{i}", marker=".")
            axis.set(xlabel=x_title, ylabel=y_title)
            if across == 0:
                # K = 0 belongs to the axis.
                axis.set_xscale("symlog", linthresh=1)
                axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
            else:
                axis.set_xscale("log")
                figures.plain_ticks(axis.xaxis)
            if up > 1:
                axis.set(yscale="log")
                axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-10))
                figures.plain_ticks(axis.yaxis)
        column[0].set_title(arm)
    # Where most of the panel is empty.
    axes[0][-1].legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="upper left")
    return figure


def training_figure(results: Results) -> figures.Figure:
    """Cosine, distance and residual of a few steps along a training run."""
    columns = len(results.arms)
    tuned = (
        f"The penalties are tuned after step {results.protocol.warm_up}, which spreads the eigenvalues: 20 terms no "
        "longer do. On the 11 weights of the ridge CG and MINRES are exact, below the axis. "
        if "diabetes ridge" in results.arms
        else ""
    )
    figure = figures.figure(
        columns,
        f"{_data(results)}, {figures.seeds(results.settings.seeds)}. What 0 to 20 terms or steps find of the exact "
        f"hypergradient and inverse HVP at that moment of training. {tuned}The numbers on top count the negative "
        "eigenvalues of the network's Hessian (seed 0): with these, plain CG hands back its start, of residual 1 "
        "(dotted), only MINRES gains much, and nothing comes near the exact hypergradient.",
        rows=3,
        width=5.0,
        height=2.8,
    )
    axes = figure.subplots(3, columns, squeeze=False)
    titles = ((3, "cosine similarity"), (4, "relative L2 distance"), (5, "residual |b - Hx| / |b|"))
    for column, arm in zip(axes.T, results.arms, strict=True):
        records = [record["training"] for record in results.of(arm)]
        steps = list(dict.fromkeys(entry[0] for entry in records[0]))
        for axis, (entry_of, title) in zip(column, titles, strict=True):
            for i, name in enumerate(dict.fromkeys(entry[2] for entry in records[0])):
                lines = [[entry[entry_of] for entry in record if entry[2] == name] for record in records]
                figures.band(axis, steps, np.array(lines, dtype=float), name, color=f"C{i}", marker="o", markersize=4)
            axis.set(xlabel="steps of Adam", ylabel=title)
            if entry_of > 3:
                axis.set(yscale="log")
                axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-8))
                axis.axhline(1, color="black", linestyle=":")
                figures.plain_ticks(axis.yaxis)
        column[0].set_title(arm, pad=20)
        for entry in records[0]:
            if entry[1]:
                column[0].annotate(
                    str(entry[1]), (entry[0], 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom"
                )
    axes[0][0].legend(fontsize=8)
    return figure


def penalty_figure(results: Results) -> figures.Figure:
    """The distance over the steps, at three condition numbers."""
    records = [record["penalties"] for record in results.of("logistic regression")]
    penalties = sorted(records[0], key=float, reverse=True)
    figure = figures.figure(
        len(penalties),
        f"{results.data}, logistic regression, {figures.seeds(results.settings.seeds)}. The weaker the penalty, the "
        "larger the condition number, and the more steps every method needs: Neumann in proportion to it, the others "
        "in proportion to its root.",
        width=4.2,
        height=3.4,
    )
    for axis, penalty in zip(figure.subplots(1, len(penalties), sharey=True, squeeze=False)[0], penalties, strict=True):
        for i, name in enumerate(records[0][penalty]["curves"]):
            curves = np.array([record[penalty]["curves"][name] for record in records], dtype=float)
            figures.band(axis, curves[0, :, 0], curves[:, :, 2], name, color=f"C{i}", marker=".")
        condition = np.median([record[penalty]["condition"] for record in records])
        axis.set(title=f"log penalty {penalty}: condition number {condition:.0f}", xlabel="steps K", xscale="log")
        axis.set(yscale="log", ylim=(1e-10, 2))
        figures.plain_ticks(axis.xaxis)
    axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("relative L2 distance")
    return figure


def inverse_figure(results: Results) -> figures.Figure:
    names = [*(f"heat {k}" for k in results.protocol.heat_steps), "heat exact"]
    figure = figures.figure(
        len(names),
        f"{_data(results)}, seed 0: the inverse Hessian (first 65 weights at the most; colour: tanh of an entry), by "
        "Neumann series with K products and exact (right). At a minimum more terms come closer; on the indefinite "
        "network 21 terms show nothing of the exact inverse yet.",
        rows=len(results.arms),
        width=2.6,
        height=2.5,
    )
    axes = figure.subplots(len(results.arms), len(names), squeeze=False)
    for line, arm in zip(axes, results.arms, strict=True):
        for axis, name in zip(line, names, strict=True):
            image = axis.imshow(results.of(arm)[0][name].numpy(), cmap="coolwarm", vmin=-1, vmax=1)
            axis.set(title=name.replace("heat ", "K = ").replace("K = exact", "exact"), xticks=[], yticks=[])
        line[0].set_ylabel(f"{arm}\nweight", fontsize=8)
        figure.colorbar(image, ax=line[-1], label="tanh of the entry")
    for axis in axes[-1]:
        axis.set_xlabel("weight", fontsize=8)
    return figure
