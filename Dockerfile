# syntax=docker/dockerfile:1
# docker build -t sd3tune .     docs/guides/docker.md shows how to train in it, and says what was never run.
#
# PyTorch's wheels bring their own CUDA libraries, so the base image has none. It tells NVIDIA's container toolkit which
# driver is needed.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv

ENV PATH=/opt/sd3tune/bin:$PATH
RUN python3 -m venv /opt/sd3tune

# pip keeps its downloads in a cache mount, so a change of the code does not download PyTorch again.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE /src/
COPY configs /src/configs
COPY sd3tune /src/sd3tune
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint /src/constraints.txt setuptools && \
    pip install --constraint /src/constraints.txt --no-build-isolation \
        "/src[bitsandbytes,eval,schedulefree,tensorboard,ui,wandb]"

# Photos, configurations, runs, models and encodings are all in the folder that is mounted here.
ENV HOME=/work HF_HOME=/work/.cache/huggingface SD3TUNE_CACHE=/work/.cache/sd3tune
WORKDIR /work
RUN useradd --no-create-home --home-dir /work trainer && chown trainer /work
USER trainer
ENTRYPOINT ["sd3tune"]
CMD ["--help"]
