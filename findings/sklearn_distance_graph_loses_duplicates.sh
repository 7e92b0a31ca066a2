#!/usr/bin/env bash
# scikit-learn with scipy: a neighbour graph of distances loses the edges between equal rows once it is made symmetric.
#
# A good guess: kneighbors_graph(mode="distance") and (mode="connectivity") have the same edges, so the union with the
#   transpose has the same edges too.
# What happens: two equal rows are joined by a stored distance of 0. scipy's maximum, + and minimum keep only what is not zero,
#   so exactly the closest pairs are no longer joined; nothing is said.
# Source: sklearn.neighbors.kneighbors_graph stores zeros; scipy.sparse, binary operations of compressed matrices
#   (_binopt drops zero results).
# Who is hurt: graphs over batches or data sets with duplicates (one picture with several captions, pictures posted twice), spectral
#   clustering and label propagation on them: a picture and its copy fall into different components.
. "$(dirname "$0")/_lib.sh"
pins scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6

observe <<'PY'
import numpy as np
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import kneighbors_graph

rows = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])  # the first two are equal
seen = {}
for mode in ("connectivity", "distance"):
    graph = kneighbors_graph(rows, 1, mode=mode)
    union = graph.maximum(graph.T)
    mean = (graph + graph.T) / 2
    seen[mode] = graph.nnz, union.nnz, mean.nnz, bool(union[0, 1]), connected_components(union)[0]
    print(f"{mode}: {graph.nnz} edges, union with the transpose {union.nnz}, mean with it {mean.nnz}, "
          f"rows 0 and 1 joined: {bool(union[0, 1])}, components: {connected_components(union)[0]}")
assert seen == {"connectivity": (4, 6, 6, True, 1), "distance": (4, 4, 4, False, 2)}, seen
PY
