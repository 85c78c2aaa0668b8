"""The metrics of /metrics, by prometheus_client."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("ivc_requests", "Requests for completions, by outcome", ["outcome"], registry=registry)
        self.queue = Gauge(
            "ivc_queue_requests", "Requests that are being read, waiting or being answered", registry=registry
        )
        self.stages = Histogram(
            "ivc_stage_seconds", "Time of each stage of an answer", ["stage"], registry=registry, buckets=BUCKETS
        )
        self.tokens = Counter("ivc_tokens", "Tokens, by kind", ["kind"], registry=registry)
        self.cache = Gauge("ivc_kv_cache_bytes", "Size of the KV cache of the last answer", registry=registry)
        self.pictures = Gauge(
            "ivc_picture_cache_bytes", "Size of the picture embeddings that are kept", registry=registry
        )
        self.lookups = Counter(
            "ivc_pictures", "Pictures in requests, by whether their embeddings were kept", ["found"], registry=registry
        )

    def answered(self, seconds: Mapping[str, float], tokens: Mapping[str, int], cache_bytes: int) -> None:
        """Count an answer."""
        for stage, value in seconds.items():
            self.stages.labels(stage).observe(value)
        for kind, count in tokens.items():
            self.tokens.labels(kind).inc(count)
        self.cache.set(cache_bytes)

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return generate_latest(self._registry)
