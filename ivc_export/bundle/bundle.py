"""A bundle on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.bundle import staging
from ivc_export.bundle.graph_files import read_graph
from ivc_export.bundle.manifest import read_manifest
from ivc_export.bundle.packed_layers import find_false_claim
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import CHAT_TEMPLATE, MANIFEST, TOKENIZER, GraphName
from ivc_export.dtypes import FLOATS
from ivc_export.errors import UserError
from ivc_export.files import confined


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk: three graphs, weights, and the manifest that describes them.

    Attributes:
        folder: where the bundle is.
        manifest: the contents of manifest.json.
        notes: the export's remarks on the checkpoint, one sentence each. A bundle that was loaded has none.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()

    @staticmethod
    def load(folder: Path | str) -> Bundle:
        """Open the bundle in `folder`, and check all of it but the values of the weights.

        Raises:
            UserError: `folder` is not a bundle, the bundle is unfinished, damaged or edited, its graphs or weights have
                changed, or another version wrote it.
        """
        if staging.is_unfinished(Path(folder)):
            raise UserError(f"{folder} was left by an export that was killed: export the model again, which removes it")
        bundle = Bundle(Path(folder), read_manifest(Path(folder)))
        graphs = [bundle.graph(name) for name in bundle.manifest.graphs]  # before a runtime opens files that they name
        problem = find_false_claim(bundle.manifest, graphs)
        if problem:
            raise UserError(f"{bundle.folder / MANIFEST} is damaged ({problem}): export the model again")
        for path in bundle.folder.iterdir():
            confined(
                bundle.folder,
                path.name,
                "copy the bundle with the files that its links lead to, or export the model again",
            )
        return bundle

    def check_portable(self, purpose: str) -> None:
        """Check that the graphs are portable, as a runtime needs them that lowers graphs itself.

        Args:
            purpose: who needs portable graphs; the error's sentence begins with it.

        Raises:
            UserError: the graphs were lowered at export.
        """
        if self.manifest.lowering != "portable":
            raise UserError(
                f"{purpose} needs portable graphs, but {self.folder} has {self.manifest.lowering} ones: export "
                "the model again without --lowering"
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The graph files and the weight files, as paths relative to the folder."""
        m = self.manifest
        return (*(graph.file for graph in m.graphs.values()), *(weights.file for weights in m.weights))

    def graph(self, name: GraphName) -> ir.Model:
        """Read one graph. Its weights stay in their files.

        Args:
            name: "vision", "prefix" or "decoder".

        Raises:
            UserError: the graph is damaged, differs from the manifest, or takes weights from files outside the bundle.
        """
        return read_graph(self.folder, name, self.manifest)

    def missing_processor_files(self) -> list[str]:
        """Files that turn a prompt into tokens, and that this bundle does not have."""
        return [name for name in (TOKENIZER, CHAT_TEMPLATE) if not (self.folder / name).is_file()]

    @cached_property
    def _embedding_parts(self) -> tuple[npt.NDArray[Any], ...]:
        """The table [vocab, hidden]; or stored values [vocab, blocks, block], and scales [vocab, blocks]."""
        table = self.manifest.embedding
        path, floats, (rows, hidden) = self.folder / table.file, FLOATS[table.floats].numpy, table.shape
        if table.packed is None:
            return (np.memmap(path, floats, "r", table.offset, (rows, hidden)),)
        shape = (rows, -(-hidden // table.packed.block), table.packed.block)
        stored = np.memmap(path, np.uint8, "r", table.offset, shape)
        return stored, np.memmap(path, floats, "r", table.packed.scales, shape[:2])

    def embed(self, tokens: npt.NDArray[np.int32], stored: np.dtype[Any] | None = None) -> npt.NDArray[Any]:
        """Embeddings of `tokens`, int32 [S]: rows of the embedding table, [S, hidden], in float32.

        stored: if the table has this dtype, its rows are returned as they are.
        """
        found = [part[tokens] for part in self._embedding_parts]
        if len(found) == 1:
            return found[0] if found[0].dtype == stored else found[0].astype(np.float32)
        levels, scales = found
        values: npt.NDArray[np.float32] = (levels.astype(np.float32) - 128) * scales.astype(np.float32)[..., None]
        return values.reshape(len(tokens), -1)[:, : self.manifest.embedding.shape[1]]
