"""What a server counts, in the form that Prometheus reads."""

from collections.abc import Callable, Mapping
from typing import Any

from tpgrpo_jax.serving import scorer as scorer_lib


class Telemetry:
  """Counters of one server, on a registry of their own."""

  def __init__(self, scorers: Mapping[str, scorer_lib.Scorer], held: Callable[[], int]):
    """Makes the counters.

    Args:
      scorers: label -> its workers, whose canaries are shown.
      held: how many requests are held now.
    """
    import prometheus_client as prometheus

    self._prometheus, self._labels = prometheus, set(scorers)
    self._registry = prometheus.CollectorRegistry()
    counter = lambda name, text, *labels: prometheus.Counter(
      f"reward_{name}", text, labels, registry=self._registry
    )
    self._requests = counter("requests", "Requests answered.", "reward", "status")
    self._pictures = counter("pictures", "Pictures that came in well-formed requests.", "reward")
    self._seconds = prometheus.Histogram(
      "reward_seconds",
      "From a request's first byte to its answer.",
      ("reward",),
      registry=self._registry,
      buckets=(0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
    )
    gauge = lambda name, text, *labels: prometheus.Gauge(
      f"reward_{name}", text, labels, registry=self._registry
    )
    gauge("requests_held", "Requests that wait or are scored now.").set_function(held)
    well = gauge("canary", "1 where the last canary found nothing wrong.", "reward")
    for label, scorer in scorers.items():
      well.labels(label).set_function(lambda scorer=scorer: float(not scorer.problem))

  def count(self, label: str, status: int, seconds: float) -> None:
    """One answer; labels that no reward has are counted together, since anyone may send any."""
    only = next(iter(self._labels)) if len(self._labels) == 1 else "unknown"
    name = label if label in self._labels else only if not label else "unknown"
    self._requests.labels(name, str(status)).inc()
    if status == 200:
      self._seconds.labels(name).observe(seconds)

  def count_pictures(self, label: str, count: int) -> None:
    """Pictures of one request."""
    self._pictures.labels(label).inc(count)

  def page(self) -> tuple[Any, ...]:
    """(content, status, headers) of /metrics."""
    kind = {"Content-Type": self._prometheus.CONTENT_TYPE_LATEST}
    return self._prometheus.generate_latest(self._registry), 200, kind
