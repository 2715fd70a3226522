"""What is measured of the pipeline: `python -m benchmarks.NAME --data DIR --output DIR`, each a short script."""
