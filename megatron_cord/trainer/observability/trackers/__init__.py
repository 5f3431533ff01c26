"""Trackers, which take scalars beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio, SwanLab."""
