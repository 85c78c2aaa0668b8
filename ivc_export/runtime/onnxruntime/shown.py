"""A FusedSession whose tensors can be compared with those of another session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ivc_export.contract.graphs import SCORED_VALUES
from ivc_export.lowering.precision.scale_residuals import SCALE
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.workspace import Arrays, Inputs
from ivc_export.runtime.plan import Run
from ivc_export.selection.method import Method

if TYPE_CHECKING:
    from onnxruntime import OrtValue


class ShownSession(FusedSession):
    """A FusedSession whose prefill Steps have every tensor between the graphs, copied from the device.

    Keys and values are this run's rows in the caches, before and after compaction. Those of decode steps stay on the
    device; only their logits are copied.
    """

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> ShownConversation:
        """Begin a conversation; see FusedConversation."""
        return ShownConversation(self, ratio, capacity, method)


class ShownConversation(FusedConversation):
    """A FusedConversation with the contract's tensors in Step.prefix and Step.decoder of a prefill."""

    def _shown(self, plan: Run, kept: int, prefix: Inputs) -> tuple[Arrays, Arrays]:
        m, cache = self.session.bundle.manifest, self.cache
        below, above = Arrays(), Arrays()
        between = {name: prefix[name] for name in ("hidden_states", SCORED_VALUES) if name in prefix}
        for name, array in self.session.fetched(between).items():
            below[name] = array.astype(np.float32)
        below["hidden_states"] /= np.float32(SCALE)
        for i in range(m.decoder.layers):
            for name in (f"key.{i}", f"value.{i}"):
                if i in m.selection.whole_layers:
                    below[f"new_{name}"] = cache_rows(cache.current[name], cache.whole_length, plan.rows)
                elif i < m.selection_layer:  # compaction has swapped the two sets of buffers
                    below[f"new_{name}"] = cache_rows(cache.spare[name], cache.length, plan.rows)
                    above[f"compact_{name}"] = cache_rows(cache.current[name], cache.length, kept)
                else:
                    above[f"new_{name}"] = cache_rows(cache.current[name], cache.length, kept)
        return below, above


def cache_rows(cache: OrtValue, start: int, count: int) -> npt.NDArray[np.float32]:
    """Rows of a cache [1, kv_heads, capacity, head_dim or value_dim], as a copy in host memory."""
    array: npt.NDArray[np.float32] = cache.numpy()[:, :, start : start + count].astype(np.float32)
    return array
