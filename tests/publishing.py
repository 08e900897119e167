"""Actors at both ends of published weights."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from stepgrpo.types import WeightVersion
from stepgrpo.weights import Manifest, Piece, Publisher, SharedWeights

Bytes = NDArray[np.uint8]


class Rank:
    """An actor that publishes its pieces of one large parameter."""

    ELEMENTS = 1 << 20

    def __init__(self, rank: int, full_every: int) -> None:
        self.publisher = Publisher(rank=rank, bucket_bytes=1 << 18, put=ray.put, full_every=full_every)
        self.start = rank * self.ELEMENTS // 2
        self.data = np.zeros(self.ELEMENTS, np.uint8)

    def publish(self, version: int, share: float = 0.05) -> tuple[Manifest, list[ray.ObjectRef[Bytes]]]:
        rng = np.random.default_rng(version + self.start)
        self.data.view(np.uint16)[rng.random(self.ELEMENTS // 2) < share] += 1
        return self.publisher.publish(version, [Piece("w", "bfloat16", (self.ELEMENTS,), self.start, self.data)])

    def digest(self) -> str:
        return sha256(self.data).hexdigest()


class Node:
    """An actor that loads what was published, as a rollout worker does."""

    def __init__(self, directory: Path) -> None:
        self.shared = SharedWeights(directory)

    def load(self, weights: WeightVersion) -> tuple[bool, list[str]]:
        """Whether it was assembled here, and the digests of both ranks' halves."""
        stored = self.shared.store(
            weights.version, weights.manifests, lambda rank, number: ray.get(weights.buckets[rank][number])
        )
        return stored, self.held(weights.version)

    def held(self, version: int) -> list[str]:
        with self.shared.reading(version) as (path, _):
            return [sha256(half).hexdigest() for half in np.split(np.fromfile(path, np.uint8), 2)]

    def close(self) -> None:
        self.shared.close()
