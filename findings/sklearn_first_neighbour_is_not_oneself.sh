#!/usr/bin/env bash
# scikit-learn: kneighbors(X) of the fitted rows does not give each row itself as its first neighbour, nor always at all.
#
# A good guess: a row is at distance 0 from itself, so with k + 1 neighbours the first column is the row and the other k are its
#   neighbours; many graph builders drop that column.
# What happens: among equal rows the order is by index, so a row may come second and then stay as a loop after the column is dropped, or
#   be missing among more copies than k. kneighbors() without an argument leaves out the row itself and is right;
#   kneighbors_graph(X, k, include_self=True) has rows without the loop it promises.
# Source: sklearn.neighbors.NearestNeighbors.kneighbors (X given: no row is known to be a query), kneighbors_graph
#   (include_self=True hands X over).
# Who is hurt: k nearest neighbour graphs over features with duplicates: loops, and an edge too few to others.
. "$(dirname "$0")/_lib.sh"
pins scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6

observe <<'PY'
import numpy as np
from sklearn.neighbors import NearestNeighbors, kneighbors_graph

rows = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # the first three are equal
itself = np.arange(4)
for algorithm in ("brute", "kd_tree"):
    finder = NearestNeighbors(n_neighbors=2, algorithm=algorithm).fit(rows)
    given, own = finder.kneighbors(rows, return_distance=False), finder.kneighbors(return_distance=False)
    first = (given[:, 0] == itself).tolist()
    loops = (given[:, 1:] == itself[:, None]).any(1).tolist()
    print(f"{algorithm}: kneighbors(X) {given.tolist()}, first is oneself: {first}, still there without the first column: {loops}")
    print(f"{algorithm}: kneighbors() {own.tolist()}")
    assert sum(first) < 4 and not (own == itself[:, None]).any()
diagonal = kneighbors_graph(rows, 2, include_self=True).diagonal().tolist()
print(f"kneighbors_graph(X, 2, include_self=True): diagonal {diagonal}")
assert diagonal == [1.0, 1.0, 0.0, 1.0]
PY
