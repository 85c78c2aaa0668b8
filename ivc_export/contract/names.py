"""Names and versions that bundles, graphs and runtimes agree on."""

from __future__ import annotations

from typing import Literal

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SCHEMA_VERSION = 2
OPSET = 17
IVC_DOMAIN = "ivc"
IVC_VERSION = 1
IR_VERSION = 8  # the lowest with functions, for TensorRT 8.6's parser
MOST_VISUAL = 16384
"""The most visual tokens of a picture, and of an engine's prompt: those of the largest picture that a published
processor allows (12,845,056 pixels, 28 x 28 for each token). Attention in the vision encoder is quadratic in them."""
GraphName = Literal["vision", "prefix", "decoder"]
AnyGraphName = Literal["vision", "prefix", "decoder", "decode"]
GRAPH_NAMES: tuple[GraphName, ...] = ("vision", "prefix", "decoder")


def graph_file(name: AnyGraphName) -> str:
    """The file of graph `name` in a bundle. `decode` has only a name, no file."""
    return f"{name}.onnx"
