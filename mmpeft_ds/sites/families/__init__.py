"""One file per model family, each with a `Family` as `ENTRY`. Found by scanning this folder."""
