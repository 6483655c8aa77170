# Trains on a TPU host: docs/gke.md. Build it in the repository's folder; .dockerignore says what is left out.
FROM python:3.12-slim
WORKDIR /moe
COPY setup.py pyproject.toml README.md LICENSE ./
COPY sparse_experts sparse_experts
COPY configs configs
RUN python -m pip install --no-cache-dir -e '.[tpu,gcs]'
CMD ["python", "-m", "sparse_experts", "--help"]
