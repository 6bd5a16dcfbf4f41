"""A run's pools and its plan in -> the Kubernetes objects of KubeRay that run it."""
