# Quintet in a container, for `quintet launch kubernetes` or `docker run`:
#
#   docker build --tag quintet .
#   docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" quintet train job.toml
#
# With NVIDIA's container toolkit, `--gpus all` brings the driver; the image holds CUDA's NVRTC and cuBLASLt and NCCL, which
# are looked for when a GPU is opened. `--build-arg BASE=debian:bookworm-slim` leaves them out, for CPUs.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/source/target \
    cargo build --release --locked && install -D target/release/quintet /out/quintet

FROM ${BASE}
# ssh, for `quintet launch ssh`.
RUN apt-get update && apt-get install --yes --no-install-recommends openssh-client && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 quintet && useradd --uid 10001 --gid 10001 --no-create-home quintet
COPY --from=build /out/quintet /usr/local/bin/quintet
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["quintet"]
