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
        self.queue = Gauge("ivc_queue_requests", "Requests that are read, wait or are answered", registry=registry)
        self.stages = Histogram(
            "ivc_stage_seconds", "Time of a stage of an answer", ["stage"], registry=registry, buckets=BUCKETS
        )
        self.tokens = Counter("ivc_tokens", "Tokens, by what they are", ["kind"], registry=registry)
        self.cache = Gauge("ivc_kv_cache_bytes", "Keys and values of the last answer", registry=registry)
        self.pictures = Gauge("ivc_picture_cache_bytes", "Embeddings of pictures that are kept", registry=registry)
        self.lookups = Counter("ivc_pictures", "Pictures of requests, by whether kept", ["found"], registry=registry)

    def answered(self, seconds: Mapping[str, float], tokens: Mapping[str, int], cache_bytes: int) -> None:
        """Count an answer."""
        for stage, value in seconds.items():
            self.stages.labels(stage).observe(value)
        for kind, count in tokens.items():
            self.tokens.labels(kind).inc(count)
        self.cache.set(cache_bytes)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
