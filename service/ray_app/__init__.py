"""The service as a Ray Serve application, whose compressors and generators scale apart. Needs the extra `ray`.

    serve run service.ray_app:build_app checkpoint=checkpoints/demo

A request's way:

1. `Ingress`, one replica: the FastAPI application of `service.app`, with every route, limit, key and error as it is
   without Ray. It admits, tokenises, plans and builds prompts; it runs no model.
2. `Compressor` replicas turn the request's rows into chunks of memory embeddings (`CompressorReplica`).
3. `Generator` replicas turn its prompt into an answer (`GeneratorReplica`); or a vLLM server does, by its URL.

A replica of 2 or 3 is an `Engine` with its worker's thread and `Lane`, so requests share batches as they do without
Ray. Each deployment has its own bounds and its own target of ongoing requests, by which Ray adds and removes replicas.

Versions: the ingress decides, with `service.checkpoints`. A request is bound to one version when it is admitted, and
both calls carry that version's name, so compression and generation never differ. A replica keeps the last few that it
was asked for (`serve.multiplexed`), and Ray prefers a replica that has the one asked for. A swap first has every
replica load the new version beside the old, which verifies its golden example; only then do new requests begin on it.

Failures: a call whose replica died is made again on another (`Fleet`). Compression, and an answer in one piece, are
repeated whole. A stream is, too, until its first piece has been sent; after that it ends with an `error` event, since a
second answer need not begin with the same words. If the ingress itself dies, its connections break, and Ray starts
another one.
"""

try:
    import ray.serve  # noqa: F401  # only to say what is missing
except ImportError as error:
    raise ImportError("service.ray_app needs Ray Serve: pip install '.[ray]' in its repository") from error

from service.ray_app.deployments import build_app

__all__ = ["build_app"]
