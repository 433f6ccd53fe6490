"""Ours against every peer: ``python -m bench.peers [--quick] [--problem P] [--task T] [--peer Q]``.

Prints a table, and writes or completes ``bench/results/peers_threads<n>_<isa>.{json,md}`` (``peers_quick_...`` with
``--quick``): a long run may be made in parts, as long as nothing but results changes between them. On one thread the
clock is the process's own, for which foreign load does not count.
"""

from __future__ import annotations

import argparse
import os

QUICK_TASKS = ("neumann20", "hypergradient")


def main() -> None:
    """Measure, print and save."""
    # JAX counts its threads when it is imported: processors come first.
    from bench.peers import COMPILED, PEERS

    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tasks, three rounds, nothing that compiles torch")
    parser.add_argument("--problem", action="append", help="default: all")
    parser.add_argument("--task", action="append", help="default: all")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    parser.add_argument("--rounds", type=int, help="default: 7")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds per task (default: 20)")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import torch

    from bench.measure import clock_for, save, table
    from bench.peers.problems import PROBLEMS, load
    from bench.peers.run import compare, versions
    from bench.peers.tasks import TASKS

    torch.set_num_threads(options.threads)
    for given, known in ((options.problem, PROBLEMS), (options.task, TASKS)):
        for name in given or ():
            if name not in known:
                parser.error(f"expected one of {', '.join(known)}, got {name}")
    peers = options.peer or [p for p in PEERS if not (options.quick and p in ("torch.compile", COMPILED))]
    rounds = options.rounds or (3 if options.quick else 7)
    name = f"peers_{'quick_' if options.quick else ''}threads{options.threads}"
    rows = []
    for problem in options.problem or PROBLEMS:
        for task in options.task or (QUICK_TASKS if options.quick else TASKS):
            torch._dynamo.reset()
            budget = 3.0 if options.quick else options.budget
            found = compare(load(problem), TASKS[task], peers, rounds, budget, clock_for(options.threads))
            print(table(found), flush=True)
            path = save(name, found, key=3, threads=options.threads, **versions())
            rows += found
    print(f"saved {path}")


if __name__ == "__main__":
    main()
