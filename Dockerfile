# The job's image; docs/image.md says what is in it, how it is built for other drivers, run and checked.

# Only `base`: torch's wheels bring CUDA's libraries. Its CUDA is the one that locks/cuda.txt is resolved for.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04

# --- the distribution's part: Python, what Triton and torch.compile compile with, an init, a user, the work folder ---
FROM ${BASE_IMAGE} AS system
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc libc6-dev libgomp1 python3 python3-dev tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /work --shell /usr/sbin/nologin job \
    && install --directory --mode=1777 /work

# --- the packages of a lock, in /opt/venv --------------------------------------------------------------------------
FROM system AS packages
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-pip \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*
ARG LOCK=locks/cuda.txt
ARG EXTRA_INDEX_URL=
COPY ${LOCK} /lock.txt
# What pip must know and nobody else (an index with a password, a company's certificates) comes as build secrets, which
# leave nothing in a layer. Only the lock for the CPU, which the tests use, has no hashes. A file that does not compile is
# no mistake: packages carry some for newer Pythons. CUDA's libraries, half of it all, become a layer of their own, with
# fixed times: it stays the same when another package changes.
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    case ${LOCK} in locks/cpu.txt) hashes= ;; *) hashes=--require-hashes ;; esac \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-compile ${hashes} --requirement /lock.txt \
        ${EXTRA_INDEX_URL:+--extra-index-url ${EXTRA_INDEX_URL}} \
    && { /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true; } \
    && find /opt/venv -exec touch --no-dereference --date=@0 {} + \
    && site=$(echo /opt/venv/lib/python3*/site-packages) \
    && mkdir -p "${site}/nvidia" "/cuda${site}" \
    && mv "${site}/nvidia" "/cuda${site}"

# --- the code, with its bytecode: nothing is written at run time ---------------------------------------------------
FROM system AS code
WORKDIR /app
COPY entrypoint.py LICENSE ./
COPY job job
COPY k8s/ask.txt k8s/
COPY slurm/ask.txt slurm/
COPY recipes recipes
# Readable by any user, whatever the umask of the checkout.
RUN chmod -R u=rwX,go=rX . && python3 -m compileall -q --invalidation-mode unchecked-hash .

# --- the image -----------------------------------------------------------------------------------------------------
FROM system
COPY --from=packages /cuda/ /
COPY --from=packages /opt/venv /opt/venv
# All that is written lands below /work, the one folder that must be writable. TMPDIR is /work itself: a folder below it
# is missing from a fresh volume, and nobody makes that one.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/work \
    USER=job \
    LOGNAME=job \
    TMPDIR=/work \
    XDG_CACHE_HOME=/work/cache \
    HF_HOME=/work/cache/huggingface \
    MPLCONFIGDIR=/work/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/work/cache/inductor \
    TRITON_CACHE_DIR=/work/cache/triton \
    OMP_WAIT_POLICY=PASSIVE \
    JOB_WORKDIR=/work \
    JOB_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    WANDB_ERROR_REPORTING=false \
    GIT_PYTHON_REFRESH=quiet
USER 10001:10001
WORKDIR /app
# -s: also where it is not process 1 (Apptainer, a shared process namespace) it reaps, and says nothing about it.
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/venv/bin/python", "/app/entrypoint.py"]
CMD []
COPY --from=code /app /app
ARG BASE_IMAGE
ARG VERSION=
ARG REVISION=
ARG CREATED=
ARG SOURCE=
LABEL org.opencontainers.image.title="qlora-job" \
    org.opencontainers.image.description="A batch job that fine-tunes a causal language model with 4-bit QLoRA" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.source="${SOURCE}"
