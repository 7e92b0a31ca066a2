"""Many adapters over one frozen base, trained side by side in one process group."""
