# One image for every program: bootstrap (the default), miner, validator.
#   docker build -t hivetrain:cpu .
#   docker build -t hivetrain:cuda --build-arg DEVICE=cuda .
ARG PYTHON_VERSION=3.11
ARG DEVICE=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PATH=/opt/hivetrain/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# torch first and alone: with the exact version installed, nothing else pulls another build of it.
FROM base AS venv
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hivetrain
COPY constraints.txt /src/constraints.txt

FROM venv AS torch-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c /src/constraints.txt --extra-index-url ${TORCH_CPU_INDEX} \
    "torch==$(sed -n 's/^torch==//p' /src/constraints.txt)+cpu"

# The wheel for Linux brings CUDA's libraries; the host brings the driver and the NVIDIA container toolkit.
FROM venv AS torch-cuda
RUN pip install -c /src/constraints.txt torch

FROM torch-${DEVICE} AS build
COPY . /app
RUN pip install -c /app/constraints.txt "/app[chain,wandb,plot,energy]" && rm -rf /app/hivetrain /app/build /app/*.egg-info

FROM base AS runtime
COPY --from=build /opt/hivetrain /opt/hivetrain
COPY --from=build /app /app
# Volumes mounted on /data start with its owner.
RUN useradd --uid 10001 --create-home hivetrain && install -d -o hivetrain -g hivetrain -m 0700 /data
USER hivetrain
WORKDIR /data
VOLUME /data
EXPOSE 8000 31337
STOPSIGNAL SIGTERM
# For the default command; a container that runs another one replaces or disables it.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["hivetrain"]
CMD ["bootstrap", "--host", "0.0.0.0", "--port", "8000", "--identity-path", "/data/bootstrap.id", \
     "--host-maddrs", "/ip4/0.0.0.0/tcp/31337"]
