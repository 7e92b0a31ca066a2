"""The helper under its earlier place, for small scripts outside the repository that put this folder on their path."""

from tests.helpers.models.tiny_towers import *  # noqa: F403
