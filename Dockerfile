# Not built here: the machines that this was written on have no Docker daemon; its pip line was run by hand (docs/install.md).
#
#   docker build --build-arg COMMIT=$(git rev-parse HEAD) -t lora-scale .
#   docker run --gpus all --ipc=host -v $PWD:/work lora-scale train run.yaml
#
# --ipc=host: NCCL's ranks share memory, and Docker's 64 MiB are too little. No nvcc: nothing of DeepSpeed is built.
FROM python:3.12-slim

# ssh and pdsh for several hosts, Open MPI for the mpi extra
RUN apt-get update \
    && apt-get install -y --no-install-recommends openmpi-bin openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lora-scale
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY lora_scale lora_scale
RUN pip install --no-cache-dir --constraint requirements/constraints.txt '.[all]'
COPY launch launch
COPY configs configs

# what the manifest of a run says of the code; empty: nothing
ARG COMMIT=
ENV LORA_SCALE_COMMIT=$COMMIT HF_HOME=/work/.cache/huggingface
RUN useradd --create-home trainer
USER trainer
WORKDIR /work
ENTRYPOINT ["lora-scale"]
CMD ["--help"]
