"""The receiving end of published weights, inside each of vLLM's worker processes.

vLLM imports this module there, because ``WorkerExtension`` is the engine's ``worker_extension_cls``; importing it
registers the backend. Every worker, also of one tensor-parallel engine, maps the same file of shared memory and takes
its own part of each parameter.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from stepgrpo.weights import Table, WeightsError

BACKEND = "stepgrpo"

# Every reload warns about layers without weights of their own (rotary embeddings, tied heads); what is really missing
# is an error of `receive_weights`.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class WorkerExtension:
    """Nothing but the reason why vLLM imports this module."""


@dataclass
class Nothing(WeightTransferInitInfo):
    pass


@dataclass
class AssembledFile(WeightTransferUpdateInfo):
    """A file of ``weights.SharedWeights``."""

    path: str
    table: Table


class FileWeights(WeightTransferEngine[Nothing, AssembledFile]):
    """Loads a whole model, under the checkpoint's own names, from one file in shared memory."""

    init_info_cls = Nothing
    update_info_cls = AssembledFile
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names = {name for name, _ in self.model.named_parameters()}

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        # The plain `model.load_weights` fails on CPU: its linear layers keep packed copies and drop the original.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: AssembledFile) -> None:
        """Load everything in one go: vLLM fuses parameters (q, k, v), and half a fused layer is a corrupt one.

        Raises:
            WeightsError: if a parameter of the model is not in the file.
        """
        loaded = self.model.load_weights(views(update_info.path, update_info.table))
        if loaded is not None and (missing := self._names - loaded):
            raise WeightsError(f"no weights were published for {', '.join(sorted(missing))}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # On CPU a head that is tied to the embedding has a packed copy of its own, which a reload leaves stale.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


def views(path: str, table: Table) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for each parameter of an assembled file, without a copy."""
    with open(path, "rb") as file:
        # A private mapping: torch wants a writable buffer, and what it writes must not reach the other engines.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, slot in table.items():
        flat = torch.frombuffer(
            data, dtype=getattr(torch, slot["dtype"]), count=prod(slot["shape"]), offset=slot["offset"]
        )
        yield name, flat.view(slot["shape"])


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeights)
