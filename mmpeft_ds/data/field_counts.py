"""Statistics of the fields of samples: how many values there are, their types, and how long or large they are."""

from __future__ import annotations

from typing import Any


class FieldCounts:
    """Simple statistics of the fields of many samples; those of several shards can be merged."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, sample: Any) -> None:
        self._put("images", "images", len(sample.images))
        if sample.features is not None:
            self._put("features", str(sample.features.dtype), sample.features.size)
        for name, array in sample.arrays.items():
            self._put(name, str(array.dtype), array.size)
        for name, value in sample.record.items():
            self._value(name, value)

    def merge(self, other: dict[str, dict[str, Any]]) -> None:
        for path, theirs in other.items():
            mine = self.counts.setdefault(path, {"types": [], "present": 0, "min": theirs["min"], "sum": 0, "max": 0})
            mine["types"] = sorted({*mine["types"], *theirs["types"]})
            mine["present"] += theirs["present"]
            mine["sum"] += theirs["sum"]
            mine["min"], mine["max"] = min(mine["min"], theirs["min"]), max(mine["max"], theirs["max"])

    def summary(self) -> dict[str, dict[str, Any]]:
        """Field path -> {type, present, min, mean, max}; `present` counts values, so items for a path with `[]`."""
        return {
            path: {
                "type": "|".join(c["types"]),
                "present": c["present"],
                "min": c["min"],
                "mean": round(c["sum"] / c["present"], 4),
                "max": c["max"],
            }
            for path, c in sorted(self.counts.items())
        }

    def _value(self, path: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            self._put(path, type(value).__name__, int(bool(value)))
        elif isinstance(value, (int, float)):
            self._put(path, type(value).__name__, value)
        elif isinstance(value, (str, list, dict)):
            self._put(path, type(value).__name__, len(value))
            if isinstance(value, list):
                for item in value:
                    self._value(path + "[]", item)
            elif isinstance(value, dict):
                for name, item in value.items():
                    self._value(f"{path}.{name}", item)

    def _put(self, path: str, type_name: str, size: float) -> None:
        count = self.counts.get(path)
        if count is None:
            self.counts[path] = {"types": [type_name], "present": 1, "min": size, "sum": size, "max": size}
            return
        if type_name not in count["types"]:
            count["types"] = sorted([*count["types"], type_name])
        count["present"] += 1
        count["sum"] += size
        count["min"], count["max"] = min(count["min"], size), max(count["max"], size)
