"""Names for a loaded image, in the form that engines and archives want."""

from __future__ import annotations

from dataclasses import dataclass

from offload_core.reference import split_reference


@dataclass(frozen=True)
class ImageName:
    """A full name with its tag: docker.io/library/app:latest."""

    repository: str
    tag: str

    def __str__(self) -> str:
        return f"{self.repository}:{self.tag}"


def parse_image_name(text: str) -> ImageName:
    """Read "app", "app:1", "team/app", "localhost:5000/app:dev".

    Raises:
        UsageError: no valid name.
    """
    registry, path, tag = split_reference(text)
    return ImageName(f"{registry}/{path}", tag)
