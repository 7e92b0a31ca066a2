#!/usr/bin/env bash
# safetensors.numpy: a transposed or strided array is saved as other numbers.
#
# A good guess: save_file writes the array that it is given, or refuses what is not contiguous, as safetensors.torch does.
# What happens: the bytes are taken in memory order under the array's own shape: a transposed matrix comes back with its
#   numbers scrambled, every second row of a matrix comes back as its first rows. No error, right shape and dtype.
# Source: safetensors.numpy.save_file and _tobytes (only the byte order is looked at).
# Who is hurt: features, prototypes and projections written from numpy after .T, a slice with a step, or a column choice.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 safetensors==0.8.0 numpy==2.4.6

observe <<'PY'
import numpy as np, torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
seen = {}
for name, array in (("contiguous", matrix), ("transposed", matrix.T), ("every second row", matrix[::2])):
    save_file({"x": array}, "x.safetensors")
    back = load_file("x.safetensors")["x"]
    seen[name] = np.array_equal(back, array)
    print(f"{name}: saved {array.tolist()}, loaded {back.tolist()}, equal {seen[name]}")
try:
    save_torch({"x": torch.from_numpy(matrix).T}, "x.safetensors")
except ValueError as error:
    print("safetensors.torch refuses the transposed tensor:", str(error)[:60], "...")
    refused = True
assert list(seen.values()) == [True, False, False] and refused
PY
