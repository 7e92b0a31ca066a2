"""Statistics of the fields of samples: how many values there are, their types, and how long or large they are."""

from __future__ import annotations

from typing import Any


class FieldCounts:
    """Simple statistics of the fields of many samples; those of several shards can be merged."""

    def __init__(self) -> None:
        self._of: dict[str, _Count] = {}

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Field path -> {types, present, min, sum, max}."""
        return {path: count.plain() for path, count in self._of.items()}

    def add(self, sample: Any) -> None:
        """Count the pictures, arrays and fields of a raw sample."""
        self._put("images", "images", len(sample.images))
        if sample.features is not None:
            self._put("features", str(sample.features.dtype), sample.features.size)
        for name, array in sample.arrays.items():
            self._put(name, str(array.dtype), array.size)
        for name, value in sample.record.items():
            self._value(name, value)

    def merge(self, other: dict[str, dict[str, Any]]) -> None:
        """Add the `counts` of other samples."""
        for path, theirs in other.items():
            mine = self._of.setdefault(path, _Count(theirs["min"], theirs["max"]))
            mine.types.update(theirs["types"])
            mine.add(theirs["present"], theirs["sum"], theirs["min"], theirs["max"])

    def summary(self) -> dict[str, dict[str, Any]]:
        """Field path -> {type, present, min, mean, max}; `present` counts values, so items for a path with `[]`."""
        return {
            path: {
                "type": "|".join(sorted(count.types)),
                "present": count.present,
                "min": count.min,
                "mean": round(count.sum / count.present, 4),
                "max": count.max,
            }
            for path, count in sorted(self._of.items())
        }

    def _value(self, path: str, value: Any) -> None:
        if isinstance(value, str):
            self._put(path, type(value).__name__, len(value))
        elif isinstance(value, bool) or value is None:
            self._put(path, type(value).__name__, int(bool(value)))
        elif isinstance(value, (int, float)):
            self._put(path, type(value).__name__, value)
        elif isinstance(value, list):
            self._put(path, type(value).__name__, len(value))
            self._items(path + "[]", value)
        elif isinstance(value, dict):
            self._put(path, type(value).__name__, len(value))
            for name, item in value.items():
                self._value(f"{path}.{name}", item)

    def _items(self, path: str, items: list[Any]) -> None:
        kinds = set(map(type, items))
        if kinds == {str} or kinds == {int}:  # most lists
            sizes = list(map(len, items)) if kinds == {str} else items
            count = self._count(path, kinds.pop().__name__, sizes[0])
            if isinstance(count.sum, int):  # then it is exact in any order
                count.add(len(sizes), sum(sizes), min(sizes), max(sizes))
                return
        for item in items:
            self._value(path, item)

    def _put(self, path: str, type_name: str, size: float) -> None:
        self._count(path, type_name, size).add(1, size, size, size)

    def _count(self, path: str, type_name: str, size: float) -> _Count:
        count = self._of.get(path)
        if count is None:
            count = self._of[path] = _Count(size, size)
        count.types.add(type_name)
        return count


class _Count:
    """Numbers of the values under one path, of which there is at least one with the size `low` and one with `high`."""

    __slots__ = ("types", "present", "sum", "min", "max")

    def __init__(self, low: float, high: float):
        self.types: set[str] = set()
        self.present, self.sum, self.min, self.max = 0, 0, low, high

    def add(self, present: int, sum: float, low: float, high: float) -> None:
        self.present += present
        self.sum += sum
        if low < self.min:
            self.min = low
        if high > self.max:
            self.max = high

    def plain(self) -> dict[str, Any]:
        names = ("present", "min", "sum", "max")
        return {"types": sorted(self.types), **{name: getattr(self, name) for name in names}}
