"""What holds for every process that runs tests."""

import gc


def pytest_collection_finish() -> None:
    """Full collections of garbage pass over what the imports have made: hundreds of thousands of objects that stay."""
    gc.collect()
    gc.freeze()
