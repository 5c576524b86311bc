"""Every metric the service exports, declared once. Labels come from closed sets, never a width."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "neumeta_requests", "Requests by route and status", ["route", "status"], registry=r
        )
        self.latency = Histogram(
            "neumeta_request_seconds",
            "From request to last byte",
            ["route"],
            buckets=SECONDS,
            registry=r,
        )
        self.first_byte = Histogram(
            "neumeta_first_byte_seconds",
            "From request to first body byte",
            ["route"],
            buckets=SECONDS,
            registry=r,
        )
        self.cache = Counter(
            "neumeta_cache_answers", "Weights by the tier that answered", ["tier"], registry=r
        )
        self.sampling = Histogram(
            "neumeta_sampling_seconds", "One materialization", buckets=SECONDS, registry=r
        )
        self.failures = Counter("neumeta_sampling_failures", "Failed materializations", registry=r)
        self.sent = Counter("neumeta_sent_bytes", "Body bytes sent", ["route"], registry=r)
        self.in_flight = Gauge("neumeta_in_flight_requests", "Requests under way", registry=r)
        self.flights = Gauge("neumeta_flights", "Materializations that run or wait", registry=r)
        self.cache_bytes = Gauge("neumeta_cache_bytes", "Bytes in the memory cache", registry=r)
        self.checkpoint = Info("neumeta_checkpoint", "Served manifolds", ["arch"], registry=r)
