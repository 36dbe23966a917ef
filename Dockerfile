# Training on a rented GPU:  docker run --gpus all IMAGE --data gs://… --out gs://… --resume
# Any base with Python 3.11 to 3.13 will do; one that has torch >= 2.6 saves its download.
ARG BASE_IMAGE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${BASE_IMAGE}

# newer bases mark their Python as managed by the distribution; logs must not sit in a buffer when the machine goes
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1

# torch.compile builds C++ and Triton code when it first runs
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/perennial
COPY requirements.txt ./
# with s3fs, for s3:// too; asked for together, so that one fsspec fits both drivers
RUN python3 -m pip install --no-cache-dir -r requirements.txt "s3fs>=2025.3.0"
COPY cli ./cli
COPY store ./store
COPY gpt ./gpt
COPY prep ./prep
COPY train ./train
COPY scripts ./scripts

# The volume of RunPod and vast.ai: ./data and ./out live there when no flags name others, the cache beside them. Any --user
# may write there; one without a name or a home needs both from here, or torch's own cache finds no place.
WORKDIR /workspace
RUN chmod 1777 /workspace
ENV PERENNIAL_CACHE=/workspace/.cache HOME=/tmp USER=perennial

# the trainer touches that file while it gets on; staging, compiling and restoring take minutes without a touch
ENV PERENNIAL_HEARTBEAT=/tmp/perennial-heartbeat
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=2 \
    CMD ["python3", "/opt/perennial/train/heartbeat.py"]

# exec form: SIGTERM reaches Python, which saves and leaves within the grace period; a shell in between would not pass it on
ENTRYPOINT ["python3", "/opt/perennial/train/run.py"]
