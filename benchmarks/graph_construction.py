#!/usr/bin/env python
"""Building the graph over the samples of all ranks: growth with its nodes, and k-NN of scikit-learn and faiss.

    python benchmarks/graph_construction.py                 M = 64 ... 16384 on 2 ranks; writes docs/benchmarks/
    python benchmarks/graph_construction.py --nodes 64 4096 --runs 1 --out runs

`--peers PYTHON` names an environment with scikit-learn and faiss-cpu, if they are not in this one.

Rows of width 1536 scattered about 37 class centres, tau 0.7, 5 neighbours, one thread a rank. A time is that of the
slowest rank from a common start, gathers included: the smallest of a few repetitions, then the median over runs. The
matrix product beside it is one rank's own rows times all, (M / N, 1536) x (1536, M), in float32. The peers get the
same rows, all of them as queries, in one process with as many threads as there are ranks; the product of all rows with
all, in the same process (torch's, or numpy's where there is no torch), is less than an exact search there can take.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

CLASSES, TAU, NEIGHBOURS = 37, 0.7, 5
OURS = ["gather", "product", "threshold", "knn", "symmetric", "ring"]
PEERS = ["sklearn", "faiss"]
ALL_PAIRS = "all pairs"  # the product that every exact search in one process has to make


def rows(nodes: int, width: int):
    """(nodes, width) float32, the same for everybody."""
    import numpy as np

    random = np.random.default_rng(nodes)
    centres = random.standard_normal((CLASSES, width), dtype=np.float32)
    noise = random.standard_normal((nodes, width), dtype=np.float32)
    return centres[random.integers(CLASSES, size=nodes)] + 0.6 * noise


def smallest(call, repetitions: int, together=lambda: None, agreed=bool) -> float:
    """Milliseconds of the fastest of some calls, after one that does not count.

    Args:
        together: starts all ranks at once.
        agreed: whether any rank has had enough.
    """
    times = []
    for repetition in range(repetitions + 1):
        together()
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
        if repetition and agreed(sum(times) > 6000):
            break
    return min(times[1:])


# --------------------------------------------------------------------------------------------------- what one runs


def ours(args: argparse.Namespace) -> dict:
    """This rank's times, for each number of nodes; the slowest rank's on rank 0."""
    import torch
    import torch.distributed as dist

    from mmpeft_ds.distributed.batch_graph import knn_graph, threshold_graph
    from mmpeft_ds.distributed.gather import gather_rows

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args.store}", rank=args.rank, world_size=args.ranks)

    def agreed(enough: bool) -> bool:
        flag = torch.tensor(float(enough))
        dist.all_reduce(flag)
        return bool(flag)

    by_nodes = {}
    for nodes in args.nodes:
        counts = [len(part) for part in torch.arange(nodes).tensor_split(args.ranks)]
        x = torch.from_numpy(rows(nodes, args.width)).split(counts)[args.rank].clone()
        everyone = gather_rows(x, counts)
        calls = {
            "gather": lambda x=x, counts=counts: gather_rows(x, counts),
            "product": lambda x=x, everyone=everyone: x @ everyone.T,
            "threshold": lambda x=x, counts=counts: threshold_graph(x, TAU, counts=counts),
            "knn": lambda x=x, counts=counts: knn_graph(x, NEIGHBOURS, counts=counts),
            "symmetric": lambda x=x, counts=counts: knn_graph(x, NEIGHBOURS, symmetric=True, counts=counts),
            "ring": lambda x=x, counts=counts: knn_graph(x, NEIGHBOURS, counts=counts, exchange="ring"),
        }
        times = torch.tensor([smallest(calls[name], args.repetitions, dist.barrier, agreed) for name in OURS])
        dist.all_reduce(times, dist.ReduceOp.MAX)
        graph = threshold_graph(x, TAU, counts=counts)
        edges = torch.tensor(float(len(graph.source) - len(x)))
        dist.all_reduce(edges)
        by_nodes[nodes] = dict(zip(OURS, times.tolist(), strict=True)) | {
            "degree": edges.item() / nodes,
            "bytes": graph.traffic.total_bytes,
            "collectives": graph.traffic.total_calls,
        }
    dist.destroy_process_group()
    return by_nodes


def peers(args: argparse.Namespace) -> dict:
    """Times of those that are installed."""
    import numpy as np

    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        NearestNeighbors = None
    try:
        import faiss

        faiss.omp_set_num_threads(args.ranks)
    except ImportError:
        faiss = None
    try:
        import torch

        torch.set_num_threads(args.ranks)
    except ImportError:
        torch = None

    def sklearn_search(x):
        search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute", metric="cosine", n_jobs=1)
        return search.fit(x).kneighbors(x)

    def faiss_search(x):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(unit)
        return index.search(unit, NEIGHBOURS + 1)

    by_nodes = {}
    for nodes in args.nodes:
        x = rows(nodes, args.width)
        by_nodes[nodes] = {
            name: smallest(lambda search=search, x=x: search(x), args.repetitions)
            for name, search, there in (
                ("sklearn", sklearn_search, NearestNeighbors),
                ("faiss", faiss_search, faiss),
            )
            if there
        }
        everyone = x if torch is None else torch.from_numpy(x)  # whichever has the quicker product
        by_nodes[nodes][ALL_PAIRS] = smallest(lambda x=everyone: x @ x.T, args.repetitions)
    return by_nodes


# ------------------------------------------------------------------------------------------------------- the driver


def start(args: argparse.Namespace, python: str, threads: int, *options: str) -> subprocess.Popen:
    """One process of this script."""
    command = [python, __file__, *options, "--width", str(args.width), "--ranks", str(args.ranks)]
    command += ["--repetitions", str(args.repetitions), "--nodes", *map(str, args.nodes)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def answers(processes: list[subprocess.Popen]) -> dict:
    """What the first prints, when all have ended well."""
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a measurement failed; what it said stands above")
    return json.loads(said[0].strip().splitlines()[-1])


def drive(args: argparse.Namespace) -> None:
    """Ours and the peers in turn; print and write the table."""
    runs = []
    for turn in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            mine = [
                start(args, sys.executable, 1, "--one", "ours", "--rank", str(rank), "--store", store)
                for rank in range(args.ranks)
            ]
            ours_by_nodes = answers(mine)
        theirs = answers([start(args, args.peers, args.ranks, "--one", "peers")])
        runs.append({nodes: ours_by_nodes[nodes] | theirs[nodes] for nodes in ours_by_nodes})
        for nodes, times in runs[-1].items():
            said = ", ".join(f"{name} {times[name]:.1f}" for name in [*OURS, *PEERS, ALL_PAIRS] if name in times)
            print(f"run {turn + 1}, M {nodes}: {said} ms", flush=True)
    table = [
        {"nodes": int(nodes)} | {key: statistics.median(run[nodes][key] for run in runs) for key in runs[0][nodes]}
        for nodes in runs[0]
    ]
    result = {"machine": _page.machine(), "ranks": args.ranks, "width": args.width, "rows": table, "runs": runs}
    _page.write("graph_construction", page(result), result, args.out)


def page(result: dict) -> str:
    """The table as markdown."""
    lines = [
        "# The graph over the samples of all ranks",
        "",
        f"M rows of width {result['width']} on {result['ranks']} ranks of one machine (gloo), {CLASSES} classes, tau "
        f"{TAU}, {NEIGHBOURS} neighbours, float32.",
        f"Machine: {result['machine']}. `python benchmarks/graph_construction.py` repeats it.",
        f"Median of {len(result['runs'])} runs.",
        "",
        "Milliseconds. `gather`: the features of all ranks. `product`: one rank's rows times all, one matrix product.",
        "The graphs include every collective and lists of edges: threshold graph; directed k-NN; symmetrised k-NN;",
        "directed k-NN with a ring in which no rank holds all features. Peers: the same search over all M rows in one",
        f"process with {result['ranks']} threads, without edges; `all pairs`: the product of all rows with all there.",
        "",
        "| M | mean degree | gather | product | threshold | k-NN | symmetrised | ring | scikit-learn | faiss "
        "| all pairs | threshold / bound | k-NN / bound | k-NN / (gather + faster peer) "
        "| k-NN / (gather + all pairs) |",
        "|" + "---|" * 15,
    ]
    for row in result["rows"]:
        bound = 2 * row["product"] + row["gather"]
        there = [row[name] for name in PEERS if name in row]
        cells = [f"{row['degree']:.1f}", *(f"{row[name]:.1f}" for name in OURS)]
        cells += [f"{row[name]:.1f}" if name in row else "-" for name in PEERS]
        cells += [f"{row[ALL_PAIRS]:.1f}", f"{row['threshold'] / bound:.2f}", f"{row['knn'] / bound:.2f}"]
        cells += [f"{row['knn'] / (row['gather'] + min(there)):.2f}" if there else "-"]
        cells.append(f"{row['knn'] / (row['gather'] + row[ALL_PAIRS]):.2f}")
        lines.append(f"| {row['nodes']} | " + " | ".join(cells) + " |")
    lines += ["", "Bound: twice the product plus the gather."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [2**power for power in range(6, 15)]
    parser.add_argument("--nodes", type=int, nargs="+", default=sizes, help="M to measure")
    parser.add_argument("--width", type=int, default=1536, help="features of a row")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the graph")
    parser.add_argument("--runs", type=int, default=2, help="times that everything is measured again")
    parser.add_argument("--repetitions", type=int, default=3, help="calls of which the fastest counts")
    parser.add_argument("--peers", default=sys.executable, help="Python that has scikit-learn and faiss-cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the page and JSON")
    parser.add_argument("--one", choices=["ours", "peers"], help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is None:
        return drive(args)
    times = ours(args) if args.one == "ours" else peers(args)
    if args.rank == 0:
        print(json.dumps(times))
    return None


if __name__ == "__main__":
    main()
