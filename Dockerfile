# pageflight on NVIDIA's Triton image. Build:  docker build -t pageflight .
#
#   docker run --rm -p 8000-8002:8000-8002 --shm-size 1g pageflight                                the demo model
#   docker run … -v "$PWD/repositories:/repositories" pageflight serve /repositories/mine          one of your own
#
# --build-arg EXTRA=gpu adds torch with CUDA, EXTRA=gpu,tensorrt TensorRT for RTX as well; then docker run --gpus all …
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${TRITON_IMAGE} AS install
ARG EXTRA=
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pageflight
COPY pyproject.toml README.md LICENSE ./
COPY engine_src engine_src
COPY build build
COPY scripts scripts
RUN scripts/install ${EXTRA}

FROM ${TRITON_IMAGE}
ARG EXTRA=
# Kernels are launched through a C module that is compiled where they run.
RUN if [ -n "${EXTRA}" ]; then apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*; fi
COPY --from=install /opt/pageflight /opt/pageflight
# A number that does not change from image to image: volumes and security policies name it.
RUN groupadd --gid 10001 pageflight && useradd --uid 10001 --gid 10001 --create-home pageflight \
    && mkdir -p /repositories && chown pageflight:pageflight /repositories
USER 10001:10001
ENV PAGEFLIGHT_REPOSITORIES=/repositories \
    PATH=/opt/pageflight/.venv/bin:${PATH}
WORKDIR /home/pageflight
VOLUME /repositories
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD curl -fsS http://localhost:8000/v2/health/ready || exit 1
STOPSIGNAL SIGTERM
ENTRYPOINT ["pageflight"]
CMD ["up"]
