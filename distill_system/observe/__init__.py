"""What a run reports: live view, metrics, timings, summary, report, TensorBoard, Prometheus."""
