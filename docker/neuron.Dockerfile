# Images for AWS Inferentia2 and Trainium, on AWS's own images of SDK 2.31 (service) and 2.29 (training): the last ones
# with torch-neuronx, and with training through XLA. Targets: `training` and `service` (last, so the default).
#
#   docker build -f docker/neuron.Dockerfile --target service  -t scaledown-service:neuron .
#   docker build -f docker/neuron.Dockerfile --target training -t scaledown-training:neuron .
#
# Not built or run here: neither this registry nor Neuron hardware was reachable. Compilers that AWS's images bring stay
# in: neuronx-cc is one. The SDK's own packages, torch among them, are left as they are, and decide the versions of ours.
# As in Dockerfile, the virtual environment is made in a stage of its own, on the same image, and copied.

ARG SERVICE_IMAGE=public.ecr.aws/neuron/pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.31.1-ubuntu24.04
ARG TRAINING_IMAGE=public.ecr.aws/neuron/pytorch-training-neuronx:2.9.0-neuronx-py312-sdk2.29.1-ubuntu24.04

FROM ${TRAINING_IMAGE} AS training-environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --system-site-packages /opt/scaledown
ENV PATH=/opt/scaledown/bin:${PATH}
COPY pyproject.toml constraints.txt docker/neuron_requirements.py ./
# `.` is the project's metadata only: its version and command.
RUN python neuron_requirements.py otel redis service training \
    && pip install --constraint neuron-constraints.txt --requirement neuron-requirements.txt \
    && touch README.md LICENSE \
    && pip install --no-deps .

FROM ${TRAINING_IMAGE} AS training
RUN groupadd --gid 10001 scaledown \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin scaledown \
    && install -d -o 10001 -g 10001 /cache /data /runs \
    && install -d /app/checkpoints
WORKDIR /app
ENV PATH=/opt/scaledown/bin:${PATH} \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NEURON_COMPILE_CACHE_URL=/cache/neuron \
    USE_TORCH_XLA=false
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ScaleDown" \
      org.opencontainers.image.description="Retrieval-augmented generation from compressed passages, on AWS Neuron" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY LICENSE ./
COPY --from=training-environment /opt/scaledown /opt/scaledown
COPY core core
COPY training training
USER 10001:10001
# A command that ends: its exit status says how it went.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]

FROM ${SERVICE_IMAGE} AS service-environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --system-site-packages /opt/scaledown
ENV PATH=/opt/scaledown/bin:${PATH}
COPY pyproject.toml constraints.txt docker/neuron_requirements.py ./
# `.` is the project's metadata only: its version and command.
RUN python neuron_requirements.py otel redis service \
    && pip install --constraint neuron-constraints.txt --requirement neuron-requirements.txt \
    && touch README.md LICENSE \
    && pip install --no-deps .

FROM ${SERVICE_IMAGE} AS service
RUN groupadd --gid 10001 scaledown \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin scaledown \
    && install -d -o 10001 -g 10001 /cache /documents \
    && install -d /app/checkpoints
WORKDIR /app
ENV PATH=/opt/scaledown/bin:${PATH} \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    USE_TORCH_XLA=false
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ScaleDown" \
      org.opencontainers.image.description="Retrieval-augmented generation from compressed passages, on AWS Neuron" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY LICENSE ./
COPY --from=service-environment /opt/scaledown /opt/scaledown
COPY core core
COPY service service
COPY docker/*.py docker/
USER 10001:10001
# One core: by default a process takes every core of the machine for itself.
ENV SCALEDOWN_HOST=0.0.0.0 \
    SCALEDOWN_CHECKPOINT=checkpoints/demo \
    SCALEDOWN_ACCELERATOR=neuron \
    NEURON_RT_VISIBLE_CORES=0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s --retries=3 \
    CMD ["python", "docker/check_health.py"]
# In place of the image's own, which starts TorchServe.
ENTRYPOINT ["python", "docker/start_service.py"]
