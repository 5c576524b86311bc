"""Every metric the service exports, declared once. Labels come from closed sets, never a width."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
)

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
        self.misses = Counter(
            "neumeta_cache_misses", "Lookups that found nothing, by tier", ["tier"], registry=r
        )
        self.lease = Counter(
            "neumeta_lease",
            "Leases across replicas: won, waited (another made it), expired (its holder died), failed",
            ["outcome"],
            registry=r,
        )
        self.redis_errors = Counter(
            "neumeta_redis_errors", "Redis commands that failed", ["operation"], registry=r
        )
        self.redis_seconds = Histogram(
            "neumeta_redis_seconds", "One Redis command", ["operation"], buckets=SECONDS, registry=r
        )
        self.circuit_open = Gauge(
            "neumeta_circuit_open", "1 while Redis is left alone after errors", registry=r
        )
        self.sampling = Histogram(
            "neumeta_sampling_seconds",
            "One materialization, by stage: queue, sample, store",
            ["stage"],
            buckets=SECONDS,
            registry=r,
        )
        self.failures = Counter("neumeta_sampling_failures", "Failed materializations", registry=r)
        self.cancelled = Counter(
            "neumeta_sampling_cancelled", "Materializations nobody waited for any more", registry=r
        )
        self.rejected = Counter(
            "neumeta_rejected", "Requests refused: busy, token, size", ["reason"], registry=r
        )
        self.stalled = Counter(
            "neumeta_stalled_sends", "Answers cut because the client stopped reading", registry=r
        )
        self.sent = Counter("neumeta_sent_bytes", "Body bytes sent", ["route"], registry=r)
        self.in_flight = Gauge("neumeta_in_flight_requests", "Requests under way", registry=r)
        self.flights = Gauge("neumeta_flights", "Materializations that run or wait", registry=r)
        self.queue = Gauge("neumeta_queue", "Materializations that wait for a sampler", registry=r)
        self.cache_bytes = Gauge("neumeta_cache_bytes", "Bytes in the memory cache", registry=r)
        self.device_bytes = Gauge(
            "neumeta_device_memory_bytes", "Memory torch holds on the CUDA device", registry=r
        )
        self.reloads = Counter(
            "neumeta_reloads", "Reloads of the manifolds, ok or failed", ["outcome"], registry=r
        )
        self.ready = Gauge("neumeta_ready", "1 while new requests are welcome", registry=r)
        self.checkpoint = Info("neumeta_checkpoint", "Served manifolds", ["arch"], registry=r)
        ProcessCollector(registry=r)
        for counter, name, values in (
            (self.cache, "tier", ("memory", "redis", "coalesced", "computed", "plan")),
            (self.misses, "tier", ("memory", "redis")),
            (self.lease, "outcome", ("won", "waited", "expired", "failed")),
            (self.redis_errors, "operation", ("get", "set", "lease")),
            (self.redis_seconds, "operation", ("get", "set", "lease")),
            (self.sampling, "stage", ("queue", "sample", "store")),
            (self.rejected, "reason", ("busy", "token", "size")),
            (self.reloads, "outcome", ("ok", "failed")),
        ):
            for value in values:  # a rate needs the zero before the first event
                counter.labels(**{name: value})
