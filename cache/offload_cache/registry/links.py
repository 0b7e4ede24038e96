"""What one capability's image repository names: manifests, tags, referrers, and what was deleted.

The bytes belong to the project, which shares them. A repository only has names for them, and a
delete only removes names: another build that uses the same bytes does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from offload_cache.manifests import OCI_INDEX, descriptor_of
from offload_core.errors import QuotaExceededError

if TYPE_CHECKING:
    from offload_cache.manifests import Manifest

MAX_TAGS = 1000
MAX_MANIFESTS = 10_000
_MAX_REMOVED = 10_000
_MAX_REFERRER_BYTES = 16 << 20
_PAGE_BYTES = 2 << 20  # well below the 4 MiB that clients accept of a manifest


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest with a subject.

    Attributes:
        subject: digest of what it refers to, which need not exist.
        artifact_type: None for an index that says none.
        descriptor: its descriptor in a list of referrers, as JSON.
    """

    subject: str
    artifact_type: str | None
    descriptor: bytes


@dataclass(slots=True)
class ImageLinks:
    """The names of one image repository.

    Attributes:
        manifests: media type of each manifest that was pushed here, by digest.
        tags: digest by tag.
        removed: blobs and manifests that were deleted here and not pushed again.
    """

    manifests: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    _referrers: dict[str, Referrer] = field(default_factory=dict)
    _referrer_bytes: int = 0

    def check_room(self, digest: str, tags: list[str], referrer: Referrer | None) -> None:
        """Refuse a manifest that the repository has no room for.

        Raises:
            QuotaExceededError: there are too many names.
        """
        if digest not in self.manifests and len(self.manifests) >= MAX_MANIFESTS:
            raise QuotaExceededError(f"a repository may have {MAX_MANIFESTS} manifests")
        check_tag_room(self.tags, tags)
        if referrer is not None and digest not in self._referrers:
            size_bytes = self._referrer_bytes + len(referrer.descriptor)
            if size_bytes > _MAX_REFERRER_BYTES:
                raise QuotaExceededError("the repository's referrers have too many annotations")

    def add(self, digest: str, media_type: str, tags: list[str], referrer: Referrer | None) -> None:
        """Name a manifest; `check_room` came before."""
        self.manifests[digest] = media_type
        self.removed.discard(digest)
        for tag in tags:
            self.tags[tag] = digest
        if referrer is not None and digest not in self._referrers:
            self._referrers[digest] = referrer
            self._referrer_bytes += len(referrer.descriptor)

    def remove(self, digest: str) -> None:
        """Forget a blob or a manifest, with the tags that name it.

        Raises:
            QuotaExceededError: too many deletes have to be remembered.
        """
        if len(self.removed) >= _MAX_REMOVED:
            raise QuotaExceededError(f"a build may delete {_MAX_REMOVED} things")
        self.removed.add(digest)
        self.manifests.pop(digest, None)
        self.tags = {tag: named for tag, named in self.tags.items() if named != digest}
        referrer = self._referrers.pop(digest, None)
        if referrer is not None:
            self._referrer_bytes -= len(referrer.descriptor)

    def referrers(
        self, subject: str, artifact_type: str | None, last: str
    ) -> tuple[bytes, str | None]:
        """Return an index of the manifests that refer to `subject`, by digest, after `last`.

        Returns:
            The index, and the digest to go on after when it is not the last one.
        """
        found: list[bytes] = []
        size_bytes = 0
        previous: str | None = None
        for digest in sorted(self._referrers):
            referrer = self._referrers[digest]
            if digest <= last or referrer.subject != subject:
                continue
            if artifact_type is not None and referrer.artifact_type != artifact_type:
                continue
            if previous is not None and size_bytes + len(referrer.descriptor) > _PAGE_BYTES:
                return _index(found), previous
            found.append(referrer.descriptor)
            size_bytes += len(referrer.descriptor)
            previous = digest
        return _index(found), None


def check_tag_room(present: dict[str, str], tags: list[str]) -> None:
    """Refuse tags that a repository has no room for.

    Raises:
        QuotaExceededError: there are too many.
    """
    if len(present.keys() | set(tags)) > MAX_TAGS:
        raise QuotaExceededError(f"a repository may have {MAX_TAGS} tags")


def referrer_of(manifest: Manifest, digest: str, size_bytes: int) -> Referrer | None:
    """Return what a manifest's `subject` makes of it; None when it has none.

    Source: OCI distribution specification 1.1, "Listing Referrers".

    Raises:
        UsageError: the subject is no descriptor.
    """
    document = manifest.document
    if document.get("subject") is None:
        return None
    subject = descriptor_of(document["subject"])
    artifact_type = document.get("artifactType")
    if not isinstance(artifact_type, str) or not artifact_type:
        artifact_type = None if manifest.config is None else manifest.config.media_type
    descriptor: dict[str, Any] = {
        "mediaType": manifest.media_type,
        "digest": digest,
        "size": size_bytes,
    }
    if artifact_type is not None:
        descriptor["artifactType"] = artifact_type
    if isinstance(document.get("annotations"), dict):
        descriptor["annotations"] = document["annotations"]
    return Referrer(subject.digest, artifact_type, orjson.dumps(descriptor))


def _index(descriptors: list[bytes]) -> bytes:
    head = b'{"schemaVersion":2,"mediaType":"%s","manifests":[' % OCI_INDEX.encode()
    return head + b",".join(descriptors) + b"]}"


def empty_index() -> bytes:
    """Return an index without manifests."""
    return _index([])
